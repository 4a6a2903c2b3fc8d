"""What a prior asks of its head, a vocabulary: vectors of ids, a loss of ids given vectors, ids drawn given vectors.

The trunk gives h_ND, one vector of width `dim` for each of this rank's N positions, and gets vectors of that width for
ids. What has K in its shape is the head's: tables (Codebook) as children, which are drawn, set aside, stepped and saved
as a codebook's are. Everything else in it is a replicated parameter like those of the trunk. All of it is collective,
and N is the same on all ranks of a code group. How K codes are written as tables (one, digits, bits) is nobody else's
business. Not here: which positions are modelled, in what order, and how guidance changes over them (priors/).

The ids of a position are one number, or `num_ids` of them along a last axis: "ids_N" below is (N,) or (N, num_ids).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from vqscale.codes.heads import draw
from vqscale.parallel.mesh import Mesh


class Losses(NamedTuple):
    """Of each token: what is to be minimised, and without gradient its parts."""

    whole_N: Tensor
    cross_entropy_N: Tensor  # with the target alone
    square_N: Tensor  # of the log-normaliser, which z_loss weighs
    right_N: Tensor | None = None  # whether the target is what temperature 0 draws; where it is asked for

    def summed(self, weight_N: Tensor) -> tuple[Tensor, Losses]:
        """(their sum, weighted, which alone has a gradient, and none for the weights; they themselves)."""
        total = (self.whole_N * weight_N.detach().to(self.whole_N.dtype)).sum()
        return total, self._replace(whole_N=self.whole_N.detach())


class Scored(NamedTuple):
    """What was drawn for each token, and how likely it was."""

    ids_N: Tensor
    log_p_N: Tensor


class Vocabulary(nn.Module, ABC):
    """Embedding, loss and drawing over `num_codes` ids for a trunk of width `dim`."""

    num_codes: int
    dim: int
    num_ids: int = 1

    @classmethod
    @abstractmethod
    def from_config(
        cls,
        config: Any,
        num_codes: int,
        dim: int,
        mesh: Mesh,
        *,
        seed: int,
        feature_dim: int | None = None,
        num_ids: int = 1,
    ) -> Self:
        """The head of its settings. First values follow from the seed, whatever the number of ranks.

        `feature_dim` is there where `config.wants_features`, and may be there elsewhere; `num_ids` is above 1 where
        `config.several_ids` alone.
        """

    def set_features(self, decode: Callable[[Tensor], Tensor]) -> None:
        """Take the frozen vectors of the codes from ids_N -> z_NF, a quantizer's `decode`; once, before training.

        For heads whose settings say wants_features. What is taken is saved with the head.
        """
        raise AssertionError(f"{type(self).__name__} takes no vectors of codes")

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """The vectors of ids of any shape (*shape, then num_ids where there are several): (*shape, dim).

        The id -1 is nobody: zeros. ValueError on all ranks of the code group for others outside 0 .. K - 1.
        """

    @abstractmethod
    def losses(
        self,
        h_ND: Tensor,
        targets_N: Tensor,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        ignore: int = -1,
        right: bool = False,
    ) -> Losses:
        """-log p(target | h) of each position in nats, and with it what the regularisers add; 0 at `ignore`.

        label_smoothing e mixes the target with the uniform distribution, z_loss adds the squared log-normaliser: where
        a head has several distributions, of each. With `right` the same pass says which targets are the likeliest, so
        that an accuracy costs no second one. ValueError on all ranks for targets outside 0 .. K - 1.
        """

    @contextmanager
    def laid_out(self) -> Iterator[None]:
        """Inside, drawing for few tokens at a time is quicker on a CPU, and rounds logits in another way: tables of
        outputs have a copy that is laid out for it. Their rows must not change meanwhile.
        """
        yield

    def weighted(
        self,
        h_ND: Tensor,
        targets_N: Tensor,
        weight_N: Tensor,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        ignore: int = -1,
        right: bool = False,
    ) -> tuple[Tensor, Losses]:
        """(the sum of the losses times their weights, the losses): for training, which minimises a number. Collective.

        As `losses`, but only the sum has a gradient, once, and what arrives for it in the backward pass is the same on
        all ranks of a code group: what weighs tokens is in weight_N, which has no gradient. A head that knows this
        beforehand may need fewer products.
        """
        found = self.losses(h_ND, targets_N, label_smoothing=label_smoothing, z_loss=z_loss, ignore=ignore, right=right)
        return found.summed(weight_N)

    @torch.no_grad()
    def sample(
        self,
        h_ND: Tensor,
        keys_N: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        unguided_ND: Tensor | None = None,
        guidance: float | Tensor = 1.0,
    ) -> Tensor:
        """ids_N drawn from p(. | h): guidance, then temperature (0 is the likeliest), top-k, top-p; no gradient.

        keys_N (noise.keys) decide the random numbers: the same key and h give the same ids on any number of ranks and
        in any batch, but where two candidates are within rounding. Guidance s, a number or one per position, leads away
        from what h would be without condition, `unguided_ND`: logits u + s (c - u).
        FloatingPointError on all ranks of the code group where logits are not finite.
        """
        rule = draw.Rule(temperature, top_k, top_p)
        return self.drawn(h_ND, keys_N, rule, unguided_ND, guidance, scored=False).ids_N

    @torch.no_grad()
    def sample_scored(
        self,
        h_ND: Tensor,
        keys_N: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        unguided_ND: Tensor | None = None,
        guidance: float | Tensor = 1.0,
    ) -> Scored:
        """The ids that `sample` draws with these arguments, and log_p_N (one number per position, several ids of it
        together), their log-probability in nats over all K codes: guided and at this temperature (at temperature 0 as
        at 1), before top-k and top-p leave any code out.
        """
        rule = draw.Rule(temperature, top_k, top_p)
        return self.drawn(h_ND, keys_N, rule, unguided_ND, guidance, scored=True)

    @abstractmethod
    def drawn(
        self,
        h_ND: Tensor,
        keys_N: Tensor,
        rule: draw.Rule,
        unguided_ND: Tensor | None,
        guidance: float | Tensor,
        scored: bool,
    ) -> Scored:
        """What `sample` and `sample_scored` answer; log_p_N is read only where `scored`. No gradient."""

    def beside_tables(self, h_ND: Tensor) -> tuple[Tensor, int] | None:
        """(what the head's network makes of N tokens in the one pass of a training loss, how many such passes drawing
        takes); None where a head is tables alone. What a head costs is planned with it; nothing is sent.
        """
        return None


def check_terms(label_smoothing: float, z_loss: float) -> None:
    """ValueError for arguments of `losses` that are no share, and no weight."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, an argument of loss: use a share from 0 to 1")
    if z_loss < 0:
        raise ValueError(f"z_loss is {z_loss}, an argument of loss, and would reward what it is against: use 0 or more")
