"""The vision transformers of dense labels: published counts, the one-hot definition, what each side sees."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vqscale import config as configuration
from vqscale import nets
from vqscale.nets import vit
from vqscale.nets.config import NetConfig
from vqscale.nets.config.vit import VitConfig
from vqscale.plan.count import network
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.model import Tokenizer

SMALL = VitConfig(
    labels=(5, 1, 1, 3), image_size=16, patch=4, width=12, encoder_layers=1, decoder_layers=2, num_heads=3, mlp_width=20
)
TASKS = {"depth": (256,), "color": (1, 1, 1), "panoptic": (134, 100)}
PUBLISHED = {  # with VQ in 768 numbers and with FSQ in 5
    "depth": (232_249_600, 231_076_869),
    "color": (132_701_184, 131_528_453),
    "panoptic": (223_593_984, 222_421_253),
}


def small_labels(count=2):
    generator = torch.Generator().manual_seed(1)
    classes = [torch.randint(-1, c + 2, (count, 1, 16, 16), generator=generator) for c in (5, 3)]
    values = torch.randn(count, 2, 16, 16, generator=generator)
    return torch.cat([classes[0], values, classes[1]], 1)


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_the_published_counts_of_every_part(task):
    for dim, wanted in zip((768, 5), PUBLISHED[task], strict=True):
        with torch.device("meta"):
            parts = nets.build(VitConfig(labels=TASKS[task]), dim)
        assert sum(map(size, parts[:4])) == wanted
    assert (size(parts.quant_conv), size(parts.post_quant_conv)) == (3_845, 4_608)
    encoder, decoder = parts.encoder, parts.decoder
    assert size(encoder.context) == size(decoder.context) == 590_592
    assert size(encoder.blocks.blocks[0]) == 7_087_872
    assert (size(encoder.blocks), size(decoder.blocks)) == (42_528_768 + 786_432, 85_056_000 + 786_432)
    one_hot = {"depth": [50_332_416], "color": [590_592], "panoptic": [26_346_240, 19_661_568]}
    outputs = {"depth": [50_397_184], "color": [590_592], "panoptic": [26_379_776, 19_686_400]}
    assert ([*map(size, encoder.labels)], [*map(size, decoder.heads)]) == (one_hot[task], outputs[task])


def test_the_image_encoder_of_stage_2_is_a_published_one():
    with torch.device("meta"):
        assert size(vit.Blocks(0, 24, 1024, 16, 4096)) == 302_311_424


def test_labels_enter_as_a_dense_map_of_their_one_hot_patches():
    encoder, labels = vit.Encoder(SMALL), small_labels()
    with torch.no_grad():
        for parameter in encoder.labels.parameters():
            parameter.normal_()
    known = [F.one_hot(labels[:, k].long() + 1, c + 3).movedim(-1, 1)[:, 1 : c + 1] for k, c in ((0, 5), (3, 3))]
    wanted = 0.0
    for part, channels in zip(encoder.labels, (known[0], labels[:, 1:3], known[1]), strict=True):
        patches_BTP = F.unfold(channels.float(), 4, stride=4).transpose(1, 2)  # (channel, row, column), row by row
        weight = part.weight if hasattr(part, "weight") else part.dense.weight.flatten(1).T
        wanted = wanted + patches_BTP @ weight + (part.bias if hasattr(part, "bias") else part.dense.bias)
    seen = []
    encoder.blocks = nn.Identity()
    encoder.blocks.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    encoder.context = nn.Identity()
    encoder(labels, torch.zeros(2, 16, 12))
    torch.testing.assert_close(seen[0], wanted)


def test_a_class_of_no_number_is_the_one_hot_of_zeros_and_learns_nothing():
    part = vit.ClassPatches(3, 2, 4)
    out = part(torch.full((1, 1, 4, 4), 3.0))
    torch.testing.assert_close(out, part.bias.expand(1, 4, 4))
    out.square().sum().backward()
    assert not part.weight.grad.any()


def test_the_grid_shrinks_with_the_published_weights_and_grows_linearly():
    line = torch.arange(8.0).expand(8, 8)[None, None]
    impulse = torch.zeros(1, 1, 8, 8)
    impulse[..., 4] = 8.0
    assert vit.resized(impulse, 4)[0, 0, 0].tolist() == pytest.approx([0, 1, 3, 0])
    torch.testing.assert_close(vit.resized(line, 4)[0, 0, 0, 1:3], torch.tensor([2.5, 4.5]))
    grown = vit.resized(torch.tensor([0.0, 4.0]).expand(2, 2)[None, None], 4)
    assert grown[0, 0, 0].tolist() == pytest.approx([0, 1, 3, 4])


def test_a_block_is_attention_and_mlp_as_torch_has_them():
    torch.manual_seed(0)
    block, x = vit.Block(12, 3, 20), torch.randn(2, 5, 12)
    twin = nn.MultiheadAttention(12, 3, batch_first=True)
    twin.load_state_dict(
        {
            "in_proj_weight": block.qkv.weight,
            "in_proj_bias": block.qkv.bias,
            "out_proj.weight": block.out.weight,
            "out_proj.bias": block.out.bias,
        }
    )
    y = F.layer_norm(x, (12,), eps=1e-6)
    x1 = x + twin(y, y, y)[0]
    hidden = block.up(F.layer_norm(x1, (12,), eps=1e-6))
    gelu = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(block(x), x1 + block.down(gelu))


def test_outputs_are_pixels_of_their_patch_and_begin_at_zero():
    decoder = vit.Decoder(SMALL)
    latents, context = torch.randn(2, 12, 2, 2), torch.randn(2, 3, 16, 16)
    assert decoder(latents, context).shape == (2, 10, 16, 16)
    assert not decoder(latents, context).any()
    with torch.no_grad():
        for head in decoder.heads:
            head.bias.copy_(torch.arange(len(head.bias)))
    out = decoder(latents, context)
    assert out[0, 6].equal(torch.arange(16.0, 32.0).view(4, 4).repeat(4, 4))  # the second channel of values
    assert out[1, 7].equal(torch.arange(16.0).view(4, 4).repeat(4, 4))  # the first class of the last channel


def test_checkpointing_changes_nothing():
    torch.manual_seed(0)
    plain = nets.build(SMALL, 4)
    again = nets.build(dataclasses.replace(SMALL, checkpointing=True), 4)
    labels, context, grads = small_labels(), torch.randn(2, 3, 16, 16), []
    for parts in (plain, again):
        for mine, whole in zip(parts[:4], plain[:4], strict=True):
            mine.load_state_dict(whole.state_dict())
        out = parts.decoder(parts.post_quant_conv(parts.quant_conv(parts.encoder(labels, context))), context)
        (out - 1).square().mean().backward()
        grads.append([p.grad for part in parts[:4] for p in part.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_a_tokenizer_of_labels_refuses_what_is_not_of_its_size():
    asked = {"signal": {"name": "depth", "num_bins": 5}, "quantizer": {"name": "fsq", "levels": [3, 3]}}
    asked |= {"net": {**configuration.to_dict(SMALL), "labels": [5]}, "latent_norm": "none"}
    tokenizer = Tokenizer.from_config(configuration.parse(TokenizerConfig, asked))
    labels, context = torch.randint(5, (2, 1, 16, 16)).float(), torch.randn(2, 3, 16, 16)
    ids = tokenizer.encode(labels, context)
    assert (ids.shape, tokenizer.decode(ids, context).shape) == ((2, 2, 2), (2, 5, 16, 16))
    with pytest.raises(ValueError, match=r"has learned positions for samples of 16 x 16 .* and these are 32 x 32"):
        tokenizer.encode(torch.zeros(2, 1, 32, 32), context)
    with pytest.raises(ValueError, match=r"images of 3 x 16 x 16 numbers .* was given \[2, 3, 8, 8\]"):
        tokenizer.encode(labels, context[..., :8, :8])
    with pytest.raises(ValueError, match="encodes and decodes with a context, and it was given none"):
        tokenizer.encode(labels)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": ()}, "give the number of classes of each channel"),
        ({"labels": (3, 0)}, r"labels are \[3, 0\]"),
        ({"bottleneck": 3}, "cannot be cut into squares of 12 pixels"),
        ({"num_heads": 5}, "5 heads do not divide a width of 12"),
        ({"encoder_layers": 0}, "encoder_layers is 0"),
    ],
)
def test_what_no_network_can_be_built_from_is_refused(change, says):
    asked = configuration.to_dict(dataclasses.replace(SMALL, **change))
    with pytest.raises(configuration.ConfigError, match=says):
        configuration.parse(NetConfig, asked)


def test_a_plan_counts_both_sides_with_their_context():
    found = network(SMALL, (16, 16), 5)
    tokens, width, mlp, patch = 16, 12, 20, 16
    block = 2 * tokens * width * (4 * width + 2 * mlp) + 4 * tokens * tokens * width
    stems = 2 * tokens * patch * width * (2 * 3 + 2)  # contexts, and two channels of values
    heads = 2 * tokens * width * patch * 10
    assert found.forward == 3 * block + stems + heads + 2 * 2 * 4 * 5 * width
    assert (found.tokens, found.parameters) == (4, sum(map(size, nets.build(SMALL, 5)[:4])))
