"""Coarse-to-fine prediction, CTF (2503.16194): p(ids | c) = p(clusters | c) p(ids | clusters, c).

The cluster of an id is its coarse id (codes/clusters.py). Stage 1 is an autoregressive prior over the G clusters, small
where it is met at every step. Stage 2 sees all coarse ids and predicts all fine ids in one pass, each on its own given
these: N + 1 steps draw an image, and K is met once.

    support: cluster   a fine id is one of the members of its cluster: nats are exact, and no softmax is over K
    support: all       any id: what is drawn may leave its cluster, -log p(coarse) - log p(fine | coarse) are the exact
                       nats of both and a bound of those of the ids

Not said in what is public: the attention of stage 2 (here to all), its support, whether it sees the class, what coarse
ids it is trained on. These are settings. Where a stage is not there its part is uniform: over the clusters, or over
the members of one, so that a run that trains one stage has nats and samples. `join` puts two such runs together.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from vqscale.codes import noise, tally
from vqscale.codes.clusters import Clusters
from vqscale.codes.codebook import Codebook
from vqscale.codes.heads import within
from vqscale.codes.heads.base import Losses
from vqscale.codes.heads.draw import Rule
from vqscale.codes.heads.flat import Head
from vqscale.nets.config.transformer import TransformerConfig
from vqscale.nets.transformer import Transformer, rotary
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.priors.autoregressive import Autoregressive
from vqscale.priors.base import Prior
from vqscale.priors.config import SampleConfig
from vqscale.priors.config.coarse_to_fine import CoarseToFineConfig, CoarseToFineSampleConfig
from vqscale.priors.modelled import Modelled
from vqscale.priors.places import Places
from vqscale.priors.positions import Positions
from vqscale.seed import derive
from vqscale.tokenizer.export import entries

NOISE = 2  # derives the keys of noise from those of images, whose own first number drops their condition
UNIFORM = TransformerConfig(width=2, num_layers=1, num_heads=1)  # of which the width is taken where there is no stage 2


class CoarseToFine(Prior):
    """Clusters one after the other, then all ids at once. See Prior for what is collective and what is random.

    `coarse` is stage 1. The rest is of stage 2, `inputs` its table of coarse ids.
    """

    config: CoarseToFineConfig

    def __init__(self, config: CoarseToFineConfig, mesh: Mesh | None = None, *, seed: int = 0) -> None:
        fine = config.transformers.get("fine")
        super().__init__(config, fine or UNIFORM, mesh, seed)
        assert config.num_clusters is not None, "priors.build refuses null"
        self.num_clusters = config.num_clusters
        self.clusters = Clusters(self.num_codes, self.num_clusters, self.mesh)
        self.coarse = None
        if "coarse" in config.transformers:
            self.coarse = Autoregressive(config.coarse(), self.mesh, seed=derive(seed, "coarse"))
        self.net = None
        if fine is not None:
            self.net = Transformer(fine)
            self.places = Places(config.num_tokens, fine)
            chosen = derive(seed, "coarse ids")
            self.inputs = Codebook(
                self.num_clusters, fine.width, mesh=self.mesh, init_scale=fine.init_scale, seed=chosen
            )
        if not torch.empty(0).is_meta:
            self.to(self.mesh.device)

    def loss(self, ids_Bhw: Tensor, condition: Tensor, keys_B: Tensor | None = None) -> Modelled:
        coarse_Bhw = self.clusters.of(self.checked(ids_Bhw))
        coarse = self._coarse_tokens(coarse_Bhw, condition, keys_B)
        fine = self._fine_tokens(ids_Bhw, coarse_Bhw, condition, keys_B)

        both = Losses(*(a + b for a, b in zip(coarse[:3], fine[:3], strict=True)))
        if coarse.right_N is not None and fine.right_N is not None:
            both = both._replace(right_N=coarse.right_N & fine.right_N)
        at = Positions((len(ids_Bhw), self.config.num_tokens), None, self.mesh.codes)
        found = self.told(both, at)
        if tally.statistics.on:
            found.parts |= {"coarse": coarse.cross_entropy_N.mean(), "fine": fine.cross_entropy_N.mean()}
        return found

    def _coarse_tokens(self, coarse_Bhw: Tensor, condition: Tensor, keys_B: Tensor | None) -> Losses:
        """Of every coarse id given those before it; without the stage they are uniform."""
        asked = tally.statistics.on and not self.training
        coarse_N = coarse_Bhw.flatten()
        if self.coarse is None:
            nats_N = torch.full(coarse_N.shape, math.log(self.num_clusters), device=coarse_N.device)
            return Losses(nats_N, nats_N, torch.zeros_like(nats_N), coarse_N == 0 if asked else None)
        h_BTD = self.coarse.states(coarse_Bhw, self.coarse.prefix(condition, keys_B))
        return self.coarse.losses(h_BTD.flatten(0, 1), coarse_N, asked)

    def _fine_tokens(self, ids_Bhw: Tensor, coarse_Bhw: Tensor, condition: Tensor, keys_B: Tensor | None) -> Losses:
        """Of every fine id given all coarse ones."""
        asked = tally.statistics.on and not self.training
        shown_Bhw = self._noisy(coarse_Bhw, keys_B)
        h_ND = self.states(shown_Bhw, self.prefix(condition, keys_B, null=not self.config.fine_condition)).flatten(0, 1)
        ids_N, coarse_N = ids_Bhw.flatten(), coarse_Bhw.flatten()
        if self.config.support == "all":
            return self.losses(h_ND, ids_N, asked)
        smoothing, z_loss = self.regularisers
        more = {"label_smoothing": smoothing, "z_loss": z_loss}
        return within.losses(h_ND, self._flat, self.clusters, coarse_N, ids_N, **more, right=asked)

    def states(self, coarse_Bhw: Tensor, prefix_BPD: Tensor) -> Tensor:
        """h_BTD, the vectors that predict each of the T fine ids from all coarse ones and the prefix."""
        coarse_BT = coarse_Bhw.flatten(1)
        if self.net is None:  # zeros, that the prefix has to do with, so that every parameter has a gradient
            return (prefix_BPD[:, :1] * 0.0).expand(-1, coarse_BT.shape[1], -1)
        x_BTD = self.inputs.lookup(coarse_BT.flatten()).unflatten(0, coarse_BT.shape)
        x_BTD = torch.cat([prefix_BPD, self.places(x_BTD)], 1)
        turns = rotary(self.config.fine_net, self.grid, x_BTD.device)
        h_BTD = self.net(x_BTD, turns, self.net.adapt(self.condition.summary(prefix_BPD)), causal=False)
        return h_BTD[:, self.config.fine_net.num_prefix :]

    @property
    def _flat(self) -> Head:
        assert isinstance(self.head, Head), "the config refuses others"
        return self.head

    def _noisy(self, coarse_Bhw: Tensor, keys_B: Tensor | None) -> Tensor:
        """In training a share of the coarse ids at random, as the images' keys decide or torch's generator does."""
        share = self.config.coarse_noise
        if not self.training or not share:
            return coarse_Bhw
        if keys_B is None:
            keys_B = torch.randint(2**62, coarse_Bhw.shape[:1], device=coarse_Bhw.device)
        number = self.config.num_tokens
        u_B2T = noise.uniform(noise.keys(NOISE, keys_B), 0, 2 * number)
        other_BT = (u_B2T[:, number:] * self.num_clusters).long().clamp(max=self.num_clusters - 1)
        return torch.where(
            (u_B2T[:, :number] < share).view(coarse_Bhw.shape), other_BT.view(coarse_Bhw.shape), coarse_Bhw
        )

    def draw(self, condition: Tensor, settings: CoarseToFineSampleConfig, numbers_B: Tensor, seed: int) -> Tensor:
        coarse_Bhw = self._drawn_coarse(condition, settings, numbers_B, seed)
        places_T = torch.arange(self.config.num_tokens, device=numbers_B.device)
        keys_N = noise.keys(derive(seed, "fine"), numbers_B[:, None], places_T).flatten()
        guided = settings.fine_guidance != 1
        null = not self.config.fine_condition
        h_ND, *null_ND = (
            self.states(coarse_Bhw, self.prefix(condition, null=away or null)).flatten(0, 1)
            for away in ((False, True) if guided else (False,))
        )
        away_ND, scale = (null_ND[0], settings.fine_guidance) if guided else (None, 1.0)
        rule = Rule(settings.fine_temperature, settings.fine_top_k, settings.fine_top_p)
        if self.config.support == "all":
            ids_N = self.head.drawn(h_ND, keys_N, rule, away_ND, scale, scored=False).ids_N
        else:
            coarse_N = coarse_Bhw.flatten()
            ids_N = within.sample(h_ND, self._flat, self.clusters, coarse_N, keys_N, rule, away_ND, scale)
        return ids_N.view(coarse_Bhw.shape)

    def _drawn_coarse(
        self, condition: Tensor, settings: CoarseToFineSampleConfig, numbers_B: Tensor, seed: int
    ) -> Tensor:
        if self.coarse is not None:
            return self.coarse.draw(condition, settings, numbers_B, seed)
        u_BT = noise.uniform(noise.keys(derive(seed, "sample"), numbers_B), 0, self.config.num_tokens)
        return (u_BT * self.num_clusters).long().clamp(max=self.num_clusters - 1).unflatten(1, self.grid)

    @property
    def asks_once(self) -> bool:
        return False

    def rows_met(self, table: str, num_codes: int) -> float:
        return (
            num_codes / self.num_clusters if (table, self.config.support) == ("head.outputs", "cluster") else num_codes
        )

    def remarks(self, settings: SampleConfig) -> list[str]:
        found = super().remarks(settings)
        assert isinstance(settings, CoarseToFineSampleConfig)
        if settings.fine_guidance == 1:
            return found
        why = self.condition.against_guidance()
        if not self.config.fine_condition:
            why = "the fine stage of this prior does not know the condition (fine_condition false): use fine_guidance 1"
        return [*found, *([f"fine_guidance is {settings.fine_guidance}, but {why}"] if why else [])]


@torch.no_grad()
def join(coarse: CoarseToFine, fine: CoarseToFine) -> CoarseToFine:
    """One prior of two that were trained apart: stage 1 of the first, stage 2 of the second. Collective.

    ValueError on all ranks where they are not of the same ids, classes and clusters.
    """
    keys = ("num_codes", "grid", "condition", "num_classes", "num_clusters")
    differ = [key for key in keys if getattr(coarse.config, key) != getattr(fine.config, key)]
    lacks = [name for name, prior in (("coarse", coarse), ("fine", fine)) if name not in prior.config.transformers]
    if differ or lacks:
        raise ValueError(
            f"these priors cannot be joined: {', '.join([*(f'{key} differs' for key in differ), *lacks])} (the stages "
            "are those of their configs, first the one with coarse, then the one with fine); train them on one cache"
        )
    same = (coarse.clusters.cluster_k == fine.clusters.cluster_k).all().long()
    if not int(ops.min_over(same, fine.mesh.world)):
        raise ValueError("the two stages have other clusters of the codes: train both with the same prior.clusters")
    config = replace(fine.config, stages="both", net=coarse.config.net, coarse_head=coarse.config.coarse_head)
    joined, given = CoarseToFine(config, fine.mesh), entries(fine)
    given |= {name: entry for name, entry in entries(coarse).items() if name.startswith("coarse.")}
    for name, entry in entries(joined).items():
        entry.tensor.copy_(given[name].tensor)
    joined.card = {key: value for key, value in fine.card.items() if coarse.card.get(key) == value}
    return joined.eval()
