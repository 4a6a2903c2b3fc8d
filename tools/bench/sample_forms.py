"""The forms that `bench sample` compares, as functions without arguments, and their measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib import import_module
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from vqscale import priors
from vqscale.codes.heads.flat import Head

from .setting import SampleSetting

Form = Callable[[], Any]


def missing(package: str = "transformers") -> str:
    """Why this package cannot run here; empty where it can."""
    try:
        import_module(package.replace("-", "_"))
    except ImportError:
        return f"{package} is left out: it is not installed; pip install -e '.[bench]'"
    return ""


def measure(setting: SampleSetting, absent: str = "") -> dict[str, dict[str, float]]:
    """{form: medians of wall seconds and of the processor's}; after a run unmeasured the forms take turns."""
    torch.set_num_threads(setting.threads)
    forms = build(setting, absent)
    for form in forms.values():
        form()
    return in_turns(forms, setting.repeats, setting.device)


def in_turns(forms: Mapping[str, Form], repeats: int, device: str) -> dict[str, dict[str, float]]:
    """{form: medians of wall seconds and of the processor's} of so many rounds of all forms."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            found[name].append(_seconds(form, device))
    return {
        name: dict(zip(("seconds", "processor"), map(median, zip(*some, strict=True)), strict=True))
        for name, some in found.items()
    }


def _seconds(form: Form, device: str) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    form()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def build(setting: SampleSetting, absent: str = "") -> dict[str, Form]:
    """The forms by name; `absent` says that transformers is not there."""
    net = {"width": setting.width, "num_layers": setting.layers, "num_heads": setting.heads}
    one_by_one = prior_of(setting, {"name": "autoregressive", "net": net})
    forms = {
        "autoregressive": _drawn(setting, one_by_one),
        "unpacked": _drawn(setting, one_by_one, packed=False),
        "bf16": _drawn(setting, one_by_one, precision="bf16"),
    }
    if not absent:
        forms["transformers"] = _transformers(setting)
    forms["products"] = _products(setting, one_by_one)
    masked = prior_of(setting, {"name": "masked", "net": net})
    forms |= {order: _drawn(setting, masked, order=order, steps=setting.steps) for order in ("confidence", "halton")}
    stages = {"net": net, "fine_net": net, "num_clusters": setting.clusters}
    two_stages = prior_of(setting, {"name": "coarse_to_fine", **stages})
    return forms | {"coarse_to_fine": _drawn(setting, two_stages, fine_temperature=0.0 if setting.greedy else 1.0)}


def prior_of(setting: SampleSetting, kind: Mapping[str, Any]) -> Any:
    """A prior of random weights, its logits of unit variance."""
    sides = [setting.side, setting.side]
    prior: Any = priors.build({**kind, "num_codes": setting.codes, "grid": sides, "num_classes": 1})
    for part in prior.modules():
        if isinstance(part, Head):
            part.rows.data.normal_(0.0, setting.width**-0.5)
    return prior.eval().to(setting.device)


def _drawn(setting: SampleSetting, prior: Any, **how: Any) -> Form:
    numbers_B = torch.arange(setting.batch, device=setting.device)
    settings = {"temperature": 0.0 if setting.greedy else 1.0, **how}
    return lambda: prior.sample(torch.zeros_like(numbers_B), settings, numbers_B=numbers_B)


def _transformers(setting: SampleSetting) -> Form:
    library: Any = import_module("transformers")
    config = library.LlamaConfig(
        vocab_size=setting.codes,
        hidden_size=setting.width,
        intermediate_size=setting.ffn_width,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        max_position_embeddings=setting.length + 1,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = library.LlamaForCausalLM(config).eval().to(setting.device)
    first = torch.zeros(setting.batch, 1, dtype=torch.int64, device=setting.device)
    length = {"min_new_tokens": setting.length, "max_new_tokens": setting.length}
    drawn = {"do_sample": False} if setting.greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}
    return lambda: model.generate(first, attention_mask=torch.ones_like(first), **length, **drawn)


def _products(setting: SampleSetting, prior: Any) -> Form:
    """What every step of the autoregressive prior multiplies, as torch does it unless told otherwise."""
    weights = [part.weight for part in prior.net.modules() if isinstance(part, torch.nn.Linear)]
    weights.append(prior.head.rows)
    inputs = [torch.randn(setting.batch, weight.shape[1], device=setting.device) for weight in weights]

    @torch.no_grad()
    def form() -> None:
        for _ in range(setting.length):
            for x_BI, weight_OI in zip(inputs, weights, strict=True):
                F.linear(x_BI, weight_OI)

    return form
