"""What `bench codes` compares a search with beyond the dense form: FAISS, and a product in bfloat16 alone.

FAISS (pip install faiss-cpu, the extra `bench`) is the flat index of inner products, IndexFlatIP: exact in float32.
Building the index is not timed. Its processes are replicas like those of the dense form: each has all K rows. The
bfloat16 product is what a search by prefilter cannot do without, in blocks into one buffer, with its rows already in
bfloat16. Nothing here measures.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from vqscale.codes.rows import Rows
from vqscale.parallel.mesh import Mesh

from .setting import Setting

BLOCK = 2048, 1024  # tokens and rows multiplied at once; no other size measured faster


def missing(setting: Setting) -> dict[str, str]:
    """{form: why it is not run}."""
    out = {}
    if setting.device != "cpu" or setting.dtype != "float32":
        why = f"it searches in float32 on a CPU, not in {setting.dtype} on {setting.device}"
        return {"faiss": why, "bf16": why}
    if importlib.util.find_spec("faiss") is None:
        out["faiss"] = "faiss is not installed: pip install faiss-cpu"
    return out


def forms(setting: Setting, mesh: Mesh, x_ND: Tensor, rows: Callable[[], Tensor]) -> dict[str, Callable]:
    """{"faiss", "bf16"} without those that are missing; `rows` makes all K rows, and is asked only for FAISS."""
    out: dict[str, Callable] = {}
    absent = missing(setting)
    if "faiss" not in absent:
        out["faiss"] = _faiss(setting, x_ND, rows())
    if "bf16" not in absent:
        out["bf16"] = _product(setting, mesh)
    return out


def _faiss(setting: Setting, x_ND: Tensor, rows_KD: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    import faiss

    index = faiss.IndexFlatIP(setting.dim)
    index.add(rows_KD.detach().numpy())
    tokens = x_ND.detach().numpy()

    def search() -> tuple[Tensor, ...]:
        faiss.omp_set_num_threads(setting.threads)
        return (torch.from_numpy(index.search(tokens, 1)[1][:, 0]),)

    return search


def _product(setting: Setting, mesh: Mesh) -> Callable[[], tuple[Tensor, ...]]:
    num_tokens = setting.tokens * setting.processes
    num_rows = Rows(setting.codes, mesh.codes.size, mesh.codes.rank).count
    b, r = min(num_tokens, BLOCK[0]), min(num_rows, BLOCK[1])
    x_bD = torch.randn(b, setting.dim).bfloat16()
    c_kD = torch.randn(num_rows, setting.dim).bfloat16()
    out_rb = torch.empty(r * b, dtype=torch.bfloat16)

    def search() -> tuple[Tensor, ...]:
        for row in range(0, num_rows, r):
            c_rD = c_kD[row : row + r]
            for token in range(0, num_tokens, b):
                x = x_bD[: num_tokens - token]
                torch.mm(c_rD, x.t(), out=out_rb[: len(c_rD) * len(x)].view(len(c_rD), len(x)))
        return ()

    return search
