"""The shipped configs of masked priors: their sizes to the digit, beside the published ones, and their commands."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from vqscale import config as configuration
from vqscale import priors
from vqscale.codes.rows import set_aside
from vqscale.plan.prior import operations
from vqscale.plan.prior import plan as plan_prior
from vqscale.plan.tokenizer import planned_mesh
from vqscale.priors.config.masked import MaskedConfig, MaskedSampleConfig
from vqscale.priors.mask_laws import left_masked
from vqscale.train.config import Run

PRIORS = Path(__file__).resolve().parents[1] / "configs" / "prior"
# Millions of parameters as Halton-MaskGIT publishes them for K = 16384.
HALTON = {"halton_tiny": 23.0, "halton_small": 69.4, "halton_base": 142.2, "halton_large": 479.7, "halton_XL": 692.1}
MASKGIT = {"maskgit": 1024, **{f"maskgit_fsq_{K}": K for K in (1000, 4375, 15360, 64000)}}


def built(path):
    config = configuration.load(Run, path)
    with torch.device("meta"):
        return config, priors.build(config.prior, planned_mesh(1, 1))


def size(config: MaskedConfig) -> int:
    """Parameters by hand: blocks, the class, places and the mask, one table of ids, the last norm."""
    net, D = config.net, config.net.width
    block = 4 * D * D + 3 * D * net.ffn_width + 2 * D + (2 * net.head_dim if net.qk_norm else 0)
    adapted = (net.num_layers * 6 + 2) * (D * D + D) if net.adaln else 0
    tokens = config.num_codes + config.num_classes + 1 + config.num_tokens + 1
    return net.num_layers * block + adapted + tokens * D + D


@pytest.mark.parametrize("name", [*MASKGIT, *HALTON])
def test_a_header_says_its_parameters_to_the_digit(name):
    path = PRIORS / f"{name}.yaml"
    config, prior = built(path)
    text = path.read_text().replace("\n# ", " ")
    counted = sum(p.numel() for p in prior.parameters())
    assert counted == size(config.prior)
    assert f"{counted:,} parameters" in text
    if name in HALTON:
        assert counted / 1e6 == pytest.approx(HALTON[name], abs=0.1)
        assert f"(published: {HALTON[name]} M)" in text
        assert (config.prior.mask_law, config.prior.unmasked_weight) == ("arccos", 1.0)
    else:
        assert config.prior.num_codes == MASKGIT[name]
        assert (config.prior.net.num_layers, config.prior.net.width, config.prior.net.num_heads) == (24, 768, 16)
    for world in (8, 32, 64):
        config.check_world(world)


def test_maskgit_is_as_large_as_published_but_for_what_its_header_names():
    """A published layer has 13 D biases and norms beside its 12 D^2 weights, ours as many weights and 2 D norms."""
    _, prior = built(PRIORS / "maskgit.yaml")
    assert 172_457_193 - sum(p.numel() for p in prior.parameters()) == (
        24 * (13 - 2) * 768  # biases and norms of the blocks
        + 2 * 768 + 768 * 768 + 768 + 2 * 768 - 768  # norms of the input; dense map and norm before the output
        + 2025  # bias of the output
        + (257 - 256) * 768  # a place for the class
        - 768  # the null class
    )  # fmt: skip


@pytest.mark.parametrize("name", [*MASKGIT, *HALTON])
def test_the_settings_of_its_command_are_settings_of_the_prior(name):
    text = (PRIORS / f"{name}.yaml").read_text().replace("\\\n#", " ")
    (command,) = re.findall(r"tools/sample.py .*", text)
    given = {key.replace("-", "_"): value for key, value in re.findall(r"--([a-z-]+) (\S+)", command)}
    assert given.keys() <= {one.name for one in fields(MaskedSampleConfig)}
    config = configuration.load(Run, PRIORS / f"{name}.yaml").prior
    plain = {key: float(x) if "." in x else int(x) if x.isdigit() else x for key, x in given.items()}
    how = configuration.parse(MaskedSampleConfig, plain)
    assert list(config.against(how)) == []
    assert not (how.guidance != 1 and config.class_dropout == 0)


@pytest.mark.slow
def test_a_plan_prices_training_and_steps_of_sampling():
    config, prior = built(PRIORS / "maskgit_fsq_64000.yaml")
    tables = set_aside(prior)
    found = operations(prior, tables)
    T, D, F, L, K = 257, 768, 2048, 24, 64000
    forward = L * (2 * T * (4 * D * D + 3 * D * F) + 4 * T * T * D)
    assert found["training: transformer"] == 3 * forward
    assert found["sampling, 12 passes: transformer"] == 12 * forward
    assert sum(left_masked("cosine", 256, 12)) == 2076  # published counts
    assert found["sampling, 12 passes: head"] == 2076 * 2 * K * D
    assert found["training: head"] == pytest.approx(6 * 0.809 * 256 * K * D, rel=0.01)  # at least 45 % masked
    assert prior.sampling_passes(MaskedSampleConfig(steps=32, order="halton")) == (32, 256)
    halton = operations(prior, tables, MaskedSampleConfig(steps=32, order="halton", guidance=2.0))
    assert halton["sampling, 32 passes: transformer"] == 2 * 32 * forward
    assert halton["sampling, 32 passes: head"] == 256 * 2 * K * D
    said = plan_prior(config, 8).text()
    assert "GFLOP per image" in said
    assert re.search(r"sampling, 12 passes: transformer +1,1\d\d\.\d{3}", said)
