"""The Inception-v3 that FID is measured with: the network of 2015 whose weights were carried over from TensorFlow.

Its names are those of the file that the field uses (pt_inception-2015-12-05-6726825d.pth, 566 tensors), which is read
from a path and loaded strictly. It differs from the Inception of torchvision in its averages (padding does not count),
in a maximum where the last block has an average, and in 1008 classes. Not here: what is computed from its features
(metrics/fid.py, metrics/generation.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqscale.nets.weights import load_strictly, read_state

PUBLISHED = "6726825d"  # how the sha256 of the published weights begins
ANY = "any"
SIDE = 299
SPATIAL = 7
WHAT = "the Inception of FID"
WHERE = (
    "get pt_inception-2015-12-05-6726825d.pth (96 MB) from the releases of mseitzer/pytorch-fid, tag fid_weights, or "
    "the same file under another name from those of toshas/torch-fidelity, tag v0.2.0, and give its path"
)
PREPROCESSING = "uint8, bilinear to 299 x 299 as in TensorFlow 1 (no half pixels, no antialiasing), (x - 128) / 128"

Kernel = int | tuple[int, int]
Step = tuple[str, int, Kernel]  # name, channels, kernel
Branch = Sequence[Step | tuple[Step, Step]]  # two steps in one place fork: both are taken, side by side


class Features(NamedTuple):
    """What the scores are made of, float32, for N images."""

    pool_ND: Tensor  # (N, 2048): `pool_3` of the graph, for FID, precision and recall
    spatial_ND: Tensor  # (N, 2023): the first 7 channels of `mixed_6/conv`, positions first, for sFID
    logits_NC: Tensor  # (N, 1008): without the bias, as all evaluators do, for the Inception score


class BasicConv2d(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, channels: int, out: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches of convolutions and one of pooling, side by side; their channels one after the other.

    pooled: channels of the 1x1 convolution after a pooling of the same size. None: the last step of every branch and
    the pooling, a maximum, have stride 2 and no padding, so that the sides halve.
    """

    def __init__(
        self, channels: int, branches: Sequence[Branch], pooled: int | None, pool: Literal["average", "max"] = "average"
    ) -> None:
        super().__init__()
        self.pool = pool
        self.branches: list[list[list[str]]] = []
        self.out = channels if pooled is None else pooled
        for branch in branches:
            width, names = channels, list[list[str]]()
            for place, step in enumerate(branch):
                forks: Sequence[Any] = step if isinstance(step[0], tuple) else (step,)
                halve = pooled is None and place == len(branch) - 1
                for name, out, kernel in forks:
                    self.add_module(
                        name, BasicConv2d(width, out, kernel, 2 if halve else 1, 0 if halve else _same(kernel))
                    )
                names.append([name for name, _, _ in forks])
                width = sum(out for _, out, _ in forks)
            self.branches.append(names)
            self.out += width
        self.branch_pool = None if pooled is None else BasicConv2d(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for branch in self.branches:
            y = x
            for names in branch:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            found.append(y)
        return torch.cat([*found, self._pooled(x)], dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.branch_pool is None:
            return F.max_pool2d(x, 3, stride=2)
        if self.pool == "max":
            return self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
        return self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))


def _same(kernel: Kernel) -> Kernel:
    """The padding that keeps the sides."""
    return kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)


def _mixed_5(channels: int, pooled: int) -> Mixed:
    five: Branch = [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)]
    three: Branch = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    return Mixed(channels, [[("branch1x1", 64, 1)], five, three], pooled)


def _mixed_6(seven: int) -> Mixed:
    across, down = (1, 7), (7, 1)
    once: Branch = [("branch7x7_1", seven, 1), ("branch7x7_2", seven, across), ("branch7x7_3", 192, down)]
    sizes: Sequence[Step] = [("1", seven, 1), ("2", seven, down), ("3", seven, across), ("4", seven, down)]
    twice: Branch = [(f"branch7x7dbl_{n}", out, kernel) for n, out, kernel in (*sizes, ("5", 192, across))]
    return Mixed(768, [[("branch1x1", 192, 1)], once, twice], 192)


