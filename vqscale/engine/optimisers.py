"""AdamW as both engines use it, alone or with Muon for the matrices: moments that exist from the start, and a switch
for steps that must change nothing.

Not here: what is stepped when, and gradients (engine.py); how the rates change (schedule.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vqscale.engine.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """torch's AdamW; while `idle`, step() changes nothing, wherever it is called from.

    `fused` goes over each parameter once and needs no memory beside it, where torch else makes several tensors of its
    size; for large tables. Its rounding depends on where a number lies in a tensor, so parameters that DeepSpeed cuts
    at every stage in another way are stepped without: they are equal at all stages, to the bit.
    """

    def __init__(self, groups: list[dict[str, Any]], optim: OptimConfig, fused: bool = False) -> None:
        self.idle = False
        self._final_weight_decay = optim.final_weight_decay
        super().__init__(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused or None)
        for group in self.param_groups:
            group["initial_weight_decay"] = group["weight_decay"]

    def step(self, closure: Any = None) -> Any:
        return None if self.idle else super().step(closure)

    def prepare(self, parameters: Iterable[Tensor]) -> None:
        """Make the moments of these parameters now (torch makes them in the first step), so that they can be read."""
        for parameter in parameters:
            self.state[parameter] = {
                "step": torch.zeros((), device=parameter.device if self.defaults["fused"] else "cpu"),
                **{key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in MOMENTS},
            }

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """What is remembered of the gradients of a parameter, by name."""
        return {key: self.state[parameter][key] for key in MOMENTS}

    def set_rates(self, lr: float, decay_share: float) -> None:
        """The learning rate, and how far every decay that is not 0 has gone to its final value."""
        for group in self.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
            first = group["initial_weight_decay"]
            if first and self._final_weight_decay is not None:
                group["weight_decay"] = first + (self._final_weight_decay - first) * decay_share

    def set_steps(self, steps: int) -> None:
        """How many steps the moments have seen, for their bias correction."""
        for state in self.state.values():
            state["step"].fill_(steps)


class MuonAdamW(AdamW):
    """torch's Muon for some matrices and AdamW for the groups, as one optimiser; nothing is cut, all is on every rank.

    Every rank makes all orthogonal updates itself: they are in bfloat16, and equal where the ranks' machines are.
    """

    def __init__(self, matrices: list[dict[str, Any]], groups: list[dict[str, Any]], optim: OptimConfig) -> None:
        super().__init__(groups, optim)
        self._matrices = torch.optim.Muon(
            matrices,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        self._first_weight_decay = optim.weight_decay

    def step(self, closure: Any = None) -> Any:
        if not self.idle:
            self._matrices.step()
        return super().step(closure)

    def prepare(self, parameters: Iterable[Tensor]) -> None:
        mine = {id(p) for group in self._matrices.param_groups for p in group["params"]}
        every = list(parameters)
        for matrix in (p for p in every if id(p) in mine):
            self._matrices.state[matrix] = {"momentum_buffer": torch.zeros_like(matrix)}
        super().prepare(p for p in every if id(p) not in mine)

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        if parameter in self._matrices.state:
            return dict(self._matrices.state[parameter])
        return super().moments(parameter)

    def set_rates(self, lr: float, decay_share: float) -> None:
        super().set_rates(lr, decay_share)
        for group in self._matrices.param_groups:
            group["lr"], first = lr * group["lr_factor"], self._first_weight_decay
            if first and self._final_weight_decay is not None:
                group["weight_decay"] = first + (self._final_weight_decay - first) * decay_share


def build(module: nn.Module, optim: OptimConfig) -> AdamW:
    """The optimiser of a module's trainable parameters, as its settings name it."""
    split = groups(module, optim)
    if optim.name == "adamw":
        return AdamW(split, optim)
    taken = {id(p) for p in muon_matrices(module, optim)}
    matrices, rest = (
        [group | {"params": members} for group in split if (members := [p for p in group["params"] if wanted(id(p))])]
        for wanted in (taken.__contains__, lambda number: number not in taken)
    )
    if not matrices or not rest:
        lacks = "no matrix, which muon is for" if rest else "nothing but matrices, and AdamW beside muon has nothing"
        raise ValueError(f"optim.name is muon, and this network has {lacks}: use optim.name=adamw")
    return MuonAdamW(matrices, rest, optim)


def muon_matrices(module: nn.Module, optim: OptimConfig) -> list[nn.Parameter]:
    """What Muon steps of a module, with one moment each: trainable matrices that are no embedding; all else is AdamW's,
    with two."""
    if optim.name != "muon":
        return []
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    return [p for p in module.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in tables]


def groups(module: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters of a module by how they decay: matrices, embeddings, and the rest, which does not; each
    of these by the factor of its learning rate.

    An embedding is a row per thing and no matrix: a row that a batch does not have decays all the same.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    # a gain of weight normalisation has dims beside its first, and one number for each of that
    matrices = {id(p) for p in trainable if p.ndim >= 2 and p.numel() > len(p)} - tables
    split = [
        ([p for p in trainable if id(p) in matrices], optim.weight_decay),
        ([p for p in trainable if id(p) in tables], optim.rows_weight_decay),
        ([p for p in trainable if id(p) not in matrices | tables], 0.0),
    ]
    factors = lr_factors(module, optim)
    return [
        {"params": members, "weight_decay": decay, "lr_factor": factor}
        for every, decay in split
        for factor in dict.fromkeys(factors.values())
        if (members := [p for p in every if factors[id(p)] == factor])
    ]


def lr_factors(module: nn.Module, optim: OptimConfig) -> dict[int, float]:
    """The factor of each trainable parameter's learning rate, by its id()."""
    found = {id(p): 1.0 for p in module.parameters() if p.requires_grad}
    for asked in optim.lr_factors:
        named = [p for name, p in module.named_parameters() if p.requires_grad and f".{asked.part}." in f".{name}."]
        if not named:
            parts = ", ".join(name for name, child in module.named_children() if any(True for _ in child.parameters()))
            raise ValueError(
                f"optim.lr_factors has the part {asked.part}, and no parameter of this model has that in its name: its "
                f"parts are {parts}, and what is in these; change the part, or leave it out"
            )
        found |= {id(p): asked.factor for p in named}
    return found
