"""LPIPS on made weights against its formula, layer after layer; loading; gradients. Never a real distance."""

from __future__ import annotations

import perceptual_files
import pytest
import torch
from torch.nn import functional as F

from vqscale.nets.lpips import LPIPS, load


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return perceptual_files.write(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def lpips(files):
    return load(*files, vgg_sha256=None)


def _formula(one, other):
    """The definition in float64, by the numbers of the layers: taps after features 3, 8, 15, 22 and 29."""
    vgg, heads = perceptual_files.states()
    convolutions = {number for number, _, _ in perceptual_files.CONVOLUTIONS}
    distance = torch.zeros(len(one), dtype=torch.float64)
    mean, deviation = torch.tensor([[-0.03, -0.088, -0.188], [0.458, 0.448, 0.45]], dtype=torch.float64)
    x = (torch.cat([one, other]).double() - mean[:, None, None]) / deviation[:, None, None]
    tap = 0
    for number in range(30):
        if number in convolutions:
            x = F.conv2d(
                x, vgg[f"features.{number}.weight"].double(), vgg[f"features.{number}.bias"].double(), padding=1
            )
        elif number in (4, 9, 16, 23):
            x = F.max_pool2d(x, 2, 2)
        else:
            x = x.clamp(min=0)
        if number in (3, 8, 15, 22, 29):
            a, b = (part / (part.square().sum(1, keepdim=True).sqrt() + 1e-10) for part in x.chunk(2))
            distance += F.conv2d((a - b).square(), heads[f"lin{tap}.model.1.weight"].double()).mean(dim=(1, 2, 3))
            tap += 1
    return distance


def test_it_is_its_formula_per_image(lpips):
    one, other = torch.rand(2, 3, 3, 32, 24) * 2 - 1
    found = lpips(one, other)
    assert found.shape == (3,)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), _formula(one, other), rtol=1e-5, atol=0)
    assert (found > 1e-2).all()
    assert torch.equal(lpips(one, one), torch.zeros(3))
    torch.testing.assert_close(lpips(one[1:2], other[1:2]), found[1:2])  # images do not see each other


def test_modes_change_nothing_and_gradients_go_to_the_images_only(lpips):
    one, other = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    found = lpips(one, other)
    assert torch.equal(lpips.train()(one, other), found)
    other.requires_grad_()
    lpips(one, other).sum().backward()
    assert other.grad.isfinite().all()
    assert (other.grad != 0).any(dim=(1, 2, 3)).all()
    assert all(not p.requires_grad and p.grad is None for p in lpips.parameters())
    # by differences along the gradient, in float64
    direction = torch.nn.functional.normalize(other.grad.flatten(), dim=0).view_as(other).double()
    with torch.no_grad():
        ends = [_formula(one, other.double() + step * direction).sum() for step in (1e-4, -1e-4)]
    assert (ends[0] - ends[1]).item() / 2e-4 == pytest.approx(other.grad.norm().item(), rel=1e-2)


def test_positions_without_features_have_a_gradient():
    """The root of a sum of squares has none at 0, and a dead position would stop a run."""
    lpips = LPIPS()
    for p in lpips.parameters():
        p.data.zero_()
    images = torch.zeros(1, 3, 16, 16, requires_grad=True)
    lpips(torch.ones(1, 3, 16, 16), images).sum().backward()
    assert torch.equal(images.grad, torch.zeros_like(images))


def test_the_network_is_that_of_the_published_files():
    lpips = LPIPS()
    assert sum(p.numel() for name, p in lpips.named_parameters() if name.startswith("features.")) == 14_714_688
    vgg, heads = perceptual_files.states()
    names = {name for name in vgg if name.startswith("features.")} | heads.keys()
    assert lpips.state_dict().keys() == names


def test_files_load_strictly(tmp_path, files):
    vgg, heads = files
    with pytest.raises(
        ValueError, match=r"VGG16 of LPIPS: the sha256 of .*397923af\.\.\. is expected.*download\.pytorch"
    ):
        load(vgg, heads)
    with pytest.raises(ValueError, match=r"linear heads of LPIPS: .*none\.pth does not exist.*lpips 0\.1\.4"):
        load(vgg, tmp_path / "none.pth", vgg_sha256=None)
    with pytest.raises(ValueError, match=r"the sha256 of .* 00ff.* is expected"):
        load(vgg, heads, vgg_sha256=None, heads_sha256="00ff")
    with pytest.raises(ValueError, match=r"5 missing: lin0\.model\.1\.weight.*"):
        load(vgg, vgg, vgg_sha256=None)
    state = torch.load(heads, weights_only=True) | {"lin5.model.1.weight": torch.ones(1, 512, 1, 1)}
    torch.save(state, tmp_path / "more.pth")
    with pytest.raises(ValueError, match=r"1 unknown: lin5\.model\.1\.weight"):
        load(vgg, tmp_path / "more.pth", vgg_sha256=None)


def test_shapes_that_do_not_fit_are_refused(lpips):
    with pytest.raises(ValueError, match=r"at least 16 pixels.*\(1, 3, 8, 16\)"):
        lpips(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))
    with pytest.raises(ValueError, match="two batches of one shape"):
        lpips(torch.zeros(2, 3, 16, 16), torch.zeros(1, 3, 16, 16))
