"""What the subcommands share: their options, what is refused, the processes, how a report ends.

Nothing is measured here, see measure.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from vqscale.run import checkout
from vqscale.run.folder import commit
from vqscale.run.machine import cores, facts

if TYPE_CHECKING:
    from .measure import Cost

TIMEOUT_S = 6 * 3600.0


def parser(subcommand: str, about: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"bench {subcommand}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_options(out: argparse.ArgumentParser) -> None:
    """What every subcommand takes: where, on how many processes, with how much memory."""
    out.add_argument("--processes", type=int, default=1, help="M, processes that share the rows, CPU only (1)")
    out.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (cpu)")
    out.add_argument("--threads", type=int, help="threads of each process (cores / processes)")
    out.add_argument("--scan-mib", type=int, default=64, help="memory of our blocks, MiB per process (64)")
    out.add_argument(
        "--max-dense-gib",
        type=float,
        default=8.0,
        help="leave out forms that would hold tokens x codes, of all processes together, in more than this (8)",
    )
    out.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def problems(args: argparse.Namespace, *counts: str) -> Iterable[str]:
    """What is wrong with the options of `add_options` and with `counts`, of which one number or more are given.

    Each is the rule, where it came from and what to change.
    """
    for key in (*counts, "processes", "threads", "scan_mib"):
        values, flag = getattr(args, key), "--" + key.replace("_", "-")
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < 1:
                yield f"{key} is {value} and must be at least 1; it comes from {flag}: give 1 or more"
    if not args.max_dense_gib >= 0:
        yield (
            f"the limit of the dense form is {args.max_dense_gib} GiB and must not be negative; it comes from "
            "--max-dense-gib: give 0 to leave the dense form out"
        )
    if args.device == "cuda" and args.processes > 1:
        yield (
            f"{args.processes} processes need a device each and are started on a CPU only, but --device is cuda: "
            "use --processes 1 or --device cpu"
        )


def no_device(device: str) -> str | None:
    """The message when the device that was asked for is not there."""
    if device != "cuda":
        return None
    import torch

    if torch.cuda.is_available():
        return None
    build = f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
    return f"cuda needs a CUDA device, but {build}; it comes from --device: use --device cpu, or a machine with a GPU"


def parse(
    out: argparse.ArgumentParser, argv: Sequence[str], wrong: Callable[[argparse.Namespace], Iterable[str]]
) -> argparse.Namespace:
    """The arguments; ends with a message and status 2 where there is no such device or anything is wrong."""
    args = out.parse_args(argv)
    if missing := no_device(args.device):
        out.error(missing)
    if found := list(wrong(args)):
        out.error("\n".join(found))
    return args


def threads(args: argparse.Namespace) -> int:
    """Threads of each process: what was asked for, or an even share of the cores."""
    return args.threads or max(1, cores() // args.processes)


def everywhere(measure: Callable[[Any], Any], setting: Any) -> list[Any]:
    """What `measure(setting)` returns on each of the setting's processes, which all begin at once."""
    if setting.device == "cuda":
        return [measure(setting)]
    from vqscale.parallel import spawn

    return spawn.run(measure, setting.processes, setting, timeout_s=TIMEOUT_S)


def joined(costs: Sequence[Cost]) -> dict[str, Any]:
    """The costs of one form on all processes as one: a repeat lasts as long as its slowest process."""
    peaks = [cost.peak_bytes for cost in costs if cost.peak_bytes is not None]
    processor = [cost.processor for cost in costs]
    return {
        "seconds": median(max(repeat) for repeat in zip(*(cost.seconds for cost in costs), strict=True)),
        **({"processor_seconds": median(max(each) for each in zip(*processor, strict=True))} if all(processor) else {}),
        "peak_bytes": max(peaks, default=None),
        "sent_bytes": max(cost.sent_bytes for cost in costs),
    }


def origin(subcommand: str, argv: Sequence[str], device: str, threads: int) -> dict[str, Any]:
    """Where a report was made: {"machine", "commit", "command"}."""
    asked = checkout.command("bench", [subcommand, *argv])
    return {"machine": machine(device, threads), "commit": commit(), "command": asked}


def told(printed: str) -> Iterator[dict[str, Any]]:
    """The rows among the lines that a process printed, JSON objects; one that was cut short is none."""
    for line in printed.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)


def place(report: dict[str, Any]) -> str:
    """The same in a line of a table."""
    host = report["machine"]
    return f"{host.get('gpu') or host['cpu']}, {host['cores']} cores, torch {host['torch']}, commit {report['commit']}"


def machine(device: str, threads: int) -> dict[str, Any]:
    import torch

    out = {**facts(), "threads": threads, "torch": torch.__version__}
    return {**out, "gpu": torch.cuda.get_device_name()} if device == "cuda" else out


def cell(value: float | None, width: int, digits: int) -> str:
    """A number in a table of text, or that there is none."""
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"
