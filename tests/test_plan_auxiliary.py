"""What --dry-run says about LPIPS, the discriminator and the average of the weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from vqscale import config as configuration
from vqscale.plan import costs_of
from vqscale.plan.activations import activation_bytes
from vqscale.plan.auxiliary import auxiliary
from vqscale.train.config import Run

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "configs" / "tokenizer" / "ibq_imagenet256_1024.yaml"
# 4x4 convolutions 3 -> 64 -> 128 -> 256 -> 512 -> 1, biases in the first and the last, a scale and a shift per norm
PATCHGAN = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 64 + 1 + 2 * (128 + 256 + 512)
NORMS = 2 * (128 + 256 + 512)
VGG, HEADS = 14_714_688, 64 + 128 + 256 + 512 + 512


def test_the_published_losses():
    config = configuration.load(Run, PUBLISHED)
    found = auxiliary(config, 2, world=4, dense=1000, rows=30, dim=256)
    assert found.parameters == {"discriminator": PATCHGAN, "LPIPS (frozen)": VGG + HEADS}
    assert found.memory["discriminator"] == 4 * (2 * PATCHGAN + 2 * -(-PATCHGAN // 4))  # ZeRO 1 splits the moments
    assert found.memory["LPIPS"] == 4 * (VGG + HEADS)
    assert found.memory["average of the weights"] == 4 * 280  # of the float32 parameters, which ZeRO 1 divides in bf16
    # ZeRO 1 in bf16: gradients twice by 2 bytes, parameters by 2 but for the gains and biases of norms
    assert list(found.sent.values()) == [pytest.approx(3 / 4 * (6 * PATCHGAN + 2 * NORMS), abs=8)]
    precise = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision="fp32", zero_stage=3))
    whole = auxiliary(precise, 2, world=4, dense=1000, rows=30, dim=256)
    assert list(whole.sent.values()) == [pytest.approx(3 / 4 * 8 * PATCHGAN, abs=8)]  # scattered, and gathered once
    assert whole.memory["average of the weights"] == 4 * 280
    for name in found.memory:
        if name.startswith("activations"):
            assert whole.memory[name] == pytest.approx(2 * found.memory[name], abs=1)
    more = auxiliary(config, 4, world=4, dense=1000, rows=30, dim=256)
    assert sum(v for k, v in more.memory.items() if "activations" in k) > 1.9 * sum(
        v for k, v in found.memory.items() if "activations" in k
    )


def test_a_run_without_them_costs_nothing_more():
    config = configuration.load(Run, ROOT / "configs" / "quickstart" / "tokenizer.yaml")
    found = auxiliary(config, 2, world=4, dense=1000, rows=30, dim=256)
    assert not found.parameters
    assert not found.memory
    assert not found.sent


def test_the_plan_shows_them():
    small = ["data.batch=8", "data.train.image_size=64", "data.val=null", "mesh.codes=4"]
    costs = costs_of(configuration.load(Run, PUBLISHED, small), 8)
    head, *lines = costs.text().splitlines()
    assert head.endswith("data 2 x codes 4 = 8 processes, 16 tokens per rank and micro-batch")
    shown = [tuple(part.strip() for part in line.rpartition("  ")[::2]) for line in lines]
    dense = sum(costs.parameters[name] for name in ("encoder", "quant_conv", "post_quant_conv", "decoder"))
    for name, value in (
        ("discriminator", f"{PATCHGAN:,}"),
        ("LPIPS (frozen)", f"{VGG + HEADS:,}"),
        ("discriminator", f"{4 * (2 * PATCHGAN + 2 * -(-PATCHGAN // 8)) / 2**20:.1f} MiB"),
        ("LPIPS", f"{4 * (VGG + HEADS) / 2**20:.1f} MiB"),
        ("average of the weights", f"{4 * (-(-dense // 8) + 1024 // 4 * 256) / 2**20:.1f} MiB"),  # rows of a rank
        (
            "data axis and ZeRO: gradients, parameters of the discriminator",
            f"{(6 * PATCHGAN + 2 * NORMS) * 7 / 8 / 2**20:.1f} MiB",
        ),
    ):
        assert (name, value) in shown


def test_activations_are_what_the_backward_pass_needs():
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 2, 1))
        image = torch.empty(2, 3, 8, 8)
    # the image for the first weight; the output of the ReLU for its own gradient and for the last weight
    assert activation_bytes(net, image) == 4 * (2 * 3 * 64 + 2 * 5 * 64)
