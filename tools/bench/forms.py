"""The forms that `bench codes` compares, as functions without arguments: ours, the dense ones, the floor.

Those of a search alone (FAISS, a product in bfloat16) are in search.py.

They start from the same rows, tokens and upstream gradient, so ours and the dense form return the same numbers; the
floor returns nothing of use: it is the matrix products alone. Nothing here measures.

With M processes each form is run by all of them at once. Ours splits the K rows over them. The dense form is M
replicas that do not talk, each with all K rows and its own tokens, as under data parallelism; the all-reduce of its
K x D gradient, which it would need, is not run: `dense_bytes` says what it would send.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vqscale import quantizers
from vqscale.codes import dense, products
from vqscale.codes.rows import Rows, draw
from vqscale.parallel.mesh import Mesh
from vqscale.seed import derive

from . import search
from .setting import FLOOR_BLOCKS, Setting

Form = Callable[[], tuple[Tensor, ...]]
"""A step returns the gradients (of x_ND, of the rows), a search returns (ids_N,), the floor returns nothing."""

ENTROPY_WEIGHT, ENTROPY_TEMPERATURE = 0.05, 0.01  # of the released configurations

# What remains when one-hot products are a gather and a scatter-add, all losses share one gradient of the logits, and
# tokens x codes is not kept from forward to backward. The mean rows are needed because a gradient of the logits is
# centred by g . mean: only a form that holds all codes of a token at once can do without them, and no rank does.
PRODUCTS = {
    "step": ("logits x C^T", "mean rows p C", "logits again in the backward pass", "g C^T", "dx = dl C", "dC = dl^T x"),
    "search": ("logits x C^T",),
}


def dense_bytes(setting: Setting) -> dict[str, int]:
    """What one process sends for the dense form: a ring all-reduce of the K x D gradient per step, no search."""
    gradient = setting.codes * setting.dim * setting.item_bytes
    return {"step": 2 * (setting.processes - 1) * gradient // setting.processes, "search": 0}


def dense_memory(setting: Setting) -> dict[str, int]:
    """The bytes that the dense form needs at its peak, all processes of this machine together, roughly.

    The released step holds at most 9 tensors of tokens x codes at once, 6 without the entropy loss; a search 1.
    """
    rows = setting.codes * setting.dim
    pairs = setting.tokens * setting.codes
    scale = setting.item_bytes * setting.processes
    return {"step": scale * (2 * rows + (9 if setting.entropy else 6) * pairs), "search": scale * (rows + pairs)}


def build(setting: Setting, mesh: Mesh) -> dict[str, dict[str, Form]]:
    """{"step": {"ours", "released", "dense", "floor"}, "search": {"ours", "dense", "faiss", "bf16", "floor"}} of the
    works of the setting; without the dense forms that it leaves out, and without what cannot be had here."""
    dtype = getattr(torch, setting.dtype)
    generator = torch.Generator().manual_seed(derive("bench", mesh.codes.rank))
    draws = torch.randn(2, setting.tokens, setting.dim, generator=generator).to(mesh.device, dtype)
    x_ND, g_ND = draws[0].clone().requires_grad_(), draws[1] / setting.tokens
    forms = {"step": {}, "search": {}}  # type: dict[str, dict[str, Form]]
    forms["step"]["ours"], forms["search"]["ours"] = _ours(setting, mesh, x_ND, g_ND)
    if setting.device == "cpu" and setting.dtype == "float32" and products.fast_on_cpu():
        forms["step"]["bf16"] = at("medium", forms["step"]["ours"])

    def whole() -> Tensor:
        return draw(Rows(setting.codes), setting.dim, "normal", _scale(setting), seed=0)

    if setting.dense:
        rows_KD = whole().to(mesh.device, dtype).requires_grad_()
        both = _dense(setting, x_ND, g_ND, rows_KD)
        if "step" in setting.dense:
            forms["step"] |= {"released": _released(setting, x_ND, g_ND, rows_KD), "dense": both[0]}
        forms["search"] |= {"dense": both[1]} if "search" in setting.dense else {}
    if "search" in setting.works:
        forms["search"] |= search.forms(setting, mesh, x_ND, whole)
    forms["step"]["floor"], forms["search"]["floor"] = _floor(setting, mesh, dtype)
    return {work: forms[work] for work in setting.works}


def _scale(setting: Setting) -> float:
    """Rows that give logits of standard deviation `spread` with tokens N(0, 1)."""
    scale: float = setting.spread * setting.dim**-0.5
    return scale


def _ours(setting: Setting, mesh: Mesh, x_ND: Tensor, g_ND: Tensor) -> tuple[Form, Form]:
    config = {
        "name": "ibq",
        "num_codes": setting.codes,
        "dim": setting.dim,
        "init": "normal",
        "init_scale": _scale(setting),
        "entropy_weight": ENTROPY_WEIGHT if setting.entropy else 0.0,
        "entropy_temperature": ENTROPY_TEMPERATURE,
        "scan_mib": setting.scan_mib,
    }
    quantizer = quantizers.build(config, mesh, seed=0).to(x_ND.dtype)
    quantizer.train()
    quantizer.begin()  # as in training: the tokens are counted too
    (rows_kD,) = quantizer.parameters()

    def step() -> tuple[Tensor, ...]:
        out = quantizer(x_ND)
        torch.autograd.backward([out.z, torch.stack(list(out.losses.values())).sum()], [g_ND, None])
        return _take_gradients(x_ND, rows_kD)

    return step, lambda: (quantizer.encode(x_ND.detach()),)


def at(matmul: products.Matmul, step: Form) -> Form:
    """The same step with this engine.matmul."""

    def low() -> tuple[Tensor, ...]:
        with products.precision(matmul):
            return step()

    return low


def _dense(setting: Setting, x_ND: Tensor, g_ND: Tensor, rows_KD: Tensor) -> tuple[Form, Form]:
    def step() -> tuple[Tensor, ...]:
        temperature = ENTROPY_TEMPERATURE if setting.entropy else None
        out = dense.published_ibq(x_ND, rows_KD, entropy_temperature=temperature)
        loss = out.quantization if out.entropy is None else out.quantization + ENTROPY_WEIGHT * out.entropy
        torch.autograd.backward([out.z_ND, loss], [g_ND, None])
        return _take_gradients(x_ND, rows_KD)

    @torch.no_grad()
    def search() -> tuple[Tensor, ...]:
        # One pass over the logits: the released code has no search apart from its training step.
        return (dense.logits(x_ND, rows_KD).max(dim=1).indices,)

    return step, search


def _released(setting: Setting, x_ND: Tensor, g_ND: Tensor, rows_KD: Tensor) -> Form:
    """The same in the layout of the released code: images of 16 x 16 tokens, or one image if they do not divide."""
    grid = (len(x_ND) // 256, 16, 16) if len(x_ND) % 256 == 0 else (1, len(x_ND), 1)

    def step() -> tuple[Tensor, ...]:
        temperature = ENTROPY_TEMPERATURE if setting.entropy else None
        x_BDhw = x_ND.unflatten(0, grid).permute(0, 3, 1, 2).contiguous()
        out = dense.released_ibq(x_BDhw, rows_KD, entropy_temperature=temperature)
        loss = out.quantization if out.entropy is None else out.quantization + ENTROPY_WEIGHT * out.entropy
        torch.autograd.backward([out.z_ND, loss], [g_ND, None])
        return _take_gradients(x_ND, rows_KD)

    return step


def _take_gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the leaves, which then have none: the next step allocates its own."""
    gradients = []
    for leaf in leaves:
        assert leaf.grad is not None
        gradients.append(leaf.grad)
        leaf.grad = None
    return tuple(gradients)


