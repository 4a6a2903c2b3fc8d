"""The forms that `bench head` compares, as functions without arguments, and their measurement.

    loss      ours, ours in bf16 products, ours with the logits made twice, the dense form (F.cross_entropy of all
              logits), F.linear_cross_entropy of torch in chunks, cut-cross-entropy (on a CPU its torch_compile form),
              QuACK's (GPUs only), the floor (three products)
    sample    ours, ours with top-p, the dense form (softmax of all logits, torch.multinomial)

A loss returns (mean loss, gradient of h, gradient of the rows), a sample (ids_N,), the floor nothing of use. With M
processes ours splits the K rows over them; the others are replicas with all K rows that do not talk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.codes import noise
from vqscale.codes.config import Products
from vqscale.codes.heads.flat import Head
from vqscale.codes.rows import Rows, draw
from vqscale.parallel.mesh import Mesh
from vqscale.seed import derive

from .measure import Cost, alone, seconds
from .setting import FLOOR_BLOCKS, HeadSetting

Form = Callable[[], tuple[Tensor, ...]]
MeanLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of (h, rows, targets)
QUACK_CHUNK = 4096  # tokens that it multiplies at once
PRODUCTS = ("logits h C^T", "dh = dl C", "dC = dl^T h")


def missing(device: str = "cpu") -> dict[str, str]:
    """The forms of a loss that cannot run on this device, and why."""
    out = {}
    if not hasattr(F, "linear_cross_entropy"):
        out["torch"] = f"torch {torch.__version__} has no F.linear_cross_entropy, which 2.13 has"
    try:
        import_module("cut_cross_entropy")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        out["cce"] = f"cut-cross-entropy cannot be imported ({reason}): pip install cut-cross-entropy (needs triton)"
    if device == "cpu":
        return {**out, "quack": "QuACK's kernels are for GPUs"}
    try:
        import_module("quack.linear_cross_entropy")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        out["quack"] = f"QuACK cannot be imported ({reason}): pip install quack-kernels"
    return out


def dense_bytes(setting: HeadSetting) -> int:
    """What one process sends for a replica's loss: a ring all-reduce of the K x D gradient, which is not run."""
    return 2 * (setting.processes - 1) * setting.codes * setting.dim * 4 // setting.processes


def dense_memory(setting: HeadSetting) -> int:
    """Bytes that the dense loss needs at its peak, all processes together: logits, their log-softmax and gradient."""
    return setting.processes * 4 * (3 * setting.tokens * setting.codes + 2 * setting.codes * setting.dim)


def measure(setting: HeadSetting) -> dict[str, dict[str, Cost]]:
    """{"loss": {form: cost}, "sample": {form: cost}} of this process. The same call on every process.

    Each form runs once unmeasured (libraries load, torch.compile compiles), once by itself for memory and bytes, then
    the forms take turns for `repeats` rounds.
    """
    torch.set_num_threads(setting.threads)
    mesh = Mesh(codes=setting.processes, device=setting.device)
    for some in build(replace(setting, tokens=8, codes=64, dim=8, drawn=8), mesh).values():
        for form in some.values():
            form()
    costs: dict[str, dict[str, Cost]] = {}
    for work, some in build(setting, mesh).items():
        if "cce" in some:
            some["cce"]()
        costs[work] = {name: alone(form, mesh) for name, form in some.items()}
        for _ in range(setting.repeats):
            for name, form in some.items():
                before = time.process_time()
                costs[work][name].seconds.append(seconds(form, mesh.device, mesh.codes))
                costs[work][name].processor.append(time.process_time() - before)
    return costs


def build(setting: HeadSetting, mesh: Mesh) -> dict[str, dict[str, Form]]:
    """The forms that the setting names, by work and name, all from the same rows, tokens and targets."""
    generator = torch.Generator().manual_seed(derive("bench", mesh.codes.rank))
    h_ND = torch.randn(setting.tokens, setting.dim, generator=generator).to(mesh.device).requires_grad_()
    targets_N = torch.randint(setting.codes, (setting.tokens,), generator=generator).to(mesh.device)
    heads = {name: _head(setting, mesh, bf16=name == "bf16") for name in ("ours", "bf16") if name in setting.losses}
    head = heads.get("ours") or _head(setting, mesh, bf16=False)
    losses: dict[str, Form] = {name: _ours(each, h_ND, targets_N) for name, each in heads.items()}
    if "twice" in setting.losses:
        losses["twice"] = _loss(lambda h, _, targets: head.loss(h, targets).mean(), h_ND, head.rows, targets_N)
    rows_KD = _rows(setting, mesh)
    for name, function in _functions(setting).items():
        if name in setting.losses:
            losses[name] = _loss(function, h_ND, rows_KD, targets_N)
    if "floor" in setting.losses:
        losses["floor"] = _floor(setting, mesh)
    samples = _samples(setting, head, h_ND.detach()[: setting.drawn], rows_KD.detach())
    return {"loss": losses, "sample": {name: samples[name] for name in setting.samples}}


def _scale(setting: HeadSetting) -> float:
    """Logits of unit variance."""
    scale: float = setting.dim**-0.5
    return scale


