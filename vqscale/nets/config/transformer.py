"""The settings of a transformer, without torch: what the priors over ids are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from vqscale.config import Free
from vqscale.nets.config import miscounted


@dataclass(frozen=True)
class TransformerConfig:
    """The transformer of LlamaGen; with adaln that of the published IBQ priors. The defaults are LlamaGen-B.

    The feed-forward part is SwiGLU with 8/3 width hidden numbers, rounded up to a multiple of ffn_multiple.
    """

    width: int = 768
    """numbers per token"""
    num_layers: int = 12
    """blocks of attention and feed-forward part"""
    num_heads: int = 12
    """heads of every attention; width / num_heads is even, and half of it divides by the sides of the grid"""
    ffn_multiple: int = 256
    """hidden numbers of the feed-forward part are a multiple of this"""
    num_prefix: int = 1
    """tokens before the first id, made of the class"""
    adaln: bool = False
    """the class also scales, shifts and gates every block (IBQ's priors); false: it acts through the prefix alone"""
    adaln_gate_scale: float = 1e-3
    """first gates of adaln are this small; the published ones: 1e-3, 1e-3, 1e-4, 1e-5 for B, L, XL, XXL"""
    qk_norm: bool = False
    """normalise queries and keys of every head before they are rotated"""
    rotary_base: float = 10_000.0
    """base of the frequencies of the rotary embedding, of which each side of the grid has an equal part of a head"""
    prefix_rotary: Literal["identity", "zero"] = "identity"
    """rotation of the prefix: none, or times zero as in both published designs, which makes attention to it flat"""
    rotary: Literal["grid", "sequence"] = "grid"
    """what turns a token: its place along each side of the grid, or its place in one row that begins with the prefix,
    as in Llama, which a prior can then be exported to"""
    norm_eps: float = 1e-5
    """added to the mean square in every norm"""
    init_scale: float = 0.02
    """first matrices and class embeddings are N(0, init_scale^2)"""
    dropout_token: float = 0.1
    """dropout of the embedded tokens, in training only, as all others"""
    dropout_residual: float = 0.1
    """dropout of what an attention adds"""
    dropout_ffn: float = 0.1
    """dropout of what a feed-forward part adds"""
    dropout_attention: float = 0.0
    """dropout of attention's weights"""
    checkpointing: Free[bool] = False
    """recompute every block in the backward pass: less memory, one more forward pass of time"""

    @property
    def ffn_width(self) -> int:
        """Hidden numbers of the feed-forward part."""
        return -(-int(8 * self.width / 3) // self.ffn_multiple) * self.ffn_multiple

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    def problems(self) -> Iterable[tuple[str, str]]:
        """(key, message) of all that no network can be built from."""
        yield from miscounted(self, ("width", "num_layers", "num_heads", "ffn_multiple", "num_prefix"))
        if self.num_heads >= 1 and (self.width % self.num_heads or self.head_dim % 2):
            yield (
                "num_heads",
                f"width {self.width} cut into num_heads {self.num_heads} must give heads of an even number of "
                "numbers, which are turned in pairs: change width or num_heads",
            )
        for key in ("dropout_token", "dropout_residual", "dropout_ffn", "dropout_attention"):
            if not 0 <= getattr(self, key) < 1:
                yield key, f"{key} is {getattr(self, key)}, but a share of zeroed values lies in [0, 1): change {key}"
        if self.rotary == "sequence" and self.prefix_rotary != "identity":
            yield (
                "prefix_rotary",
                f"prefix_rotary is {self.prefix_rotary} and rotary is sequence, where the prefix is turned as the "
                "first tokens of the row: use prefix_rotary: identity, or rotary: grid",
            )
        for key in ("rotary_base", "norm_eps"):
            if getattr(self, key) <= 0:
                yield key, f"{key} is {getattr(self, key)}: make it positive"
        for key in ("init_scale", "adaln_gate_scale"):
            if getattr(self, key) < 0:
                yield key, f"{key} is {getattr(self, key)}, a scale of first values: use 0 or more"
