"""Tell a run from images to samples on one self-contained page: tokenizer, reconstructions, prior, samples, commands.

    vqscale page TOKENIZER_RUN PRIOR_RUN SAMPLES --out runs/quickstart.html
    vqscale page --dense FOLDER ... --out runs/dense.html

The folders are those of two runs of `vqscale train` and one of `vqscale sample`. Real images stand beside the samples:
of data.val of the tokenizer's run, or of data.train where there is none; what is no local file is read with --fetch
alone. With --classifier it tells what the shapes classifier recognises in the samples. With --dense it puts folders of
`vqscale evaluate dense --out` on one page.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqscale import config as configuration
from vqscale.data.config import ImagesConfig
from vqscale.nets.config import grid
from vqscale.programs.commands import words
from vqscale.run import processes
from vqscale.train.config import Run

if TYPE_CHECKING:
    from vqscale.show.pictures import Picture

FOLDERS = "finished folders of two runs of `vqscale train`, and of `vqscale sample`"
MOST_CLASSES, DRAWN, REAL = 20, 8, 4
MOST_READ = 4096  # real images that are looked at for some of every class


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the page is there, 1 failed on the way, 2 the user's input."""
    return processes.status_of(lambda: _page(arguments(sys.argv[1:] if argv is None else argv)))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = words.parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="*", metavar="TOKENIZER_RUN PRIOR_RUN SAMPLES", help=FOLDERS)
    parser.add_argument("--dense", type=Path, nargs="+", metavar="FOLDER", help="of `vqscale evaluate dense --out`")
    parser.add_argument("--classifier", metavar="FOLDER", help="of `vqscale classifier`: what it says of the samples")
    fetch = "read real images of URLs and `pipe:` commands too, which TOKENIZER_RUN/run.yaml names: if you trust it"
    parser.add_argument("--fetch", action="store_true", help=fetch)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="the page")
    args = parser.parse_args(given)
    if len(args.folders) != (0 if args.dense else 3):
        raise ValueError(
            f"{len(args.folders)} folders are given{' beside --dense' if args.dense else ''}: give TOKENIZER_RUN, "
            "PRIOR_RUN and SAMPLES, or --dense alone with its folders"
        )
    if not args.dense:
        args.tokenizer, args.prior, args.samples = args.folders
    return args


def _page(args: argparse.Namespace) -> int:
    from vqscale.show import dense_page, run_page

    if args.dense:
        print(run_page.write(args.out, "Dense prediction by guiding codes", map(dense_page.part, args.dense)))
        return 0
    (config, summary, rows), second = _run(args.tokenizer, "tokenizer"), _run(args.prior, "prior")
    if config.tokenizer.signal.name != "images":
        raise ValueError(
            f"this page is of images, and {args.tokenizer} has a tokenizer of {config.tokenizer.signal.name}: use the "
            "page of `vqscale evaluate sounds --out` or `vqscale evaluate dense --out`"
        )
    settings, drawn = _drawn(args.samples)
    parts = [run_page.tokenizer(config, grid(config.tokenizer.net, config.data.train.sides), summary, rows)]
    pictures = sorted((args.tokenizer / "samples" / "reconstructions").glob("*.png"))
    if pictures:
        parts.append(run_page.reconstructions(pictures[-1]))
    parts.append(run_page.prior(*second))
    source = _trusted(config.data.val or config.data.train, args)
    how = _how(second[0].prior.name, settings)
    names = _names(source)
    parts.append(run_page.samples(drawn, _real(source, list(drawn)), names, how))
    if args.classifier:
        parts.append(run_page.judged(*_judged(args, names)))
    parts.append(run_page.commands(_commands(args)))
    print(run_page.write(args.out, "From images to samples", parts))
    return 0


def _run(folder: Path, task: str) -> tuple[Any, dict[str, Any], list[dict[str, Any]]]:
    """(config, summary, rows of metrics) of a finished run of this task."""
    lacks = [name for name in ("run.yaml", "summary.json", "metrics.jsonl") if not (folder / name).is_file()]
    if lacks:
        raise ValueError(
            f"{folder} has no {', '.join(lacks)}, which a finished run has: give the folder of one, or train it to its "
            "last step with `vqscale train`"
        )
    config: Run = configuration.load(Run, folder / "run.yaml")
    if config.task != task:
        raise ValueError(f"{folder} is a run of task {config.task}: give one of task {task} in its place")
    *lines, _ = (folder / "metrics.jsonl").read_text().split("\n")
    summary = json.loads((folder / "summary.json").read_text())
    wrong = [key for key in ("steps", "processes") if not isinstance(summary.get(key), int)]
    if wrong:
        raise ValueError(f"{folder / 'summary.json'} has no whole number as {' and '.join(wrong)}: train the run again")
    return config, summary, [json.loads(line) for line in lines]


