"""Draw images from a trained prior: ids from the prior, pictures from the decoder of its tokenizer.

    vqscale sample runs/quickstart-prior runs/quickstart samples/shapes --per-class 8 --guidance 2
    torchrun --nproc_per_node=8 -m vqscale sample PRIOR TOKENIZER OUT --num-images 50000

PRIOR and TOKENIZER are run folders (the newest whole checkpoint), checkpoints, or exported folders. Of PRIOR the
averaged weights are taken where there are any, unless --weights says otherwise; of TOKENIZER those that made the ids
PRIOR was trained on. Image i has class classes[i mod number of classes], and its ids depend on the seed, on i and on
its class only: any number of processes draws the same images. OUT gets samples.npz (arr_0 and arr_1 as ADM's evaluator
reads them), grid.png and sample.json. The same command continues what was interrupted; TERM, USR1, USR2 or a file STOP
in OUT end it with status 75, and batches that are finished are kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqscale.programs.commands import words
from vqscale.run import processes

if TYPE_CHECKING:
    from vqscale.parallel.mesh import Mesh
    from vqscale.priors.config import SampleConfig
    from vqscale.programs.sample import Outcome
    from vqscale.programs.sample_request import SampleRequest


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 failed while drawing, 2 the user's input, 75 stopped on request."""
    given = sys.argv[1:] if argv is None else list(argv)
    return processes.status_of(lambda: _sample(arguments(given), words.command("sample", given)))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The arguments, with the grid of processes; ValueError with all that can be seen to be wrong without a model."""
    from vqscale.programs import sample_request

    args = _parser().parse_args(given)
    args.grid = sample_request.check_arguments(args, lambda classes: _problems(args, classes))
    return args


def _sample(args: argparse.Namespace, command: str) -> int:
    from vqscale.programs import sample
    from vqscale.run.folder import EXIT_STOPPED

    with processes.joined(args.device, args.grid, args.timeout_s) as mesh:
        asked, outcome = _draw(args, command, mesh)
    if mesh.world.rank == 0:
        print(sample.summary(outcome, args.out, asked, mesh.world.size), flush=True)
    return EXIT_STOPPED if outcome.state == "stopped" else 0


def _draw(args: argparse.Namespace, command: str, mesh: Mesh) -> tuple[SampleRequest, Outcome]:
    from vqscale.programs import sample, sample_options

    prior, tokenizer = sample.models(args, mesh)
    request = _request(args, sample.classes_of(prior, args.classes), sample_options.sample_config(args))
    sample.remark(prior.remarks(request.how), mesh)
    about = {"paths": {"prior": str(args.prior), "tokenizer": str(args.tokenizer)}, "command": command}
    return request, sample.sample(prior, tokenizer, args.out, mesh, request, about=about, overwrite=args.overwrite)


def _problems(args: argparse.Namespace, classes: tuple[int, ...]) -> list[str]:
    """All that is wrong with what is asked for, as far as can be seen without a model."""
    from vqscale.priors.config import SampleConfig
    from vqscale.programs import sample_options
    from vqscale.programs.sample_request import noted

    found = _request(args, classes, SampleConfig()).problems()
    with noted(found):
        sample_options.sample_config(args)
    return found


def _request(args: argparse.Namespace, classes: tuple[int, ...], how: SampleConfig) -> SampleRequest:
    from vqscale.programs.sample_request import SampleRequest

    num_images = args.num_images if args.per_class is None else args.per_class * len(classes)
    return SampleRequest(num_images, classes, how, args.seed, args.batch, args.resize)


def _parser() -> argparse.ArgumentParser:
    from vqscale.programs import sample_options

    parser = words.parser(__doc__)
    add: Any = parser.add_argument
    add("prior", type=Path, metavar="PRIOR", help="run folder, checkpoint or exported folder of a prior")
    add("tokenizer", type=Path, metavar="TOKENIZER", help="the tokenizer whose ids the prior was trained on")
    add("out", type=Path, metavar="OUT", help="folder of the samples: new, or begun by the same command")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--num-images", type=int, default=100, help="images in all (default: 100)")
    number.add_argument("--per-class", type=int, help="images of every class, instead of --num-images")
    add("--classes", help="numbers and ranges such as 0,5,10-19, which take turns (default: all)")
    add("--seed", type=int, default=0, help="another seed, other images (default: 0)")
    add("--batch", type=int, default=64, help="images of a step and process (default: 64)")
    add("--resize", type=int, help="pixels of the shorter side, bicubic as LlamaGen resizes (default: as decoded)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto takes a GPU per process if there are")
    add("--codes", type=int, default=1, help="processes that share the codes (default: 1)")
    add("--weights", choices=["average", "parameters"], default="average", help="of the prior (default: average)")
    add("--overwrite", action="store_true", help="throw away what is in OUT if it is not the same samples")
    add("--timeout-s", type=float, default=600.0, help="seconds that processes wait for each other (default: 600)")
    sample_options.add(parser)
    return parser
