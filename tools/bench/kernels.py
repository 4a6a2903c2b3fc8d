"""`bench kernels`: what the fused kernels of vqscale/codes need of GPUs that need not be here.

Compiles each with Triton for compute capabilities 8.0 (A100), 8.9 (L40, RTX 40; 8.6 has the same tiles), 9.0 (H100,
H200), 10.0 (B200) and 12.0 (RTX 50), with the tiles that vqscale/codes/gpu/tiles.py gives it there, and prints for each
registers per thread, bytes of stack (what does not fit into registers and is spilled), shared memory, and how many
products of tensor cores are in its code: those of warps (mma), of warp groups (wgmma), of the fifth generation
(tcgen05). Times nothing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vqscale.programs.commands import words

from . import command

WARPS = r"mma\.sync"
PRODUCTS = {80: WARPS, 89: WARPS, 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma", 120: WARPS}  # by compute capability
LOW = {"X": "score", "C": "score", "LOW": "score", "V": "low", "G": "low"}
POINTERS = {**LOW, "SCORE": "*fp64", "ROW": "*i32"}
FULL_TOKENS = ("rescore_kernel", "widths_kernel")  # these read tokens and codes as they are given, not operands
NUMBERS = ("scale", "ratio", "rounding")


class Case(NamedTuple):
    kernel: Any
    constants: dict[str, Any]
    warps: int
    stages: int
    says: str


def main(argv: Sequence[str]) -> int:
    from vqscale.codes.gpu import tiles

    args = arguments(argv)
    print(f"{'kernel':24}{'case':36}{'cc':>4}{'registers':>10}{'stack B':>9}{'shared KiB':>12}{'products':>10}")
    fits = True
    for capability in args.capability:
        most = tiles.SHARED_KIB[capability]
        for case in cases(args.dim, args.fp32, capability):
            name = case.kernel.__name__
            if args.only not in name:
                continue
            registers, stack, shared, products = compiled(case, "*fp32" if args.fp32 else "*bf16", capability)
            fits &= shared <= most * 1024
            line = f"{name.removesuffix('_kernel'):24}{case.says:36}{capability:4}{registers:10}{stack:9}"
            print(f"{line}{shared / 1024:12.1f}{products:10}", flush=True)
    print("all fit" if fits else "NOT all fit into the shared memory of a program")
    return 0 if fits else 1


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    out = command.parser("kernels", __doc__)
    out.add_argument("--dim", type=words.count, default=256, help="D, dimension of a code (256)")
    out.add_argument("--fp32", action="store_true", help="operands in float32; else bfloat16")
    out.add_argument("--only", default="", help="kernels whose name contains this")
    out.add_argument(
        "--capability", type=int, nargs="+", default=list(PRODUCTS), choices=PRODUCTS, help="80, 89, 90, 100, 120 (all)"
    )
    return out.parse_args(argv)


def cases(dim: int, full: bool, capability: int) -> Iterator[Case]:
    """Every kernel with a bias, in the variants that differ in what they hold; last those with scores in float8."""
    from vqscale.codes import products
    from vqscale.codes.gpu import kernels, kernels_backward, tiles

    def tile(kind: tiles.Kernel, wide: bool = False) -> tiles.Tile:
        return tiles.tile(kind, dim, 4 if full else 2, wide, capability)

    def case(kernel: Any, kind: tiles.Kernel, says: str, wide: bool = False, **flags: bool) -> Case:
        chosen = tile(kind, wide)
        blocks = {"BLOCK_N": chosen.tokens, "BLOCK_K": chosen.codes, "BLOCK_D": tiles.padded(dim)}
        flags = {"HAS_BIAS": True, "SCALED": False, **flags}
        return Case(kernel, {**flags, **blocks}, chosen.warps, chosen.stages, says)

    yield case(kernels.peaks_kernel, "peaks", "")
    for kind in ("peaks", "mix"):
        flags = {"HAS_BIAS": True, "CHUNK": tile(kind).codes, "BLOCK_D": tiles.RESCORE_DIM}
        yield Case(kernels.widths_kernel, {**flags, "SCALED": False}, 4, 3, f"after {kind}")
        flags = {**flags, "BLOCK_N": tiles.RESCORE_TOKENS}
        yield Case(kernels.rescore_kernel, flags, 4, 3, f"after {kind}")
    yield case(kernels.column_sums_kernel, "columns", "")
    yield case(kernels.row_means_kernel, "means", "")
    for same in (True, False):
        for entropy in (False, True):
            says = ", ".join(word for word, said in (("values apart", not same), ("two temperatures", entropy)) if said)
            yield case(kernels.mix_kernel, "mix", says, ENTROPY=entropy, SAME=same)
            marks = {"HAS_MEAN": True, "HAS_SHIFT": True, "HAS_ENTROPY": entropy, "HAS_COLUMNS": entropy, "SAME": same}
            yield case(kernels_backward.logit_gradient_kernel, "gradient", says, not same, **marks)
    if full or divmod(capability, 10) < products.FLOAT8_FROM:
        return
    says = "scores in float8"
    flags = {"HAS_BIAS": True, "SCALED": True, "CHUNK": tile("mix").codes, "BLOCK_D": tiles.RESCORE_DIM}
    yield Case(kernels.widths_kernel, flags, 4, 3, says)
    yield case(kernels.column_sums_kernel, "columns", says, SCALED=True)
    yield case(kernels.row_means_kernel, "means", says, SCALED=True)
    for entropy in (False, True):
        says = f"scores in float8{', two temperatures' if entropy else ''}"
        yield case(kernels.mix_kernel, "mix", says, ENTROPY=entropy, SAME=False, SCALED=True)
        marks = {"HAS_MEAN": True, "HAS_SHIFT": True, "HAS_ENTROPY": entropy, "HAS_COLUMNS": entropy, "SAME": False}
        yield case(kernels_backward.logit_gradient_kernel, "gradient", says, True, **marks, SCALED=True)


def compiled(case: Case, operand: str, capability: int) -> tuple[int, int, int, int]:
    """(registers, bytes of stack, bytes of shared memory, products of tensor cores in the code)."""
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
        if case.kernel.__name__ == "logit_gradient_kernel" and name == "OUT":
            kind = operand
        if name in NUMBERS:
            kind = "fp32"
        elif kind == "score" and name != "LOW" and case.kernel.__name__ in FULL_TOKENS:
            kind = "*fp32"
        elif kind in ("score", "low"):
            kind = "*fp8e4nv" if kind == "score" and case.constants.get("SCALED") else operand
        signature[name] = kind
        if kind != "fp32":  # addresses and sizes divide by 16, as they mostly do
            aligned[(place,)] = [["tt.divisibility", 16]]
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    options = {"num_warps": case.warps, "num_stages": case.stages}
    source = ASTSource(case.kernel, signature, constants, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = usage(kernel.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    return registers, stack, kernel.metadata.shared, len(re.findall(PRODUCTS[capability], kernel.asm["ptx"]))


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
