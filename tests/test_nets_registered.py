"""A net of one side that takes a context, registered by its settings and a line in NETS; what tokenizers ask of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from torch import nn

from vqscale import config as configuration
from vqscale import nets
from vqscale.nets.config import NETS, NetSettings
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.model import Tokenizer


@dataclass(frozen=True)
class HintedConfig(NetSettings):
    """Frames of a wave, each seen beside the mean of a hint."""

    module: ClassVar[str] = f"{__name__}:build"
    takes_context: ClassVar[bool] = True
    name: Literal["hinted"] = "hinted"
    """which network"""
    hop: int = 4
    """steps of a frame"""
    in_channels: int = 1
    """channels of a wave"""

    @property
    def strides(self):
        return (self.hop,)

    @property
    def strides_from(self):
        return f"net.hop {self.hop}"


class Side(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, context):
        return self.layer(x + context.mean(dim=(1, 2), keepdim=True))


def build(config, dim):
    encoder = Side(nn.Conv1d(config.in_channels, dim, config.hop, stride=config.hop))
    decoder = Side(nn.ConvTranspose1d(dim, config.in_channels, config.hop, stride=config.hop))
    return nets.Parts(encoder, nn.Identity(), nn.Identity(), decoder, "layer.weight")


@pytest.fixture
def tokenizer(monkeypatch):
    monkeypatch.setitem(NETS, "hinted", f"{__name__}:HintedConfig")
    asked = {"net": {"name": "hinted"}, "quantizer": {"name": "ibq", "num_codes": 7, "dim": 3, "init": "normal"}}
    return Tokenizer.from_config(configuration.parse(TokenizerConfig, asked)).eval()


def test_waves_become_ids_of_one_side_and_waves_again(tokenizer, tmp_path):
    waves, hint = torch.randn(2, 1, 12), torch.randn(2, 3, 5)
    recon, quantized = tokenizer(waves, hint)
    ids = tokenizer.encode(waves, hint)
    assert ids.shape == (2, 3)
    assert torch.equal(ids.flatten(), quantized.ids)
    torch.testing.assert_close(tokenizer.decode(ids, hint), recon)
    assert tokenizer.last_weight is tokenizer.decoder.layer.weight
    again = Tokenizer.load(tokenizer.save(tmp_path / "saved"))
    assert torch.equal(again.decode(ids, hint), tokenizer.decode(ids, hint))
    assert again.fingerprint == tokenizer.fingerprint


def test_encoder_and_decoder_both_see_the_context(tokenizer):
    waves, hint = torch.randn(2, 1, 12), torch.randn(2, 3, 5)
    assert not torch.equal(tokenizer.latents(waves, hint), tokenizer.latents(waves, hint + 1))
    ids = tokenizer.encode(waves, hint)
    assert not torch.equal(tokenizer.decode(ids, hint), tokenizer.decode(ids, hint + 1))


def test_a_context_is_given_where_the_net_takes_one_and_nowhere_else(tokenizer):
    waves = torch.randn(2, 1, 12)
    with pytest.raises(ValueError, match="encodes and decodes with a context, and it was given none"):
        tokenizer.encode(waves)
    with pytest.raises(ValueError, match=r"samples of 10 cannot be cut into tokens of 4, the stride of the net\.hop 4"):
        tokenizer.encode(waves[:, :, :10], waves)
    plain = {"net": {"channels": 8, "multipliers": [1], "num_groups": 4, "attention_levels": []}}
    plain = Tokenizer.from_config(configuration.parse(TokenizerConfig, plain))
    with pytest.raises(ValueError, match=r"conv of this tokenizer takes no context, .* one of shape \(2, 1, 12\)"):
        plain.encode(torch.randn(2, 3, 8, 8), waves)
