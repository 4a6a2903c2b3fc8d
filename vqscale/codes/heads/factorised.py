"""Ids as digits: id = sum_i digit_i x (the product of the factors after i), each digit with a flat head of its own.

    log p(id | h) = sum_i log p(digit_i | h, digits before it)          the nats are exact
    vector of id  = sum_i vector_i(digit_i)

With `within`, a small causal transformer reads h and the vectors of the digits so far, and its token i predicts digit
i: the asymmetric factors 2^6 x 2^12 of Open-MAGVIT2 (2409.04410). Without, digits are independent given h. Where a
token has several ids (residual and grouped tokenizers), their digits follow one another: digits of the first id, then
of the second. Products cost tokens x the sum of the factors, not their product; so do rows. With one digit this is
Head.

Every table is a Codebook of a Head, its rows split over the ranks; what is sent is as a Head's, once for each digit.
The transformer is replicated, like the trunk. Sampling goes digit by digit, each with the same temperature, top-k and
top-p among its own values; guidance is on the logits of each digit, with both conditions read through `within`.
Published scripts do the same, with numbers of their own for each digit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from vqscale.codes import noise
from vqscale.codes.codebook import SCAN_MIB
from vqscale.codes.config import Products
from vqscale.codes.heads import draw
from vqscale.codes.heads.base import Losses, Scored, Vocabulary
from vqscale.codes.heads.config import FactorisedConfig, WithinConfig
from vqscale.codes.heads.flat import Head
from vqscale.codes.ids import check_ids, whole_ids
from vqscale.matmul import Linear
from vqscale.nets.transformer import KVCache, Transformer, rotary
from vqscale.parallel.mesh import Axis, Mesh
from vqscale.seed import derive


class Within(nn.Module):
    """The transformer over the `length` digits of a token: x_NSD to what predicts each of them.

    Its positions are h, then digits; `dim` is mapped to its own width and back where they differ.
    """

    def __init__(self, config: WithinConfig, dim: int, length: int) -> None:
        super().__init__()
        self.length, self.net = length, Transformer(config.net(dim))
        width = self.net.config.width
        self.enter = Linear(dim, width) if width != dim else nn.Identity()
        self.leave = Linear(width, dim) if width != dim else nn.Identity()

    def forward(self, x_NSD: Tensor, cache: KVCache | None = None) -> Tensor:
        first = cache.filled if cache is not None else 0
        turns = rotary(self.net.config, (self.length - 1,), x_NSD.device)[first : first + x_NSD.shape[1]]
        y_NSD: Tensor = self.leave(self.net(self.enter(x_NSD), turns, cache=cache))
        return y_NSD

    def cache(self, x_ND: Tensor) -> KVCache:
        """For N tokens, one position after the other."""
        return KVCache(self.net.config, len(x_ND), self.length, x_ND)


class Factorised(Vocabulary):
    """Embedding, loss and sampling over `num_ids` ids of `num_codes` each, by digits. `mesh` None is one process.

    `factors` are the values of each digit of an id, the most significant first; None is one digit per id. ValueError
    where their product is not num_codes.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        mesh: Mesh | None = None,
        *,
        factors: Sequence[int] | None = None,
        within: WithinConfig | None = None,
        num_ids: int = 1,
        embedding: Literal["rows", "tied"] = "rows",
        init_scale: float = 0.02,
        products: Products = "fp32",
        seed: int = 0,
        scan_mib: int = SCAN_MIB,
    ) -> None:
        super().__init__()
        self.num_codes, self.dim, self.num_ids = num_codes, dim, num_ids
        self.factors = tuple(factors or (num_codes,))
        if math.prod(self.factors) != num_codes:
            raise ValueError(
                f"factors {list(self.factors)} multiply to {math.prod(self.factors)}, an argument of Factorised, and "
                f"num_codes is {num_codes}: give factors of num_codes"
            )
        mesh = mesh or Mesh()

        def head(place: int, size: int) -> Head:
            chosen = derive(seed, "digit", place) if place else seed
            return Head(
                size,
                dim,
                mesh,
                embedding=embedding,
                init_scale=init_scale,
                products=products,
                seed=chosen,
                scan_mib=scan_mib,
            )

        self.digits = nn.ModuleList(head(place, size) for place, size in enumerate(self.factors * num_ids))
        self.within = None
        if within is not None and len(self.digits) > 1:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(seed, "within"))
                self.within = Within(within, dim, len(self.digits))
            if not torch.empty(0).is_meta:
                self.within.to(mesh.device)

    @classmethod
    def from_config(
        cls,
        config: FactorisedConfig,
        num_codes: int,
        dim: int,
        mesh: Mesh,
        *,
        seed: int,
        feature_dim: int | None = None,
        num_ids: int = 1,
    ) -> Factorised:
        assert config.factors != "own", "they are looked up before: see wants_digits"
        return cls(
            num_codes,
            dim,
            mesh,
            factors=config.factors,
            within=config.within,
            num_ids=num_ids,
            embedding=config.embedding,
            init_scale=config.init_scale,
            products=config.products,
            seed=seed,
            scan_mib=config.scan_mib,
        )

    @property
    def heads(self) -> list[Head]:
        """One for each digit."""
        return [head for head in self.digits if isinstance(head, Head)]

    @property
    def axis(self) -> Axis:
        return self.heads[0].axis

    def split(self, ids_N: Tensor) -> Tensor:
        """digits_NS of ids, of all ids of a token where it has several; those of -1 are -1."""
        ids_NI = ids_N.reshape(-1, self.num_ids, 1)
        places = torch.tensor([math.prod(self.factors[i + 1 :]) for i in range(len(self.factors))], device=ids_N.device)
        digits = ids_NI.div(places, rounding_mode="floor") % torch.tensor(self.factors, device=ids_N.device)
        return torch.where(ids_NI < 0, -1, digits).flatten(1)

    def join(self, digits_NS: Tensor) -> Tensor:
        """The inverse of `split`: ids (N,), or (N, num_ids)."""
        ids_NI = digits_NS.new_zeros(len(digits_NS), self.num_ids)
        for digit_NI, size in zip(digits_NS.unflatten(1, (self.num_ids, -1)).unbind(2), self.factors, strict=True):
            ids_NI = ids_NI * size + digit_NI
        return ids_NI if self.num_ids > 1 else ids_NI[:, 0]

    def embed(self, ids: Tensor) -> Tensor:
        shape = ids.shape if self.num_ids == 1 else ids.shape[:-1]
        ids = ids.to(torch.int64)
        check_ids(ids, -1, self.num_codes, "ids to embed", self.axis)
        digits_NS = self.split(ids)
        vectors = [head.embed(digit_N) for head, digit_N in zip(self.heads, digits_NS.unbind(1), strict=True)]
        return torch.stack(vectors).sum(0).view(*shape, self.dim)

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
        """Sums over the digits, each given the true ones before it; smoothing and z_loss act on each. Collective.

        The ids of a token are right when every digit is the likeliest given the true ones before it: temperature 0
        draws exactly these.
        """
        return _together(
            [
                head.losses(y_ND, digit_N, label_smoothing=label_smoothing, z_loss=z_loss, right=right)
                for head, y_ND, digit_N in self._digits(h_ND, targets_N, ignore)
            ]
        )

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
        """The sums of the digits."""
        found = [
            head.weighted(y_ND, digit_N, weight_N, label_smoothing=label_smoothing, z_loss=z_loss, right=right)
            for head, y_ND, digit_N in self._digits(h_ND, targets_N, ignore)
        ]
        totals, parts = zip(*found, strict=True)
        return torch.stack(totals).sum(), _together(parts)

    def _digits(self, h_ND: Tensor, targets_N: Tensor, ignore: int) -> list[tuple[Head, Tensor, Tensor]]:
        """(head, what predicts the digit, its target), of every digit; -1 where the target is ignored."""
        targets_N = whole_ids(targets_N, "targets")
        ignored = targets_N == ignore
        check_ids(torch.where(ignored, 0, targets_N), 0, self.num_codes, "targets", self.axis)
        digits_NS = self.split(torch.where(ignored, -1, targets_N))
        return list(zip(self.heads, self._states(h_ND, digits_NS), digits_NS.unbind(1), strict=True))

    def _states(self, h_ND: Tensor, digits_NS: Tensor) -> Sequence[Tensor]:
        """What predicts each digit, given h and the true digits before it."""
        if self.within is None:
            return [h_ND] * len(self.heads)
        before = zip(self.heads[:-1], digits_NS.unbind(1), strict=False)
        x_NSD = torch.stack([h_ND, *(head.embed(digit_N).to(h_ND.dtype) for head, digit_N in before)], 1)
        return self.within(x_NSD).unbind(1)

    def beside_tables(self, h_ND: Tensor) -> tuple[Tensor, int] | None:
        if self.within is None:
            return None
        return self.within(h_ND[:, None].expand(-1, len(self.heads), -1)), 1  # keys and values are kept in drawing

    @contextmanager
    def laid_out(self) -> Iterator[None]:
        with ExitStack() as stack:
            for head in self.heads:
                stack.enter_context(head.laid_out())
            yield

    def drawn(
        self,
        h_ND: Tensor,
        keys_N: Tensor,
        rule: draw.Rule,
        unguided_ND: Tensor | None,
        guidance: float | Tensor,
        scored: bool,
    ) -> Scored:
        """Digit by digit: guidance, then temperature, top-k, top-p, among the values of the digit; log p is the sum
        over the digits, each given the drawn ones before it. Collective."""
        paths = [h_ND] if unguided_ND is None else [h_ND, unguided_ND.to(h_ND.dtype)]
        x_XD, digits = torch.cat(paths), list[Scored]()
        cache = None if self.within is None else self.within.cache(x_XD)
        for place, head in enumerate(self.heads):
            if self.within is not None and digits:
                x_XD = self.heads[place - 1].embed(digits[-1].ids_N).to(h_ND.dtype).repeat(len(paths), 1)
            y_XD = x_XD if self.within is None else self.within(x_XD[:, None], cache)[:, 0]
            y_ND, *null_ND = y_XD.chunk(len(paths))
            chosen_N = noise.keys(keys_N, place) if place else keys_N
            digits.append(head.drawn(y_ND, chosen_N, rule, null_ND[0] if null_ND else None, guidance, scored))
        digits_SN, log_p_SN = zip(*digits, strict=True)
        return Scored(self.join(torch.stack(digits_SN, 1)), torch.stack(log_p_SN, 1).sum(1))


def _together(parts: Sequence[Losses]) -> Losses:
    """The losses of all digits of a token as one."""
    whole, entropy, square = (torch.stack(values).sum(0) for values in list(zip(*parts, strict=True))[:3])
    every = [part.right_N for part in parts if part.right_N is not None]
    return Losses(whole, entropy, square, torch.stack(every).all(0) if every else None)
