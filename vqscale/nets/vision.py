"""A frozen vision transformer whose features others learn from: the blocks of vit.py with weights by the names of
DINOv2, which nothing downloads.

    x = [class token, patches of the image] + positions;  features after block l: norm(x_l), the class token left out

An image is resized so that a patch falls on every place that is asked for: features are of the grid of the caller.
Positions were learned for a square; for another grid they are interpolated, as published, with bicubic weights and a
tenth of a place more than there are.

Here the published scale of each branch (ls1, ls2) is multiplied into the last map of the branch, so that the blocks are
the usual ones; their GELU is the exact one. Not here: models with registers or SwiGLU (ViT-g), whose files are refused
by their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqscale.nets.config.vision import VisionConfig
from vqscale.nets.transformer import at_least_float32
from vqscale.nets.vit import NORM_EPS, Block
from vqscale.nets.weights import check_file, check_shapes, read_state

WHAT = "the vision transformer"
WHERE = (
    "get dinov2_vitb14_pretrain.pth, say, of https://github.com/facebookresearch/dinov2 on a machine that may "
    "download, and give its path"
)
_BLOCK = {
    "norm1": "norm_attention",
    "attn.qkv": "qkv",
    "attn.proj": "out",
    "norm2": "norm_mlp",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
}
_SCALES = {"out": "ls1.gamma", "down": "ls2.gamma"}


class Vision(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> features of a grid; frozen: gradients go to the images only."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch, self.side = config.patch, config.image_size // config.patch
        self.first = nn.Parameter(torch.zeros(config.width))
        self.positions = nn.Parameter(torch.zeros(1 + self.side**2, config.width))
        self.patches = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        sizes = (config.width, config.num_heads, config.mlp_width)
        self.blocks = nn.ModuleList(Block(*sizes, gelu="none") for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        # ImageNet's, for images in [-1, 1]; in no file
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1) * 2 - 1, persistent=False)
        deviation = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1) * 2
        self.register_buffer("deviation", deviation, persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, grid: tuple[int, int], layers: Sequence[int]) -> list[Tensor]:
        """After each of these blocks, numbered from 1, the features of a grid: (B, width, *grid)."""
        size = (grid[0] * self.patch, grid[1] * self.patch)
        if tuple(images.shape[2:]) != size:
            images = F.interpolate(at_least_float32(images), size=size, mode="bilinear", antialias=True)
        tokens_BTD = self.patches((images - self.mean) / self.deviation).flatten(2).transpose(1, 2)
        first = self.first.expand(len(images), 1, -1)
        x_BTD = at_least_float32(torch.cat([first.to(tokens_BTD.dtype), tokens_BTD], 1)) + self._positions(grid)
        found = []
        for number, block in enumerate(self.blocks[: max(layers)], start=1):
            x_BTD = block(x_BTD)
            if number in layers:
                found.append(self.norm(x_BTD)[:, 1:].transpose(1, 2).unflatten(2, grid))
        return found

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """(1 + places, width): those of the class token, then of the grid row by row."""
        if grid == (self.side, self.side):
            return self.positions
        square = self.positions[1:].T.unflatten(1, (self.side, self.side))[None]
        scale = tuple((places + 0.1) / self.side for places in grid)
        resized = F.interpolate(square, scale_factor=scale, mode="bicubic")
        return torch.cat([self.positions[:1], resized[0].flatten(1).T])


def published_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a file for such a network."""
    width, wide = config.width, config.mlp_width
    places = 1 + (config.image_size // config.patch) ** 2
    block: dict[str, tuple[int, ...]] = {
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "mlp.fc1.weight": (wide, width),
        "mlp.fc1.bias": (wide,),
        "mlp.fc2.weight": (width, wide),
    }
    vectors = ("norm1.weight", "norm1.bias", "attn.proj.bias", "ls1.gamma", "norm2.weight", "norm2.bias")
    block |= dict.fromkeys((*vectors, "mlp.fc2.bias", "ls2.gamma"), (width,))
    return {
        "cls_token": (1, 1, width),
        "pos_embed": (1, places, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, config.patch, config.patch),
        "patch_embed.proj.bias": (width,),
        **{f"blocks.{n}.{name}": shape for n in range(config.num_layers) for name, shape in block.items()},
        "norm.weight": (width,),
        "norm.bias": (width,),
    }


def check(config: VisionConfig) -> None:
    """ValueError unless the file is there and, where its head tells them, has these names and shapes."""
    check_file(config.weights, what=WHAT, where=WHERE)
    if Path(config.weights).suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(config.weights, framework="pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{WHAT}: {config.weights} cannot be read as weights ({error}): {WHERE}") from None
        check_shapes(published_shapes(config), shapes, what=f"{WHAT} from {config.weights}")


def load(config: VisionConfig) -> Vision:
    """The network with the weights of its file. ValueError where they are not its."""
    given = read_state(config.weights, what=WHAT, where=WHERE, sha256=config.sha256)
    shapes = {name: tuple(x.shape) for name, x in given.items()}
    check_shapes(published_shapes(config), shapes, what=f"{WHAT} from {config.weights}")
    given = {name: x.float() for name, x in given.items()}
    state = {"first": given["cls_token"].flatten(), "positions": given["pos_embed"][0]}
    for kind in ("weight", "bias"):
        state |= {f"patches.{kind}": given[f"patch_embed.proj.{kind}"], f"norm.{kind}": given[f"norm.{kind}"]}
        for n in range(config.num_layers):
            for theirs, ours in _BLOCK.items():
                x = given[f"blocks.{n}.{theirs}.{kind}"]
                scale = given[f"blocks.{n}.{_SCALES[ours]}"] if ours in _SCALES else torch.ones(len(x))
                state[f"blocks.{n}.{ours}.{kind}"] = x * scale.view(-1, *[1] * (x.ndim - 1))
    vision = Vision(config)
    vision.load_state_dict(state)
    return vision


class Held:
    """A frozen vision transformer that is part of no module: what holds it neither trains nor saves it. The file is
    read on the first use; tensors without values (meta) need none."""

    def __init__(self, config: VisionConfig) -> None:
        self.config = config
        self._vision: Vision | None = None

    def __call__(self, images: Tensor, grid: tuple[int, int], layers: Sequence[int]) -> list[Tensor]:
        """As Vision."""
        if images.is_meta:
            with torch.device("meta"):
                return Vision(self.config)(images, grid, layers)
        if self._vision is None:
            self._vision = load(self.config).to(images.device)
        return self._vision(images, grid, layers)
