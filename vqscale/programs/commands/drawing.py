"""What the command lines of `sample` and `sweep` share: two models, which images, on which processes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vqscale.programs.commands import words


def parser(about: str | None, out: str, *, lists: bool = False) -> argparse.ArgumentParser:
    """A parser with PRIOR, TOKENIZER, OUT (told by `out`) and the options of both; `lists` as in sample_options.add."""
    from vqscale.programs.sampling import options as sample_options

    parser = words.parser(about)
    add: Any = parser.add_argument
    add("prior", type=Path, metavar="PRIOR", help="run folder, checkpoint or exported folder of a prior")
    add("tokenizer", type=Path, metavar="TOKENIZER", help="the tokenizer whose ids the prior was trained on")
    add("out", type=Path, metavar="OUT", help=out)
    add("--classes", help="numbers and ranges such as 0,5,10-19, which take turns (default: all)")
    add("--seed", type=int, default=0, help="another seed, other images (default: 0)")
    add("--batch", type=int, default=64, help="images of a step and process (default: 64)")
    add("--resize", type=int, help="pixels of the shorter side, bicubic as LlamaGen resizes (default: as decoded)")
    words.add_codes(parser, "codes")
    words.add_weights(parser, "the prior")
    words.add_processes(parser)
    sample_options.add(parser, lists=lists)
    return parser


def arguments(
    parser: argparse.ArgumentParser,
    given: Sequence[str],
    problems: Callable[[argparse.Namespace, tuple[int, ...]], list[str]],
) -> argparse.Namespace:
    """The arguments, with the grid of processes; ValueError with all that can be seen to be wrong without a model, of
    which problems(args, classes) are the program's own."""
    from vqscale.programs.sampling import request as sample_request

    args = parser.parse_args(given)
    args.grid = sample_request.check_arguments(args, lambda classes: problems(args, classes))
    return args
