"""The transformer against a slow form with complex rotations and one token at a time; its cache, its first values."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vqscale import config as configuration
from vqscale.nets.config.transformer import TransformerConfig
from vqscale.nets.decoding import OneToken
from vqscale.nets.transformer import KVCache, Transformer, rotary, rotate

SMALL = {"width": 24, "num_layers": 2, "num_heads": 3, "ffn_multiple": 8}
DESIGNS = {
    "llamagen": {"prefix_rotary": "zero"},
    "ibq": {"prefix_rotary": "zero", "adaln": True},
    "others": {"adaln": True, "qk_norm": True, "num_prefix": 2, "rotary_base": 50.0, "norm_eps": 0.3},
}
GRID = (2, 3)


def made(name: str, **more) -> Transformer:
    """A transformer whose every part matters: with small first values a wrong gate would hardly show."""
    torch.manual_seed(1)
    net = Transformer(TransformerConfig(**{**SMALL, **DESIGNS[name], **more}))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0.0, 0.3)
    return net.eval()


def inputs(net: Transformer, batch: int = 2):
    torch.manual_seed(2)
    turns = rotary(net.config, GRID)
    return torch.randn(batch, len(turns), net.config.width), turns, torch.randn(batch, net.config.width)


def slow(net: Transformer, x_TD: torch.Tensor, c_D: torch.Tensor, causal: bool) -> torch.Tensor:
    """One sequence, from the formulas."""
    config = net.config

    def norm(x, part, eps=config.norm_eps):
        return torch.stack([v / (v.square().mean() + eps).sqrt() * part.weight for v in x])

    def turned(v_d, token):
        half = config.head_dim // 2
        pairs = torch.view_as_complex(v_d.reshape(-1, 2))
        place = token - config.num_prefix
        if place < 0:
            return v_d * (0.0 if config.prefix_rotary == "zero" else 1.0)
        angles = []
        for coordinate in divmod(place, GRID[1]):
            angles += [coordinate * config.rotary_base ** (-2.0 * i / half) for i in range(half // 2)]
        return torch.view_as_real(pairs * torch.exp(1j * torch.tensor(angles))).flatten()

    for number, block in enumerate(net.blocks):
        adapt = net.adapters[number](c_D[None])[0, :, 0] if config.adaln else None
        g1, g2, s1, s2, b1, b2 = (1, 1, 0, 0, 0, 0) if adapt is None else adapt
        y_TD = norm(x_TD, block.norm_attention) * (1 + s1) + b1
        out = torch.zeros_like(y_TD)
        for head in range(config.num_heads):
            d = config.head_dim
            rows = [block.attention.qkv.weight[part * config.width + head * d :][:d] for part in range(3)]
            q, k, v = (y_TD @ row.t() for row in rows)
            if config.qk_norm:
                q, k = (norm(x, part) for x, part in zip((q, k), block.attention.norms, strict=True))
            for t in range(len(y_TD)):
                seen = range(t + 1) if causal else range(len(y_TD))
                scores = torch.stack([turned(q[t], t) @ turned(k[s], s) for s in seen]) / d**0.5
                out[t, head * d : (head + 1) * d] = scores.softmax(0) @ v[: len(seen)]
        x_TD = x_TD + g1 * (out @ block.attention.out.weight.t())
        y_TD = norm(x_TD, block.norm_ffn) * (1 + s2) + b2
        hidden = F.silu(y_TD @ block.ffn.gate.weight.t()) * (y_TD @ block.ffn.up.weight.t())
        x_TD = x_TD + g2 * (hidden @ block.ffn.down.weight.t())
    h_TD = norm(x_TD, net.norm)
    if not config.adaln:
        return h_TD
    scale, shift = net.adapters[-1](c_D[None])[0, :, 0]
    return h_TD * (1 + scale) + shift


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", DESIGNS)
@torch.no_grad()
def test_it_is_what_the_formulas_say(name, causal):
    net = made(name)
    x_BTD, turns, c_BD = inputs(net)
    h_BTD = net(x_BTD, turns, net.adapt(c_BD), causal=causal)
    for h_TD, x_TD, c_D in zip(h_BTD, x_BTD, c_BD, strict=True):
        torch.testing.assert_close(h_TD, slow(net, x_TD, c_D, causal), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DESIGNS)
@torch.no_grad()
def test_the_cache_changes_nothing(name):
    net = made(name)
    x_BTD, turns, c_BD = inputs(net)
    adapt, whole = net.adapt(c_BD), net(x_BTD, turns, net.adapt(c_BD))
    cache, first = KVCache(net.config, 2, len(turns), x_BTD), net.config.num_prefix + 1
    parts = [net(x_BTD[:, :first], turns[:first], adapt, cache=cache)]
    for t in range(first, len(turns)):
        parts.append(net(x_BTD[:, t : t + 1], turns[t : t + 1], adapt, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("name", DESIGNS)
@torch.no_grad()
def test_one_token_at_a_time_is_what_the_network_says(name, low):
    net = made(name)
    x_BTD, turns, c_BD = inputs(net)
    first = net.config.num_prefix
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        adapt = net.adapt(c_BD)
        cache = KVCache(net.config, 2, len(turns), x_BTD)
        one = OneToken(net, turns, adapt, cache)
        parts = [net(x_BTD[:, :first], turns[:first], adapt, cache=cache)]
        parts += [one(x_BTD[:, t])[:, None] for t in range(first, len(turns))]
    assert cache.filled == len(turns)
    whole = net(x_BTD, turns, net.adapt(c_BD))
    if low:  # rounded, and really so
        assert 1e-5 < (torch.cat(parts, 1) - whole).abs().mean() < 0.05 * whole.abs().mean()
    else:
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_scores_know_the_distance_of_tokens_and_not_their_place():
    config = TransformerConfig(**SMALL)
    turns = rotary(config, (4, 5))[1:].unflatten(0, (4, 5))
    torch.manual_seed(0)
    q, k = torch.randn(2, config.head_dim)

    def score(a, b):
        return rotate(q, turns[a]) @ rotate(k, turns[b])

    assert torch.isclose(score((0, 0), (1, 2)), score((2, 1), (3, 3)), atol=1e-5)
    assert not torch.isclose(score((0, 0), (1, 2)), score((0, 0), (2, 1)), atol=1e-3)


@pytest.mark.parametrize("name", DESIGNS)
def test_recomputing_blocks_gives_the_same_gradients(name):
    found, times = [], []
    for checkpointing in (False, True):
        net = made(name, checkpointing=checkpointing, dropout_ffn=0.3).train()
        net.blocks[0].ffn.register_forward_pre_hook(lambda *_, on=checkpointing: times.append(on))
        x_BTD, turns, c_BD = inputs(net)
        torch.manual_seed(3)
        net(x_BTD, turns, net.adapt(c_BD)).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert times == [False, True, True]


@pytest.mark.parametrize("kind", ["token", "residual", "ffn", "attention"])
@pytest.mark.parametrize("name", ["llamagen", "ibq"])
def test_dropout_is_for_training(name, kind):
    shares = {f"dropout_{each}": 0.0 for each in ("token", "residual", "ffn", "attention")}
    net = made(name, **(shares | {f"dropout_{kind}": 0.5}))
    x_BTD, turns, c_BD = inputs(net)
    once, again = (net(x_BTD, turns, net.adapt(c_BD)) for _ in range(2))
    assert torch.equal(once, again)
    net.train()
    assert not torch.allclose(net(x_BTD, turns, net.adapt(c_BD)), once)


@pytest.mark.parametrize("scale", [None, 0.05])
def test_first_values_are_those_of_the_papers(scale):
    torch.manual_seed(0)
    chosen = {} if scale is None else {"init_scale": scale}
    config = TransformerConfig(width=128, num_layers=1, num_heads=4, adaln=True, adaln_gate_scale=1e-3, **chosen)
    net, scale = Transformer(config), scale or 0.02
    assert float(net.blocks[0].ffn.up.weight.detach().std()) == pytest.approx(scale, rel=0.05)
    parts = net.adapters[0].linear.weight.detach().chunk(6)
    assert [float(part.std()) for part in parts] == pytest.approx([1e-3 * scale] * 2 + [scale / 2] * 4, rel=0.05)
    assert float(net.adapters[1].linear.weight.detach().std()) == pytest.approx(scale / 2, rel=0.05)
    assert all(float(adapter.linear.bias.detach().abs().max()) == 0 for adapter in net.adapters)


def test_in_half_precision_the_residual_stream_and_the_norms_are_not():
    net = made("ibq")
    x_BTD, turns, c_BD = inputs(net)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x_BTD, turns, net.adapt(c_BD))
    assert half.dtype == torch.float32
    assert (half - net(x_BTD, turns, net.adapt(c_BD))).abs().mean() < 0.05
    rounded = x_BTD.bfloat16()
    assert torch.equal(net.norm(rounded), net.norm(rounded.float()))


@pytest.mark.parametrize("on", [False, True])
def test_the_cache_has_the_type_of_autocast(on):
    config = TransformerConfig(**SMALL)
    with torch.autocast("cpu", torch.bfloat16, enabled=on):
        cache = KVCache(config, 2, 5, torch.empty(0))
    k_BSTd = torch.randn(2, config.num_heads, 3, config.head_dim)
    for kept in cache.extend(0, k_BSTd, k_BSTd):
        assert kept.dtype == (torch.bfloat16 if on else torch.float32)
        assert torch.equal(kept, k_BSTd.to(kept.dtype))


def test_hidden_widths_of_the_published_models():
    widths = {768: 2048, 1024: 2816, 1280: 3584, 1536: 4096, 1920: 5120, 3200: 8704}
    assert {width: TransformerConfig(width=width).ffn_width for width in widths} == widths


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"width": 100, "num_heads": 12}, "num_heads.*width 100 cut into num_heads 12"),
        ({"width": 24, "num_heads": 8}, "num_heads.*heads of an even number"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"dropout_ffn": 1.0}, "dropout_ffn is 1.0"),
        ({"widht": 3}, "did you mean width"),
    ],
)
def test_what_cannot_be_built(keys, said):
    with pytest.raises(configuration.ConfigError, match=said):
        configuration.parse(TransformerConfig, keys)
