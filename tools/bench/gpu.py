"""`bench gpu`: all that a machine with a GPU has to show, by one command, which tools/gpu_check.sh is.

This file starts the parts one after the other, each in a process of its own and for as long as the budget lets it, and
prints; what they measure is in gpu_parts.py and gpu_training.py, what is held against it in gpu_goals.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vqscale.run.checkout import checkout

from . import command, gpu_goals

ABOUT = """\
Needs a Python with torch and triton, and nothing else: it installs nothing, and what other packages would add is left
out where they are missing, and said. The parts, each cut short when its time is over:

  checks     mixtures, searches and losses of a head beside dense forms in float64; the same twice, to the bit
  tests      the tests that need a GPU, where pytest is installed
  step       one IBQ training step, 4096 tokens x 2^18 codes x 256: ours, dense, floor, ours with scores in float8
  entropy    the same with the entropy loss
  search     the exact search at this size: ours, dense, flash-kmeans, floor
  head       the loss of a prior's head at 2^14, 2^16, 2^18 codes: ours, dense, torch's, cut-cross-entropy, QuACK, floor
  training   a step of configs/tokenizer/ibq_imagenet256_262144.yaml with everything but data and the weights of LPIPS
             (they are drawn), 16 images: seconds, peak memory, the shares of the code axis and of the device
  ranks      the codes split over two processes that talk over NCCL, on one device if that can be
  graphs     the step of `training` with compiled networks, and with the tokenizer, codes and all, replayed as CUDA
             graphs; compiling takes what the others have left over

The table comes last, then what falls short of the goals. The numbers go to tools/results/gpu/ of the checkout, or to
--out. --interpret runs the same program on a CPU in Triton's interpreter at tiny sizes: its times say nothing, it
shows that the program runs, and it writes nothing without --out."""

# Seconds of a budget of 480 that each part may take, and what earlier parts have left over.
# The checks are the first that compile kernels, which the others then find compiled.
PARTS = {"checks": 80, "tests": 70, "step": 50, "entropy": 45, "search": 25, "head": 60, "training": 60, "ranks": 30}
PARTS |= {"graphs": 60}
FAILED = "checks", "tests"  # of these a failure is one of the whole


def _parser() -> argparse.ArgumentParser:
    out = command.parser("gpu", ABOUT)
    out.add_argument("--interpret", action="store_true", help="on a CPU, in Triton's interpreter, at tiny sizes")
    out.add_argument("--budget-s", type=float, default=480.0, help="seconds for all parts together (480)")
    out.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts alone", metavar="PART")
    out.add_argument("--out", type=Path, help="folder for the numbers (tools/results/gpu)")
    out.add_argument("--part", choices=[*PARTS, "rank"], help=argparse.SUPPRESS)  # of the processes that this starts
    return out


def problems(args: argparse.Namespace) -> Iterable[str]:
    if not args.budget_s > 0:
        yield f"the budget is {args.budget_s} s and must be a positive number; it comes from --budget-s: give 480"
    for package in ("torch", "triton"):
        if find_spec(package) is None:
            yield (
                f"{package} is needed, and {sys.executable} has none; use another Python, as in PYTHON=/path/to/python "
                "bash tools/gpu_check.sh, or install it there"
            )
            return
    if not args.interpret and (missing := command.no_device("cuda")):
        yield missing.replace("it comes from --device: use --device cpu", "use --interpret")


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if args.part is not None:
        from . import gpu_parts

        return gpu_parts.run(args.part, args.interpret)
    if found := list(problems(args)):
        _parser().error("\n".join(found))
    device = "cpu" if args.interpret else "cuda"
    report = {"parts": run(args)} | command.origin("gpu", argv, device, 1)
    report["interpreted"] = args.interpret
    for part in report["parts"].values():
        part["command"] = report["command"]
    report["goals"] = gpu_goals.judged(report["parts"])
    print(table(report), flush=True)
    if (folder := args.out or _results(args.interpret)) is not None:
        print(f"written: {_write(folder, report)}")
    broken = [name for name, part in report["parts"].items() if name in FAILED and part["failed"]]
    return 1 if broken else 0


def run(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """{part: {"rows", "seconds", "note", "failed"}}, all within the budget."""
    started, due, out = time.monotonic(), 0.0, {}
    for name, share in PARTS.items():
        due += args.budget_s * share / sum(PARTS.values())
        if name not in args.only:
            continue
        print(f"bench gpu: {name} ...", file=sys.stderr, flush=True)
        out[name] = part(name, args.interpret, max(1.0, due - (time.monotonic() - started)))
    return out


def part(name: str, interpret: bool, limit_s: float) -> dict[str, Any]:
    """One part in a process of its own, killed with all that it started when its time is over; what it had told by
    then is kept."""
    words = [sys.executable, str(Path(__file__).parent), "gpu", "--part", name, *(["--interpret"] if interpret else [])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if interpret else os.environ
    began, note = time.monotonic(), ""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        )
        try:
            told, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            note = f"cut short after {limit_s:.0f} s"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            told, _ = process.communicate()
        errors.seek(0)
        last = [line for line in errors.read().splitlines() if line.strip()][-1:]
    if process.returncode and not note:
        note = f"ended with status {process.returncode}: {' '.join(last)}"
    rows = list(command.told(told))
    failed = bool(process.returncode) or any(row.get("ok") is False for row in rows)
    return {"rows": rows, "seconds": time.monotonic() - began, "note": note, "failed": failed}


def table(report: dict[str, Any]) -> str:
    lines = [
        "",
        command.place(report),
        *(["in Triton's interpreter: the times are those of a CPU, and say nothing"] if report["interpreted"] else []),
        "",
        f"{'':10}{'':26}{'':9}{'ms':>10}{'/ floor':>9}{'extra MiB':>11}",
    ]
    for name, part in report["parts"].items():
        floors = {row["case"]: row["seconds"] for row in part["rows"] if row.get("form") == "floor"}
        for row in part["rows"]:
            seconds, peak, floor = row.get("seconds"), row.get("peak_bytes"), floors.get(row["case"])
            cells = (
                command.cell(seconds and 1000 * seconds, 10, 2),
                command.cell(seconds and floor and seconds / floor, 9, 2),
                command.cell(peak and peak / 2**20, 11, 1),
            )
            said = " ".join(filter(None, ["FAILED" if row.get("ok") is False else "", row.get("note", "")]))
            lines.append(f"{name:10}{row['case']:26}{row.get('form', ''):9}{''.join(cells)}  {said}".rstrip())
        lines.append(f"{name:10}{part['seconds']:.0f} s" + (f"; {part['note']}" if part["note"] else ""))
    return "\n".join([*lines, "", *gpu_goals.text(report["goals"])])


def _results(interpret: bool) -> Path | None:
    root = checkout()
    return None if interpret or root is None else root / "tools" / "results" / "gpu"


def _write(folder: Path, report: dict[str, Any]) -> Path:
    """FOLDER/CARD-COMMIT.json; parts that are run again at the same commit take the place of what they were there."""
    host = report["machine"]
    words = re.sub(r"[^a-z0-9]+", "-", f"{host.get('gpu') or 'interpreted'}-{report['commit']}".lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{words}.json"
    parts = dict(report["parts"])
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # none there, or one that is none
        parts = {**json.loads(path.read_text())["parts"], **parts}
    parts = {name: parts[name] for name in PARTS if name in parts}
    path.write_text(json.dumps({**report, "parts": parts, "goals": gpu_goals.judged(parts)}, indent=1) + "\n")
    return path
