"""What every prior has: the interface, its vocabulary and condition, guidance, and how it is found and left on disk.

A prior is called with this rank's images and talks to nobody; its head does (codes/heads/base.py). All ranks of a code
group have the same number of images. Not here: how ids are modelled (one file each), and training (train/prior.py).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from vqscale import config as configuration
from vqscale.codes import heads, tally
from vqscale.codes.heads.base import Losses
from vqscale.codes.ids import check_ids
from vqscale.nets.config.transformer import TransformerConfig
from vqscale.nets.mode import evaluating
from vqscale.parallel.mesh import Mesh
from vqscale.priors import conditions
from vqscale.priors.config import GuidedSampleConfig, IdsConfig, Passes, PriorConfig, SampleConfig
from vqscale.priors.modelled import Modelled
from vqscale.priors.positions import Positions
from vqscale.seed import derive
from vqscale.tokenizer import export, saved

NOBODY = torch.iinfo(torch.int64).min  # what the head ignores, so that -1 is an error like any other wrong id


class SampleWarning(UserWarning):
    """Settings that are allowed and hardly meant."""


class Prior(nn.Module, ABC):
    """A distribution of ids (B, *grid) given a condition. `card` has what is known of where weights come from.

    Label smoothing, z_loss, dropout and the dropping of conditions act in training mode only.
    """

    config: Any  # of this prior, an IdsConfig; it names the SampleConfig

    def __init__(self, config: IdsConfig, net: TransformerConfig, mesh: Mesh | None, seed: int) -> None:
        super().__init__()
        self.mesh = mesh or Mesh()
        self.config = config
        self.card: dict[str, Any] = {}
        self.head = heads.build(
            config.head,
            self.num_codes,
            net.width,
            self.mesh,
            seed=derive(seed, "ids"),
            feature_dim=config.feature_dim,
            num_ids=self.num_ids,
        )
        condition = conditions.build(config, net)
        self._condition_name = condition.saved_as
        self.add_module(condition.saved_as, condition)

    @property
    def condition(self) -> conditions.Condition:
        return cast(conditions.Condition, getattr(self, self._condition_name))

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """What init and trained of a run name, as the children that it is made of."""
        one = {"head": "head", "condition": self._condition_name}
        others = tuple(name for name, _ in self.named_children() if name not in one.values())
        return {"network": others} | {part: (name,) for part, name in one.items()}

    @property
    def num_codes(self) -> int:
        assert self.config.num_codes is not None, "priors.build refuses null"
        return self.config.num_codes

    @property
    def num_ids(self) -> int:
        """Ids of a token."""
        assert self.config.num_ids is not None, "priors.build refuses null"
        return int(self.config.num_ids)

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along each side."""
        assert self.config.grid is not None, "priors.build refuses null"
        return tuple(self.config.grid)

    @property
    def num_classes(self) -> int:
        """Conditions that are numbers; 0 where there are none."""
        return self.condition.num_classes

    @property
    def fingerprint(self) -> str:
        """sha256 over the config and every parameter with all rows, the same on any number of ranks; hexadecimal.

        Computed when asked; collective on the code axis."""
        return export.fingerprint(self, self.config)

    @abstractmethod
    def loss(self, ids_Bhw: Tensor, condition: Tensor, keys_B: Tensor | None = None) -> Modelled:
        """The loss of ids int64 (B, *grid), or (B, *grid, num_ids), every one of 0 .. K - 1, given a condition (of
        classes, -1 .. C - 1); collective.

        keys_B (noise.keys) decide what is random per image (dropped conditions, masks), on any number of ranks alike;
        without them torch's generator does, in evaluation mode the place in the batch. Training and the evaluations of
        a run always give them.
        """

    def training_passes(self) -> Passes:
        """Of an image in a step, which is more than forward alone."""
        return Passes(1, self.config.num_tokens)

    @property
    def asks_once(self) -> bool:
        """Whether the loss of a step is `weighted` of the head, and nothing beside it: its gradients may then be made
        with the loss."""
        return True

    def rows_met(self, table: str, num_codes: int) -> float:
        """Rows of a table of outputs that one token is multiplied with."""
        return num_codes

    def sampling_passes(self, settings: Any) -> Passes:
        """Of drawing an image with these settings, but for their guidance, which doubles the network's."""
        return Passes(1, self.config.num_tokens)

    @abstractmethod
    def draw(self, condition: Tensor, settings: Any, numbers_B: Tensor, seed: int) -> Tensor:
        """What `sample` answers, with settings of this prior's SampleConfig; called in evaluation mode, no gradient."""

    def complete(self, ids_Bhw: Tensor, condition: Tensor, settings: Any, numbers_B: Tensor, seed: int) -> Tensor:
        """`draw`, given some of the ids; the others are -1. Of priors that draw in any order; ValueError of others."""
        raise ValueError(
            f"known ids were given, an argument of sample, and the prior {self.config.name} draws all ids in an order "
            "of its own: leave them out, or use a prior that predicts any ids from any others, such as masked"
        )

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        settings: SampleConfig | Mapping[str, Any] | None = None,
        *,
        numbers_B: Tensor,
        seed: int = 0,
        known: Tensor | None = None,
    ) -> Tensor:
        """Draw ids (B, *grid), or (B, *grid, num_ids), for a condition; collective, no gradient, in evaluation mode.

        `settings` are of this prior's own SampleConfig (config.sampling), or a dict of some of its fields; None: all at
        their default. numbers_B number the images over all ranks: (seed, number) decides an image, on any number of
        ranks and in any batch, up to ties within rounding. `known` (B, *grid) has ids that are given and stay as they
        are, and -1 where an id is to be drawn: all ranks give it or none, and a prior that cannot take it refuses it.
        ValueError for settings that are not this prior's.
        """
        chosen = self.sample_config(settings)
        if numbers_B.dim() != 1 or condition.shape[:1] != numbers_B.shape:
            raise ValueError(
                f"conditions have the shape {list(condition.shape)} and numbers_B {list(numbers_B.shape)}, arguments "
                "of sample: give one condition and one number for each image"
            )
        for line in self.remarks(chosen):
            warnings.warn(line, SampleWarning, stacklevel=3)
        with evaluating(self):
            if known is None:
                return self.draw(condition, chosen, numbers_B, seed)
            ids_Bhw = self.checked(known).to(torch.int64)
            check_ids(ids_Bhw.flatten(), -1, self.num_codes, "known ids", self.mesh.codes)
            return self.complete(ids_Bhw, condition, chosen, numbers_B, seed)

    def forward(self, ids_Bhw: Tensor, condition: Tensor, keys_B: Tensor | None = None) -> Modelled:
        return self.loss(ids_Bhw, condition, keys_B)

    @classmethod
    def load(
        cls, path: str | Path, *, mesh: Mesh | None = None, weights: Literal["average", "parameters"] = "average"
    ) -> Prior:
        """The trained prior of a run folder (its newest whole checkpoint), of one of its checkpoint folders, or of a
        folder that `save` wrote; in evaluation mode, on the mesh's device.

        `weights` "average" takes the moving averages of a checkpoint, or the parameters where it has none; a saved
        folder has what was saved. With a mesh it is collective, and a rank reads only its own rows. ValueError on all
        ranks for what cannot be loaded.
        """
        from vqscale import priors

        mesh = mesh or Mesh()
        source = saved.find(path, mesh, weights, task="prior", schema=PriorConfig)
        with torch.random.fork_rng(devices=[]):
            prior = priors.build(source.config, mesh)
        source.fill(prior, mesh)
        prior.card = source.card
        return prior.eval()

    def save(self, folder: str | Path, card: Mapping[str, Any] | None = None) -> Path:
        """Write model.safetensors and card.json, from which `load` gives the same prior to the bit, on any number of
        processes; collective. The rows of all ids are in it, and nothing that only a training wants.

        `card` adds to what is known of the weights. Only rank 0 writes, and no rank holds the rows of all. ValueError
        on all ranks where the folder holds something already.
        """
        return export.write(folder, self, self.config, {**self.card, **(card or {})}, self.mesh, kind="prior")

    def checked(self, ids_Bhw: Tensor) -> Tensor:
        """ids as they are; ValueError where they are not those of an image of the config's grid."""
        several = "" if self.num_ids == 1 else f" with {self.num_ids} ids each (num_ids)"
        if tuple(ids_Bhw.shape[1:]) != self.ids_shape:
            raise ValueError(
                f"ids have the shape {list(ids_Bhw.shape)}, images x grid, but this prior is one of "
                f"{' x '.join(map(str, self.grid))} ids (grid, in its config){several}: give ids of that grid, or "
                "build a prior of another"
            )
        return ids_Bhw

    @property
    def ids_shape(self) -> tuple[int, ...]:
        """Of the ids of an image: the grid, and num_ids where a token has several."""
        return self.grid if self.num_ids == 1 else (*self.grid, self.num_ids)

    def in_a_row(self, ids_Bhw: Tensor) -> Tensor:
        """ids of images as a sequence, the last side fastest: (B, T), or (B, T, num_ids)."""
        return self.checked(ids_Bhw).flatten(1, len(self.grid))

    def modelled(self, h_BTD: Tensor, ids_Bhw: Tensor, weight_BT: Tensor | None = None) -> Modelled:
        """The loss of ids (B, *grid) given the vectors that predict each of them, T = the product of grid; collective.

        weight_BT weighs the tokens in the mean of their image, and the head is not asked about those of weight 0;
        without it all count alike. Where a token has several ids its nats are theirs together, and it is right when all
        of them are.
        """
        at = Positions(h_BTD.shape[:2], weight_BT, self.mesh.codes)
        h_ND, ids_N = at.of(h_BTD), at.of(self.in_a_row(ids_Bhw), NOBODY)
        if self.training:
            total, losses = self.weighted(h_ND, ids_N, at.weights(ids_N))
            return self.told(losses, at, total)
        return self.told(self.losses(h_ND, ids_N, right=tally.statistics.on), at)

    def told(self, losses: Losses, at: Positions, mean: Tensor | None = None) -> Modelled:
        """What is said of a batch, of what a head says of the positions of it; nothing is sent. `mean` is that of the
        losses, where it alone has a gradient."""
        return Modelled.of(losses, at, self.regularisers[1], mean)

    @property
    def regularisers(self) -> tuple[float, float]:
        """(label smoothing, z_loss), which are for training."""
        return (self.config.label_smoothing, self.config.z_loss) if self.training else (0.0, 0.0)

    def losses(self, h_ND: Tensor, ids_N: Tensor, right: bool) -> Losses:
        """What the head says of ids given the vectors that predict them; NOBODY is not asked about. Collective."""
        smoothing, z_loss = self.regularisers
        return self.head.losses(h_ND, ids_N, label_smoothing=smoothing, z_loss=z_loss, ignore=NOBODY, right=right)

    def weighted(self, h_ND: Tensor, ids_N: Tensor, weight_N: Tensor) -> tuple[Tensor, Losses]:
        """(the sum of `losses` times weights, which alone has a gradient; the losses), in training. Collective."""
        if not self.asks_once:
            return self.losses(h_ND, ids_N, right=False).summed(weight_N)
        smoothing, z_loss = self.regularisers
        return self.head.weighted(h_ND, ids_N, weight_N, label_smoothing=smoothing, z_loss=z_loss, ignore=NOBODY)

    def prefix(self, condition: Tensor, keys_B: Tensor | None = None, *, null: bool = False) -> Tensor:
        """The vectors (B, P, D) before the first id: in training of some images the null condition's, with `null` of
        all. Collective. ValueError on all ranks of the code group for what is no condition.
        """
        given = self.condition.checked(condition, self.mesh.codes)
        null_B = given.new_ones(len(given), dtype=torch.bool) if null else self.condition.dropped(given, keys_B)
        vectors: Tensor = self.condition(given, null_B)
        return vectors

    def sample_config(self, given: SampleConfig | Mapping[str, Any] | None = None) -> SampleConfig:
        """These settings as this prior's SampleConfig. ValueError with all that is wrong with them."""
        kind: type[SampleConfig] = self.config.sampling
        if given is None or isinstance(given, Mapping):
            given = configuration.parse(kind, given or {}, source="settings")
        if not isinstance(given, kind):
            raise ValueError(
                f"settings are {type(given).__name__}, and the prior {self.config.name} is sampled as its "
                f"{kind.__name__} says: give one of these, or a dict"
            )
        wrong = [text for _, text in (*given.problems(), *self.config.against(given))]
        if wrong:
            raise ValueError("; ".join(wrong))
        return given

    def remarks(self, settings: SampleConfig) -> list[str]:
        """What follows from settings that are allowed and hardly meant."""
        if not isinstance(settings, GuidedSampleConfig) or settings.guidance == 1:
            return []
        why = self.condition.against_guidance()
        return [f"guidance is {settings.guidance}, but {why}"] if why else []
