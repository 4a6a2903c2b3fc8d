"""The published tokenizers of speech once more, for tests: as functions of a state dictionary with the published names,
and made dictionaries with all names that a checkpoint has.

Like published.py written from the description alone: products and sums, a step of the LSTM at a time, the transform by
its definition.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def conv(s, name: str, x: Tensor, stride: int = 1, left: int = 0, right: int = 0, mirror: bool = False) -> Tensor:
    """(B, c, L) -> (B, out, l), of plain weights or of those in two parts."""
    v = s.get(f"{name}.weight_v")
    weight = (
        s[f"{name}.weight"] if v is None else s[f"{name}.weight_g"] * v / v.square().sum((1, 2), keepdim=True) ** 0.5
    )
    ends = (x[..., 1 : left + 1].flip(-1), x[..., x.shape[-1] - right - 1 : -1].flip(-1))
    if not mirror:
        ends = (x.new_zeros(*x.shape[:2], left), x.new_zeros(*x.shape[:2], right))
    windows = torch.cat([ends[0], x, ends[1]], -1).unfold(2, weight.shape[2], stride)
    return torch.einsum("bclk,ock->bol", windows, weight) + s[f"{name}.bias"][:, None]


def padded(s, name: str, x: Tensor, stride: int = 1, causal: bool = True) -> Tensor:
    """A convolution of the encoder, of signals that are long enough to be mirrored."""
    both = s[f"{name}.weight_v"].shape[2] - stride
    right = (0 if causal else both // 2) + (-x.shape[2]) % stride
    return conv(s, name, x, stride, both - (0 if causal else both // 2), right, mirror=True)


def elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.exp(x) - 1)


def lstm(s, name: str, x: Tensor) -> Tensor:
    frames = list(x.unbind(2))
    for layer in (0, 1):
        w, u, b, c = (s[f"{name}.{part}_l{layer}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        hidden = cell = torch.zeros_like(frames[0])
        for t, frame in enumerate(frames):
            i, f, g, o = (frame @ w.T + b + hidden @ u.T + c).chunk(4, 1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            hidden = torch.sigmoid(o) * torch.tanh(cell)
            frames[t] = hidden
    return x + torch.stack(frames, 2)


def level(s, name: str, x: Tensor, causal: bool = True) -> Tensor:
    h = padded(s, f"{name}.block.1.conv.conv", elu(x), causal=causal)
    return conv(s, f"{name}.shortcut.conv.conv", x) + conv(s, f"{name}.block.3.conv.conv", elu(h))


def latents(s, waves: Tensor, prefix: str = "encoder.model.", causal: bool = True) -> Tensor:
    x = padded(s, f"{prefix}0.conv.conv", waves, causal=causal)
    for i, stride in zip((1, 4, 7, 10), (2, 4, 5, 8), strict=True):
        x = level(s, f"{prefix}{i}", x, causal)
        x = padded(s, f"{prefix}{i + 2}.conv.conv", elu(x), stride, causal)
    return padded(s, f"{prefix}15.conv.conv", elu(lstm(s, f"{prefix}13.lstm", x)), causal=causal)


def spread(s, name: str, x: Tensor, stride: int) -> Tensor:
    """(B, c, n) -> (B, out, n stride): every number adds its kernel of two strides; what is after the last is cut."""
    g, v = s[f"{name}.weight_g"], s[f"{name}.weight_v"]
    weight = g * v / v.square().sum((1, 2), keepdim=True) ** 0.5
    n, kernel = x.shape[2], weight.shape[2]
    whole = x.new_zeros(len(x), weight.shape[1], (n + 1) * stride)
    for t in range(n):
        whole[:, :, t * stride : t * stride + kernel] += torch.einsum("bc,cok->bok", x[:, :, t], weight)
    return whole[:, :, : n * stride] + s[f"{name}.bias"][:, None]


def mirrored_waves(s, z: Tensor) -> Tensor:
    """(B, dim, n) codes -> (B, 1, 320 n), by EnCodec's decoder."""
    x = lstm(s, "decoder.model.1.lstm", padded(s, "decoder.model.0.conv.conv", z))
    for i, stride in zip((3, 6, 9, 12), (8, 5, 4, 2), strict=True):
        x = level(s, f"decoder.model.{i + 1}", spread(s, f"decoder.model.{i}.convtr.convtr", elu(x), stride))
    return padded(s, "decoder.model.15.conv.conv", elu(x))


