"""Make a published tokenizer ours: a folder with model.safetensors and card.json that Tokenizer.load reads.

    vqscale import --from FAMILY FILE OUT [--weights average|raw] [--levels N]

FAMILY is ibq, open_magvit2, simvq or simvq_audio; or, with --weights raw, taming (VQGAN), diffusers (VQModel),
llamagen, wavtokenizer or encodec (24 kHz), which have no averages.

FILE is a .ckpt, .pt, .pth, .th, .bin or .safetensors that you fetched; nothing is downloaded, and nothing in it is
executed. Every key is accounted for: what is missing, unknown or of another shape is listed, and then nothing is
written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vqscale.programs.commands import words
from vqscale.run import processes


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 failed on the way, 2 the user's input."""
    return processes.status_of(lambda: _import(arguments(sys.argv[1:] if argv is None else argv)))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = words.parser(__doc__)
    parser.add_argument("--from", dest="family", required=True, metavar="FAMILY", help="whose tokenizer it is")
    parser.add_argument("--weights", default="average", choices=("average", "raw"), help="which of the two in FILE")
    parser.add_argument("--levels", type=int, metavar="N", help="of encodec's 32 quantizers the first so many alone")
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    return parser.parse_args(given)


def _import(args: argparse.Namespace) -> int:
    from vqscale.nets.weights import read_state
    from vqscale.tokenizer import published

    family = published.family_named(args.family)
    what = f"the checkpoint of a published {args.family} tokenizer"
    state = read_state(args.file, what=what, where=f"fetch it from {family.where}")
    tokenizer = published.convert(state, args.family, args.weights, args.levels)
    with args.file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    origin = f"{args.family}: {args.file.name} (sha256 {digest}), {args.weights} weights"
    tokenizer.save(args.out, {"origin": origin, **family.card})
    card = json.loads((args.out / "card.json").read_text())
    print(json.dumps(card, indent=1))
    print(f"{args.out}: {tokenizer.quantizer.num_codes} codes, fingerprint {card['fingerprint']}")
    return 0
