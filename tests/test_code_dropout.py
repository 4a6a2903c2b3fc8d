"""Code dropout: its law, what a decoder sees in place of a code, and that ranks do not change what an image loses."""

from __future__ import annotations

import jobs
import pytest
import torch
from torch import nn

from vqscale import config as configuration
from vqscale.codes import noise
from vqscale.tokenizer.code_dropout import random_kept
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.model import Tokenizer

NET = {"channels": 8, "multipliers": [1, 1], "num_blocks": 1, "z_channels": 6, "num_groups": 4, "attention_levels": []}
FSQ = {"name": "fsq", "levels": [3, 5, 3]}


def tokenizer_of(**keys):
    return Tokenizer.from_config(configuration.parse(TokenizerConfig, {"net": NET, "quantizer": FSQ, **keys}))


def test_every_number_of_codes_is_kept_as_often_and_any_of_them():
    draws = 20_000
    kept_BT = random_kept(noise.keys(5, torch.arange(draws)), (2, 4)).flatten(1)
    number_B = kept_BT.sum(1)
    wanted = draws / 9
    assert ((number_B.bincount(minlength=9) - wanted) ** 2 / wanted).sum() < 26.1  # chi squared of 8, one in a thousand
    of_three = kept_BT[number_B == 3]
    pairs_TT = of_three.double().T @ of_three.double() / len(of_three)
    share = torch.where(torch.eye(8, dtype=torch.bool), 3 / 8, 3 / 8 * 2 / 7)
    assert (pairs_TT - share).abs().max() < 0.05  # four deviations
    uniform = noise.uniform(noise.keys(3, noise.keys(5, torch.arange(draws))), 0, 1)  # the definition, code by code
    assert torch.equal(number_B, sum((1 - i / 9 > uniform[:, 0]).long() for i in range(1, 9)))


def test_what_is_kept_of_an_image_follows_from_its_key_alone():
    keys = noise.keys(1, torch.arange(6))
    assert torch.equal(random_kept(keys, (3, 2))[4:], random_kept(keys[4:], (3, 2)))


def test_a_decoder_sees_zeros_or_the_learned_vector_in_place_of_a_code():
    images, keys = torch.randn(4, 3, 6, 6), noise.keys(2, torch.arange(4))
    kept = random_kept(keys, (3, 3))[:, None]
    for no_code in ("zero", "learned"):
        tokenizer, seen = tokenizer_of(code_dropout="random", no_code=no_code), []
        tokenizer.decoder.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0]))
        z_BDg = tokenizer.eval()(images)[1].z.view(4, 3, 3, 3).movedim(-1, 1)
        torch.testing.assert_close(seen[-1], tokenizer.post_quant_conv(z_BDg))  # without dropout
        out, quantized = tokenizer.train()(images, None, keys)
        dropped = tokenizer.post_quant_conv(torch.zeros(1, 3, 1, 1)) if no_code == "zero" else torch.zeros(1, 6, 1, 1)
        torch.testing.assert_close(seen[-1], torch.where(kept, tokenizer.post_quant_conv(z_BDg), dropped))
        given = tokenizer.reconstruct(quantized.z, (4, 3, 3), None, kept[:, 0])
        torch.testing.assert_close(given, out)
        torch.testing.assert_close(tokenizer.decode(quantized.ids.view(4, 3, 3), kept=kept[:, 0]), out)
        assert not torch.allclose(tokenizer(images)[0], out)  # other codes without keys
    out.sum().backward()
    assert tokenizer.no_code.grad.any()


def test_the_vector_goes_into_a_folder_and_older_tokenizers_have_none(tmp_path):
    plain, learned = tokenizer_of(), tokenizer_of(code_dropout="random", no_code="learned")
    assert "no_code" not in dict(plain.named_parameters())
    nn.init.normal_(learned.no_code)
    again = Tokenizer.load(learned.save(tmp_path / "saved"))
    assert torch.equal(again.no_code, learned.no_code)
    ids, none = torch.zeros(1, 3, 3, dtype=torch.int64), torch.zeros(1, 3, 3, dtype=torch.bool)
    assert torch.equal(again.decode(ids, kept=none), learned.decode(ids, kept=none))
    with pytest.raises(configuration.ConfigError, match="without dropped codes the vector is never met"):
        tokenizer_of(no_code="learned")


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_with_code_dropout_is_the_same_on_any_number_of_processes(tmp_path, tiny_shards):
    dropout = ("tokenizer.code_dropout=random", "tokenizer.no_code=learned", "run.steps=4")
    one, two = (
        jobs.finish(jobs.write_config(tmp_path / str(world), tiny_shards, *dropout), world=world) for world in (1, 2)
    )
    jobs.same_numbers(one, two)
    assert jobs.tensors(one, 4)["parameter/no_code"].any()