def _mixed_7(channels: int, pool: Literal["average", "max"]) -> Mixed:
    once: Branch = [
        ("branch3x3_1", 384, 1),
        (("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))),
    ]
    twice: Branch = [
        ("branch3x3dbl_1", 448, 1),
        ("branch3x3dbl_2", 384, 3),
        (("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))),
    ]
    return Mixed(channels, [[("branch1x1", 320, 1)], once, twice], 192, pool)


class Inception(nn.Module):
    """uint8 images (N, 3, H, W) -> Features, in float32 on any device: no autocast, no TF32. Always in evaluation.

    `facts` says which weights these are, and whether they are the published ones: only numbers made with those may
    bear the names of the field. `dims` are the numbers of features.
    """

    dims = (2048, SPATIAL * 17 * 17, 1008)

    def __init__(self) -> None:
        super().__init__()
        self.facts: dict[str, Any] = {"sha256": None, "published": False}
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b = _mixed_5(192, 32)
        self.Mixed_5c = _mixed_5(256, 64)
        self.Mixed_5d = _mixed_5(288, 64)
        three: Branch = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
        self.Mixed_6a = Mixed(288, [[("branch3x3", 384, 3)], three], None)
        self.Mixed_6b = _mixed_6(128)
        self.Mixed_6c = _mixed_6(160)
        self.Mixed_6d = _mixed_6(160)
        self.Mixed_6e = _mixed_6(192)
        seven: Branch = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
                         ("branch7x7x3_4", 192, 3)]  # fmt: skip
        self.Mixed_7a = Mixed(768, [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)], seven], None)
        self.Mixed_7b = _mixed_7(1280, "average")
        self.Mixed_7c = _mixed_7(2048, "max")
        self.fc = nn.Linear(2048, 1008)
        self.train(False)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Inception:
        """It judges and does not learn: statistics of a batch would make an image's features depend on its peers."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        assert images.dtype == torch.uint8, f"Inception takes uint8 images, not {images.dtype}"
        cudnn = torch.backends.cudnn
        with (
            torch.autocast(images.device.type, enabled=False),
            cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False),
        ):
            return self._features((resize(images, SIDE) - 128) / 128)

    def _features(self, x: Tensor) -> Features:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)  # 73 x 73
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)  # 35 x 35
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # 17 x 17
        # `mixed_6/conv` is the ReLU of this branch; it is computed again, for a hundredth of the time
        spatial = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # 8 x 8
        pool = x.mean(dim=(2, 3))
        return Features(pool, spatial, pool @ self.fc.weight.T)


def resize(images: Tensor, side: int) -> Tensor:
    """(N, C, H, W) -> (N, C, side, side) float32: bilinear as in TensorFlow 1 without align_corners.

    Pixel i comes from place i * (old side / new side), between the pixel below it and the next, or the last again.
    Smaller or larger, it looks at two pixels a side: there is no antialiasing.
    """
    return _lerp(_lerp(images.float(), side, dim=3), side, dim=2)


def _lerp(x: Tensor, side: int, dim: int) -> Tensor:
    size = x.shape[dim]
    # in float32, as TensorFlow does
    place = torch.arange(side, dtype=torch.float32) * torch.tensor(size / side, dtype=torch.float32)
    low = place.long().clamp(max=size - 1)
    share = (place - low).to(x.device).view([-1 if d == dim else 1 for d in range(x.dim())])
    before = x.index_select(dim, low.to(x.device))
    after = x.index_select(dim, (low + 1).clamp(max=size - 1).to(x.device))
    return before + (after - before) * share


def load(path: Path | str, sha256: str = PUBLISHED) -> Inception:
    """The network with the weights in a file, whose sha256 must begin with the given digits ("any": whatever it is).

    Weights other than the published ones are marked: scores made with them compare with nobody's. ValueError where the
    file is missing, another, damaged, or does not have exactly the 566 tensors.
    """
    state = read_state(path, what=WHAT, where=WHERE, sha256=None if sha256 == ANY else sha256)
    with torch.device("meta"):  # no first values are drawn: every tensor comes from the file
        inception = Inception()
    inception.to_empty(device="cpu")
    load_strictly(inception, state, what=f"{WHAT} ({path})")
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    inception.facts = {"file": Path(path).name, "sha256": digest, "published": digest.startswith(PUBLISHED)}
    return inception
