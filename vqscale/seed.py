"""One way to make seeds: `derive` turns what a random draw is for into the seed that it uses.

Whatever must not depend on the number of processes or on the order of events (initial rows, the order of samples,
augmentation, revival) draws from a fresh generator seeded by derive(run seed, what it is for, which one).
"""

from __future__ import annotations

import hashlib


def derive(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on every part and on their order; the same parts give the same everywhere."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