def refined(books: list[Tensor], x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """(ids (N, levels), codes (N, D)) of a residual quantizer with these rows."""
    ids, z_ND = [], torch.zeros_like(x_ND)
    for rows in books:
        ids.append(torch.cdist(x_ND - z_ND, rows).argmin(1))
        z_ND = z_ND + rows[ids[-1]]
    return torch.stack(ids, 1), z_ND


def group_normed(s, name: str, x: Tensor) -> Tensor:
    groups = x.reshape(x.shape[0], 32, -1)
    away = groups - groups.mean(2, keepdim=True)
    flat = (away / (away.square().mean(2, keepdim=True) + 1e-6) ** 0.5).reshape(x.shape)
    return flat * s[f"{name}.weight"][:, None] + s[f"{name}.bias"][:, None]


def layer_normed(s, name: str, x: Tensor) -> Tensor:
    """Over the channels of (B, c, n); of a scale and a shift of four, the first."""
    away = x - x.mean(1, keepdim=True)
    flat = away / (away.square().mean(1, keepdim=True) + 1e-6) ** 0.5
    adaptive = s.get(f"{name}.scale.weight")
    scale = s[f"{name}.weight"] if adaptive is None else adaptive[0]
    shift = s[f"{name}.bias"] if adaptive is None else s[f"{name}.shift.weight"][0]
    return flat * scale[:, None] + shift[:, None]


def swish(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def residual(s, name: str, x: Tensor) -> Tensor:
    h = conv(s, f"{name}.conv1", swish(group_normed(s, f"{name}.norm1", x)), left=1, right=1)
    return x + conv(s, f"{name}.conv2", swish(group_normed(s, f"{name}.norm2", h)), left=1, right=1)


def attention(s, name: str, x: Tensor) -> Tensor:
    h = group_normed(s, f"{name}.norm", x)
    q, k, v = (conv(s, f"{name}.{part}", h) for part in "qkv")
    weights = torch.exp(torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5)
    weights = weights / weights.sum(2, keepdim=True)
    return x + conv(s, f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v))


def waves(s, z: Tensor, hop: int = 320) -> Tensor:
    """(B, dim, n) codes -> (B, 1, n hop)."""
    x = conv(s, "backbone.embed", z, left=3, right=3)
    for i in range(5):
        x = (attention if i == 2 else residual)(s, f"backbone.pos_net.{i}", x)
    x = layer_normed(s, "backbone.norm", group_normed(s, "backbone.pos_net.5", x))
    i = 0
    while f"backbone.convnext.{i}.gamma" in s:
        name = f"backbone.convnext.{i}"
        windows = torch.nn.functional.pad(x, (3, 3)).unfold(2, 7, 1)
        h = torch.einsum("bcnk,ck->bcn", windows, s[f"{name}.dwconv.weight"][:, 0]) + s[f"{name}.dwconv.bias"][:, None]
        h = layer_normed(s, f"{name}.norm", h).transpose(1, 2)
        h = h @ s[f"{name}.pwconv1.weight"].T + s[f"{name}.pwconv1.bias"]
        h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
        h = s[f"{name}.gamma"] * (h @ s[f"{name}.pwconv2.weight"].T + s[f"{name}.pwconv2.bias"])
        x, i = x + h.transpose(1, 2), i + 1
    frames = layer_normed(s, "backbone.final_layer_norm", x).transpose(1, 2) @ s["head.out.weight"].T
    return inverse(frames + s["head.out.bias"], hop)


def inverse(numbers: Tensor, hop: int) -> Tensor:
    length, n = 4 * hop, numbers.shape[1]
    m, p = numbers.split(2 * hop + 1, 2)
    size = torch.exp(m).clip(max=100)
    t, k = torch.arange(length), torch.arange(2 * hop + 1)
    twice = torch.where((k == 0) | (k == 2 * hop), 1.0, 2.0).to(m.dtype)
    turn = 2 * math.pi * ((t[:, None] * k) % length).to(m.dtype) / length
    # the real part of the sum over all frequencies; of the first and the last only the real part counts
    real, imaginary = size * torch.cos(p) * twice, size * torch.sin(p) * torch.where(twice == 1, 0.0, 2.0)
    pieces = (real @ torch.cos(turn).T - imaginary @ torch.sin(turn).T) / length
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * t.to(m.dtype) / length)
    wave, weight = m.new_zeros(len(m), (n - 1) * hop + length), m.new_zeros((n - 1) * hop + length)
    for i in range(n):
        wave[:, i * hop : i * hop + length] += pieces[:, i] * window
        weight[i * hop : i * hop + length] += window**2
    cut = slice(3 * hop // 2, 3 * hop // 2 + n * hop)
    return (wave[:, cut] / weight[cut])[:, None]


def codes(s) -> Tensor:
    return s["quantize.embedding.weight"] @ s["quantize.embedding_proj.weight"].T + s["quantize.embedding_proj.bias"]


def used_shapes(
    num_codes: int, channels=32, dim=512, width=768, hidden=2304, blocks=12, parts=True, strides=(2, 4, 5, 8)
):
    """Names and shapes of what is called: of the encoder `encoder.model.*`, backbone and head, and (`parts`) SimVQ."""
    shapes: dict[str, tuple[int, ...]] = {}

    def normed(name, out, into, kernel):
        shapes.update(
            {f"{name}.bias": (out,), f"{name}.weight_g": (out, 1, 1), f"{name}.weight_v": (out, into, kernel)}
        )

    def plain(name, *shape):
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    c = channels
    normed("encoder.model.0.conv.conv", c, 1, 7)
    for i, stride in zip((1, 4, 7, 10), strides, strict=True):
        normed(f"encoder.model.{i}.block.1.conv.conv", c // 2, c, 3)
        normed(f"encoder.model.{i}.block.3.conv.conv", c, c // 2, 1)
        normed(f"encoder.model.{i}.shortcut.conv.conv", c, c, 1)
        normed(f"encoder.model.{i + 2}.conv.conv", 2 * c, c, 2 * stride)
        c *= 2
    for layer in (0, 1):
        for part in ("ih", "hh"):
            shapes[f"encoder.model.13.lstm.weight_{part}_l{layer}"] = (4 * c, c)
            shapes[f"encoder.model.13.lstm.bias_{part}_l{layer}"] = (4 * c,)
    normed("encoder.model.15.conv.conv", dim, c, 7)
    plain("backbone.embed", width, dim, 7)
    for name in ("norm", "final_layer_norm"):
        plain(f"backbone.{name}", width)
    for i in (0, 1, 3, 4):
        for j in (1, 2):
            plain(f"backbone.pos_net.{i}.norm{j}", width)
            plain(f"backbone.pos_net.{i}.conv{j}", width, width, 3)
    plain("backbone.pos_net.2.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        plain(f"backbone.pos_net.2.{part}", width, width, 1)
    plain("backbone.pos_net.5", width)
    for i in range(blocks):
        name = f"backbone.convnext.{i}"
        shapes[f"{name}.gamma"] = (width,)
        plain(f"{name}.dwconv", width, 1, 7)
        plain(f"{name}.norm", width)
        plain(f"{name}.pwconv1", hidden, width)
        plain(f"{name}.pwconv2", width, hidden)
    plain("head.out", 4 * math.prod(strides) + 2, width)
    if parts:
        shapes["quantize.embedding.weight"] = (num_codes, dim)
        plain("quantize.embedding_proj", dim, dim)
    return shapes


def encodec_shapes(channels=32, dim=128, num_codes=1024, levels=32):
    """Names and shapes of EnCodec's model of 24 kHz, in its own package."""
    encoder = used_shapes(1, channels, dim, parts=False)
    shapes = {name: shape for name, shape in encoder.items() if name.startswith("encoder.")}

    def normed(name, out, first, into, kernel):
        shapes.update(
            {f"{name}.bias": (out,), f"{name}.weight_g": (first, 1, 1), f"{name}.weight_v": (first, into, kernel)}
        )

    def like(name, other):
        found = {f"{name}{key.removeprefix(other)}": shape for key, shape in encoder.items() if key.startswith(other)}
        shapes.update(found)

    c = 16 * channels
    normed("decoder.model.0.conv.conv", c, c, dim, 7)
    like("decoder.model.1.", "encoder.model.13.")
    for i, other, stride in ((3, 10, 8), (6, 7, 5), (9, 4, 4), (12, 1, 2)):
        normed(f"decoder.model.{i}.convtr.convtr", c // 2, c, c // 2, 2 * stride)
        like(f"decoder.model.{i + 1}.", f"encoder.model.{other}.")
        c //= 2
    normed("decoder.model.15.conv.conv", 1, 1, c, 7)
    for i in range(levels):
        book = f"quantizer.vq.layers.{i}._codebook."
        shapes |= {f"{book}inited": (1,), f"{book}cluster_size": (num_codes,)}
        shapes |= {f"{book}embed": (num_codes, dim), f"{book}embed_avg": (num_codes, dim)}
    return shapes


def unused_names() -> list[str]:
    """Of a decoder that is never called, of discriminators (DAC's twice) and of the mel filters."""
    three = ("bias", "weight_g", "weight_v")
    names = [f"decoder.model.{i}.conv.conv.{part}" for i in (0, 15) for part in three]
    names += [f"decoder.model.1.lstm.{w}_{p}_l{i}" for w in ("weight", "bias") for p in ("ih", "hh") for i in (0, 1)]
    for i in (3, 6, 9, 12):
        names += [f"decoder.model.{i}.convtr.convtr.{part}" for part in three]
        for conv_name in ("block.1", "block.3", "shortcut"):
            names += [f"decoder.model.{i + 1}.{conv_name}.conv.conv.{part}" for part in three]
    six = (*(f"convs.{j}" for j in range(5)), "conv_post")
    for kind, count in (("multiperioddisc", 5), ("multiresddisc", 3)):
        names += [f"loss.{kind}.discriminators.{i}.{j}.{part}" for i in range(count) for j in six for part in three]
    banded = (*(f"band_convs.{b}.{j}.0" for b in range(5) for j in range(5)), "conv_post")
    for dac in ("dac", "dacdiscriminator.discriminator"):
        for i in range(8):
            names += [f"loss.{dac}.discriminators.{i}.{j}.{p}" for j in (six if i < 5 else banded) for p in three]
    return [*names, "loss.melspec_loss.mel_spec.spectrogram.window", "loss.melspec_loss.mel_spec.mel_scale.fb"]


def made(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Values for names: products of unit size, scales around one, biases that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        values = torch.empty(shape).normal_(generator=generator)
        if name.endswith(("weight_g", "weight.original0", "gamma")):
            state[name] = 1 + 0.1 * values
        elif len(shape) > 1:
            state[name] = values / math.prod(shape[1:]) ** 0.5
        else:
            state[name] = 0.1 * values + float("norm" in name and name.endswith("weight"))
    return state


def checkpoint(averaged: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dictionary of a Lightning checkpoint with these averages; what is not read is nan or small."""
    rows, nan = "quantize.embedding.weight", torch.full((1,), float("nan"))
    raw = {name: x if name == rows else nan.expand(x.shape) for name, x in averaged.items()}
    raw["head.istft.window"] = torch.hann_window(1280)
    raw |= {name: torch.ones(1) for name in unused_names()}
    trained = [n for n in unused_names() if "melspec" not in n and "dacdiscriminator" not in n]
    shadows = {name: x for name, x in averaged.items() if name != rows} | {name: torch.ones(1) for name in trained}
    shadows = {f"model_ema.{name.replace('.', '')}": x for name, x in shadows.items()}
    return raw | shadows | {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(-1)}


def wavtokenizer(state: dict[str, Tensor], rows_KD: Tensor, hop: int = 320) -> dict[str, Tensor]:
    """The state dictionary of WavTokenizer's Lightning checkpoint with these weights and rows: norms have a scale and a
    shift for each of four bandwidths; what is not read is small."""
    encodec = "feature_extractor.encodec."
    held = {(encodec if name.startswith("encoder.") else "") + name: x for name, x in state.items()}
    for name in [n for n in held if n.startswith(("backbone.norm.", "backbone.convnext.")) and ".norm." in n]:
        kind = "scale" if name.endswith("weight") else "shift"
        first = held.pop(name)
        held[f"{name.rpartition('.')[0]}.{kind}.weight"] = torch.stack([first, -first, 2 * first, first + 1])
    book = f"{encodec}quantizer.vq.layers.0._codebook."
    held |= {f"{book}embed": rows_KD, f"{book}embed_avg": 2 * rows_KD, f"{book}cluster_size": torch.ones(len(rows_KD))}
    held |= {f"{book}inited": torch.ones(1), "head.istft.window": torch.hann_window(4 * hop)}
    names = (encodec + n if n.startswith("decoder.") else n.removeprefix("loss.") for n in unused_names())
    return held | {name: torch.ones(1) for name in names}
