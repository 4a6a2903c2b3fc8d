"""Make a published tokenizer ours: a folder with model.safetensors and card.json that Tokenizer.load reads.

    python tools/import_checkpoint.py --from ibq|simvq FILE OUT [--weights average|raw]

FILE is a .ckpt, .pt, .pth, .bin or .safetensors that you fetched; nothing is downloaded, and nothing in it is executed.
Every key is accounted for: what is missing, unknown or of another shape is listed, and then nothing is written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

NAMES = ("ibq", "simvq")


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 2 the user's input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="family", required=True, choices=NAMES, help="whose tokenizer it is")
    parser.add_argument("--weights", default="average", choices=("average", "raw"), help="which of the two in FILE")
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    asked = parser.parse_args(argv)
    from vqscale.nets.weights import read_state
    from vqscale.tokenizer.published import FAMILIES, convert

    try:
        family = FAMILIES[asked.family]
        what = f"the checkpoint of a published {asked.family} tokenizer"
        state = read_state(asked.file, what=what, where=f"fetch it from {family.where}")
        tokenizer = convert(state, asked.family, asked.weights)
        with asked.file.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        origin = f"{asked.family}: {asked.file.name} (sha256 {digest}), {asked.weights} weights"
        images = {"image_size": family.image_size, "interpolation": family.interpolation}
        tokenizer.save(asked.out, {"origin": origin, **images})
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    card = json.loads((asked.out / "card.json").read_text())
    print(json.dumps(card, indent=1))
    print(f"{asked.out}: {tokenizer.quantizer.num_codes} codes, fingerprint {card['fingerprint']}")
    return 0
