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
from typing import TYPE_CHECKING

from vqscale.programs.commands import drawing, words
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
    """As drawing.arguments."""
    return drawing.arguments(_parser(), given, _problems)


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
    parser = drawing.parser(__doc__, "folder of the samples: new, or begun by the same command")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--num-images", type=int, default=100, help="images in all (default: 100)")
    number.add_argument("--per-class", type=int, help="images of every class, instead of --num-images")
    overwrite = "throw away what is in OUT if it is not the same samples"
    parser.add_argument("--overwrite", action="store_true", help=overwrite)
    return parser
