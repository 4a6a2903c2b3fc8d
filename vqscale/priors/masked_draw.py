"""Drawing from a masked prior: step by step, some of the masked ids are revealed, given all that are known.

    confidence   all masked ids are drawn; those of the highest log p (over all K, at the temperature of the draw) plus
                 noise stay, the others are masked again. Equal ones in the order of their positions
    halton       the next positions of Halton's sequence (halton.py) are drawn
    random       any positions, an order per image

The last two know their positions beforehand, so the head is asked about every id once, however many steps there are;
confidence asks it about what is masked at each step. How many ids a step reveals is exact (mask_laws.left_masked), for
each image by what is unknown of it. Every step is a pass of the network over all tokens, with guidance two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vqscale.codes import noise
from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis
from vqscale.priors import halton
from vqscale.priors.config.masked import MaskedSampleConfig
from vqscale.priors.guidance import guidance_scales
from vqscale.priors.mask_laws import left_masked
from vqscale.seed import derive

if TYPE_CHECKING:
    from vqscale.priors.masked import Masked


def complete(
    prior: Masked, ids_Bhw: Tensor, condition: Tensor, settings: MaskedSampleConfig, numbers_B: Tensor, seed: int
) -> Tensor:
    """The ids with those that are -1 drawn; collective."""
    ids_BT = prior.in_a_row(ids_Bhw).clone()
    counts = Counts(hidden(ids_BT), settings, prior.mesh.codes)
    place_BT = None if settings.order == "confidence" else places(prior.grid, settings, numbers_B, seed)
    scales = guidance_scales(settings.guidance, settings.schedule, settings.steps)
    prefixes = [prior.prefix(condition)]
    if any(scale != 1 for scale in scales):
        prefixes.append(prior.prefix(condition, null=True))
    row_B1 = torch.arange(len(ids_BT), device=ids_BT.device)[:, None]
    for step, scale in enumerate(scales):
        if not counts.most_revealed[step]:  # of images of which little was unknown
            continue
        guided = prefixes[: 1 if scale == 1 else 2]
        h_BTD, *null_BTD = prior.states(torch.cat([ids_BT] * len(guided)), torch.cat(guided)).chunk(len(guided))
        masked_BT = hidden(ids_BT)
        ask = Question(prior, settings, numbers_B, seed, step, scale, h_BTD, null_BTD[0] if null_BTD else None)
        if place_BT is None:
            at_BP = first_masked(masked_BT, counts.most_masked[step])
            new_BP, score_BP = ask.scored(at_BP)
            score_BP = score_BP.masked_fill(~masked_BT.gather(1, at_BP), -torch.inf)
            rank_BP = score_BP.argsort(dim=1, descending=True, stable=True).argsort(1)
        else:
            at_BP = next_masked(masked_BT, place_BT, counts.most_revealed[step])
            new_BP = ask.drawn(at_BP)
            rank_BP = torch.arange(at_BP.shape[1], device=at_BP.device)
        revealed_BP = rank_BP < counts.revealed_Bs[:, step, None]
        ids_BT[row_B1, at_BP] = torch.where(each(revealed_BP, new_BP), new_BP, ids_BT[row_B1, at_BP])
    return ids_BT.unflatten(1, prior.grid)


def hidden(ids_BT: Tensor) -> Tensor:
    """masked_BT: tokens whose id, or any of several, is -1."""
    return ids_BT < 0 if ids_BT.dim() == 2 else (ids_BT < 0).any(2)


def each(of_tokens: Tensor, ids: Tensor) -> Tensor:
    """What is said of tokens, for ids of which a token may have several."""
    return of_tokens.view(*of_tokens.shape, *[1] * (ids.dim() - of_tokens.dim()))


class Counts:
    """How many ids each step finds masked and reveals: of each image, and the most of any image of the code group."""

    def __init__(self, masked_BT: Tensor, settings: MaskedSampleConfig, axis: Axis) -> None:
        """Collective."""
        unknown = masked_BT.sum(1).tolist()
        known = {number: left_masked(settings.mask_law, number, settings.steps) for number in set(unknown)}
        left_Bs = torch.tensor([known[number] for number in unknown], device=masked_BT.device)
        left_Bs = left_Bs.view(len(unknown), settings.steps + 1)
        self.revealed_Bs = left_Bs[:, :-1] - left_Bs[:, 1:]
        both_Bs = torch.cat([left_Bs[:, :-1], self.revealed_Bs], 1)
        most_s = ops.max_over(torch.cat([both_Bs, torch.zeros_like(both_Bs[:1])]).amax(0), axis)
        self.most_masked, self.most_revealed = (part_s.tolist() for part_s in most_s.chunk(2))


def places(grid: tuple[int, ...], settings: MaskedSampleConfig, numbers_B: Tensor, seed: int) -> Tensor:
    """When each position comes, place_BT = 0 .. T - 1, in an order that is known beforehand."""
    order_T = torch.tensor(halton.order(grid), device=numbers_B.device)
    keys_B = noise.keys(derive(seed, "order"), numbers_B)
    if settings.order == "random":
        return noise.uniform(keys_B, 0, len(order_T)).argsort(dim=1, stable=True).argsort(1)
    place_BT = order_T.argsort().expand(len(numbers_B), -1)
    if settings.roll:
        start_B1 = (noise.uniform(keys_B, 0, 1) * len(order_T)).to(torch.int64)
        place_BT = (place_BT - start_B1) % len(order_T)
    return place_BT


def first_masked(masked_BT: Tensor, most: int) -> Tensor:
    """at_BP, the masked positions of each image in their order; of an image with fewer, known ones behind them."""
    return (~masked_BT).to(torch.int8).argsort(dim=1, stable=True)[:, :most]


def next_masked(masked_BT: Tensor, place_BT: Tensor, most: int) -> Tensor:
    """at_BP, the masked positions that come next."""
    return torch.where(masked_BT, place_BT, masked_BT.shape[1]).argsort(dim=1, stable=True)[:, :most]


@dataclass
class Question:
    """What the head is asked at one step: the ids of some positions, given the vectors of all of them."""

    prior: Masked
    settings: MaskedSampleConfig
    numbers_B: Tensor
    seed: int
    step: int
    guidance: float
    h_BTD: Tensor
    null_BTD: Tensor | None

    def keys(self, purpose: str, at_BP: Tensor) -> Tensor:
        return noise.keys(derive(self.seed, purpose), self.numbers_B[:, None], self.step, at_BP).flatten()

    def options(self, at_BP: Tensor) -> dict[str, Any]:
        chosen = self.settings
        rule: dict[str, Any] = {"temperature": chosen.temperature, "top_k": chosen.top_k, "top_p": chosen.top_p}
        if self.null_BTD is not None:
            rule |= {"unguided_ND": taken(self.null_BTD, at_BP), "guidance": self.guidance}
        return rule

    def drawn(self, at_BP: Tensor) -> Tensor:
        """The ids of these positions. Collective."""
        keys_N = self.keys("sample", at_BP)
        drawn_N = self.prior.head.sample(taken(self.h_BTD, at_BP), keys_N, **self.options(at_BP))
        return drawn_N.unflatten(0, at_BP.shape)

    def scored(self, at_BP: Tensor) -> tuple[Tensor, Tensor]:
        """The ids of these positions and the confidence in each. Collective."""
        h_ND, keys_N = taken(self.h_BTD, at_BP), self.keys("sample", at_BP)
        drawn_N, score_N = self.prior.head.sample_scored(h_ND, keys_N, **self.options(at_BP))
        share = self.settings.order_noise * (1 - (self.step + 1) / self.settings.steps)
        if share:
            score_N = score_N + share * noise.gumbel(self.keys("order", at_BP), 0, 1, score_N.dtype)[:, 0]
        return drawn_N.unflatten(0, at_BP.shape), score_N.view(at_BP.shape)


def taken(h_BTD: Tensor, at_BP: Tensor) -> Tensor:
    """The vectors of some positions of each image, N x D."""
    return h_BTD.gather(1, at_BP[..., None].expand(-1, -1, h_BTD.shape[2])).flatten(0, 1)
