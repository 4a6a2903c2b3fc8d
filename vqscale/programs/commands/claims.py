"""Run claims of papers as small studies, judge each by the rule in its file, and put all on one page.

    vqscale claims                       every file of configs/claims, one after the other, and the page
    vqscale claims --list                what there is, with estimated minutes on two cores, and nothing started
    vqscale claims --only scq            this file alone, or --only NAME of a claim; again for more; the page has all
    vqscale claims --quick               a look: fewer steps and seeds, in folders of its own
    vqscale claims --report --out FOLDER write tables and page from what there is, and start nothing
    vqscale claims FILE.yaml ...         these files in place of those of the checkout
    vqscale claims --slurm --time=02:00:00   each study as an array of jobs; options of the form --name=value are for
                                         sbatch. What comes before a study runs here. When the arrays are done the same
                                         command draws, measures and reports

A verdict is one of: holds, holds in part, does not hold here, cannot be tested here (why). What is done stays done: an
interrupted command (Ctrl-C, TERM) lets its runs save, and given again it goes on. The page and claims.json are written
to runs/claims (runs/claims-quick), or --out. key=value changes a key of every file, as study.jobs=1.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType

from vqscale import config as configuration
from vqscale.config.text import inline
from vqscale.programs.claims import claims
from vqscale.programs.claims.before import Before
from vqscale.programs.claims.claims import Asked
from vqscale.programs.commands import COMMANDS, study, words
from vqscale.programs.studies import launchers
from vqscale.programs.studies.runner import Runner
from vqscale.run import checkout, processes
from vqscale.run import folder as run_folder
from vqscale.train.config import Run

PLACE = Path("runs/claims")
OF_SBATCH = re.compile(r"--[a-z][a-z-]*=.*")


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, submitted or told, 1 something failed on the way, 2 the user's input, 75 stopped on request."""
    given = sys.argv[1:] if argv is None else list(argv)
    return processes.status_of(lambda: _claims(arguments(given), checkout.command("claims", given)))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The arguments, and the files that they name; ValueError for words that do not go together."""
    parser = words.parser(__doc__)
    parser.add_argument("words", nargs="*", metavar="FILE.yaml | key=value")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a file or a claim")
    parser.add_argument("--quick", action="store_true", help="fewer steps and seeds")
    parser.add_argument("--list", action="store_true", help="what there is, and nothing started")
    parser.add_argument("--report", action="store_true", help="tables and page from what there is")
    parser.add_argument("--out", type=Path, help=f"where they go (default: {PLACE}, with --quick {PLACE}-quick)")
    parser.add_argument("--slurm", action="store_true", help="studies as arrays of jobs")
    args, others = parser.parse_known_intermixed_args(given)
    wrong = [word for word in others if not OF_SBATCH.fullmatch(word)]
    if wrong or (others and not args.slurm):
        parser.error(f"unknown: {' '.join(wrong or others)} (options of sbatch go with --slurm, as --name=value)")
    if args.slurm and (args.list or args.report):
        raise ValueError("--slurm starts studies, and --list and --report start nothing: leave one out")
    args.changes = [word for word in args.words if words.CHANGE.match(word)]
    args.files = [Path(word) for word in args.words if word not in args.changes] or shipped()
    if args.slurm:
        args.changes += ["study.launcher=slurm", f"study.launcher_options={inline(others)}"]
    return args


def shipped() -> list[Path]:
    """The files of the checkout; ValueError where there is none."""
    root = checkout.checkout()
    found = [] if root is None else sorted((root / "configs" / "claims").glob("*.yaml"))
    if not found:
        raise ValueError(
            "no FILE.yaml was given, and configs/claims, which is taken then, is in the repository and not in the "
            "installed package: give the paths of files of claims"
        )
    near = [Path(os.path.relpath(path)) for path in found]
    return found if near[0].parts[0] == os.pardir else near


def _claims(args: argparse.Namespace, command: str) -> int:
    every = [loaded(path, args.changes, args.quick) for path in args.files]
    chosen = _chosen(every, args.only)
    for asked in every:
        study.check_options(asked.study, asked.trials)
    place = args.out or (PLACE.with_name(f"{PLACE.name}-quick") if args.quick else PLACE)
    if args.list:
        return _list(chosen)
    done = Carried()
    if not args.report:
        study.listen(done.stop)
        for asked in chosen:
            done.carry_out(asked, command)
    for row in claims.report(every, command, place):
        print(f"{row.name}: {row.told}")
    print(f"page: {place / 'index.html'}, table: {place / 'claims.csv'}")
    if done.stopping:
        print("interrupted: what ran has saved, the same command goes on")
        return run_folder.EXIT_STOPPED
    return 1 if done.failed else 0


def loaded(path: Path, changes: Iterable[str] = (), quick: bool = False) -> Asked:
    """A file of claims; ValueError also for what its commands would refuse before they open a file that may not be
    there yet, or the end of the program by argparse."""
    asked = claims.load(path, changes, quick)
    for given in asked.config.before:
        try:
            _check(given)
        except ValueError as error:
            raise ValueError(f"{path}: before: {checkout.command(given[0], given[1:])}: {error}") from error
    return asked


def _check(given: Sequence[str]) -> None:
    name, *rest = given
    if name != "train":
        import_module(f"vqscale.programs.commands.{COMMANDS[name][0]}").arguments(rest)
        return
    path, changes = words.config_and_changes(rest)
    if path is None:
        raise ValueError("train is given no CONFIG: name one")
    configuration.load(Run, path, changes)


def _chosen(every: Sequence[Asked], only: Sequence[str]) -> list[Asked]:
    """The files that --only names, by their own names or those of claims; all without it."""
    names = [{asked.name, *(claim.name for claim in asked.config.claims)} for asked in every]
    known = [name for found in names for name in sorted(found)]
    repeated = sorted({name for name in known if known.count(name) > 1})
    if repeated:
        raise ValueError(f"several files or claims are called {', '.join(repeated)}: give each a name of its own")
    if unknown := [name for name in only if name not in known]:
        raise ValueError(f"--only {unknown[0]}: no file and no claim is called so, they are {', '.join(known)}")
    return [asked for asked, found in zip(every, names, strict=True) if not only or found & {*only}]


def _list(chosen: Sequence[Asked]) -> int:
    for asked in chosen:
        left = sum(not trial.done for trial in asked.trials)
        print(f"{asked.name}: {asked.minutes:g} minutes, estimated; {left} of {len(asked.trials)} runs left")
        for claim in asked.config.claims:
            print(f"  {claim.name}: {claim.paper}: {claim.title}")
    print(f"{sum(asked.minutes for asked in chosen):g} minutes in all")
    return 0


class Carried:
    """Brings studies and what is before them to their end, one after the other, and can be told to stop."""

    def __init__(self) -> None:
        self.stopping, self.failed = False, False
        self._now: Before | Runner | None = None

    def stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        if isinstance(self._now, Runner):
            self._now.stop(number, frame)
        elif self._now is not None:
            self._now.stop()

    def carry_out(self, asked: Asked, command: str) -> None:
        """All that a file needs; what fails is said, and others go on."""
        if self.stopping:
            return
        print(f"{asked.name}: {len(asked.trials)} runs, about {asked.minutes:g} minutes on two cores", flush=True)
        self._now = before = Before(asked.config)
        why = before.run()
        self.stopping |= before.stopping
        if why:
            print(f"{asked.name}: {why}", flush=True)
            self.failed |= not before.absent
        if why or self.stopping:
            return
        launcher = launchers.build(asked.study, asked.trials)
        self._now = runner = Runner(asked.study, asked.trials, launcher, command)
        if not self.stopping:
            study.carry_out(runner)
        self.failed |= bool(runner.failed)
