"""What is measured, in numbers: the settings that forms are built from. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

LOSSES = ("ours", "bf16", "twice", "dense", "torch", "cce", "quack", "floor")
# Tokens and rows that a floor multiplies at once: on a CPU no other size measured faster; on a GPU such a block of
# bfloat16 takes 32 MiB, which stay in the L2 cache.
FLOOR_BLOCKS = {"cpu": (2048, 4096), "cuda": (4096, 4096)}
SAMPLES = ("ours", "top-p", "dense")


@dataclass(frozen=True)
class Setting:
    """Of the code axis. `tokens` is per process; `dense` names the works of which the dense form is run too.

    `works` are run; of a work that is not, nothing is built but what it shares with the others.
    """

    tokens: int
    codes: int
    dim: int
    entropy: bool = False
    processes: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    repeats: int = 5
    threads: int = 1
    scan_mib: int = 64
    spread: float = 1.0
    products: str = "fp32"  # bf16: of ours, as engine.matmul: medium, and of the floor
    dense: tuple[str, ...] = ("step", "search")
    works: tuple[str, ...] = ("step", "search")

    @property
    def item_bytes(self) -> int:
        return 8 if self.dtype == "float64" else 4


@dataclass(frozen=True)
class HeadSetting:
    """Of a prior's head, for one K. `tokens` and `drawn` (tokens that a sample draws at once) are per process."""

    tokens: int
    codes: int
    dim: int
    drawn: int = 64
    processes: int = 1
    device: str = "cpu"
    repeats: int = 5
    threads: int = 1
    scan_mib: int = 64
    products: str = "fp32"  # bf16: of the other forms and of the floor, where ours has a form of it
    losses: tuple[str, ...] = LOSSES
    samples: tuple[str, ...] = SAMPLES


@dataclass(frozen=True)
class SampleSetting:
    """Of drawing from priors over side x side ids."""

    batch: int
    side: int
    codes: int
    width: int
    layers: int
    heads: int
    steps: int = 12
    clusters: int = 512
    greedy: bool = False
    repeats: int = 3
    device: str = "cpu"
    threads: int = 1

    @property
    def length(self) -> int:
        """Ids of an image."""
        return self.side**2

    @property
    def ffn_width(self) -> int:
        """Hidden numbers of the feed-forward part, as TransformerConfig has them."""
        from vqscale.nets.config.transformer import TransformerConfig

        return TransformerConfig(width=self.width).ffn_width


@dataclass(frozen=True)
class Rounds:
    """Of forms that take turns: `warm` steps of each come first, unmeasured."""

    warm: int = 10
    repeats: int = 9
    device: str = "cpu"
    threads: int = 1
