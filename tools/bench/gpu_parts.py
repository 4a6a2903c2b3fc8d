"""The parts of `bench gpu` that measure kernels: each tells its rows on stdout, one JSON object a line.

A row has a case and, of what is timed, a form, seconds (the median) and peak_bytes beyond the inputs; of a check `ok`;
and a note. What is run is that of `bench codes` and `bench head`, on sizes for a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from statistics import median
from typing import Any

import torch

from vqscale.codes import backend, products
from vqscale.parallel.mesh import Mesh
from vqscale.run.checkout import checkout

from . import forms, head_forms, measure
from .setting import HeadSetting, Setting


@dataclass(frozen=True)
class Sizes:
    device: str = "cuda"
    tokens: int = 4096
    codes: int = 2**18
    dim: int = 256
    head: tuple[int, ...] = (2**14, 2**16, 2**18)
    checked: tuple[int, int] = (512, 8199)  # tokens and codes of the checks: no whole number of tiles
    repeats: int = 10
    images: int = 16
    side: int = 256
    channels: int = 128


TINY = Sizes("cpu", 32, 160, 16, (64, 160), (20, 83), repeats=1, images=1, side=32, channels=32)


def run(part: str, interpret: bool) -> int:
    torch.manual_seed(0)
    with kernels(interpret):
        PARTS[part](TINY if interpret else Sizes())
    return 0


def tell(case: str, **row: Any) -> None:
    print(json.dumps({"case": case, **row}), flush=True)


@contextmanager
def kernels(interpret: bool) -> Iterator[None]:
    """With `interpret` the fused kernels serve a CPU, as on a device that has them; needs TRITON_INTERPRET=1."""
    if not interpret:
        yield
        return
    root = checkout()
    assert root is not None, "the interpreter's products of bfloat16 are mended in tests/lib of a checkout"
    spec = importlib.util.spec_from_file_location("interpreted", root / "tests" / "lib" / "interpreted.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    kept = backend._has_kernels, products.wanted, products.has_float8
    backend._has_kernels = lambda x: x.dtype in (torch.float32, torch.bfloat16)
    products.wanted = lambda device_type, dtype: kept[1]("cuda", dtype)
    products.has_float8 = cache(lambda: True)
    try:
        yield
    finally:
        backend._has_kernels, products.wanted, products.has_float8 = kept


def tests(sizes: Sizes) -> None:
    """The tests that are marked as those of a GPU; in the interpreter they are found, and skipped."""
    root, case = checkout(), "marked gpu"
    if root is None or importlib.util.find_spec("pytest") is None:
        tell(case, note="left out: " + ("no checkout" if root is None else "pytest is not installed in this Python"))
        return
    files = [str(path) for path in sorted((root / "tests").glob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    if sizes.device == "cpu":
        files = [name for name in files if name.endswith("test_products.py")]
    # without the options of the checkout, which are those of pytest's plugins
    options = ["-q", "-o", "addopts=", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run([sys.executable, "-m", "pytest", *options, *files], cwd=root, capture_output=True, text=True)
    lines = [line.strip("= ") for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    # an import that fails is that of a package which this Python does not have
    missing = [line for line in lines if "ModuleNotFoundError" in line]
    note = f"left out: {missing[0]}" if missing else lines[-1] if lines else f"status {done.returncode}"
    tell(case, note=note, **({} if missing else {"ok": done.returncode in (0, 5)}))


def step(sizes: Sizes, entropy: bool = False) -> None:
    setting = _setting(sizes, "step", entropy)
    need = forms.dense_memory(setting)["step"]
    if sizes.device == "cuda" and need > 0.8 * torch.cuda.mem_get_info()[0]:
        tell(_shape(sizes), form="dense", note=f"left out: it needs about {need / 2**30:.0f} GiB")
        setting = replace(setting, dense=())
    _time(sizes, setting, "step")


def search(sizes: Sizes) -> None:
    setting = _setting(sizes, "search")
    _time(sizes, setting, "search", {"flash": _flash(sizes)})


def _setting(sizes: Sizes, work: str, entropy: bool = False) -> Setting:
    return Setting(
        tokens=sizes.tokens,
        codes=sizes.codes,
        dim=sizes.dim,
        entropy=entropy,
        device=sizes.device,
        repeats=sizes.repeats,
        products="bf16",
        works=(work,),
        dense=(work,),
    )


def _shape(sizes: Sizes) -> str:
    return f"{sizes.tokens} x {sizes.codes} x {sizes.dim}"


def _time(sizes: Sizes, setting: Setting, work: str, more: Mapping[str, Any] | None = None) -> None:
    with products.precision("medium"):
        mesh = Mesh(device=sizes.device)
        found = forms.build(setting, mesh)[work]
        wanted: dict[str, Any] = {name: found[name] for name in ("ours", "dense", "floor") if name in found}
        if work == "step":
            low = forms.at("low", found["ours"])
            wanted["float8"] = low if products.has_float8() else "left out: this device multiplies no float8"
        wanted |= more or {}
        timed(_shape(sizes), wanted, mesh, sizes.repeats)


def _flash(sizes: Sizes) -> Callable[[], Any] | str:
    """flash-kmeans' assignment in float16: the nearest by distance, with no bound on its rounding; or why not."""
    if sizes.device == "cpu":
        return "left out: flash-kmeans is for GPUs"
    try:
        assign = import_module("flash_kmeans.assign_euclid_triton").euclid_assign_triton
    except Exception as error:
        return f"left out: flash-kmeans cannot be imported ({error}): pip install flash-kmeans"
    x_1ND, c_1KD = (torch.randn(1, num, sizes.dim, device="cuda").half() for num in (sizes.tokens, sizes.codes))
    square_1N = x_1ND.float().square().sum(2)
    return lambda: assign(x_1ND, c_1KD, square_1N)


