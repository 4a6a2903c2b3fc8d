"""Tokenizer: the order of tokens, ids there and back, precision under autocast, and the losses on images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqscale import config as configuration
from vqscale import quantizers
from vqscale.nets.config import ConvConfig
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantized, Quantizer
from vqscale.quantizers.config.tables import IBQConfig
from vqscale.signals import images as losses
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.model import Tokenizer

NET = ConvConfig(
    channels=8, multipliers=(1, 2, 2), num_blocks=1, attention_levels=(2,), z_channels=6, num_groups=4, dropout=0.3
)


class Nearest(Quantizer):
    """The least that is a quantizer: nearest row, straight through, and a record of what it was given."""

    def __init__(self, num_codes: int = 11, dim: int = 3) -> None:
        super().__init__()
        self.dim, self.num_codes = dim, num_codes
        self.rows = nn.Parameter(torch.randn(num_codes, dim))
        self.seen: list[Tensor] = []
        self.autocast: list[bool] = []

    def encode(self, x_ND: Tensor) -> Tensor:
        self.seen.append(x_ND.detach())
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return torch.cdist(x_ND, self.rows).argmin(1)

    def decode(self, ids_N: Tensor) -> Tensor:
        return self.rows[ids_N]

    def begin(self) -> None:
        raise AssertionError("the tokenizer begins no training")

    def update(self) -> list:
        raise AssertionError("the tokenizer updates nothing")

    def forward(self, x_ND: Tensor) -> Quantized:
        ids_N = self.encode(x_ND)
        z_ND = self.rows[ids_N]
        commitment = (x_ND - z_ND.detach()).square().mean() + (x_ND.detach() - z_ND).square().mean()
        return Quantized(x_ND + (z_ND - x_ND).detach(), ids_N, {"commitment": commitment})


@pytest.fixture
def images():
    return torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.fixture
def tokenizer(images):
    """In training mode; its 11 rows are the latents of the first 11 of 12 tokens of the images: ids differ."""
    torch.manual_seed(1)
    tokenizer = Tokenizer(NET, Nearest()).eval()
    with torch.no_grad():
        tokenizer.quantizer.rows.copy_(tokenizer.latents(images)[:11])
    return tokenizer.train()


def test_tokens_are_row_major_per_image(tokenizer, images):
    tokenizer.eval()
    maps = tokenizer.quant_conv(tokenizer.encoder(images))
    assert maps.shape == (2, 3, 2, 3)
    x_ND = tokenizer.latents(images)
    assert x_ND.shape == (12, 3)
    for b in range(2):
        for y in range(2):
            for x in range(3):
                torch.testing.assert_close(x_ND[(b * 2 + y) * 3 + x], maps[b, :, y, x])


def test_forward_is_its_parts(tokenizer, images):
    tokenizer.eval()
    recon, quantized = tokenizer(images)
    rows = tokenizer.quantizer.rows[quantized.ids]
    z = torch.zeros(2, 3, 2, 3)
    for n, row in enumerate(rows):
        z[n // 6, :, n % 6 // 3, n % 3] = row
    assert recon.shape == images.shape
    torch.testing.assert_close(recon, tokenizer.decoder(tokenizer.post_quant_conv(z)))


def test_ids_there_and_back(tokenizer, images):
    tokenizer.eval()
    recon, quantized = tokenizer(images)
    ids = tokenizer.encode(images)
    assert ids.shape == (2, 2, 3)
    assert ids.dtype == torch.int64
    assert ids.flatten()[:11].tolist() == list(range(11))
    assert torch.equal(ids.flatten(), quantized.ids)
    torch.testing.assert_close(tokenizer.decode(ids), recon)


@pytest.mark.parametrize("name", ["vq", "ibq"])
def test_ids_there_and_back_with_a_codebook(images, name):
    tokenizer = Tokenizer(NET, quantizers.build({"name": name, "num_codes": 50, "dim": 4}), "rms").eval()
    recon, quantized = tokenizer(images)
    ids = tokenizer.encode(images)
    assert torch.equal(ids.flatten(), quantized.ids)
    torch.testing.assert_close(tokenizer.decode(ids), recon)


def test_encode_and_decode_in_training_drop_nothing_and_leave_the_modes(tokenizer, images):
    reference = Tokenizer(NET, tokenizer.quantizer)
    reference.load_state_dict(tokenizer.state_dict())
    reference.eval()
    tokenizer.train()
    tokenizer.decoder.mid.eval()
    modes = [part.training for part in tokenizer.modules()]
    noisy = [tokenizer.latents(images) for _ in range(2)]
    assert not torch.equal(*noisy), "dropout should be seen in training, or this test shows nothing"
    ids = tokenizer.encode(images)
    assert torch.equal(ids, reference.encode(images))
    decoded = tokenizer.decode(ids)
    assert torch.equal(decoded, reference.decode(ids))
    assert [part.training for part in tokenizer.modules()] == modes
    assert not decoded.requires_grad


def test_gradients_reach_every_part(tokenizer, images):
    recon, quantized = tokenizer(images)
    (losses.reconstruction(images, recon, "l2") + sum(quantized.losses.values())).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("latent_norm", ["none", "rms", "layer"])
def test_latent_norm(images, latent_norm):
    torch.manual_seed(1)
    tokenizer = Tokenizer(NET, Nearest(), latent_norm).eval()
    x_ND = tokenizer.quant_conv(tokenizer.encoder(images)).permute(0, 2, 3, 1).reshape(12, 3)
    if latent_norm == "layer":
        x_ND = x_ND - x_ND.mean(1, keepdim=True)
    if latent_norm != "none":
        x_ND = x_ND / x_ND.square().mean(1, keepdim=True).add(1e-6).sqrt()
    torch.testing.assert_close(tokenizer.latents(images), x_ND)
    assert not [name for name in tokenizer.state_dict() if "norm" in name.split(".")[0]]


def test_float32_under_autocast(tokenizer, images):
    tokenizer.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recon, quantized = tokenizer(images)
        half = tokenizer.encoder(images)
        assert half.dtype == torch.bfloat16, "the nets should follow the autocast, or this test shows nothing"
        tokenizer.encode(images)
        assert torch.is_autocast_enabled("cpu")
    expected = F.conv2d(half.float(), tokenizer.quant_conv.weight, tokenizer.quant_conv.bias)
    given, given_to_encode = tokenizer.quantizer.seen
    assert given.dtype == given_to_encode.dtype == quantized.z.dtype == recon.dtype == torch.float32
    torch.testing.assert_close(given, expected.permute(0, 2, 3, 1).reshape(12, 3), rtol=1e-6, atol=1e-6)
    assert tokenizer.quantizer.autocast == [False, False]


def test_no_images_give_no_ids(tokenizer):
    """The last batch of an evaluation can be empty on some ranks, which still take part."""
    recon, quantized = tokenizer(torch.zeros(0, 3, 8, 12))
    assert recon.shape == (0, 3, 8, 12)
    assert quantized.ids.shape == (0,)
    assert tokenizer.encode(torch.zeros(0, 3, 8, 12)).shape == (0, 2, 3)


def test_sides_must_divide(tokenizer):
    for call in (tokenizer, tokenizer.latents, tokenizer.encode):
        with pytest.raises(ValueError, match=r"8 x 10 .* 4 x 4.*3 levels"):
            call(torch.zeros(1, 3, 8, 10))


def test_forward_on_the_meta_device():
    with torch.device("meta"):
        recon, quantized = Tokenizer(NET, Nearest())(torch.empty(2, 3, 8, 12))
    assert recon.shape == (2, 3, 8, 12)
    assert quantized.z.shape == (12, 3)


def test_reconstruction_losses():
    x = torch.tensor([[[[0.0, 1.0], [-1.0, 0.5]]]])
    y = torch.tensor([[[[0.5, 1.0], [1.0, 0.0]]]])
    assert losses.reconstruction(x, y, "l1").item() == pytest.approx((0.5 + 0 + 2 + 0.5) / 4)
    assert losses.reconstruction(x, y, "l2").item() == pytest.approx((0.25 + 0 + 4 + 0.25) / 4)
    assert losses.reconstruction(x.bfloat16(), y.bfloat16(), "l1").dtype == torch.float32
    with pytest.raises(ValueError, match=r"'huber'.*l1, l2"):
        losses.reconstruction(x, y, "huber")
    with pytest.raises(ValueError, match="same shape"):
        losses.reconstruction(x, y[0], "l1")


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (torch.tensor([[[0, 11]]]), r"in 0 \.\. 10, for there are 11 codes, but they go from 0 to 11"),
        (torch.tensor([[[-1, 3]]]), r"in 0 \.\. 10, for there are 11 codes, but they go from -1 to 3"),
        (torch.zeros(1, 2, 2), "ids are float32, and ids are whole numbers"),
        (torch.zeros(4, dtype=torch.int64), r"shape \(B, side, side\), and these \(4,\)"),
    ],
    ids=["of another", "empty place", "floats", "flat"],
)
def test_ids_of_no_code_are_refused(ids, text):
    with pytest.raises(ValueError, match=text):
        _of_codes(11).decode(ids)


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(3, 8, 8), torch.zeros(1, 8, 8, 3), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)],
    ids=["one image", "channels last", "bytes"],
)
def test_what_is_no_batch_of_images_is_refused(tokenizer, wrong):
    for call in (tokenizer.encode, tokenizer):
        with pytest.raises(ValueError, match=r"floats of shape \(B, 3, side, side\).*v / 127.5 - 1"):
            call(wrong)


def _of_codes(count, mesh=None):
    config = TokenizerConfig(net=NET, quantizer=configuration.parse(IBQConfig, {"num_codes": count, "dim": 3}))
    return Tokenizer.from_config(config, mesh).eval()


def _decode_elsewhere(axis_size):
    mesh = Mesh(1, axis_size)
    tokenizer = _of_codes(5, mesh)
    ids = torch.full((1, 2, 2), 5 if mesh.codes.rank else 4)
    with pytest.raises(ValueError, match=r"in 0 \.\. 4, for there are 5 codes"):
        tokenizer.decode(ids)
    return True


@pytest.mark.dist
def test_ids_of_no_code_are_refused_on_all_ranks(ranks):
    """One rank that left alone would leave the other waiting for its part of the lookup."""
    assert ranks(2, _decode_elsewhere, 2) == [True, True]
