"""How the fused kernels cut their work: tiles of tokens x codes per kernel, and parts so that every processor has some.

Chosen for Hopper (227 KiB of shared memory for a program, 64 Ki registers and 132 processors): at 256 dimensions every
kernel fits, uses the warp-group products and keeps all but 56 bytes of a thread in registers, which tools/bench kernels
reads off code compiled for sm_90. Their speed has not been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

MOST_PARTS = 16

Kernel = Literal["peaks", "mix", "columns", "means", "tokens", "keys"]


@dataclass(frozen=True)
class Tile:
    """Tokens x codes that a program has at hand, its warps, and how many tiles ahead it loads."""

    tokens: int
    codes: int
    warps: int
    stages: int


# At 256 padded dimensions, operands in bfloat16. Fewer dimensions take the same tiles and more stages.
TILES: dict[Kernel, Tile] = {
    "peaks": Tile(128, 128, 8, 2),
    "mix": Tile(128, 64, 8, 2),
    "columns": Tile(128, 128, 8, 2),
    "means": Tile(128, 128, 8, 2),
    "tokens": Tile(128, 64, 8, 2),
    "keys": Tile(64, 128, 8, 2),
}
# Where values are not the keys, or the second temperature has a gradient: more to load, more to hold.
WIDE: dict[Kernel, Tile] = {"tokens": Tile(128, 32, 8, 2), "keys": Tile(32, 128, 8, 2)}
FULL = Tile(32, 16, 8, 2), Tile(16, 32, 8, 2)  # float32 operands: programs that keep tokens, that keep codes
RESCORE_TOKENS, RESCORE_DIM = 16, 32


def keeps_codes(kernel: Kernel) -> bool:
    """Programs keep a tile of codes and walk over the tokens; else the other way round."""
    return kernel in ("columns", "keys")


def tile(kernel: Kernel, dim: int, item_bytes: int, wide: bool = False) -> Tile:
    if item_bytes == 4:
        return FULL[keeps_codes(kernel)]
    found = WIDE.get(kernel, TILES[kernel]) if wide else TILES[kernel]
    return found if padded(dim) > 128 else Tile(found.tokens, found.codes, found.warps, found.stages + 1)


def padded(dim: int) -> int:
    """The width of a tile: a power of two, 16 at least, as products need it."""
    return max(16, 1 << (dim - 1).bit_length())


def parts(num_tiles: int, length: int, block: int, programs: int) -> tuple[int, int]:
    """(parts, length of each) for an inner loop over `length` in steps of `block`, run by `num_tiles` programs a part.

    The fewest parts with which the last wave of programs is as full as it gets; each is whole blocks, none is empty.
    """
    blocks = max(1, -(-length // block))
    best, least = (1, blocks * block), float("inf")
    for num in range(1, min(MOST_PARTS, blocks) + 1):
        per_part = -(-blocks // num)
        waves = -(-num_tiles * -(-blocks // per_part) // programs)
        if waves * per_part < least:
            best, least = (-(-blocks // per_part), per_part * block), waves * per_part
    return best


@cache
def programs(device: torch.device) -> int:
    """How many programs run at once, one per processor: a tile takes most of its shared memory."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