def _trusted(source: ImagesConfig, args: argparse.Namespace) -> ImagesConfig:
    """The source, when it is of local files, or when the user says that the run may fetch and start what it names."""
    from vqscale.data.shards.patterns import expand, is_local

    others = [shard for shard in expand(source.patterns, must_exist=False) if not is_local(shard)]
    if others and not args.fetch:
        raise ValueError(
            f"{args.tokenizer / 'run.yaml'} has its real images from {', '.join(others[:3])}, and nothing is fetched "
            "or started that a run folder names: give --fetch if you trust it"
        )
    return source


def _drawn(folder: Path) -> tuple[dict[str, Any], dict[int, list[Picture]]]:
    """(settings, the first images of every class) of a folder of samples."""
    import numpy as np

    from vqscale.metrics.sample_file import SampleFile
    from vqscale.programs.sampling import folder as sample_folder

    facts = sample_folder.read(folder)
    if facts is None or facts.get("state") != "done":
        raise ValueError(f"{folder} has no finished samples: make them with `vqscale sample`, or start it again")
    classes = facts["settings"]["classes"][:MOST_CLASSES]
    with np.load(folder / sample_folder.FILE, allow_pickle=False) as file:
        labels = file["arr_1"].tolist()
    found: dict[int, list[Picture]] = {label: [] for label in classes}
    for first, images in SampleFile(folder / sample_folder.FILE).batches(64):
        if first >= DRAWN * len(facts["settings"]["classes"]):  # classes take turns
            break
        for label, image in zip(labels[first:], images.permute(0, 2, 3, 1).numpy(), strict=False):
            if label in found and len(found[label]) < DRAWN:
                found[label].append(image)
    return facts["settings"], found


def _judged(args: argparse.Namespace, names: Mapping[int, str]) -> tuple[dict[str, float], float]:
    """(what the shapes classifier says of the samples, its own accuracy)."""
    from vqscale.data.made.shapes import CLASS_NAMES
    from vqscale.metrics.sample_file import SampleFile
    from vqscale.parallel.mesh import Mesh
    from vqscale.programs import judge
    from vqscale.programs.sampling import folder as sample_folder

    if names and list(names.values()) != list(CLASS_NAMES):
        raise ValueError(
            f"--classifier judges drawn shapes ({', '.join(CLASS_NAMES)}), and the classes of these pictures are "
            f"{', '.join(list(names.values())[:10])}: leave it out"
        )
    images = SampleFile(args.samples / sample_folder.FILE)
    numbers, about = judge.judge(images, args.classifier, Mesh())
    return {**numbers, "images": len(images)}, about["shapes classifier"]["own accuracy"]


def _how(prior: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is worth saying of how samples of a prior of this name were drawn: what is not usual, and the seed."""
    from vqscale import priors

    return {**priors.sampling(prior).of(settings).unusual(), "seed": settings["seed"]}


def _real(source: ImagesConfig, classes: Sequence[int]) -> dict[int, list[Picture]]:
    """Some real images of each of these classes, as a tokenizer sees them."""
    from vqscale.data.samples import SampleStream
    from vqscale.metrics.reconstruction import to_bytes

    config = replace(source, num_workers=0, make=None)
    found: dict[int, list[Picture]] = {label: [] for label in classes}
    stream = SampleStream(config, 32, train=False)
    for batch in itertools.islice(stream.batches(0), MOST_READ // 32):
        images = to_bytes(batch.samples).permute(0, 2, 3, 1).numpy()
        for image, label, valid in zip(images, batch.labels.tolist(), batch.valid.tolist(), strict=True):
            if valid and label in found and len(found[label]) < REAL:
                found[label].append(image)
        if all(len(images) == REAL for images in found.values()):
            break
    return found


def _names(source: ImagesConfig) -> dict[int, str]:
    """Names of classes, where the folder of the shards says them."""
    path = Path(source.patterns[0]).parent / "classes.txt"
    return dict(enumerate(path.read_text().splitlines())) if path.is_file() else {}


def _commands(args: argparse.Namespace) -> list[str]:
    run, prior, samples = args.tokenizer, args.prior, args.samples
    return [
        "# other samples: more varied with less guidance and a higher temperature, clearer the other way",
        f"vqscale sample {prior} {run} {samples}-2 --per-class 8 --guidance 2 --temperature 0.9 --seed 1",
        "# train the prior for longer: the same command goes on from its last checkpoint",
        f"torchrun --nproc_per_node=2 -m vqscale train {prior}/run.yaml run.steps=4000",
        "# every key of a config with its meaning; curves; what a config needs before it is started",
        "vqscale train --help",
        f"tensorboard --logdir {run.parent}",
        "vqscale train configs/tokenizer/ibq_imagenet256_262144.yaml --dry-run --world 64",
        "# your own images, a folder for each class",
        "vqscale shards --source /data/my_images --out /data/shards",
        "torchrun --nproc_per_node=2 -m vqscale train configs/quickstart/tokenizer.yaml run.folder=runs/mine "
        "data.train.shards='/data/shards/train-*.tar' data.train.make=null data.val=null",
    ]
