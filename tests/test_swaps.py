"""Swapped ids: which, for what, how a decoder is trained on them, and how one is measured that meets them."""

from __future__ import annotations

import json
from functools import partial

import jobs
import pytest
import quantizer_cases
import saved_runs
import torch

from vqscale import config as configuration
from vqscale.codes import noise
from vqscale.codes.swaps import Swaps, random_shares
from vqscale.parallel.mesh import Mesh
from vqscale.programs.commands import evaluate
from vqscale.programs.commands import train as command
from vqscale.train import swapped
from vqscale.train.config import TokenizerRun
from vqscale.train.config.swaps import SwapsConfig

K, IMAGES, TOKENS = quantizer_cases.K, 40, 25


def _ids():
    return torch.randint(K, (IMAGES, TOKENS), generator=torch.Generator().manual_seed(1))


def _near(mesh):
    return Swaps.among_neighbours(quantizer_cases.built("vq", mesh).decode, K, 3, mesh)


def _swapped(data, codes, share):
    """Of this rank's images."""
    mesh = Mesh(data, codes)
    mine = torch.arange(IMAGES).chunk(mesh.world.size)[mesh.world.rank]
    return _near(mesh)(_ids()[mine], noise.keys(7, mine), share)


def test_a_share_of_the_ids_becomes_one_of_their_nearest():
    ids, keys_B, near = _ids(), noise.keys(7, torch.arange(IMAGES)), _near(Mesh())
    z_KD = quantizer_cases.built("vq").decode(torch.arange(K)).double()
    nearest_K3 = torch.cdist(z_KD, z_KD).fill_diagonal_(torch.inf).argsort(1)[:, :3]
    assert torch.equal(near(ids, keys_B, 0.0), ids)
    every = near(ids, keys_B, 1.0)
    assert (every[..., None] == nearest_K3[ids]).any(-1).all()
    assert all((every == nearest_K3[ids][..., place]).float().mean() > 0.25 for place in range(3))
    some = near(ids, keys_B, 0.3)
    moved = some != ids
    assert 0.25 < moved.float().mean() < 0.35
    assert torch.equal(some[moved], every[moved])
    assert (near(ids, keys_B, 0.6) != ids)[moved].all()
    assert torch.equal(near(ids[3:5], keys_B[3:5], 0.3), some[3:5])
    shares_B = random_shares(keys_B, 0.5)
    assert 0 < shares_B.min() < shares_B.max() < 0.5
    by_image = (near(ids, keys_B, shares_B) != ids).double().mean(1)
    assert torch.corrcoef(torch.stack([by_image, shares_B]))[0, 1] > 0.7


def test_any_other_code_is_as_likely_and_never_the_code_itself():
    ids, keys_B = torch.arange(K).repeat(IMAGES, 40), noise.keys(7, torch.arange(IMAGES))
    other = Swaps(K)(ids, keys_B, 1.0)
    assert not (other == ids).any()
    assert torch.bincount(other.flatten(), minlength=K).float().std() < 0.1 * other.numel() / K
    none = torch.zeros(2, 3, dtype=torch.int64)
    assert torch.equal(Swaps(1)(none, keys_B[:2], 1.0), none)


@pytest.mark.dist
def test_the_same_ids_are_swapped_on_any_mesh(ranks):
    alone = _swapped(1, 1, 0.4)
    for data, codes in ((1, 2), (2, 1)):
        assert torch.equal(torch.cat(ranks(2, partial(_swapped, data, codes, 0.4))), alone)


def test_a_decoder_is_given_swapped_codes_in_training_alone():
    tokenizer = saved_runs.small(quantizer={"name": "vq", "num_codes": 20, "dim": 4}).train()
    tokenizer.inputs = swapped.inputs(tokenizer, SwapsConfig(share=1.0, neighbours=2), Mesh())
    images, keys_B = saved_runs.images(4), noise.keys(1, torch.arange(4))
    recon, quantized = tokenizer(images, None, keys_B)
    near = Swaps.among_neighbours(tokenizer.quantizer.decode, 20, 2, Mesh())
    ids = near(quantized.ids.view(4, -1), keys_B, random_shares(keys_B, 1.0))
    assert (ids.flatten() != quantized.ids).any()
    wanted = tokenizer.reconstruct(tokenizer.quantizer.decode(ids.flatten()), tokenizer.grid(images))
    assert torch.equal(recon, wanted)
    tokenizer.eval()
    assert torch.allclose(tokenizer(images)[0], tokenizer.decode(tokenizer.encode(images)), atol=1e-6)


SHORT = ("run.eval_every=9", "run.checkpoint_every=2", "data.val=null", "tokenizer.quantizer.warmup_steps=1")


@pytest.mark.slow
def test_a_run_on_swapped_ids_goes_on_as_one_that_was_not_stopped(tmp_path, tiny_shards):
    first = jobs.write_config(tmp_path / "first", tiny_shards, *SHORT, "run.steps=3")
    assert command.main([str(first)]) == 0
    more = (*SHORT, f"init.from={tmp_path / 'first' / 'run'}", "trained=[decoder]", "swaps={share: 0.5, neighbours: 4}")
    more += ("optim.schedule=constant",)
    whole, cut = (jobs.write_config(tmp_path / name, tiny_shards, *more, "run.steps=4") for name in ("whole", "cut"))
    assert command.main([str(whole)]) == 0
    assert command.main([str(cut), "run.steps=2"]) == 0
    assert command.main([str(cut)]) == 0
    jobs.same_bits(tmp_path / "whole" / "run", tmp_path / "cut" / "run", 4)

    out = tmp_path / "measured"
    words = ["tokenizer", str(tmp_path / "whole" / "run"), "--shards", str(tiny_shards / "val.tar"), "--batch", "4"]
    words += ["--workers", "0", "--swaps", "0.1", "0.9", "--neighbours", "4", "--device", "cpu", "--out", str(out)]
    assert evaluate.main(words) == 0
    numbers = json.loads((out / "result.json").read_text())["numbers"]
    assert {"psnr", "psnr_near_0.1", "psnr_near_0.9", "psnr_any_0.1", "psnr_any_0.9"} <= numbers.keys()
    assert abs(numbers["psnr"] - numbers["psnr_near_0.1"]) < abs(numbers["psnr"] - numbers["psnr_any_0.9"])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["swaps={share: 0.2}"], "use trained: .decoder."),
        (["swaps={share: 0.0}", "init.from=x", "trained=[decoder]"], "use more than 0"),
        (
            ["swaps={}", "init.from=x", "trained=[decoder]", "tokenizer.quantizer={name: residual}"],
            "several codes per token",
        ),
    ],
)
def test_swaps_that_cannot_be_are_refused_with_the_config(tmp_path, tiny_shards, changes, text):
    with pytest.raises(configuration.ConfigError, match=text):
        configuration.load(TokenizerRun, jobs.write_config(tmp_path, tiny_shards, *changes))


def test_shares_that_are_none_are_refused():
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        evaluate.arguments(["tokenizer", "x", "--shards", "y", "--swaps", "1.5"])