def _floor(setting: Setting, mesh: Mesh, dtype: torch.dtype) -> tuple[Form, Form]:
    """The products of PRODUCTS alone, torch.mm in blocks into buffers that are used again."""
    num_tokens, dim = setting.tokens * setting.processes, setting.dim
    num_rows = Rows(setting.codes, mesh.codes.size, mesh.codes.rank).count
    dtype = torch.bfloat16 if setting.products == "bf16" else dtype
    tokens, rows = FLOOR_BLOCKS[setting.device]
    b, r = min(num_tokens, tokens), min(num_rows, rows)
    x_bD, g_bD = torch.randn(2, b, dim, device=mesh.device, dtype=dtype)
    c_rD = torch.randn(r, dim, device=mesh.device, dtype=dtype) * _scale(setting)
    l_br, dl_br = torch.empty(2, b * r, device=mesh.device, dtype=dtype)
    dx_bD, dc_rD = torch.empty_like(x_bD), torch.empty_like(c_rD)

    def blocks() -> Iterator[tuple[int, int]]:
        for token in range(0, num_tokens, b):
            for row in range(0, num_rows, r):
                yield min(b, num_tokens - token), min(r, num_rows - row)

    def step() -> tuple[Tensor, ...]:
        for i, j in blocks():
            x, g, c = x_bD[:i], g_bD[:i], c_rD[:j]
            logits, gradient = l_br[: i * j].view(i, j), dl_br[: i * j].view(i, j)
            torch.mm(x, c.t(), out=logits)
            torch.mm(logits, c, out=dx_bD[:i])
            torch.mm(x, c.t(), out=logits)
            torch.mm(g, c.t(), out=gradient)
            torch.mm(gradient, c, out=dx_bD[:i])
            torch.mm(gradient.t(), x, out=dc_rD[:j])
        return ()

    def search() -> tuple[Tensor, ...]:
        for i, j in blocks():
            torch.mm(x_bD[:i], c_rD[:j].t(), out=l_br[: i * j].view(i, j))
        return ()

    return step, search
