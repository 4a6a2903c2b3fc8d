"""Which codes a gradient reaches: those that tokens took with VQ, all with IBQ; alone and on processes; the command."""

from __future__ import annotations

import json

import pytest
import torch
from saved_runs import IBQ, small

from vqscale.data.config import ImagesConfig
from vqscale.data.samples import SampleStream
from vqscale.parallel.mesh import Mesh
from vqscale.programs import reach
from vqscale.programs.commands import evaluate

SIDE, K = 16, 61
VQ = {"name": "vq", "num_codes": K, "dim": 8}


def _stream(shards, mesh=None, batch=4):
    config, world = ImagesConfig(str(shards / "val.tar"), image_size=SIDE, num_workers=0), (mesh or Mesh()).world
    return SampleStream(config, batch, world.rank, world.size, train=False)


def _reached(data, codes, shards, settings):
    mesh = Mesh(data, codes)
    return reach.reached(small(mesh, quantizer=settings), _stream(shards, mesh), mesh)


def _first(shards):
    return next(iter(_stream(shards).batches())).samples


@pytest.mark.dist
def test_vq_reaches_what_was_taken_and_ibq_all_on_one_and_two_processes(ranks, tiny_shards):
    taken = small(quantizer=VQ).encode(_first(tiny_shards)).unique().numel() / K
    assert 0 < taken < 1
    for settings, expected in ((VQ, taken), ({**IBQ, "num_codes": K}, 1.0)):
        assert _reached(1, 1, tiny_shards, settings)["reached"] == expected
        for division in ((1, 2), (2, 1)):
            for found in ranks(2, _reached, *division, tiny_shards, settings):
                assert found["reached"] == expected


def test_evenly_is_by_the_norm_of_each_gradient(tiny_shards):
    tokenizer = small(quantizer={**IBQ, "num_codes": K})
    samples = _first(tiny_shards)
    recon, quantized = tokenizer(samples)
    loss = ((recon - samples) ** 2).mean() + sum(quantized.losses.values())
    loss.backward()
    norms = tokenizer.quantizer.codebook.rows.grad.norm(dim=1)
    expected = float((norms >= 0.01 * norms.mean()).double().mean())
    assert reach.reached(tokenizer, _stream(tiny_shards), Mesh())["reached_evenly"] == pytest.approx(expected)


def test_saturated_ibq_is_told_from_ibq(tiny_shards):
    """Codes so far apart that the softmax is 0 or 1 in float32: as few are reached as with VQ, or nearly."""
    tokenizer = small(quantizer={**IBQ, "num_codes": K})
    with torch.no_grad():
        tokenizer.quantizer.codebook.rows.mul_(1e4)
    assert reach.reached(tokenizer, _stream(tiny_shards), Mesh())["reached"] < 1


@pytest.mark.parametrize(
    ("settings", "batch", "said"),
    [
        ({"name": "fsq", "num_codes": 64}, 4, "are none that learn by gradient: leave it out"),
        ({"name": "ema", "num_codes": K, "dim": 8}, 4, "are none that learn by gradient"),
        (VQ, 64, "there are 10 images where 64 are one"),
    ],
)
def test_what_has_no_such_gradients(tiny_shards, tmp_path, capsys, settings, batch, said):
    small(quantizer=settings).save(tmp_path / "saved")
    assert evaluate.main(_words(tmp_path, tiny_shards, batch)) == 2
    assert said in capsys.readouterr().err


def _words(folder, shards, batch):
    words = ["tokenizer", folder / "saved", "--shards", shards / "val.tar", "--image-size", SIDE, "--workers", 0]
    return [str(word) for word in [*words, "--batch", batch, "--device", "cpu", "--reach", "--out", folder / "out"]]


def test_the_command_tells_it(tiny_shards, tmp_path):
    tokenizer = small(quantizer=VQ)
    tokenizer.save(tmp_path / "saved")
    assert evaluate.main(_words(tmp_path, tiny_shards, 4)) == 0
    told = json.loads((tmp_path / "out" / "result.json").read_text())
    assert told["numbers"]["reached"] == tokenizer.encode(_first(tiny_shards)).unique().numel() / K
