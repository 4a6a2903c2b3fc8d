"""The replicated parameters under DeepSpeed, ZeRO stages 0 to 3: the only file that knows DeepSpeed.

DeepSpeed averages gradients in its backward pass and holds the part of this rank; engine.py reads them there, finds the
norm, scales them, and lets DeepSpeed step. Its own clipping, schedules, loss scaling and checkpoints stay off: clipping
at stage 0 uses the mean of local norms, a stage 0 step takes NaN gradients, and its checkpoints are for one world size.

With `communication: bf16` DeepSpeed still holds float32, and the module computes under autocast (rounded.py): gradients
are reduced in bfloat16 (communication_data_type), and parameters come rounded. At stage 3 DeepSpeed casts the shares
that it gathers, at stages 1 and 2 `_gather` stands in for its gather after a step: then a rank has its own part of the
unrounded parameters in what the optimiser steps, and nowhere else.

Private names of DeepSpeed 0.19 that are used here, each at one place: averaged_gradients (stages 1 to 3, between
backward and step), fp32_partitioned_groups_flat, persistent_parameters and comm_dtype (stage 3), _hp_mapping,
_lazy_init_hp_params_optimizer_state, update_lp_params and all_gather_dp_groups (stages 1 and 2).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vqscale.disk.held import Held, shared
from vqscale.engine import optimisers
from vqscale.engine.config import EngineConfig, OptimConfig
from vqscale.engine.replicated import held_whole
from vqscale.engine.rounded import rounded
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh, world_group

LARGEST_BUCKET, BUCKETS = 50_000_000, 8
_joined: Any = None  # the process group that DeepSpeed was last started in


def settings(config: EngineConfig, num_parameters: int, mesh: Mesh) -> dict[str, Any]:
    """DeepSpeed's dictionary. A misspelt key at its top level passes silently, so nothing else writes it."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage > 0:
        # A bucket is allocated whole (2 GB by default) and reduced when it is full, on a GPU on a stream beside the
        # backward pass: so there are several, or all would wait for its end. On a CPU, without streams, one will do.
        overlaps = mesh.device.type != "cpu"
        size = max(1, min(LARGEST_BUCKET, num_parameters // (BUCKETS if overlaps else 1)))
        zero |= {"reduce_bucket_size": size, "overlap_comm": overlaps}
    if config.zero_stage in (1, 2):
        zero |= {"compute_grad_norm": False}  # it is engine.py's
    if config.zero_stage == 3:
        # It would replace torch.nn.functional.linear in the whole process, for every other network in it too.
        zero |= {"memory_efficient_linear": False}
    return {
        "train_micro_batch_size_per_gpu": 1,  # only counted by DeepSpeed, never used
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        **({"communication_data_type": "bf16"} if config.sends_bf16 and mesh.world.size > 1 else {}),
    }


def _import(device: torch.device) -> Any:
    """deepspeed, for this device, quiet, in the process group that `connect` made (one of its own for one process)."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups, logger

    world = world_group(device)
    # On a CPU it would compile an operator for inference in shared memory first: a minute, a compiler, and a lock file
    # that a killed process leaves behind for the next one to wait for. Training has no use for it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.addFilter(_worth_saying)
    global _joined
    if _joined is not world:
        # DeepSpeed keeps its groups for good; those of processes that have been left are of no use with these. It also
        # numbers modules and parameters by process, and at stage 3 compares the numbers between processes.
        deepspeed.comm.comm.cdb = None
        groups._release_process_group_references()
        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][:] = [0]
        Init.param_id = 0
        _joined = world
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _worth_saying(record: logging.LogRecord) -> bool:
    """Not that torch's AdamW is untested, nor that outputs are dataclasses (see Zero)."""
    return not any(known in record.getMessage() for known in ("untested optimizer", "unknown inputs or outputs type"))


class Zero:
    """One module's trainable parameters under DeepSpeed; at stage 3 the module's own parameters are taken apart.

    Forward goes through the module itself at all stages: the hooks that stage 3 needs are on the modules, while those
    of DeepSpeed's forward, on its outputs, would take torch.autograd.grad for a backward pass. At stage 3 a module that
    owns parameters of more than 100,000 elements directly must return tensors, tuples or dicts: DeepSpeed does not
    look into dataclasses for what to fetch before the backward pass, which then fails at once. Stages 2 and 3, and 1 on
    a GPU, pair the gradients of the ranks by the order in which backward makes them, so every rank must build the same
    graph.
    """

    def __init__(self, module: nn.Module, config: EngineConfig, optim: OptimConfig, mesh: Mesh) -> None:
        self._module, self._stage, self._world = module, config.zero_stage, mesh.world
        self.whole = config.zero_stage == 0
        low = config.sends_bf16 and mesh.world.size > 1
        self._parted = low and config.zero_stage in (1, 2)  # and the module has the parameters rounded
        self.divided = self._parted or (config.zero_stage == 3 and mesh.world.size > 1)
        self._every = dict(module.named_parameters())
        self._parameters = {name: p for name, p in self._every.items() if p.requires_grad}
        if not self._parameters:
            raise ValueError(
                "engine.name deepspeed steps parameters, and this network has none that learn: use engine.name: torch"
            )
        self._deepspeed = _import(mesh.device)
        self._adam = optimisers.build(module, optim)
        low_ids = {id(p) for p in rounded(module)} if low else set()
        self._low_groups = _split(self._adam, low_ids) if self._parted else []
        for p in self._parameters.values() if self._stage == 3 else ():
            if id(p) in low_ids:
                p.comm_dtype = torch.bfloat16  # type: ignore[attr-defined]
        numel = sum(p.numel() for p in self._parameters.values())
        self._engine, *_ = self._deepspeed.initialize(
            model=module, optimizer=self._adam, config=settings(config, numel, mesh), dist_init_required=False
        )
        self._prepare()

    def _prepare(self) -> None:
        """Make the moments of what the optimiser steps: parameters, flat partitions, or flat parts of partitions."""
        if self._stage == 3:
            self._adam.prepare(self._engine.optimizer.fp32_partitioned_groups_flat)
            return
        if self._stage == 0:
            self._adam.prepare(self._parameters.values())
        else:
            self._adam.prepare(p for group in self._adam.param_groups for p in group["params"])
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def forward(self, *args: Any) -> Any:
        return self._module(*args)

    def backward(self, loss: Tensor) -> None:
        if self._stage > 0:
            # What DeepSpeed's own forward would do: at stage 3 it says whether this backward accumulates.
            self._engine.optimizer.clear_backward_seen_flag()
        self._engine.backward(loss, scale_wrt_gas=False)

    def advance(self) -> None:
        self._engine.step()

    def gradients(self) -> list[Tensor]:
        """The averaged gradients of this rank: all of them at stage 0, its partition (padding is zero) above."""
        if self._stage == 0:
            return [p.grad for p in self._parameters.values() if p.grad is not None]
        return [part for group in self._engine.optimizer.averaged_gradients.values() for part in group]

    def apply(self, lr: float, decay_share: float, skip: bool) -> None:
        gradients = self.gradients()
        if skip:
            for gradient in gradients:
                gradient.zero_()
        self._adam.idle = skip
        self._adam.set_rates(lr, decay_share)
        with self._gathering():
            self._engine.step()
        self._adam.idle = False
        if self._stage == 3:
            # Its buffers live on: a parameter without a gradient in the next step would step with this one's.
            for gradient in gradients:
                gradient.zero_()

    @contextmanager
    def _gathering(self) -> Iterator[None]:
        """Inside, DeepSpeed's gather of the parameters after a step is `_gather`, where these are to be rounded."""
        if not self._parted:
            yield
            return
        from deepspeed.runtime.zero import stage_1_and_2

        usual = stage_1_and_2.all_gather_dp_groups
        stage_1_and_2.all_gather_dp_groups = self._gather
        try:
            yield
        finally:
            stage_1_and_2.all_gather_dp_groups = usual

    @torch.no_grad()
    def _gather(self, *, partitioned_param_groups: list[list[Tensor]], **others: Any) -> None:
        """Every flat group from the parts of all ranks: in bfloat16 where autocast rounds it, a bucket at a time."""
        for parts, low in zip(partitioned_param_groups, self._low_groups, strict=True):
            for pieces in zip(*(part.split(max(1, LARGEST_BUCKET // len(parts))) for part in parts), strict=True):
                mine = pieces[self._world.rank]
                sent = ops.gather(mine.bfloat16() if low else mine, self._world)
                for piece, values in zip(pieces, sent.split(len(mine)), strict=True):
                    piece.copy_(values)

    def held(self) -> dict[str, Held]:
        """See replicated.py. Of moments a rank holds its part alone, and of parameters too where they are `divided`."""
        if self._stage == 0:
            return held_whole(self._module, self._parameters, self._adam)
        out = {}
        for name, p in self._every.items():
            whole = self._stage < 3 and (name not in self._parameters or not self._parted)
            out[f"parameter/{name}"] = shared(p) if whole else self.held_part(name, self._part(p))
        for name, p in self._parameters.items():
            for key in optimisers.MOMENTS:
                out[f"{key}/{name}"] = self._moment(name, p, key)
        return out

    def _moment(self, name: str, p: Any, key: str) -> Held:
        if self._stage == 3:
            return self.held_part(name, self._deepspeed.utils.safe_get_local_optimizer_state(p, key))
        nothing = p.detach().view(-1)[:0]  # where all of it is in the parts of other ranks
        mapping = p._hp_mapping
        return Held(mapping.get_optim_state_fragment(key) if mapping else nothing, _start(p), tuple(p.shape))

    @torch.no_grad()
    def loaded(self, steps: int) -> None:
        """What `held` gave was filled; copies that DeepSpeed steps, and what it and the module keep whole, follow."""
        self._adam.set_steps(steps)
        if self._stage == 3:
            for p in self._parameters.values():
                self._deepspeed.utils.safe_set_local_fp32_param(p, self._share(p))
            kept = self._engine.optimizer.persistent_parameters
            if kept:
                kept[0].partition(kept)
                kept[0].all_gather(kept)
        elif self._parted:
            with self._gathering():
                self._engine.optimizer.update_lp_params()
        elif self._stage > 0:
            each: Any
            for each in self._parameters.values():
                mapping = each._hp_mapping
                if mapping is not None:
                    at = mapping.lp_fragment_address
                    mapping.hp_fragment.copy_(each.view(-1)[at.start : at.start + at.numel])

    def parts(self) -> dict[str, Tensor]:
        """See replicated.py. At stage 3 a part is a share of the flattened parameter, the last padded with zeros."""
        return {name: self._part(p) for name, p in self._parameters.items()}

    def _part(self, p: Any) -> Tensor:
        if self._stage == 3:
            return self._share(p)
        if not self._parted:
            out: Tensor = p.detach()
            return out
        return p._hp_mapping.hp_fragment.detach() if p._hp_mapping else p.detach().view(-1)[:0]

    def _share(self, p: Any) -> Tensor:
        """This rank's share of a parameter, as it lies there. Its padding is whatever memory held: it is cleared."""
        share: Tensor = p.ds_tensor.detach()
        share[max(0, p.ds_numel - self._world.rank * len(share)) :] = 0.0
        return share

    def join(self, name: str, part: Tensor) -> Tensor:
        p: Any = self._parameters[name]
        if self._parted:
            whole = torch.zeros_like(p).view(-1)
            whole[_start(p) : _start(p) + len(part)] = part
            return ops.sum_over(whole, self._world).view(p.shape)
        if self._stage < 3:
            return part
        return ops.gather(part, self._world)[: p.ds_numel].view(p.ds_shape)

    def held_part(self, name: str, part: Tensor) -> Held:
        p: Any = self._every[name]
        if self._stage < 3:
            return Held(part, _start(p), tuple(p.shape)) if self._parted else shared(part)
        start = self._world.rank * len(part)
        return Held(part[: max(0, p.ds_numel - start)], start, tuple(p.ds_shape))

    @torch.no_grad()
    def put(self, name: str, tensor: Tensor) -> None:
        p = self._parameters[name]
        with nullcontext() if self._stage < 3 else self._deepspeed.zero.GatheredParameters([p], modifier_rank=0):
            p.copy_(tensor)


def _split(adam: optimisers.AdamW, low_ids: Collection[int]) -> list[bool]:
    """Make the groups of the optimiser such that each is sent in one precision; whether that is bfloat16."""
    split = [
        (group | {"params": members}, low)
        for group in adam.param_groups
        for low in (False, True)
        if (members := [p for p in group["params"] if (id(p) in low_ids) == low])
    ]
    adam.param_groups[:] = [group for group, _ in split]
    return [low for _, low in split]


def _start(p: Any) -> int:
    """Where this rank's part of a parameter begins, at stages 1 and 2."""
    return p._hp_mapping.lp_fragment_address.start if p._hp_mapping else 0
