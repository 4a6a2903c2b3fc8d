"""Draw images from a trained prior: ids from the prior, pictures from the decoder of its tokenizer.

    vqscale sample runs/quickstart-prior runs/quickstart samples/shapes --per-class 8 --guidance 2
    torchrun --nproc_per_node=8 -m vqscale sample PRIOR TOKENIZER OUT --num-images 50000
    vqscale sample MASKED TOKENIZER OUT --known caches/val --draw-rows 4-11 --draw-columns 4-11

PRIOR and TOKENIZER are run folders (the newest whole checkpoint), checkpoints, or exported folders. Of PRIOR the
averaged weights are taken where there are any, unless --weights says otherwise; of TOKENIZER those that made the ids
PRIOR was trained on. Image i has class classes[i mod number of classes], and its ids depend on the seed, on i and on
its class only: any number of processes draws the same images. OUT gets samples.npz (arr_0 and arr_1 as ADM's evaluator
reads them), grid.png and sample.json. The same command continues what was interrupted; TERM, USR1, USR2 or a file STOP
in OUT end it with status 75, and batches that are finished are kept. With --known the ids of images are given, and
those in some rows and columns alone are drawn; the others never change. With --ids nothing is decoded, and OUT/cache is
a token cache of what was drawn, which a decoder can be trained on (drawn.from of a run).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqscale.programs.commands import drawing
from vqscale.run import checkout, processes

if TYPE_CHECKING:
    from vqscale.parallel.mesh import Mesh
    from vqscale.priors.config import SampleConfig
    from vqscale.programs.sampling.draw import Outcome
    from vqscale.programs.sampling.known import Region
    from vqscale.programs.sampling.request import SampleRequest


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 failed while drawing, 2 the user's input, 75 stopped on request."""
    given = sys.argv[1:] if argv is None else list(argv)
    return processes.status_of(lambda: _sample(arguments(given), checkout.command("sample", given)))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """As drawing.arguments."""
    return drawing.arguments(parser(), given, _problems)


def _sample(args: argparse.Namespace, command: str) -> int:
    from vqscale.programs.sampling import draw as sample
    from vqscale.run.folder import EXIT_STOPPED

    with processes.joined(args.device, args.grid, args.timeout_s) as mesh:
        asked, outcome = _draw(args, command, mesh)
    if mesh.world.rank == 0:
        print(sample.summary(outcome, args.out, asked, mesh.world.size), flush=True)
    return EXIT_STOPPED if outcome.state == "stopped" else 0


def _draw(args: argparse.Namespace, command: str, mesh: Mesh) -> tuple[SampleRequest, Outcome]:
    from vqscale.programs.sampling import draw as sample
    from vqscale.programs.sampling import known_ids
    from vqscale.programs.sampling import options as sample_options

    prior, tokenizer = sample.models(args, mesh)
    given = () if args.known and args.classes is None else sample.classes_of(prior, args.classes)
    request, paths = _request(args, given, sample_options.sample_config(args)), ["prior", "tokenizer"]
    if args.known:
        known = known_ids.read(args.known, _region(args), prior, tokenizer, mesh, request.num_images)
        request, paths = replace(request, known=known), [*paths, "known"]
    sample.remark(prior.remarks(request.how), mesh)
    about = {"paths": {name: str(getattr(args, name)) for name in paths}, "command": command}
    return request, sample.sample(prior, tokenizer, args.out, mesh, request, about=about, overwrite=args.overwrite)


def _problems(args: argparse.Namespace, classes: tuple[int, ...]) -> list[str]:
    """All that is wrong with what is asked for, as far as can be seen without a model."""
    from vqscale.priors.config import SampleConfig
    from vqscale.programs.sampling import options as sample_options
    from vqscale.programs.sampling.request import noted

    found = _request(args, classes, SampleConfig()).problems()
    with noted(found):
        sample_options.sample_config(args)
    with noted(found):
        _check_known(args)
    return found


def _check_known(args: argparse.Namespace) -> None:
    """ValueError for what is wrong with the options of known ids, as far as can be seen without reading any."""
    from vqscale.programs.sampling import options as sample_options

    if args.known is None:
        if args.draw_rows or args.draw_columns:
            raise ValueError(
                "--draw-rows and --draw-columns say which of the ids of --known are drawn anew, and there is no "
                "--known: give one, or leave them out"
            )
        return
    config = sample_options.prior_config(args.prior)
    if not config.any_order:
        raise ValueError(
            f"--known gives ids, and {args.prior}, a prior of name {config.name}, draws all ids in an order of its "
            "own: leave it out, or use a prior that predicts any ids from any others, such as masked"
        )
    if args.per_class is not None and args.classes is None:
        raise ValueError(
            "--per-class counts images of every class, and with --known images have the classes that theirs had: give "
            "--num-images, or --classes"
        )
    region = _region(args)
    if config.grid is not None:
        region.of(config.grid)


def _region(args: argparse.Namespace) -> Region:
    """What is drawn of known ids. ValueError for what are no numbers."""
    from vqscale.programs.sampling.known import SIDES, Region
    from vqscale.programs.sampling.request import parse_numbers

    chosen = {side: getattr(args, f"draw_{side}") for side in SIDES}
    return Region(**{side: (text and parse_numbers(text, f"--draw-{side}")) or None for side, text in chosen.items()})


def _request(args: argparse.Namespace, classes: tuple[int, ...], how: SampleConfig) -> SampleRequest:
    from vqscale.programs.sampling.request import SampleRequest

    num_images = args.num_images if args.per_class is None else args.per_class * len(classes)
    return SampleRequest(num_images, classes, how, args.seed, args.batch, args.resize, ids_only=args.ids)


def parser() -> argparse.ArgumentParser:
    out = drawing.parser(__doc__, "folder of the samples: new, or begun by the same command")
    number = out.add_mutually_exclusive_group()
    number.add_argument("--num-images", type=int, default=100, help="images in all (default: 100)")
    number.add_argument("--per-class", type=int, help="images of every class, instead of --num-images")
    known = out.add_argument_group("known ids, of which a region is drawn anew (masked priors)")
    add: Any = known.add_argument
    sources = "a token cache, a folder of samples, or a picture: image i has the ids (and the class, unless --classes "
    sources += "says another) of number i mod how many there are"
    add("--known", type=Path, metavar="IDS", help=sources)
    add("--draw-rows", metavar="ROWS", help="rows of ids that are drawn, such as 4-11 (default: all)")
    add("--draw-columns", metavar="COLUMNS", help="and columns (default: all); what lies in both is drawn")
    out.add_argument("--ids", action="store_true", help="write a token cache of the ids, OUT/cache, and no images")
    overwrite = "throw away what is in OUT if it is not the same samples"
    out.add_argument("--overwrite", action="store_true", help=overwrite)
    return out
