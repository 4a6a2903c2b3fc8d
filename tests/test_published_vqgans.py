"""VQGANs of other projects: a made state dictionary, imported, computes what the restated network computes, and every
name of a full-sized one is known.
"""

from __future__ import annotations

import published
import pytest
import torch
import vqgans
from saved_runs import small
from test_published import run_tool

from vqscale.nets.config import ConvConfig
from vqscale.tokenizer import as_diffusers
from vqscale.tokenizer.export import entries
from vqscale.tokenizer.model import Tokenizer
from vqscale.tokenizer.published import convert

DIMS = {"taming": 256, "llamagen": 8}
NET = {"channels": 32, "multipliers": [1, 2, 2], "num_blocks": 2, "z_channels": 8, "attention_levels": [0, 2]}


def made(family: str, **sizes):
    return published.made(vqgans.shapes(family, **sizes))


def pictures() -> torch.Tensor:
    return torch.rand(1, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.mark.slow
@pytest.mark.parametrize("family", DIMS)
def test_an_imported_vqgan_computes_what_was_published(family, tmp_path):
    state = made(family, ch=32, dim=8, num_codes=300, z=16)
    used = {"quantize.codebook_used": torch.zeros(65536)} if family == "llamagen" else {}
    key = {"taming": "state_dict", "llamagen": "model"}[family]
    torch.save({key: state | used | {"loss.discriminator.main.0.weight": torch.ones(1)}}, tmp_path / "vqgan.pt")
    assert run_tool("--from", family, tmp_path / "vqgan.pt", tmp_path / "out", "--weights", "raw") == 0
    tokenizer = Tokenizer.load(tmp_path / "out").double()
    s = {name: x.double() for name, x in state.items()}
    rows = s["quantize.embedding.weight"]
    if family == "llamagen":
        rows = rows / (rows * rows).sum(1, keepdim=True) ** 0.5
    with torch.no_grad():
        x = vqgans.latents(family, s, pictures())
        x_ND = x.permute(0, 2, 3, 1).flatten(0, 2)
        assert 0.1 < x_ND.std() < 10
        torch.testing.assert_close(tokenizer.latents(pictures()), x_ND, rtol=0, atol=1e-5)
        unit = x_ND / (x_ND * x_ND).sum(1, keepdim=True) ** 0.5 if family == "llamagen" else x_ND
        ids = tokenizer.encode(pictures())
        assert torch.equal(ids.flatten(), ((unit[:, None] - rows) ** 2).sum(2).argmin(1))
        assert len(ids.unique()) > 4
        expected = vqgans.pixels(family, s, rows[ids].permute(0, 3, 1, 2))
        assert 0.1 < expected.std() < 10
        torch.testing.assert_close(tokenizer.decode(ids), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_an_imported_open_magvit2_computes_what_was_published(tmp_path):
    blocks, bits = 2, 18
    state = published.made(vqgans.magvit_shapes(32, bits, blocks))
    torch.save(published.checkpoint(state), tmp_path / "last.ckpt")
    assert run_tool("--from", "open_magvit2", tmp_path / "last.ckpt", tmp_path / "out") == 0
    tokenizer = Tokenizer.load(tmp_path / "out").double()
    s = {name: x.double() for name, x in state.items()}
    with torch.no_grad():
        x = vqgans.magvit_latents(s, pictures(), blocks)
        signs = torch.where(x > 0, 1.0, -1.0).double()
        ids = tokenizer.encode(pictures())
        assert torch.equal(
            ids, ((x > 0) * 2 ** torch.arange(bits)[:, None, None]).sum(1)
        )  # the first channel is lowest
        assert len(ids.unique()) > 4
        expected = vqgans.magvit_pixels(s, signs, blocks)
        assert 0.1 < expected.std() < 10
        torch.testing.assert_close(tokenizer.decode(ids), expected, rtol=0, atol=1e-5)
        one = tokenizer.decode(ids[:, :1, :1])
        assert one.isfinite().all()  # one place has no deviation


@pytest.mark.slow
@pytest.mark.parametrize("family", [*DIMS, "open_magvit2"])
def test_every_name_of_a_full_sized_one_is_known(family):
    if family == "open_magvit2":
        shapes = vqgans.magvit_shapes(128, 18, 4)
    else:
        shapes = vqgans.shapes(family, 128, DIMS[family], 16384)
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tokenizer = convert(state, family, "raw")
    assert tokenizer.quantizer.num_codes == (2**18 if family == "open_magvit2" else 16384)
    assert tokenizer.net.strides == (16, 16)
    assert sum(e.tensor.numel() for e in entries(tokenizer).values()) == sum(x.numel() for x in state.values())


@pytest.mark.slow
@pytest.mark.parametrize("family", vqgans.PROJECTIONS)
def test_every_name_of_a_full_sized_vqmodel_is_read_into_its_place(family):
    """The f4 of latent diffusion with 8192 codes. Tensors of one number each: where it ends up is what was read."""
    sizes = {"ch": 128, "dim": 3, "num_codes": 8192, "z": 3, "levels": (1, 2, 4), "attended": False}
    theirs, ours = vqgans.shapes(family, **sizes), vqgans.shapes("taming", **sizes)
    state = {name: torch.tensor(float(i)).expand(shape) for i, (name, shape) in enumerate(theirs.items())}
    tokenizer = convert(state, "diffusers", "raw")
    assert tokenizer.config.net == ConvConfig(multipliers=(1, 2, 4), num_blocks=2, attention_levels=(), z_channels=3)
    assert (tokenizer.quantizer.num_codes, tokenizer.quantizer.dim) == (8192, 3)
    found = entries(tokenizer)
    assert len(found) == len(ours) == len(theirs)
    for i, (name, shape) in enumerate(ours.items()):
        x = found["quantizer.codebook.rows" if name == "quantize.embedding.weight" else name].tensor
        assert x.shape == shape
        assert (x == i).all(), name
    del state[f"decoder.mid_block.attentions.0.{vqgans.PROJECTIONS[family][-1]}.bias"]
    with pytest.raises(ValueError, match=r"1 missing: decoder\.mid\.attn_1\.proj_out\.bias; 1 unknown: teacher"):
        convert(state | {"teacher": torch.ones(1)}, "diffusers", "raw")


@pytest.mark.parametrize("quantizer", ["vq", "ema"])
def test_what_diffusers_has_comes_back_as_it_left(quantizer):
    codes = {"name": quantizer, "num_codes": 11, "dim": 5}
    tokenizer = small(net={**NET, "num_groups": 32}, quantizer=codes, latent_norm="none")
    back = convert(as_diffusers.export(tokenizer).tensors, "diffusers", "raw")
    assert back.config.net == tokenizer.config.net
    ours, theirs = entries(tokenizer), entries(back)
    assert ours.keys() == theirs.keys()
    for name, entry in ours.items():
        assert torch.equal(theirs[name].tensor, entry.tensor), name


@pytest.mark.parametrize("family", DIMS)
def test_what_is_missing_unknown_or_double_is_said(family):
    state = made(family, ch=32, dim=8, num_codes=5, z=16)
    other = next(f for f in DIMS if f != family)
    with pytest.raises(ValueError, match="these are other weights"):
        convert(state, other, "raw")
    del state["decoder.conv_out.bias"]
    with pytest.raises(ValueError, match=r"1 missing: decoder.conv_out.bias; 1 unknown: teacher"):
        convert(state | {"teacher": torch.ones(1)}, family, "raw")
    with pytest.raises(ValueError, match=r"no averaged weights .*--weights raw"):
        convert(state, family)


def test_a_name_that_two_rules_give_is_refused():
    state = made("llamagen", ch=32, dim=8, num_codes=5, z=16)
    twice = {**state, "decoder.conv_norm_out.weight": state["decoder.norm_out.weight"]}
    with pytest.raises(ValueError, match=r"two tensors of the file are decoder\.norm_out\.weight"):
        convert(twice, "diffusers", "raw")
