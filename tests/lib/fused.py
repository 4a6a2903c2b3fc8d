"""`Codebook.mix` served by the fused kernels, in Triton's interpreter or on a device, and dense.py as its judge."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from interpreted import INTERPRETED
from similarities import added
from whole import mine, normal, put

from vqscale.codes import backend, dense, products
from vqscale.codes.codebook import Codebook
from vqscale.codes.gpu import passes, tiles
from vqscale.codes.gpu.tiles import Tile
from vqscale.parallel.mesh import Mesh

if INTERPRETED:
    from triton import language as tl
    from triton.runtime import interpreter

DEVICE = "cpu" if INTERPRETED else "cuda"
FUSED = backend.Passes(passes.best, passes.mix, passes.column_sums, passes.row_means, passes.mix_backward)


@contextmanager
def small_tiles():
    """Enough programs that every kernel splits its inner loop; few and large tiles, which an interpreter likes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "programs", lambda device: 3)
        if INTERPRETED:
            patch.setattr(tiles, "FULL", (Tile(32, 64, 1, 1), Tile(16, 64, 1, 1)))
        yield


@contextmanager
def kernels_serve(kind):
    """As on a device that has the kernels: all passes are theirs, with products of this kind (fp32, bf16, fp8)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "pick", lambda x_BD, products="fp32": FUSED)
        patch.setattr(products, "wanted", lambda device_type, dtype: kind)
        yield


@contextmanager
def sums_of_tensor_cores():
    """Sums of float8 keep 13 bits of the largest of 32 addends, as is known of Hopper; a device does as it does."""
    if not INTERPRETED:
        yield
        return
    exact = interpreter.InterpreterBuilder.create_dot

    def cut(self, a, b, d, *options):
        if a.dtype.scalar != tl.float8e4nv:
            return exact(self, a, b, d, *options)
        wide = [interpreter._convert_float(x.data, x.dtype, tl.float16, None).view(np.float16) for x in (a, b)]
        term_NDK = wide[0].astype(np.float64)[:, :, None] * wide[1].astype(np.float64)[None]
        total_NK = d.data.astype(np.float64)
        for first in range(0, term_NDK.shape[1], 32):
            addends = np.concatenate([total_NK[:, None], term_NDK[:, first : first + 32]], 1)
            step = np.exp2(np.frexp(np.abs(addends).max(1, keepdims=True))[1] - 14.0)
            total_NK = (np.trunc(addends / step) * step).sum(1)
        return interpreter.TensorHandle(total_NK.astype(np.float32), d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", cut)
        yield


def numbers(num, codes, dim, scale, kind):
    """x and rows: float64 numbers that float32, bfloat16, or float8 in units, holds exactly."""
    x, rows = scale * normal(num, dim, seed=1), normal(codes, dim, seed=2)
    return tuple(held(part.float(), kind).double().to(DEVICE) for part in (x, rows))


def held(part, kind):
    """What products of this kind read of float32 numbers, of float8 in the place of scores."""
    if kind == "fp8":
        low, unit = products.float8(part)
        return low.float() * unit
    return part.to(torch.bfloat16 if kind == "bf16" else torch.float32)


def weights(num, codes, dim, used):
    every = {
        "mean": normal(num, dim, seed=3),
        "lse": normal(num, seed=4),
        "entropy": normal(num, seed=5),
        "columns": normal(codes, seed=6),
    }
    return {name: every[name].to(DEVICE) for name in used.split()}


@added()
def answers(ranks_of_codes, shape, scale, similarity, used, kind, temperatures, budget=None):
    """What this rank's tokens and rows are told, and the gradients of x and the rows."""
    mesh, (num, codes, dim) = Mesh(1, ranks_of_codes), shape
    x, rows = numbers(num, codes, dim, scale, kind)
    codebook = put(Codebook(codes, dim, mesh=mesh, similarity=similarity).to(DEVICE), rows.float())
    codebook.budget = budget or codebook.budget
    x = mine(x, mesh).float().requires_grad_()
    with kernels_serve(kind):
        out = codebook.mix(x, *temperatures)
        layout = codebook.layout
        says = {"lse": out.lse_N, "mean": out.mean_ND, "entropy": out.entropy_N, "columns": out.columns_k}
        loss = 0.0
        for name, weight in weights(num, codes, dim, used).items():
            part = weight[layout.start : layout.stop] if name == "columns" else mine(weight, mesh)
            loss = loss + (says[name] * part.float()).sum()
        loss.backward()
        says |= {"ids": out.ids_N, "nearest": codebook.nearest(x)[0], "score": out.score_N}
    says |= {"dx": x.grad, "drows": codebook.rows.grad}
    return {name: part.detach().cpu() for name, part in says.items()}


@added()
def answers_in_small_tiles(*args):
    with small_tiles():
        return answers(*args)


def near(got, expected, tolerance):
    """Close, relative to the largest number."""
    assert got.shape == expected.shape
    got, expected = got.detach().double(), expected.detach().double().cpu()
    torch.testing.assert_close(got, expected, rtol=0.0, atol=tolerance * float(expected.abs().max()))


@added()
def check(
    ranks,
    shape,
    similarity,
    used,
    kind,
    tolerance,
    temperatures=(0.7, 0.2),
    codes=1,
    budget=None,
    answers=answers_in_small_tiles,
):
    scale = shape[2] ** -0.5 * 2
    results = ranks(codes, answers, codes, shape, scale, similarity, used, kind, temperatures, budget)
    got = {name: torch.cat([result[name] for result in results]) for name in results[0]}
    x, rows = (part.requires_grad_() for part in numbers(*shape, scale, kind))
    truth = dense.mix(x, rows, similarity, *temperatures)
    ids, score = dense.nearest(x, rows, similarity)
    assert torch.equal(got["ids"], ids.cpu())
    assert torch.equal(got["nearest"], ids.cpu())
    near(got["score"], score / temperatures[0], 1e-6)
    named = {"mean": truth.mean_ND, "lse": truth.lse_N, "entropy": truth.entropy_N, "columns": truth.columns_K}
    for name, value in named.items():
        near(got[name], value, tolerance)
    loss = sum((named[name] * weight).sum() for name, weight in weights(*shape, used).items())
    dx, drows = torch.autograd.grad(loss, (x, rows))
    near(got["dx"], dx, tolerance)
    near(got["drows"], drows, tolerance)
