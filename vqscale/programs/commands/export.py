"""Make a trained tokenizer or prior a folder that another library loads: safetensors and JSON, nothing that is run.

    vqscale export --to transformers|diffusers MODEL OUT [--weights average|parameters] [--class-of library|vqscale]

MODEL is a run folder, one of its checkpoints, or a saved or imported folder; OUT is new or empty. What the class there
would not compute alike is refused, with every setting that stands against it. In transformers any tokenizer may also be
a class of vqscale, decoder and all, which AutoModel finds where vqscale is installed and imported. It becomes that
where the library has no class for it, unless --class-of says whose it has to be.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from vqscale.programs.commands import words
from vqscale.run import processes

# One line for each library and what it takes: the module whose `export` makes it a Foreign.
EXPORTS = {
    "transformers": {"tokenizer": "vqscale.tokenizer.as_transformers", "prior": "vqscale.priors.as_llama"},
    "diffusers": {"tokenizer": "vqscale.tokenizer.as_diffusers"},
}
# For what of these there is a class of vqscale too: the module whose `export` makes it one, and says why.
OWN = {("transformers", "tokenizer"): "vqscale.tokenizer.as_auto_model"}


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 failed on the way, 2 the user's input."""
    return processes.status_of(lambda: _export(arguments(sys.argv[1:] if argv is None else argv)))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = words.parser(__doc__)
    parser.add_argument(
        "--to", dest="library", required=True, choices=[*EXPORTS], help="the library that is to load it"
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="run folder, checkpoint, or saved folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, new or empty")
    words.add_weights(parser)
    parser.add_argument(
        "--class-of",
        choices=["library", "vqscale"],
        help="whose class it has to be: the library's, or refused, or vqscale's (default: the library's if it has one)",
    )
    return parser.parse_args(given)


def _export(args: argparse.Namespace) -> int:
    from vqscale.tokenizer import saved

    kind = saved.kind_of(args.model) or "tokenizer"  # where nothing says it, loading says what is wrong
    if kind not in EXPORTS[args.library]:
        takes = {library: kinds for library, kinds in EXPORTS.items() if kind in kinds}
        raise ValueError(
            f"{args.model} is a {kind}, and --to {args.library} takes a {' or a '.join(EXPORTS[args.library])}: "
            + (f"use --to {' or '.join(takes)}" if takes else "no library here has a class for it")
        )
    if args.class_of == "vqscale" and (args.library, kind) not in OWN:
        raise ValueError(
            f"{args.model} is a {kind} for {args.library}, and vqscale has a class for "
            + ", ".join(f"a {kind} in {library}" for library, kind in OWN)
            + " only: leave --class-of out"
        )
    made = _made(kind, args)
    made.write(args.out)
    print(f"{args.out}: {made.loads_as}.from_pretrained({str(args.out)!r})")
    for remark in made.remarks:
        print(f"  {remark}")
    return 0


def _made(kind: str, args: argparse.Namespace) -> Any:
    """The model as the class that it becomes."""
    model, theirs = _load(kind, args), import_module(EXPORTS[args.library][kind])
    own = OWN.get((args.library, kind))
    if own is not None and args.class_of != "library":
        because = ["--class-of vqscale"] if args.class_of else theirs.why_not(model)
        if because:
            return import_module(own).export(model, because)
    return theirs.export(model)


def _load(kind: str, args: argparse.Namespace) -> Any:
    if kind == "prior":
        from vqscale.priors import Prior

        return Prior.load(args.model, weights=args.weights)
    from vqscale.tokenizer.model import Tokenizer

    return Tokenizer.load(args.model, weights=args.weights)
