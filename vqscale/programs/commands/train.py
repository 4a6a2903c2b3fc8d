"""Train what a config describes, on one process or under torchrun.

    torchrun --nproc_per_node=8 launch/train.py [CONFIG] [dotted.key=value ...]

    CONFIG       a YAML file of configs/; without one, configs/quickstart/tokenizer.yaml
    key=value    changes a key of it, e.g. mesh.codes=4 optim.lr=2e-4 tokenizer.quantizer.num_codes=65536
    --help       this text and every key with its type, default and meaning
    --dry-run    check everything, print parameters, memory per rank and bytes per step, and start nothing
    --world N    with --dry-run: plan for N processes
    --profile    trace 3 steps into the run folder's profile/ (run.profile_steps=3)

The same command continues a run from its newest whole checkpoint, on any number of processes. TERM, USR1, USR2, or a
file STOP in the run folder make it save and leave with exit status 75. The environment variable
VQSCALE_SUBMIT_SCRIPT names a script (of SLURM, say) of which the run folder keeps a copy; VQSCALE_STATUS_FILE a file
that gets the exit status, which torchrun does not pass on. Jobs of SLURM: launch/slurm/train.sbatch.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqscale import config as configuration
from vqscale.run import folder, processes
from vqscale.train.config import Run, TokenizerRun

if TYPE_CHECKING:
    from vqscale.parallel.mesh import Mesh

OVERRIDE = re.compile(r"[^/]*=")  # a path may have an equals sign in it, after a slash
DEFAULT = Path(__file__).resolve().parents[3] / "configs" / "quickstart" / "tokenizer.yaml"


def main(argv: list[str]) -> int:
    status = _start(argv)
    _leave_status(status)
    return status


def _start(argv: list[str]) -> int:
    """Exit status: 0 done, 1 failed while running, 2 the user's input, 75 stopped on request."""
    if "--help" in argv or "-h" in argv:
        print(f"{__doc__}\nKeys:\n{configuration.describe(Run)}")
        return 0
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        path, overrides, dry, planned = _arguments(argv)
        config = configuration.load(Run, path, overrides)
        config.check_world(planned or world)
        if dry:
            if rank == 0:
                print(_plan(config, planned or world))
            return 0
        folder.check(config)
        device = _check_machine(config)
    except (ValueError, OSError) as error:
        # What is wrong with the input every rank finds, and one says it; a disk or a network may be bad on one only.
        if rank == 0 or isinstance(error, OSError):
            print(f"error: {error}", file=sys.stderr)
        processes.leave_word(f"error: {error}")
        return 2 if isinstance(error, ValueError) else 1
    try:
        return _run(config, device)
    except BaseException as error:
        _tell(error, rank, world)
        # No farewell to the others: they may wait for this rank. torchrun ends them.
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, ValueError) else 1)


def _arguments(argv: list[str]) -> tuple[Path, list[str], bool, int | None]:
    """(config file, overrides, dry run?, planned processes); ValueError for what is none of these."""
    words, dry, planned = list(argv), False, None
    if "--dry-run" in words:
        words.remove("--dry-run")
        dry = True
    if "--world" in words:
        at = words.index("--world")
        number = words[at + 1] if at + 1 < len(words) else "nothing"
        if not number.isdigit() or int(number) < 1 or not dry:
            raise ValueError(f"--world takes a number of processes, with --dry-run; found {number}: use --world 8")
        planned = int(number)
        del words[at : at + 2]
    if "--profile" in words:
        words[words.index("--profile")] = "run.profile_steps=3"
    unknown = [word for word in words if word.startswith("-")]
    overrides = [word for word in words if OVERRIDE.match(word)]
    files = [word for word in words if word not in overrides and not word.startswith("-")]
    if unknown or len(files) > 1:
        raise ValueError(
            f"{' '.join(unknown or files[1:])} is neither an option nor key=value, and there is one CONFIG: "
            "see launch/train.py --help"
        )
    return Path(files[0]) if files else DEFAULT, overrides, dry, planned


def _plan(config: Run, world: int) -> str:
    if config.task == "prior":
        from vqscale.plan.prior import plan as plan_prior

        return plan_prior(config, world).text()
    from vqscale.plan.tokenizer import plan

    return plan(config, world).text()


def _check_machine(config: Run) -> str:
    """Everything about this machine that can be wrong, before any process group: device, compiler, weights,
    shards or caches."""
    from vqscale.engine.config import check_engine

    device = processes.pick_device(config.run.device)
    check_engine(config.engine, device)
    if config.run.compile:
        processes.check_compiler(device)
    if config.task == "prior":
        from vqscale.train.prior import open_streams

        open_streams(config)
    else:
        _check_images(config)
    return device


def _check_images(config: TokenizerRun) -> None:
    from vqscale.data import images

    if config.loss.perceptual is not None:
        from vqscale.nets import lpips

        lpips.check(config.loss.perceptual.vgg, config.loss.perceptual.heads)
    for key, source in (("data.train", config.data.train), ("data.val", config.data.val)):
        if source is not None:
            try:
                images.prepare(source)
            except (ValueError, OSError) as error:
                kind = ValueError if isinstance(error, ValueError) else OSError
                raise kind(f"{key}: {error}") from error


def _run(config: Run, device: str) -> int:
    from vqscale.parallel.mesh import Mesh, connect, disconnect, world_size

    here = connect(device, config.engine.timeout_s)
    data, codes = config.mesh.resolve(world_size())
    mesh = Mesh(data, codes, device=here, timeout_s=config.engine.timeout_s)
    summary = _train(config, mesh)
    disconnect()
    return 0 if summary is not None else folder.EXIT_STOPPED


def _train(config: Run, mesh: Mesh) -> dict[str, Any] | None:
    if config.task == "prior":
        from vqscale.train import prior

        return prior.train(config, mesh)
    from vqscale.train import tokenizer

    return tokenizer.train(config, mesh)


def _tell(error: BaseException, rank: int, world: int) -> None:
    """Print why this rank ends: input errors once, lost peers in a line, everything else with its traceback."""
    sys.stdout.flush()
    who = f"[rank {rank} of {world}] " if world > 1 else ""
    if isinstance(error, KeyboardInterrupt):
        print(f"{who}interrupted", file=sys.stderr)
    elif isinstance(error, RuntimeError) and processes.LOST_PEER.search(str(error)):
        first = str(error).strip().splitlines()[0]
        print(f"{who}error: lost another rank ({first[:160]}); its own message says why", file=sys.stderr)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        print(
            f"{who}error: {error}: a disk is full, most likely that of run.folder; make room and start again, the "
            "checkpoints that are finished stand",
            file=sys.stderr,
        )
    elif isinstance(error, ValueError | FloatingPointError) or type(error).__name__ in processes.EXPLAINED:
        print(f"{who}error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
        print(f"{who}error: {type(error).__name__}: {error}", file=sys.stderr)
    sys.stderr.flush()
    processes.leave_word(f"error: {error}")


def _leave_status(status: int) -> None:
    """Tell whoever started torchrun the status of rank 0: torchrun itself answers 1 for every status but 0."""
    path = os.environ.get("VQSCALE_STATUS_FILE")
    if path and os.environ.get("RANK", "0") == "0":
        Path(path).write_text(f"{status}\n")
