"""The Inception of FID: its 566 tensors, its resize and its layers against slow forms, and which files it takes."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch.nn import functional as F

from vqscale.nets import inception
from vqscale.nets.inception import Inception, load, resize


@pytest.fixture(scope="module")
def made():
    """Weights under which no layer dies out."""
    generator = torch.Generator().manual_seed(0)
    network = Inception()
    with torch.no_grad():
        for name, x in network.state_dict().items():
            if name.endswith("conv.weight"):
                x.copy_(torch.randn(x.shape, generator=generator) * (2 / x[0].numel()) ** 0.5)
            elif name.endswith(("bn.weight", "running_var")):
                x.copy_(torch.rand(x.shape, generator=generator) / 2 + 0.75)
            elif name.endswith(("bn.bias", "running_mean")):
                x.copy_(torch.randn(x.shape, generator=generator) / 10)
    return network


@pytest.fixture(scope="module")
def file(made, tmp_path_factory):
    """(path, sha256) of the made weights."""
    path = tmp_path_factory.mktemp("inception") / "made.pth"
    torch.save(made.state_dict(), path)
    with path.open("rb") as opened:
        return path, hashlib.file_digest(opened, "sha256").hexdigest()


def test_the_tensors_are_those_of_the_published_file():
    with torch.device("meta"):
        network = Inception()
    state = network.state_dict()
    assert len(state) == 566
    assert next(iter(state)) == "Conv2d_1a_3x3.conv.weight"
    assert sum(p.numel() for p in network.parameters()) == 23_850_960  # torchvision's 23,834,568 + 8 classes
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5d.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6b.branch7x7dbl_2.conv.weight": (128, 128, 7, 1),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3dbl_1.conv.weight": (448, 1280, 1, 1),
        "Mixed_7c.branch3x3_2b.bn.num_batches_tracked": (),
        "Mixed_7c.branch3x3dbl_3a.conv.weight": (384, 384, 1, 3),
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


@pytest.mark.parametrize(("height", "width", "side"), [(5, 7, 9), (13, 10, 6), (4, 4, 4), (1, 3, 5)])
def test_the_resize_is_tensorflows_of_2015(height, width, side):
    images = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    slow = torch.empty(2, 3, side, side, dtype=torch.float64)
    for y in range(side):
        for x in range(side):
            v, u = y * height / side, x * width / side
            top, left = int(v), int(u)
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            a, b, c, d = (images[:, :, i, j].double() for i in (top, below) for j in (left, right))
            upper, lower = a + (b - a) * (u - left), c + (d - c) * (u - left)
            slow[:, :, y, x] = upper + (lower - upper) * (v - top)
    torch.testing.assert_close(resize(images, side).double(), slow, rtol=0, atol=1e-3)


def test_the_resize_by_hand():
    row = torch.tensor([0, 100], dtype=torch.uint8).view(1, 1, 1, 2)
    assert resize(row, 4)[0, 0, 0].tolist() == [0, 50, 100, 100]  # half pixels would give 0, 25, 75, 100
    assert resize(torch.arange(8).to(torch.uint8).view(1, 1, 1, 8), 2)[0, 0, 0].tolist() == [0, 4]


def slow_features(state, images):
    """The graph written out, layer by layer, from the tensors by name."""

    def conv(name, x, stride=1, padding=0):
        x = F.conv2d(x, state[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, var = state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"]
        scale = state[f"{name}.bn.weight"] / (var + 0.001).sqrt()
        x = (x - mean[:, None, None]) * scale[:, None, None] + state[f"{name}.bn.bias"][:, None, None]
        return x.clamp(min=0)

    def average(x):  # of the neighbours that are inside the image
        ones = torch.ones_like(x[:1, :1])
        kernel = torch.ones(x.shape[1], 1, 3, 3)
        return F.conv2d(x, kernel, padding=1, groups=x.shape[1]) / F.conv2d(ones, kernel[:1], padding=1)

    def chain(block, x, *steps):
        for name, *padding in steps:
            x = conv(f"{block}.{name}", x, padding=tuple(padding) if padding else 0)
        return x

    def fork(block, x, stem):
        return [
            conv(f"{block}.{stem}a", x, padding=(0, 1)),
            conv(f"{block}.{stem}b", x, padding=(1, 0)),
        ]

    x = (resize(images, 299) - 128) / 128
    x = conv("Conv2d_2a_3x3", conv("Conv2d_1a_3x3", x, stride=2))
    x = F.max_pool2d(conv("Conv2d_2b_3x3", x, padding=1), 3, 2)
    x = F.max_pool2d(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x)), 3, 2)
    for b in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        five = chain(b, x, ["branch5x5_1"], ["branch5x5_2", 2, 2])
        three = chain(b, x, ["branch3x3dbl_1"], ["branch3x3dbl_2", 1, 1], ["branch3x3dbl_3", 1, 1])
        x = torch.cat([conv(f"{b}.branch1x1", x), five, three, conv(f"{b}.branch_pool", average(x))], 1)
    three = chain("Mixed_6a", x, ["branch3x3dbl_1"], ["branch3x3dbl_2", 1, 1])
    three = conv("Mixed_6a.branch3x3dbl_3", three, stride=2)
    x = torch.cat([conv("Mixed_6a.branch3x3", x, stride=2), three, F.max_pool2d(x, 3, 2)], 1)
    for b in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        one = conv(f"{b}.branch1x1", x)
        if b == "Mixed_6d":
            spatial = one[:, :7].permute(0, 2, 3, 1).reshape(len(x), -1)
        seven = chain(b, x, ["branch7x7_1"], ["branch7x7_2", 0, 3], ["branch7x7_3", 3, 0])
        double = [
            ["branch7x7dbl_1"],
            *([f"branch7x7dbl_{n}", *((3, 0) if n % 2 == 0 else (0, 3))] for n in range(2, 6)),
        ]
        x = torch.cat([one, seven, chain(b, x, *double), conv(f"{b}.branch_pool", average(x))], 1)
    seven = chain("Mixed_7a", x, ["branch7x7x3_1"], ["branch7x7x3_2", 0, 3], ["branch7x7x3_3", 3, 0])
    three = conv("Mixed_7a.branch3x3_2", conv("Mixed_7a.branch3x3_1", x), stride=2)
    x = torch.cat([three, conv("Mixed_7a.branch7x7x3_4", seven, stride=2), F.max_pool2d(x, 3, 2)], 1)
    for b, pool in (("Mixed_7b", average(x)), ("Mixed_7c", None)):
        pool = F.max_pool2d(x, 3, 1, 1) if pool is None else pool
        once = fork(b, conv(f"{b}.branch3x3_1", x), "branch3x3_2")
        twice = fork(b, chain(b, x, ["branch3x3dbl_1"], ["branch3x3dbl_2", 1, 1]), "branch3x3dbl_3")
        x = torch.cat([conv(f"{b}.branch1x1", x), *once, *twice, conv(f"{b}.branch_pool", pool)], 1)
    pooled = x.mean((2, 3))
    return pooled, spatial, pooled @ state["fc.weight"].T


def test_the_layers_are_those_of_the_graph(made):
    images = torch.randint(0, 256, (2, 3, 40, 33), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    images[1] = images[1, :, :1, :1]
    made.train()  # stays in evaluation: an image's features do not depend on its peers
    found = made(images)
    assert [tuple(x.shape) for x in found] == [(2, 2048), (2, 2023), (2, 1008)]
    for x, expected in zip(found, slow_features(made.state_dict(), images), strict=True):
        assert x.dtype == torch.float32
        assert x.std() > 0.1
        torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_file_is_taken_by_its_checksum_and_marked(file, made, monkeypatch):
    path, digest = file
    with pytest.raises(ValueError, match=rf"sha256 of .* is {digest[:8]}.*6726825d.* is expected.*pytorch-fid"):
        load(path)
    network = load(path, "any")
    assert network.facts == {"file": "made.pth", "sha256": digest, "published": False}
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert all(torch.equal(x, made.state_dict()[name]) for name, x in network.state_dict().items())
    monkeypatch.setattr(inception, "PUBLISHED", digest[:8])
    assert load(path, digest[:10]).facts["published"]


def test_files_that_are_not_its_weights_are_refused(file, tmp_path):
    path, _ = file
    with pytest.raises(ValueError, match=r"does not exist, and nothing is downloaded.*tag fid_weights"):
        load(tmp_path / "none.pth")
    cut = tmp_path / "cut.pth"
    with path.open("rb") as whole:
        cut.write_bytes(whole.read(1 << 20))
    with pytest.raises(ValueError, match=r"cannot be read as weights.*cut off"):
        load(cut, "any")
    torch.save({"fc.weight": torch.zeros(1000, 2048), "AuxLogits.fc.bias": torch.zeros(1)}, cut)
    with pytest.raises(ValueError, match=r"565 missing: Conv2d_1a_3x3.*1 unknown: AuxLogits.*1 of another shape"):
        load(cut, "any")
