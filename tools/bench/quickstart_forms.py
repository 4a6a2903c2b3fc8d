"""The training steps that `bench quickstart` compares, as functions without arguments, and their measurement.

Ours are the lines of vqscale/train that make a step; the others are what one would write with torch alone. All take
one step on one batch, each from weights of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from vqscale import nets, priors, signals
from vqscale.codes import dense, noise, products
from vqscale.codes.rows import set_aside
from vqscale.data.made import shapes
from vqscale.engine.average import Average
from vqscale.engine.engine import Engine
from vqscale.matmul import matmul_precision
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.config.tables import EMAConfig
from vqscale.signals.images import reconstruction
from vqscale.tokenizer.model import Tokenizer
from vqscale.train import loop
from vqscale.train.config import TokenizerRun
from vqscale.train.config.prior import PriorRun

from .sample_forms import Form, in_turns
from .setting import Rounds

PACKAGES = ("vector-quantize-pytorch", "transformers")


def versions(absent: Mapping[str, str]) -> dict[str, str]:
    return {package: version(package) for package in PACKAGES if package not in absent}


def measure(
    tokenizer: TokenizerRun, prior: PriorRun, rounds: Rounds, absent: Mapping[str, str]
) -> dict[str, dict[str, dict[str, float]]]:
    """{tokenizer, prior: {form: medians of wall seconds and of the processor's}}; `absent` packages are left out."""
    torch.set_num_threads(rounds.threads)
    parts: dict[str, tuple[Any, Any]] = {"tokenizer": (tokenizers, tokenizer), "prior": (trained_priors, prior)}
    found = {}
    for name, (build, config) in parts.items():
        with products.precision(config.engine.matmul):
            forms: dict[str, Form] = build(config, rounds.device, absent)
            for form in forms.values():
                for _ in range(rounds.warm):
                    form()
            forms["floor"] = floor(forms["ours"])
            found[name] = in_turns(forms, rounds.repeats, rounds.device)
    return found


def tokenizers(config: TokenizerRun, device: str, absent: Mapping[str, str]) -> dict[str, Form]:
    side = config.data.train.sides[0]
    drawn = np.stack([shapes.draw(number, side, 0)[0] for number in range(config.data.batch)])
    samples = torch.from_numpy(drawn).to(device).movedim(-1, 1).div(127.5).sub(1.0).contiguous()
    codes: Any = config.tokenizer.quantizer
    ema = EMAConfig(num_codes=codes.num_codes, dim=codes.dim, warmup_steps=2, landing_steps=0)
    averaged = replace(config, tokenizer=replace(config.tokenizer, quantizer=ema))
    forms = {"ours": our_tokenizer(config, samples), "ours, ema": our_tokenizer(averaged, samples)}
    forms["released"] = plain_tokenizer(config, samples, Released(codes.num_codes, codes.dim))
    if "vector-quantize-pytorch" not in absent:
        library: Any = import_module("vector_quantize_pytorch")
        theirs = library.VectorQuantize(dim=codes.dim, codebook_size=codes.num_codes)
        forms["vector-quantize-pytorch"] = plain_tokenizer(config, samples, theirs)
    return forms


def our_tokenizer(config: TokenizerRun, samples: Tensor) -> Form:
    """A step as train/tokenizer.py takes it."""
    mesh = Mesh(device=samples.device.type)
    distances = signals.build(config.tokenizer.signal).distances(config.loss, mesh)
    tokenizer = Tokenizer.from_config(config.tokenizer, mesh, config.run.seed)
    tables, quantizer = set_aside(tokenizer), tokenizer.quantizer
    quantizer.begin()
    engine = Engine(tokenizer, loop.learned_rows(tables), config.engine, config.optim, mesh, config.run.steps)
    average, numbers = Average(engine, config.average), count(1)
    places = torch.arange(len(samples), device=samples.device)

    def step() -> Tensor:
        number = next(numbers)
        recon, quantized = engine(samples, None, noise.keys(0, number, places))
        found = distances(recon, samples, engine.autocast)
        loss = torch.stack([distance.weight * distance.value for distance in found.values()]).sum()
        loss = loss + config.loss.quantizer_weight * sum(quantized.losses.values())
        engine.backward(loss)
        for parameter, rows in quantizer.update(engine.step().stepped):
            engine.forget(parameter, rows)
            average.forget(parameter, rows)
        average.update(number)
        return loss.detach()

    return step


class Released(nn.Module):
    """IBQ in the layout of its released code, called as a VectorQuantize is: (z, ids, loss) of x_BND."""

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        self.rows_KD = nn.Parameter(torch.randn(num_codes, dim))

    def forward(self, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = dense.released_ibq(x_BND.movedim(-1, 1).unsqueeze(-1), self.rows_KD)
        return out.z_ND.view_as(x_BND), out.ids_N, out.quantization


def plain_tokenizer(config: TokenizerRun, samples: Tensor, quantizer: nn.Module) -> Form:
    """The same encoder and decoder around a quantizer that answers (z, ids, loss), in a loop of torch alone."""
    torch.manual_seed(config.run.seed)
    codes: Any = config.tokenizer.quantizer
    parts = nets.build(config.tokenizer.net, codes.dim)
    encoder = nn.Sequential(parts.encoder, parts.quant_conv)
    decoder = nn.Sequential(parts.post_quant_conv, parts.decoder)
    whole = nn.ModuleList([encoder, quantizer, decoder]).to(samples.device).train()

    def loss() -> Tensor:
        x_BDhw = encoder(samples)
        z_BND, _, beside = quantizer(x_BDhw.flatten(2).transpose(1, 2).contiguous())
        recon = decoder(z_BND.transpose(1, 2).unflatten(2, x_BDhw.shape[2:]))
        apart = reconstruction(samples, recon, config.loss.reconstruction)
        return apart + config.loss.quantizer_weight * beside.sum()

    return plain(config, whole.parameters(), loss)


def trained_priors(config: PriorRun, device: str, absent: Mapping[str, str]) -> dict[str, Form]:
    sizes, batch = config.prior, config.data.batch
    assert sizes.num_codes is not None
    assert sizes.grid is not None
    ids = torch.randint(sizes.num_codes, (batch, *sizes.grid), device=device)
    labels_B = torch.randint(max(1, sizes.num_classes), (batch,), device=device)
    forms = {"ours": our_prior(config, ids, labels_B)}
    if "transformers" not in absent:
        forms["transformers"] = llama(config, ids, labels_B)
    return forms


def our_prior(config: PriorRun, ids: Tensor, labels_B: Tensor) -> Form:
    """A step as train/prior.py takes it; the vectors of the codes are drawn."""
    mesh = Mesh(device=ids.device.type)
    prior = priors.build(config.prior, mesh, seed=config.run.seed)
    tables = set_aside(prior)
    if config.prior.head.wants_features:
        vectors_KF = torch.randn(prior.num_codes, config.prior.feature_dim or 0, device=ids.device)
        prior.head.set_features(lambda ids_N: vectors_KF[ids_N])
    engine = Engine(prior, loop.learned_rows(tables), config.engine, config.optim, mesh, config.run.steps)
    average, numbers = Average(engine, config.average), count(1)
    places = torch.arange(len(ids), device=ids.device)

    def step() -> Tensor:
        number = next(numbers)
        modelled = engine(ids, labels_B, noise.keys(0, number, places))
        engine.backward(modelled.loss)
        engine.step()
        average.update(number)
        loss: Tensor = modelled.loss.detach()
        return loss

    return step


def llama(config: PriorRun, ids: Tensor, labels_B: Tensor) -> Form:
    """As many tokens: that of the class, for which the first codes stand, then all ids but the last."""
    library: Any = import_module("transformers")
    net: Any = config.prior.transformers["net"]
    model = library.LlamaForCausalLM(
        library.LlamaConfig(
            vocab_size=config.prior.num_codes,
            hidden_size=net.width,
            intermediate_size=net.ffn_width,
            num_hidden_layers=net.num_layers,
            num_attention_heads=net.num_heads,
            max_position_embeddings=config.prior.num_tokens,
            use_cache=False,
        )
    )
    model.to(ids.device).train()
    ids_BT = ids.flatten(1)
    given_BT = torch.cat([labels_B[:, None] % (config.prior.num_codes or 1), ids_BT[:, :-1]], 1)

    def loss() -> Tensor:
        return F.cross_entropy(model(given_BT).logits.flatten(0, 1), ids_BT.flatten())

    return plain(config, model.parameters(), loss)


def plain(config: TokenizerRun | PriorRun, parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor]) -> Form:
    """Backward pass, clipping and AdamW as torch has them."""
    every, optim = [one for one in parameters if one.requires_grad], config.optim
    adam = torch.optim.AdamW(every, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)

    def step() -> Tensor:
        adam.zero_grad()
        found = loss()
        found.backward()
        if config.engine.clip_norm:
            nn.utils.clip_grad_norm_(every, config.engine.clip_norm)
        adam.step()
        return found.detach()

    return step


class Products(TorchDispatchMode):
    """Keeps the products, convolutions and attentions that run inside the block: (torch's switch, operation, operands),
    and what they are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        twin = getattr(torch.ops.aten, func._opname.rstrip("_"), None)
        if twin in flop_registry or func._opname.startswith("_scaled_dot_product"):
            switch = torch.get_float32_matmul_precision()
            self.kept.append((switch, func, *(tree_map_only(Tensor, _copy, some) for some in (args, kwargs))))
        return func(*args, **kwargs)


def _copy(x: Tensor) -> Tensor:
    """With its strides; what is expanded becomes whole."""
    return x.detach().clone()


def floor(step: Form) -> Form:
    """The products of one step, one after the other."""
    with Products() as seen:
        step()

    def form() -> None:
        for switch, func, args, kwargs in seen.kept:
            with ExitStack() as stack:
                if switch != torch.get_float32_matmul_precision():
                    stack.enter_context(matmul_precision(switch))
                func(*args, **kwargs)

    return torch.no_grad()(form)
