"""Train what a config describes, on one process or under torchrun.

    vqscale train [CONFIG] [dotted.key=value ...]
    torchrun --nproc_per_node=8 -m vqscale train [CONFIG] [dotted.key=value ...]

    CONFIG       a YAML file as in configs/; in a checkout, without one, configs/quickstart/tokenizer.yaml
    key=value    changes a key of it, e.g. mesh.codes=4 optim.lr=2e-4 tokenizer.quantizer.num_codes=65536
    --help [KEY] this text and every key with its type, default and meaning; or KEY and what is below it: data.train
    --dry-run    check everything, print parameters, memory per rank and bytes per step, and start nothing
    --world N    with --dry-run: plan for N processes
    --profile    trace 3 steps into the run folder's profile/ (run.profile_steps=3)

The same command continues a run from its newest whole checkpoint, on any number of processes. TERM, USR1, USR2, or a
file STOP in the run folder make it save and leave with exit status 75. The environment variable
VQSCALE_SUBMIT_SCRIPT names a script (of SLURM, say) of which the run folder keeps a copy. Jobs of SLURM:
launch/slurm/train.sbatch. In a checkout launch/train.py is the same program.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqscale import config as configuration
from vqscale.disk.owner import own
from vqscale.programs.commands import words
from vqscale.run import checkout, folder, processes
from vqscale.train.config import Run, TokenizerRun

if TYPE_CHECKING:
    from vqscale.parallel.mesh import Mesh
    from vqscale.train.watch import Effort


def main(argv: list[str]) -> int:
    """0 done, 1 failed while running, 2 the user's input, 75 stopped on request."""
    return processes.status_of(lambda: _start(argv))


def _start(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        return _help([word for word in argv if not word.startswith("-")])
    path, changes, dry, planned = _arguments(argv)
    config = configuration.load(Run, path or checkout.config("quickstart/tokenizer.yaml"), changes)
    world = planned or int(os.environ.get("WORLD_SIZE", "1"))
    config.check_world(world)
    asked, config = config, _filled(config)
    if dry:
        if os.environ.get("RANK", "0") == "0":
            from vqscale.plan import costs_of

            found = configuration.differences(configuration.to_dict(asked), configuration.to_dict(config))
            looked_up = [f"as the cache and the tokenizer say: {line}" for line in found]
            print("\n".join([costs_of(config, world).text(), *looked_up]))
        return 0
    folder.check(config)
    device = _check_machine(config)
    with _owned(config):
        return _run(config, device)


def _help(keys: list[str]) -> int:
    """All of the help, or what it says of these keys."""
    head = f"{__doc__}\nKeys (* may have another value when a run goes on):"
    print("\n".join([configuration.describe(Run, key) for key in keys] or [head, configuration.describe(Run)]))
    return 0


def _arguments(argv: list[str]) -> tuple[Path | None, list[str], bool, int | None]:
    """(config file, changes of its keys, dry run?, planned processes); ValueError for what is none of these."""
    left, dry, planned = list(argv), False, None
    if "--dry-run" in left:
        left.remove("--dry-run")
        dry = True
    if "--world" in left:
        at = left.index("--world")
        number = left[at + 1] if at + 1 < len(left) else "nothing"
        if not number.isdigit() or int(number) < 1 or not dry:
            raise ValueError(f"--world takes a number of processes, with --dry-run; found {number}: use --world 8")
        planned = int(number)
        del left[at : at + 2]
    if "--profile" in left:
        left[left.index("--profile")] = "run.profile_steps=3"
    return *words.config_and_changes(left), dry, planned


def _filled(config: Run) -> Run:
    """The config with what others know in the place of null: a prior's token cache and tokenizer."""
    if config.task != "prior":
        return config
    from vqscale.train import nulls

    return nulls.fill(config)


def _check_machine(config: Run) -> str:
    """Everything about this machine that can be wrong, before any process group: device, compiler, weights,
    shards or caches, and what it begins from."""
    from vqscale.engine.config import check_engine

    device = processes.pick_device(config.run.device)
    check_engine(config.engine, device)
    if config.run.compile:
        processes.check_compiler(device)
    if config.run.cuda_graphs:
        processes.check_graphs(device)
    if config.task == "prior":
        from vqscale.train import prior_data

        prior_data.check(config)
    else:
        _check_images(config)
        from vqscale.train import drawn_ids

        drawn_ids.check(config)
    if config.init is not None or config.trained is not None:
        from vqscale.train import first_weights

        first_weights.check(config)
    return device


def _check_images(config: TokenizerRun) -> None:
    from vqscale.data import samples

    if config.loss.perceptual is not None:
        from vqscale.nets import lpips

        lpips.check(config.loss.perceptual.vgg, config.loss.perceptual.heads)
    for asked in (config.loss.alignment, getattr(config.loss.adversarial, "net", None)):
        if seen := getattr(asked, "vision", None):
            from vqscale.nets import vision

            vision.check(seen)
    for key, source, batch in (("data.train", config.data.train, config.data.batch), ("data.val", config.data.val, 0)):
        if source is not None:
            try:
                samples.prepare(source, batch)
            except (ValueError, OSError) as error:
                kind = ValueError if isinstance(error, ValueError) else OSError
                raise kind(f"{key}: {error}") from error


@contextmanager
def _owned(config: Run) -> Iterator[None]:
    """Rank 0 is the one writer of the run folder in this block; ValueError where there is another one, or where one has
    begun another run since it was looked at."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with own(config.run.folder, "the run"):
        folder.check(config)
        yield


def _run(config: Run, device: str) -> int:
    grid = config.mesh.resolve(int(os.environ.get("WORLD_SIZE", "1")))
    operations = _planned(config, *grid)
    with processes.joined(device, grid, config.engine.timeout_s, agreed=()) as mesh:
        summary = _train(config, mesh, operations)
    return 0 if summary is not None else folder.EXIT_STOPPED


def _planned(config: Run, data: int, codes: int) -> int:
    """The operations of an image, on the rank that logs, where steps are left. It also says, before the processes meet,
    what --dry-run warns of: tokens on the code axis that outweigh the network."""
    from vqscale.train import loop

    if os.environ.get("RANK", "0") != "0" or loop.is_done(config.run.folder, config.run.steps):
        return 0
    from vqscale.plan import costs_of, operations_of

    if codes == 1:
        return operations_of(config)
    costs = costs_of(replace(config, mesh=replace(config.mesh, data=data, codes=codes)), data * codes)
    for line in costs.warnings():
        print(line, flush=True)
    return costs.training


def _effort(config: Run, operations: int, mesh: Mesh) -> Effort:
    """All processes at once measure what products reach: they share the cores of a machine. Collective."""
    import torch

    from vqscale.parallel import ops
    from vqscale.run import machine
    from vqscale.train.watch import Effort

    here = machine.product_rate(mesh.device, config.engine.precision)
    rate = torch.tensor([here], dtype=torch.float64, device=mesh.device)
    return Effort(operations, ops.sum_over(rate, mesh.world).item())


def _train(config: Run, mesh: Mesh, operations: int) -> dict[str, Any] | None:
    effort = _effort(config, operations, mesh)
    if config.task == "prior":
        from vqscale.train import prior

        return prior.train(config, mesh, effort)
    from vqscale.train import tokenizer

    return tokenizer.train(config, mesh, effort)