def head(sizes: Sizes) -> None:
    mesh = Mesh(device=sizes.device)
    absent = head_forms.missing(sizes.device)
    for codes in sizes.head:
        names = tuple(name for name in ("bf16", "dense", "torch", "cce", "quack", "floor") if name not in absent)
        setting = HeadSetting(
            sizes.tokens, codes, sizes.dim, device=sizes.device, products="bf16", losses=names, samples=()
        )
        exact = f"2^{codes.bit_length() - 1}" if codes & (codes - 1) == 0 else str(codes)
        forms_of: dict[str, Any] = dict(head_forms.build(setting, mesh)["loss"])
        forms_of |= {name: f"left out: {absent[name]}" for name in ("torch", "cce", "quack") if name in absent}
        timed(f"{exact} codes", forms_of, mesh, sizes.repeats)


def timed(case: str, wanted: Mapping[str, Callable[[], Any] | str], mesh: Mesh, repeats: int) -> None:
    """A row of each form; of a text in the place of one, that note. What fails alone is told, and the others go on."""
    seconds: dict[str, list[float]] = {}
    peaks, kept = {}, {}
    for name, form in wanted.items():
        if isinstance(form, str):
            tell(case, form=name, note=form)
            continue
        try:
            form()  # compiles
            peaks[name], kept[name], seconds[name] = measure.alone(form, mesh).peak_bytes, form, []
        except Exception as error:  # those of others too, of which one does not know what they raise
            if name in ("ours", "bf16", "floor"):
                raise
            tell(case, form=name, note=f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
    for _ in range(repeats):
        for name, form in kept.items():
            seconds[name].append(measure.seconds(form, mesh.device, mesh.codes))
    for name in kept:
        tell(case, form=name, seconds=median(seconds[name]), peak_bytes=peaks[name])


def checks(sizes: Sizes) -> None:
    from . import gpu_checks

    for row in gpu_checks.rows(sizes.device, *sizes.checked, sizes.dim):
        tell(**row)


def training(sizes: Sizes) -> None:
    from . import gpu_training

    for row in gpu_training.step(sizes.device, sizes.images, sizes.side, sizes.channels, sizes.codes, sizes.dim):
        tell(**row)


def graphs(sizes: Sizes) -> None:
    from . import gpu_training

    for row in gpu_training.graphs(sizes.device, sizes.images, sizes.side, sizes.channels, sizes.codes, sizes.dim):
        tell(**row)


def ranks(sizes: Sizes) -> None:
    from . import gpu_training

    for row in gpu_training.two_ranks(sizes.device):
        tell(**row)


def rank(sizes: Sizes) -> None:
    from . import gpu_training

    for row in gpu_training.one_rank(sizes.device, sizes.checked, sizes.dim):
        tell(**row)


PARTS: dict[str, Callable[[Sizes], None]] = {
    "checks": checks,
    "tests": tests,
    "step": step,
    "entropy": lambda sizes: step(sizes, entropy=True),
    "search": search,
    "head": head,
    "training": training,
    "ranks": ranks,
    "graphs": graphs,
    "rank": rank,
}
