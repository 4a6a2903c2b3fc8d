"""How the fused kernels cut their work: tiles of tokens x codes per kernel, parts so that every processor has some, and
blocks of gradients of logits that the device's cache holds.

At 256 dimensions every kernel fits into the shared memory of A100, H100, H200 and B200, and of cards that are for
graphics too, and uses their tensor cores; what is spilled, 200 bytes of a thread at most, tools/bench kernels reads off
code compiled for each. Their speed has not been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import isqrt
from typing import Literal

import torch

from vqscale.codes.constant import constant_result

MOST_PARTS = 16
# That a program may have, by ten times the compute capability; elsewhere as on Hopper.
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99, 121: 99}
SIDE = 128  # tokens and codes of a block of gradients of logits are a multiple of it
CACHE_BYTES = 50 * 2**20  # of a H100 or H200, for what is no GPU

Kernel = Literal["peaks", "mix", "columns", "means", "gradient"]


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
    "gradient": Tile(128, 64, 8, 2),
}
WIDE: dict[Kernel, Tile] = {"gradient": Tile(128, 32, 8, 2)}  # where values are not the keys: more to load
# On an A100 there is less shared memory, and sums are held in registers while operands are.
OLDER: dict[Kernel, Tile] = {"mix": Tile(64, 64, 8, 2), "gradient": Tile(64, 64, 8, 2)}
# On cards that are for graphics too there is less again: GeForce RTX 30 to 50, A10, L4, L40.
SMALL: dict[Kernel, Tile] = {
    "peaks": Tile(128, 64, 8, 2),
    "mix": Tile(64, 32, 8, 2),
    "columns": Tile(64, 128, 8, 2),
    "means": Tile(128, 64, 8, 2),
    "gradient": Tile(32, 32, 4, 2),
}
FULL = Tile(32, 16, 8, 2), Tile(16, 32, 8, 2)  # float32 operands: programs that keep tokens, that keep codes
RESCORE_TOKENS, RESCORE_DIM = 16, 32


def keeps_codes(kernel: Kernel) -> bool:
    """Programs keep a tile of codes and walk over the tokens; else the other way round."""
    return kernel == "columns"


def tile(kernel: Kernel, dim: int, item_bytes: int, wide: bool = False, capability: int = 90) -> Tile:
    if item_bytes == 4:
        return FULL[keeps_codes(kernel)]
    room = SHARED_KIB.get(capability, SHARED_KIB[90])
    special = SMALL if room < 163 else OLDER if room < 227 else WIDE if wide else {}
    found = special.get(kernel, TILES[kernel])
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


def wave(num_tokens: int, item_bytes: int, cache_bytes: int, budget: int) -> tuple[int, int]:
    """(tokens, rows) of the blocks of gradients of logits that are written by one kernel and read by two products.

    A block takes two thirds of the device's cache at most, and the budget: what is read again, tokens and rows, has the
    rest. Blocks are about square, because a product of T tokens and R rows does as many operations per number that it
    reads as the smaller of them has; they are whole tiles, and all have about as many tokens.
    """
    room = min(2 * cache_bytes // 3, budget) // item_bytes
    count = max(1, round(num_tokens / max(SIDE, isqrt(room))))
    tokens = min(num_tokens, -(-num_tokens // (count * SIDE)) * SIDE)
    return tokens, max(SIDE, room // tokens // SIDE * SIDE)


def cache_bytes(device: torch.device) -> int:
    """Of the cache that all processors of the device share."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CACHE_BYTES


@constant_result
def capability(device: torch.device) -> int:
    """Ten times the compute capability; that of Hopper for what is no GPU."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


@cache
def programs(device: torch.device) -> int:
    """How many programs run at once, one per processor: a tile takes most of its shared memory."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
