"""`bench kernels`: what the fused kernels of vqscale/codes need of a GPU that need not be here.

Compiles each with Triton for compute capability 9.0 (H100, H200), with the tiles that vqscale/codes/gpu/tiles.py
gives it, and prints registers per thread, bytes of stack (what does not fit into registers), shared memory and the
warp-group products in its code. Times nothing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import command

SHARED_MOST = 227 * 1024  # bytes of shared memory that a program may have
POINTERS = {"X": "low", "C": "low", "V": "low", "G": "low", "LOW": "low", "SCORE": "*fp64", "ROW": "*i32"}
FULL_TOKENS = ("rescore_kernel", "widths_kernel")  # these read tokens and codes as they are given, not operands
NUMBERS = ("scale", "out_scale", "ratio", "rounding")


class Case(NamedTuple):
    kernel: Any
    constants: dict[str, Any]
    warps: int
    stages: int
    says: str


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    print(f"{'kernel':28}{'case':28}{'registers':>10}{'stack B':>9}{'shared KiB':>12}{'wgmma':>7}")
    fits = True
    for case in cases(args.dim, args.fp32):
        name = case.kernel.__name__
        if args.only not in name:
            continue
        registers, stack, shared, products = compiled(case, "*fp32" if args.fp32 else "*bf16")
        fits &= shared <= SHARED_MOST
        print(f"{name:28}{case.says:28}{registers:10}{stack:9}{shared / 1024:12.1f}{products:7}", flush=True)
    print("all fit" if fits else f"NOT all fit into {SHARED_MOST // 1024} KiB of shared memory")
    return 0 if fits else 1


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    out = command.parser("kernels", __doc__)
    out.add_argument("--dim", type=int, default=256, help="D, dimension of a code (256)")
    out.add_argument("--fp32", action="store_true", help="operands in float32; else bfloat16")
    out.add_argument("--only", default="", help="kernels whose name contains this")
    return out.parse_args(argv)


def cases(dim: int, full: bool) -> Iterator[Case]:
    """Every kernel with a bias, in the variants that differ in what they hold."""
    from vqscale.codes.gpu import kernels, kernels_backward, tiles

    def case(kernel: Any, kind: tiles.Kernel, says: str, wide: bool = False, **flags: bool) -> Case:
        tile = tiles.tile(kind, dim, 4 if full else 2, wide)
        blocks = {"BLOCK_N": tile.tokens, "BLOCK_K": tile.codes, "BLOCK_D": tiles.padded(dim)}
        return Case(kernel, {"HAS_BIAS": True, **flags, **blocks}, tile.warps, tile.stages, says)

    yield case(kernels.peaks_kernel, "peaks", "")
    for kind in ("peaks", "mix"):
        chunk = tiles.tile(kind, dim, 4 if full else 2).codes
        flags = {"HAS_BIAS": True, "CHUNK": chunk, "BLOCK_D": tiles.RESCORE_DIM}
        yield Case(kernels.widths_kernel, flags, 4, 3, f"after {kind}")
        flags = {**flags, "BLOCK_N": tiles.RESCORE_TOKENS}
        yield Case(kernels.rescore_kernel, flags, 4, 3, f"after {kind}")
    yield case(kernels.column_sums_kernel, "columns", "")
    yield case(kernels.row_means_kernel, "means", "")
    for same in (True, False):
        for entropy in (False, True):
            says = ", ".join(word for word, said in (("values apart", not same), ("two temperatures", entropy)) if said)
            yield case(kernels.mix_kernel, "mix", says, ENTROPY=entropy, SAME=same)
            marks = {"HAS_MEAN": True, "HAS_SHIFT": True, "HAS_ENTROPY": entropy, "HAS_COLUMNS": entropy, "SAME": same}
            wide = entropy or not same
            yield case(kernels_backward.token_gradient_kernel, "tokens", says, wide, **marks)
            yield case(kernels_backward.key_gradient_kernel, "keys", says, wide, **marks)


def compiled(case: Case, operand: str) -> tuple[int, int, int, int]:
    """(registers, bytes of stack, bytes of shared memory, products of warp groups)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature, aligned = {}, {}
    for place, name in enumerate(names):
        if name in case.constants:
            signature[name] = "constexpr"
            continue
        kind = "i32" if name.islower() else POINTERS.get(name, "*fp32")
        if name in NUMBERS:
            kind = "fp32"
        elif kind == "low":
            kind = "*fp32" if name != "LOW" and case.kernel.__name__ in FULL_TOKENS else operand
        signature[name] = kind
        if kind != "fp32":  # addresses and sizes divide by 16, as they mostly do
            aligned[(place,)] = [["tt.divisibility", 16]]
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    options = {"num_warps": case.warps, "num_stages": case.stages}
    source = ASTSource(case.kernel, signature, constants, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    registers, stack = usage(kernel.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    return registers, stack, kernel.metadata.shared, kernel.asm["ptx"].count("wgmma.mma_async")


def usage(binary: bytes, cuobjdump: Path) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack = (re.search(rf"{key}:(\d+)", done.stdout) for key in ("REG", "STACK"))
    assert registers is not None, done.stdout
    assert stack is not None, done.stdout
    return int(registers[1]), int(stack[1])
