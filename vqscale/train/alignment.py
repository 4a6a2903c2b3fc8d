"""The loss of codes that a frozen vision model is asked about: one minus the cosine of its features and a map of them.

The map from codes to features is a network with an engine of its own, like a discriminator (beside.py), and a part of
no tokenizer: it first steps on codes without their gradients, then the tokenizer learns against it as it now is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqscale.engine.engine import Engine
from vqscale.nets import vision
from vqscale.nets.config import grid
from vqscale.parallel.mesh import Mesh
from vqscale.seed import derive
from vqscale.train.beside import Beside
from vqscale.train.config import TokenizerRun
from vqscale.train.config.alignment import AlignmentConfig


class Alignment(Beside):
    """The alignment of a run: the frozen model, the map and its engine. Making one is collective. In a checkpoint the
    map is under alignment/, and the frozen model is not there."""

    name = "alignment"

    def __init__(self, config: AlignmentConfig, run: TokenizerRun, dim: int, mesh: Mesh) -> None:
        torch.manual_seed(derive(run.run.seed, "alignment"))
        net = to_features(config, dim).to(mesh.device)
        super().__init__(Engine(net, {}, run.engine, config.optim or run.optim, mesh, run.run.steps))
        self.config, self._net, self._vision = config, run.tokenizer.net, vision.Held(config.vision)

    def distance(self, images: Tensor, z_ND: Tensor) -> Tensor:
        """What the tokenizer minimises, not weighted, after a step of the map: images (B, 3, H, W) and the rows of
        codes of their tokens. Collective."""
        places, step = grid(self._net, images.shape[2:]), self.config.tokens_per_feature
        with torch.no_grad(), self.engine.autocast():
            fewer = (places[0] // step, places[1] // step)
            (maps,) = self._vision(images, fewer, [self.config.after])
        features_ND = maps.float().flatten(2).transpose(1, 2).flatten(0, 1)
        z_BDhw = z_ND.unflatten(0, (len(images), *places)).movedim(-1, 1)
        codes_ND = F.avg_pool2d(z_BDhw, step).movedim(1, -1).flatten(0, 2)
        with self.learning():
            self.engine.backward(apart(self.engine(codes_ND.detach()), features_ND))
            self.engine.step()
        return apart(self.engine(codes_ND), features_ND)


def to_features(config: AlignmentConfig, dim: int) -> nn.Module:
    """The map from codes of `dim` to features."""
    width = config.vision.width
    return nn.Sequential(nn.Linear(dim, config.hidden), nn.SiLU(), nn.Linear(config.hidden, width))


def apart(mapped_ND: Tensor, features_ND: Tensor) -> Tensor:
    """The mean of one minus the cosine of rows, in float32."""
    return 1 - F.cosine_similarity(mapped_ND.float(), features_ND, dim=-1).mean()