def _rows(setting: HeadSetting, mesh: Mesh) -> Tensor:
    rows_KD = draw(Rows(setting.codes), setting.dim, "normal", _scale(setting), seed=0)
    return rows_KD.to(mesh.device).requires_grad_()


def _head(setting: HeadSetting, mesh: Mesh, bf16: bool) -> Head:
    products: Products = "bf16" if bf16 else "fp32"
    head = Head(setting.codes, setting.dim, mesh, embedding="tied", products=products, scan_mib=setting.scan_mib)
    head.rows.data = draw(head.layout, setting.dim, "normal", _scale(setting), seed=0).to(mesh.device)
    return head


def _functions(setting: HeadSetting) -> dict[str, MeanLoss]:
    """Mean losses of (h, rows, targets), which are rounded first where the setting's products are those of bf16."""
    on_cuda = setting.device == "cuda"

    def dense(h_ND: Tensor, rows_KD: Tensor, targets_N: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h_ND, rows_KD), targets_N)

    def chunked(h_ND: Tensor, rows_KD: Tensor, targets_N: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        loss: Tensor = F.linear_cross_entropy(h_ND, rows_KD, targets_N, options=options)
        return loss

    def cut(h_ND: Tensor, rows_KD: Tensor, targets_N: Tensor) -> Tensor:
        impl = "cce" if on_cuda else "torch_compile"
        loss: Tensor = import_module("cut_cross_entropy").linear_cross_entropy(h_ND, rows_KD, targets_N, impl=impl)
        return loss

    def quack(h_ND: Tensor, rows_KD: Tensor, targets_N: Tensor) -> Tensor:
        chunked = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
        loss: Tensor = chunked(h_ND, rows_KD, targets_N, chunk_size=min(len(h_ND), QUACK_CHUNK), reduction="mean")
        return loss

    found: dict[str, MeanLoss] = {"dense": dense, "torch": chunked, "cce": cut, "quack": quack}
    if setting.products == "bf16":
        found = {name: _rounded(function) for name, function in found.items()}
    return found


def _rounded(function: MeanLoss) -> MeanLoss:
    return lambda h_ND, rows_KD, targets_N: function(h_ND.bfloat16(), rows_KD.bfloat16(), targets_N)


def _ours(head: Head, h_ND: Tensor, targets_N: Tensor) -> Form:
    weight_N = torch.full(targets_N.shape, 1 / len(targets_N), device=h_ND.device)
    return _loss(lambda h, _, targets: head.weighted(h, targets, weight_N)[0], h_ND, head.rows, targets_N)


def _loss(function: MeanLoss, h_ND: Tensor, rows: Tensor, targets_N: Tensor) -> Form:
    def form() -> tuple[Tensor, ...]:
        loss = function(h_ND, rows, targets_N)
        loss.backward()
        assert h_ND.grad is not None
        assert rows.grad is not None
        out = loss.detach(), h_ND.grad, rows.grad
        h_ND.grad = rows.grad = None
        return out

    return form


def _samples(setting: HeadSetting, head: Head, h_ND: Tensor, rows_KD: Tensor) -> dict[str, Form]:
    keys_N = noise.keys(0, torch.arange(len(h_ND), device=h_ND.device))

    def dense() -> tuple[Tensor, ...]:
        return (torch.multinomial((h_ND @ rows_KD.t()).softmax(1), 1)[:, 0],)

    return {
        "ours": lambda: (head.sample(h_ND, keys_N),),
        "top-p": lambda: (head.sample(h_ND, keys_N, top_p=0.9),),
        "dense": dense,
    }


def _floor(setting: HeadSetting, mesh: Mesh) -> Form:
    """PRODUCTS alone, torch.mm in blocks into buffers that are used again."""
    num_tokens, dim = setting.tokens * setting.processes, setting.dim
    num_rows = Rows(setting.codes, mesh.codes.size, mesh.codes.rank).count
    tokens, rows = FLOOR_BLOCKS[setting.device]
    b, r = min(num_tokens, tokens), min(num_rows, rows)
    kind: dict[str, Any] = {"device": mesh.device}
    kind["dtype"] = torch.bfloat16 if setting.products == "bf16" else torch.float32
    x_bD, c_rD = torch.randn(b, dim, **kind), torch.randn(r, dim, **kind) * _scale(setting)
    l_br, dx_bD, dc_rD = torch.empty(b * r, **kind), torch.empty_like(x_bD), torch.empty_like(c_rD)

    def blocks() -> Iterator[tuple[int, int]]:
        for token in range(0, num_tokens, b):
            for row in range(0, num_rows, r):
                yield min(b, num_tokens - token), min(r, num_rows - row)

    def form() -> tuple[Tensor, ...]:
        for i, j in blocks():
            logits = l_br[: i * j].view(i, j)
            torch.mm(x_bD[:i], c_rD[:j].t(), out=logits)
            torch.mm(logits, c_rD[:j], out=dx_bD[:i])
            torch.mm(logits.t(), x_bD[:i], out=dc_rD[:j])
        return ()

    return form
