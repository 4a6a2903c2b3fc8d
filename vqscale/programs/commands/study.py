"""Run a study: every combination of its dials, one after the other or side by side, then a table, figures and a page.

    python tools/study.py STUDY.yaml [key=value ...]     e.g. jobs=1 folder=runs/other seeds=[0,1]
    --dry-run    print the plan with parameters and memory of each run, and start nothing
    --prepare    write the config of each run, print their paths, and start nothing (for launch/slurm/array.sbatch)
    --help       this text and every key of a study

Interrupted (Ctrl-C, TERM), it lets the runs save and leaves; the same command goes on. A run that fails is recorded and
the rest goes on; the same command tries it again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from tqdm import tqdm

from vqscale import config as configuration
from vqscale.disk import files
from vqscale.programs import study as studies
from vqscale.programs.study import Member, StudyConfig
from vqscale.run import folder as run_folder
from vqscale.show import page

ROOT = Path(__file__).resolve().parents[3]
POLL_S = 1.0
COLUMNS = {
    "run": "{}", "status": "{}", "num_codes": "{:,.0f}", "usage": "{:.1%}", "perplexity": "{:,.0f}", "psnr": "{:.2f}",
    "ssim": "{:.3f}", "loss": "{:.4f}", "images_per_s": "{:.0f}", "code_axis_share": "{:.0%}", "verdict": "{}",
}  # fmt: skip


class Started(Protocol):
    def poll(self) -> int | None: ...
    def send_signal(self, number: int) -> None: ...


class LocalLauncher:
    """Starts runs as processes of this machine. Another launcher needs the same one method."""

    def start(self, member: Member, study: StudyConfig) -> Started:
        train = [str(ROOT / "launch" / "train.py"), str(member.file(study))]
        many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={study.processes}"]
        threads = max(1, (os.cpu_count() or 1) // (study.processes * study.jobs))
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        with member.log(study).open("a") as log:
            command = [sys.executable, *(many if study.processes > 1 else []), *train]
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


class Conductor:
    """Keeps `jobs` runs going until all members are done or have failed; `stop` lets the running ones save and ends."""

    def __init__(self, study: StudyConfig, members: list[Member], launcher: LocalLauncher) -> None:
        self.study, self.members, self.launcher = study, members, launcher
        self.waiting = [member for member in members if not (member.folder / "summary.json").exists()]
        self.running: dict[str, tuple[Member, Started]] = {}
        self.failures: dict[str, str] = {}
        self.stopping = False

    def stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        for _, process in self.running.values():
            process.send_signal(signal.SIGTERM)

    def play(self) -> None:
        steps = sum(member.config.run.steps for member in self.members)
        with tqdm(
            total=steps, unit="step", dynamic_ncols=True, mininterval=5 if not sys.stdout.isatty() else 0.5
        ) as bar:
            while self.running or (self.waiting and not self.stopping):
                while self.waiting and len(self.running) < self.study.jobs and not self.stopping:
                    member = self.waiting.pop(0)
                    self.running[member.name] = (member, self.launcher.start(member, self.study))
                time.sleep(POLL_S)
                self._collect()
                bar.n = sum(_steps_done(member) for member in self.members)
                bar.set_postfix_str(", ".join(self.running) or "done", refresh=True)

    def _collect(self) -> None:
        for name, (member, process) in list(self.running.items()):
            status = process.poll()
            if status is None:
                continue
            del self.running[name]
            if status and not self.stopping:
                self.failures[name] = _last_words(member.log(self.study))
                tqdm.write(f"{name} failed: {self.failures[name]} (see {member.log(self.study)})")
            report(self.study, self.members, self.failures)


def _steps_done(member: Member) -> int:
    return int(studies.last_row(member.folder).get("step", 0))


def _last_words(log: Path) -> str:
    """The line of a log that says why its run failed: the last with "error:", else the last one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if "error:" in line]
    return (told or lines or ["it said nothing"])[-1][:300]


def report(study: StudyConfig, members: list[Member], failures: dict[str, str]) -> list[dict[str, Any]]:
    """Write results.csv, the figures and the page from what there is; returns the lines."""
    lines = [studies.outcome(member, failures.get(member.name, "")) for member in members]
    studies.write_results(study, lines)
    place, dials = Path(study.folder), [dial.name for dial in study.dials]
    (place / "figures").mkdir(exist_ok=True)
    figures = []
    for key, caption in page.FIGURES.items():
        path = place / "figures" / f"{key}.png"
        if page.figure(lines, key, dials, path):
            figures.append(page.picture(path, caption))
    seen = {member.name: sorted((member.folder / "samples" / "reconstructions").glob("*.png")) for member in members}
    failed = "".join(f"<p class=failed>{line['run']}: {line['error']}</p>" for line in lines if line.get("error"))
    parts = [
        ("Results", page.table(lines, COLUMNS) + failed),
        ("Figures", "".join(figures)),
        ("Originals above reconstructions", page.side_by_side({name: at[-1] for name, at in seen.items() if at})),
        ("How", f"<p>commit {run_folder.commit()}</p><pre>python tools/study.py {' '.join(sys.argv[1:])}</pre>"
                f"<pre>{configuration.dump(study)}</pre>"),
    ]  # fmt: skip
    files.write(place / "index.html", page.page(f"Study {place.name}", parts))
    return lines


def print_plan(study: StudyConfig, members: list[Member]) -> None:
    from vqscale.plan.tokenizer import MIB, plan

    print(f"{len(members)} runs of {study.processes} processes, {study.jobs} side by side, in {study.folder}")
    for member in members:
        costs = plan(member.config, study.processes)
        parameters, memory = sum(costs.parameters.values()), sum(costs.memory.values()) / MIB
        print(
            f"  {member.name}: {parameters:,} parameters, {memory:,.0f} MiB per rank, {member.config.run.steps} steps"
        )


def print_table(lines: list[dict[str, Any]]) -> None:
    rows = [list(COLUMNS), *([page.cell(line.get(key), form) for key, form in COLUMNS.items()] for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())


def main(argv: list[str]) -> int:
    if not argv or "--help" in argv or "-h" in argv:
        print(f"{__doc__}\nKeys:\n{configuration.describe(StudyConfig)}")
        return 0 if argv else 2
    try:
        words = [word for word in argv if word not in ("--dry-run", "--prepare")]
        files = [Path(word) for word in words if "=" not in word]
        if len(files) != 1:
            raise ValueError(f"give one STUDY.yaml, found {len(files)}: see tools/study.py --help")
        study = configuration.load(StudyConfig, files[0], [word for word in words if "=" in word])
        members = studies.expand(study, files[0])
        if "--dry-run" in argv:
            print_plan(study, members)
            return 0
        studies.settle(study, members)
        if "--prepare" in argv:
            print("\n".join(str(member.file(study)) for member in members))
            return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    conductor = Conductor(study, members, LocalLauncher())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, conductor.stop)
    conductor.play()
    lines = report(study, members, conductor.failures)
    print_table(lines)
    print(f"page: {Path(study.folder) / 'index.html'}, table: {Path(study.folder) / 'results.csv'}")
    if conductor.stopping:
        print("interrupted: the runs have saved, the same command goes on")
        return run_folder.EXIT_STOPPED
    return 1 if conductor.failures else 0
