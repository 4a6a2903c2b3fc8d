"""The autoregressive prior of LlamaGen (2406.06525) and IBQ (2412.02692): p(ids | c) = prod_i p(id_i | ids before, c).

The sequence is the prefix made of the condition c, then the ids row by row but the last; the vector of each token
predicts the id after it, so an image of h x w ids costs one pass over as many tokens (and the rest of the prefix).

With cluster_weight w the loss of IAR (2501.00880): - log p(id) - w log p(cluster of the id), the logit of a cluster the
log-sum-exp of its members'. As p(cluster) = p(id) / p(id | cluster), the second softmax is over the members alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vqscale.codes import noise
from vqscale.codes.clusters import Clusters
from vqscale.codes.heads import within
from vqscale.codes.heads.base import Losses
from vqscale.codes.heads.flat import Head
from vqscale.nets.decoding import OneToken
from vqscale.nets.transformer import KVCache, Transformer, rotary
from vqscale.parallel.mesh import Mesh
from vqscale.priors.base import NOBODY, Prior
from vqscale.priors.config.autoregressive import AutoregressiveConfig, AutoregressiveSampleConfig
from vqscale.priors.guidance import guidance_scales
from vqscale.priors.modelled import Modelled
from vqscale.seed import derive


class Autoregressive(Prior):
    """One id after the other. See Prior for what is collective and what is random."""

    config: AutoregressiveConfig

    def __init__(self, config: AutoregressiveConfig, mesh: Mesh | None = None, *, seed: int = 0) -> None:
        super().__init__(config, config.net, mesh, seed)
        self.net = Transformer(config.net)
        self.clusters = None
        if config.wants_clusters:
            assert config.num_clusters is not None, "priors.build refuses null"
            self.clusters = Clusters(self.num_codes, config.num_clusters, self.mesh)
        if not torch.empty(0).is_meta:
            self.to(self.mesh.device)

    def states(self, ids_Bhw: Tensor, prefix_BPD: Tensor) -> Tensor:
        """h_BTD, the vectors that predict each of the T ids from those before it and the prefix."""
        x_BTD = torch.cat([prefix_BPD, self.head.embed(self.in_a_row(ids_Bhw)[:, :-1])], 1)
        turns = rotary(self.config.net, self.grid, x_BTD.device)[: x_BTD.shape[1]]
        h_BTD = self.net(x_BTD, turns, self.net.adapt(self.condition.summary(prefix_BPD)))
        return h_BTD[:, self.config.net.num_prefix - 1 :]

    def loss(self, ids_Bhw: Tensor, condition: Tensor, keys_B: Tensor | None = None) -> Modelled:
        return self.modelled(self.states(ids_Bhw, self.prefix(condition, keys_B)), ids_Bhw)

    def losses(self, h_ND: Tensor, ids_N: Tensor, right: bool) -> Losses:
        weight = self.config.cluster_weight
        if not self.training or self.clusters is None:
            return super().losses(h_ND, ids_N, right)
        assert isinstance(self.head, Head), "the config refuses others"
        # (1 + w) times this has 1 + w normalisers, the regularisers as they are, and w logits of the target too many,
        # which the softmax within the cluster takes away again.
        smoothing, z_loss = (share / (1.0 + weight) for share in self.regularisers)
        all_codes = self.head.losses(h_ND, ids_N, label_smoothing=smoothing, z_loss=z_loss, ignore=NOBODY)
        members = within.losses(h_ND, self.head, self.clusters, self.clusters.of(ids_N), ids_N)
        return all_codes._replace(whole_N=(1.0 + weight) * all_codes.whole_N - weight * members.whole_N)

    @property
    def asks_once(self) -> bool:
        return self.clusters is None

    def draw(self, condition: Tensor, settings: AutoregressiveSampleConfig, numbers_B: Tensor, seed: int) -> Tensor:
        scales = guidance_scales(settings.guidance, settings.schedule, self.config.num_tokens)
        guided = any(scale != 1 for scale in scales)
        prefixes = [self.prefix(condition), *([self.prefix(condition, null=True)] if guided else [])]
        sequence, drawn = Incremental(self, prefixes, settings), list[Tensor]()
        positions = torch.arange(len(scales), device=numbers_B.device)
        keys_TB = noise.keys(derive(seed, "sample"), numbers_B, positions[:, None])
        with self.head.laid_out() if settings.packed else nullcontext():
            for keys_B, scale in zip(keys_TB, scales, strict=True):
                h_BD, *null_BD = sequence.advance(drawn[-1] if drawn else None).chunk(1 + guided)
                drawn.append(
                    self.head.sample(
                        h_BD,
                        keys_B,
                        temperature=settings.temperature,
                        top_k=settings.top_k,
                        top_p=settings.top_p,
                        unguided_ND=null_BD[0] if guided else None,
                        guidance=scale,
                    )
                )
        return torch.stack(drawn, 1).unflatten(1, self.grid)


class Incremental:
    """The vectors that predict the next id, id by id, after each of several prefixes of the same images.

    Where settings are `cached` the keys and values of the tokens so far are kept, and where they are `packed` too, what
    follows the prefix is nets/decoding.py's. Not cached, all tokens are computed again: the definition, equal to
    rounding. `precision` bf16 is autocast's over the transformer; fp32 leaves the caller's as it is.
    """

    def __init__(self, prior: Autoregressive, prefixes: list[Tensor], settings: AutoregressiveSampleConfig) -> None:
        self._prior, self._times, self._precision = prior, len(prefixes), settings.precision
        self._tokens_BTD = torch.cat(prefixes)
        net, config = prior.net, prior.config.net
        self._turns = rotary(config, prior.grid, self._tokens_BTD.device)
        self._cache = self._one = None
        with self._rounding():
            self._adapt = net.adapt(prior.condition.summary(self._tokens_BTD))
            if settings.cached:
                length = config.num_prefix + prior.config.num_tokens - 1
                self._cache = KVCache(config, len(self._tokens_BTD), length, self._tokens_BTD)
            if self._cache and settings.packed:
                self._one = OneToken(net, self._turns, self._adapt, self._cache)

    def _rounding(self) -> AbstractContextManager[Any]:
        device = self._tokens_BTD.device.type
        return nullcontext() if self._precision == "fp32" else torch.autocast(device, torch.bfloat16)

    def advance(self, ids_B: Tensor | None = None) -> Tensor:
        """Give the id that was drawn (None at first); returns h of the next, the prefixes one after the other.

        Collective, for the ids are embedded.
        """
        if ids_B is not None:
            new_BTD = self._prior.head.embed(ids_B)[:, None].repeat(self._times, 1, 1)
            self._tokens_BTD = new_BTD if self._cache else torch.cat([self._tokens_BTD, new_BTD], 1)
        first = self._cache.filled if self._cache else 0
        with self._rounding():
            if self._one is not None and first:
                return self._one(self._tokens_BTD[:, 0])
            turns = self._turns[first : first + self._tokens_BTD.shape[1]]
            return self._prior.net(self._tokens_BTD, turns, self._adapt, cache=self._cache)[:, -1]
