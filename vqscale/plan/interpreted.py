"""What the fused kernels of a step of the code axis do, counted in Triton's interpreter on a CPU: how often each is
launched, the operations of its products, the bytes that it writes; and the operations of the library's products.

Nothing is timed. Operands are float32, which the interpreter multiplies; on a GPU they are bfloat16, with half the
bytes and other tiles. The interpreter is chosen before triton is imported: a process that has imported it without, or
where it is not installed, counts nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from vqscale.codes import scan
from vqscale.codes.scan import Keys
from vqscale.codes.softmax import backward
from vqscale.codes.softmax.backward import Upstream
from vqscale.codes.softmax.forward import Wanted
from vqscale.plan import cost
from vqscale.plan.count import code_axis
from vqscale.plan.machines import MACHINES
from vqscale.plan.traffic import Work

STEP = ("mix", "column_sums", "row_means", "logit_gradient")  # kernels whose work does not depend on data
SIZES = (64, 256, 16)  # tokens, codes, dim of a step that is compared: the interpreter is slow
LEAST_BLOCKS = 1  # bytes: the smallest blocks
NAMES = ("products", "library", "blocks", "block_bytes")


@dataclass
class Counted:
    launches: dict[str, int] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)
    """bytes by kernel"""
    library: int = 0
    """operations"""

    @property
    def products(self) -> int:
        """Operations of all products of a step, but for the exact scores of what is in doubt."""
        return self.library + sum(self.operations.get(name, 0) for name in STEP)


def available() -> bool:
    if find_spec("triton") is None:
        return False
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    from triton import knobs

    return bool(knobs.runtime.interpret)


def count(tokens: int, codes: int, dim: int, entropy: bool, budget: int) -> Counted:
    """One forward and backward pass of a mixture with random tokens; its blocks are as `budget` bytes allow."""
    from vqscale.codes.gpu import passes

    x, rows = torch.randn(tokens, dim), torch.randn(codes, dim) * dim**-0.5
    wanted, keys = Wanted(codes, budget, 1.0, 0.1 if entropy else None), Keys(rows)
    found = Counted()
    with _counting(found):
        mixed = passes.mix(x, keys, rows, wanted)
        log_B, given = mixed.soft.sum_B.log2(), torch.ones(tokens)
        up = Upstream(mixed.score_B, log_B, x, given)
        if mixed.entropy_soft is not None:
            entropy_log_B = mixed.entropy_soft.sum_B.log2()
            columns_k = passes.column_sums(x, keys, mixed, mixed.score_B, entropy_log_B, wanted)
            means_B = passes.row_means(x, keys, mixed, mixed.score_B, entropy_log_B, columns_k, wanted)
            up = Upstream(mixed.score_B, log_B, x, given, given, given, columns_k, means_B, entropy_log_B)
        passes.mix_backward(x, keys, rows, mixed, up, wanted)
    return found


@contextmanager
def _counting(found: Counted) -> Iterator[None]:
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    running = [""]
    run, dot, store = InterpretedFunction.run, InterpreterBuilder.create_dot, InterpreterBuilder.create_masked_store
    add = backward.add_product

    def counted_run(self: Any, *args: Any, **options: Any) -> Any:
        running[0] = self.fn.__name__.removesuffix("_kernel")
        found.launches[running[0]] = found.launches.get(running[0], 0) + 1
        return run(self, *args, **options)

    def counted_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        operations = 2 * a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]
        found.operations[running[0]] = found.operations.get(running[0], 0) + operations
        return dot(self, a, b, d, *options)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, policy: Any) -> Any:
        nbytes = int(mask.data.sum()) * value.data.dtype.itemsize
        found.stored[running[0]] = found.stored.get(running[0], 0) + nbytes
        return store(self, pointers, value, mask, policy)

    def counted_add(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, products: Any) -> None:
        found.library += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        add(out, a, b, products)

    counted = (
        (InterpretedFunction, "run", counted_run),
        (InterpreterBuilder, "create_dot", counted_dot),
        (InterpreterBuilder, "create_masked_store", counted_store),
        (backward, "add_product", counted_add),
    )
    before = [getattr(owner, name) for owner, name, _ in counted]
    try:
        for owner, name, function in counted:
            setattr(owner, name, function)
        yield
    finally:
        for (owner, name, _), function in zip(counted, before, strict=True):
            setattr(owner, name, function)


def compare() -> list[dict[str, Any]]:
    """The model of a step on a GPU beside what its kernels do in Triton's interpreter, without and with entropies;
    nothing where that does not run. Products of 2 N K D; bytes of a block are of float32, twice those of bfloat16."""
    if not available():
        return []
    from vqscale.codes.gpu import tiles

    tokens, codes, dim = SIZES
    size = tiles.wave(tokens, 4, tiles.CACHE_BYTES, LEAST_BLOCKS)
    out = []
    for entropy in (False, True):
        work = Work(codes, dim, tokens, entropy=entropy, codes_precision="medium")
        axis = cost.on_machine(code_axis({"name": "ibq"}), work, MACHINES["h200"])
        found = count(tokens, codes, dim, entropy, LEAST_BLOCKS)
        each = 2 * tokens * codes * dim
        out.append(
            {
                "entropy": entropy,
                "products_predicted": axis.products,
                "products_counted": found.products / each,
                "library_predicted": cost.LIBRARY,
                "library_counted": found.library / each,
                "blocks_predicted": len(list(scan.cut(tokens, codes, *size))),
                "blocks_counted": found.launches["logit_gradient"],
                "block_bytes_predicted": 2 * 4 * axis.passes * tokens * codes,
                "block_bytes_counted": found.stored["logit_gradient"],
            }
        )
    return out


def agrees(row: dict[str, Any]) -> bool:
    return all(row[f"{name}_predicted"] == row[f"{name}_counted"] for name in NAMES)


def text(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["the kernels of a GPU are not counted: that takes triton (the extra gpu)"]
    out = [f"kernels of a GPU, in the interpreter, {SIZES[0]} x {SIZES[1]} x {SIZES[2]}: predicted = counted"]
    for row in rows:
        parts = (
            f"{name.replace('_', ' ')} {row[f'{name}_predicted']:g} = {row[f'{name}_counted']:g}" for name in NAMES
        )
        out.append(f"  {'with' if row['entropy'] else 'without'} entropies: {', '.join(parts)}")
    return out
