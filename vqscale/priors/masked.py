"""The masked prior of MaskGIT (2202.04200): p(some ids | the others, c), all ids of a pass independent of each other.

Every token of the sequence (the prefix made of the condition c, then the ids) sees all others. A masked id enters as
one learned vector that is no row of the vocabulary, and every token has a learned vector of its place: where all is
masked, rotary embeddings alone would hardly tell places apart. In training a random set of ids is masked; how many, a
law of mask_laws.py says. How ids are drawn is in masked_draw.py.

What is said of held-out ids is the bound of any order: draw n uniformly from 1 .. T, mask n ids at random, take the
mean nats of the masked ones. Its expectation is the mean over all orders of the chain rule, an upper bound of the nats
of the mixture of all orders: comparable with the exact nats of other priors, and never better than what it bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqscale.codes import noise
from vqscale.codes.ids import check_ids
from vqscale.nets.transformer import Transformer, rotary
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.priors import masked_draw
from vqscale.priors.base import Prior
from vqscale.priors.config import Passes
from vqscale.priors.config.masked import MaskedConfig, MaskedSampleConfig
from vqscale.priors.mask_laws import left_masked, training_counts
from vqscale.priors.modelled import Modelled
from vqscale.priors.places import Places

MASKS = 1  # derives the keys of masks from those of images, whose own first number drops their condition


class Masked(Prior):
    """Ids in any order. See Prior for what is collective and what is random."""

    config: MaskedConfig

    def __init__(self, config: MaskedConfig, mesh: Mesh | None = None, *, seed: int = 0) -> None:
        super().__init__(config, config.net, mesh, seed)
        self.net = Transformer(config.net)
        self.places = Places(config.num_tokens, config.net, masks=True)
        if not torch.empty(0).is_meta:
            self.to(self.mesh.device)

    def states(self, ids_BT: Tensor, prefix_BPD: Tensor) -> Tensor:
        """h_BTD, the vectors that predict each of the T ids from all; -1 is a masked id. Collective."""
        x_BTD = self.places(self.head.embed(ids_BT), masked_draw.hidden(ids_BT))
        x_BTD = torch.cat([prefix_BPD, x_BTD], 1)
        turns = rotary(self.config.net, self.grid, x_BTD.device)
        h_BTD = self.net(x_BTD, turns, self.net.adapt(self.condition.summary(prefix_BPD)), causal=False)
        return h_BTD[:, self.config.net.num_prefix :]

    def loss(self, ids_Bhw: Tensor, condition: Tensor, keys_B: Tensor | None = None) -> Modelled:
        ids_BT = self.in_a_row(ids_Bhw)
        check_ids(ids_BT, 0, self.num_codes, "ids", self.mesh.codes)
        if keys_B is None:
            new = torch.randint(2**62, (len(ids_BT),), device=ids_BT.device)
            keys_B = new if self.training else torch.arange(len(ids_BT), device=ids_BT.device)
        prefix_BPD = self.prefix(condition, keys_B)
        if self.training:
            return self.of_masked(ids_BT, prefix_BPD, training_masks(keys_B, self.config), self.config.unmasked_weight)
        masks = [bound_masks(keys_B, self.config, number) for number in range(self.config.bound_passes)]
        return mean_of([self.of_masked(ids_BT, prefix_BPD, masked_BT) for masked_BT in masks])

    def of_masked(
        self, ids_BT: Tensor, prefix_BPD: Tensor, masked_BT: Tensor, unmasked_weight: float = 0.0
    ) -> Modelled:
        """The loss of masked ids given the others, and with a weight that of the others too. Collective."""
        seen_BT = torch.where(masked_draw.each(masked_BT, ids_BT), -1, ids_BT)
        h_BTD = self.states(seen_BT, prefix_BPD)
        return self.modelled(h_BTD, ids_BT.view(-1, *self.ids_shape), masked_BT.double().clamp(min=unmasked_weight))

    def training_passes(self) -> Passes:
        num, asked = self.config.num_tokens, 1.0
        if not self.config.unmasked_weight:
            uniform = (torch.arange(4096, dtype=torch.float64, device="cpu") + 0.5) / 4096
            counts = training_counts(self.config.mask_law, self.config.least_masked, uniform, num)
            asked = float(counts.double().mean()) / num
        return Passes(1, asked * num)

    def sampling_passes(self, settings: MaskedSampleConfig) -> Passes:
        left = left_masked(settings.mask_law, self.config.num_tokens, settings.steps)
        return Passes(settings.steps, sum(left) if settings.order == "confidence" else left[0])

    def draw(self, condition: Tensor, settings: MaskedSampleConfig, numbers_B: Tensor, seed: int) -> Tensor:
        ids_Bhw = torch.full((len(numbers_B), *self.ids_shape), -1, device=numbers_B.device)
        return self.complete(ids_Bhw, condition, settings, numbers_B, seed)

    def complete(
        self, ids_Bhw: Tensor, condition: Tensor, settings: MaskedSampleConfig, numbers_B: Tensor, seed: int
    ) -> Tensor:
        several = self.in_a_row(ids_Bhw).unflatten(1, (-1, 1)).flatten(2) < 0
        if int(ops.max_over((several.any(2) & ~several.all(2)).sum(), self.mesh.codes)):
            raise ValueError(
                f"a token has {self.num_ids} ids here (num_ids, in the prior's config), and of some tokens a part is "
                "known, an argument of sample: give all ids of a token, or -1 for all of them"
            )
        return masked_draw.complete(self, ids_Bhw, condition, settings, numbers_B, seed)


def training_masks(keys_B: Tensor, config: MaskedConfig) -> Tensor:
    """masked_BT of images in training: a number of ids by the config's law, any of them."""
    num = config.num_tokens
    uniform_BV = noise.uniform(noise.keys(MASKS, keys_B), 0, 1 + num)
    count_B = training_counts(config.mask_law, config.least_masked, uniform_BV[:, 0], num)
    return noise.lowest(uniform_BV[:, 1:], count_B)


def bound_masks(keys_B: Tensor, config: MaskedConfig, number: int) -> Tensor:
    """masked_BT of a pass over held-out images: n uniform in 1 .. T, the passes spread evenly over it, any n ids."""
    num = config.num_tokens
    first_B1 = noise.uniform(noise.keys(MASKS, keys_B), 0, 1, torch.float64)
    count_B = ((first_B1[:, 0] + number / config.bound_passes) % 1.0 * num).to(torch.int64).clamp(max=num - 1) + 1
    return noise.lowest(noise.uniform(noise.keys(MASKS, keys_B, number), 0, num), count_B)


def mean_of(passes: list[Modelled]) -> Modelled:
    """The mean of what passes over the same images say."""

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean(0)

    found = Modelled(mean([one.loss for one in passes]), mean([one.nats_B for one in passes]))
    right = [one.right_B for one in passes if one.right_B is not None]
    found.right_B = mean(right) if right else None
    found.parts = {name: mean([one.parts[name] for one in passes]) for name in passes[0].parts}
    return found
