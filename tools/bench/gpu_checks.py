"""The checks of `bench gpu`: public operations on the device beside dense forms in float64, the same twice, no waiting.

They need no pytest; the tests proper are those that are marked gpu.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale import quantizers
from vqscale.codes import dense, products
from vqscale.codes.codebook import Codebook
from vqscale.codes.heads.flat import Head
from vqscale.parallel.mesh import Mesh

from .rounding import bfloat16, float8

ENTROPY_TEMPERATURE = 0.2
NEAR = 2e-2  # of the largest number: what products of bfloat16 round away
NEAR_FLOAT8 = 1e-1  # whose sums tensor cores keep fewer bits of

Row = dict[str, Any]


def rows(device: str, tokens: int, codes: int, dim: int) -> Iterator[Row]:
    yield from _mixtures(device, tokens, codes, dim, "medium", "")
    if products.has_float8():
        yield from _mixtures(device, tokens, codes, dim, "low", ", scores in float8")
    yield _head(device, bfloat16(torch.randn(tokens, dim, device=device)), codes)
    if device == "cuda":
        yield _waits(device, tokens, codes, dim)


def _mixtures(device: str, tokens: int, codes: int, dim: int, matmul: products.Matmul, how: str) -> Iterator[Row]:
    codebook = Codebook(codes, dim, mesh=Mesh(device=device), init_scale=dim**-0.5)
    # Tokens and rows are numbers that operands hold: what is rounded is the arithmetic.
    held = float8 if matmul == "low" else bfloat16
    x_ND = held(torch.randn(tokens, dim, device=device)).requires_grad_()
    codebook.rows.data.copy_(held(codebook.rows.data))
    shapes = {"mean": (tokens, dim), "lse": (tokens,), "entropy": (tokens,), "columns": (codes,)}
    weights = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    with products.precision(matmul):
        first, again = _mixed(codebook, x_ND, weights), _mixed(codebook, x_ND, weights)
    same = all(torch.equal(first[name], again[name]) for name in first)
    yield {"case": f"a mixture twice{how}", "ok": same, "note": "equal to the bit" if same else "NOT equal to the bit"}
    x, rows_kD = (part.detach().double().requires_grad_() for part in (x_ND, codebook.rows))
    ids, _ = dense.nearest(x, rows_kD, "dot")
    found = dense.mix(x, rows_kD, "dot", 1.0, ENTROPY_TEMPERATURE)
    truth = {"mean": found.mean_ND, "lse": found.lse_N, "entropy": found.entropy_N, "columns": found.columns_K}
    truth |= dict(zip(("dx", "drows"), torch.autograd.grad(_weighed(truth, weights), (x, rows_kD)), strict=True))
    errors = {name: apart(first[name], exact) for name, exact in truth.items()}
    yield _beside(f"a mixture beside float64{how}", errors, NEAR_FLOAT8 if matmul == "low" else NEAR)
    for case, got in (("ids of a mixture", first["ids"]), ("ids of a search", codebook.nearest(x_ND)[0])):
        same = torch.equal(got, ids)
        yield {"case": case + how, "ok": same, "note": "those of float64" if same else "NOT those of float64"}


def _weighed(says: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([(says[name] * weight).sum() for name, weight in weights.items()]).sum()


def _mixed(codebook: Codebook, x_ND: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = codebook.mix(x_ND, 1.0, ENTROPY_TEMPERATURE)
    says = {"mean": out.mean_ND, "lse": out.lse_N, "entropy": out.entropy_N, "columns": out.columns_k}
    both = torch.autograd.grad(_weighed(says, weights), (x_ND, codebook.rows))
    says |= dict(zip(("dx", "drows"), both, strict=True))
    return {"ids": out.ids_N, **{name: part.detach() for name, part in says.items() if part is not None}}


def apart(got: Tensor, exact: Tensor) -> float:
    """The largest difference, beside the largest number."""
    return float((got.double() - exact).abs().max() / exact.abs().max())


def _beside(case: str, errors: Mapping[str, float], near: float = NEAR) -> Row:
    said = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return {"case": case, "ok": all(error < near for error in errors.values()), "note": said}


def _head(device: str, h_ND: Tensor, codes: int) -> Row:
    head = Head(codes, h_ND.shape[1], Mesh(device=device), embedding="tied", products="bf16")
    head.rows.data.normal_(0.0, h_ND.shape[1] ** -0.5)
    targets_N, h = torch.randint(codes, (len(h_ND),), device=device), h_ND.clone().requires_grad_()
    loss = head.loss(h, targets_N).mean()
    got = [loss.detach(), *torch.autograd.grad(loss, (h, head.rows))]
    leaves = [part.detach().double().requires_grad_() for part in (h, head.rows)]
    exact = F.cross_entropy(leaves[0] @ leaves[1].t(), targets_N)
    wanted = [exact.detach(), *torch.autograd.grad(exact, leaves)]
    names = ("loss", "dh", "drows")
    errors = {name: apart(*pair) for name, pair in zip(names, zip(got, wanted, strict=True), strict=True)}
    return _beside("a head beside float64", errors)


def _waits(device: str, tokens: int, codes: int, dim: int) -> Row:
    """That no operation of a quantizer's step makes the host wait, by torch's own word."""
    config = {"name": "ibq", "num_codes": codes, "dim": dim, "entropy_weight": 0.1, "init": "normal"}
    quantizer = quantizers.build(config, Mesh(device=device), seed=0).train()
    x_ND = torch.randn(tokens, dim, device=device, requires_grad=True)

    def step() -> None:
        out = quantizer(x_ND)
        torch.stack([*out.losses.values(), out.z.square().mean()]).sum().backward()

    note, ok = "the host waits for nothing", True
    with products.precision("medium"):
        step()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        except RuntimeError as error:
            note, ok = f"the host waits: {error}", False
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"case": "a step of a quantizer", "ok": ok, "note": note}
