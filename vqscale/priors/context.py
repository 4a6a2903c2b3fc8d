"""The context of a tokenizer as the condition of a prior: stage 2 of UViM (2205.10337), from an image to the ids of
what is seen in it.

The tokens of a vision transformer over the image, with blocks, positions and patches of the published design, are
vectors before the first id: of the published "large" 302,311,424 parameters of blocks, 1,048,576 of positions, 787,456
of patches, and of "base" 85,056,000, 786,432 and 590,592. UViM's decoder attends to them across in each block and has
another kind of block for it (402,925,568 in 24 blocks of 1024); here they are a prefix like any other, so that every
prior takes them, with its cache of keys and values, and the blocks are the priors' (308,331,520 in as many, without
adaln). Guidance leads away from a learned prefix; adaln adapts the blocks to the prefix's mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vqscale.nets.config.transformer import TransformerConfig
from vqscale.nets.vit import ImageEncoder
from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis
from vqscale.priors.conditions import Condition
from vqscale.priors.config import IdsConfig
from vqscale.priors.config.conditions import ContextConfig


class Context(Condition):
    """Contexts (B, C, H, W) as P vectors each, and a null prefix."""

    saved_as = "context"

    def __init__(self, config: IdsConfig, net: TransformerConfig) -> None:
        settings = config.condition
        assert isinstance(settings, ContextConfig), "the config names this class"
        super().__init__(settings.dropout)
        self.shape = settings.shape
        self.image_encoder = ImageEncoder(settings)
        self.project = None if settings.width == net.width else nn.Linear(settings.width, net.width)
        self.null = nn.Parameter(torch.empty(net.num_prefix, net.width).normal_(0.0, net.init_scale))

    def of(self, batch: Any) -> Tensor:
        """The context that came with the ids."""
        context = batch.context
        assert context is not None, "a run refuses data without contexts"
        return torch.as_tensor(context)

    def checked(self, condition: Tensor, axis: Axis) -> Tensor:
        wrong = condition.shape[1:] != self.shape or not condition.is_floating_point()
        if not condition.is_meta and int(ops.max_over(torch.tensor(int(wrong), device=condition.device), axis)):
            raise ValueError(
                f"the condition of this prior is a context, floats (B, {', '.join(map(str, self.shape))}) (channels, "
                "image_size, in the condition's config), and on one rank or more it is something else (here "
                f"{str(condition.dtype).removeprefix('torch.')} {list(condition.shape)}): give what the tokenizer's "
                "signal says is the context"
            )
        return condition

    def forward(self, condition: Tensor, null_B: Tensor | None = None) -> Tensor:
        null_BPD = self.null.expand(len(condition), -1, -1)
        if null_B is not None and not self.training and bool(null_B.all()):  # nobody looks at the image
            return null_BPD
        prefix_BPD: Tensor = self.image_encoder(condition)
        if self.project is not None:
            prefix_BPD = self.project(prefix_BPD)
        if null_B is None:  # in training too, for DeepSpeed wants a gradient of every parameter on every rank
            null_B = torch.zeros(len(condition), dtype=torch.bool, device=condition.device)
        return torch.where(null_B[:, None, None], null_BPD, prefix_BPD)

    def summary(self, prefix_BPD: Tensor) -> Tensor:
        return prefix_BPD.mean(1)

    def example(self, count: int) -> Tensor:
        return torch.empty(count, *self.shape)
