"""What a run of a prior would cost, without running it: the model on the meta device, arithmetic for the rest.

As plan.py for tokenizers, and with the same gaps. Bytes sent are those of ring collectives: what the head sends on the
code axis (tokens x width, whatever K is), and the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vqscale import priors
from vqscale.codes.codebook import Codebook
from vqscale.codes.heads.flat import Head
from vqscale.codes.heads.passes import LEAST_TOKENS
from vqscale.codes.rows import set_aside
from vqscale.engine.optimisers import muon_matrices
from vqscale.engine.rounded import num_rounded
from vqscale.nets.config.transformer import TransformerConfig
from vqscale.nets.transformer import Transformer, rotary
from vqscale.parallel.mesh import Mesh
from vqscale.plan.activations import activation_bytes
from vqscale.plan.cost import averaged, split_bytes
from vqscale.plan.count import Kernel, KernelCounter
from vqscale.plan.tokenizer import MIB, Costs, frozen_numbers, planned_mesh
from vqscale.plan.traffic import network_bytes
from vqscale.priors.base import Prior
from vqscale.priors.config import SampleConfig
from vqscale.train import nulls
from vqscale.train.config.prior import PriorRun
from vqscale.train.frozen import freeze

FP32, INT64 = 4, 8


def plan(config: PriorRun, world: int) -> Costs:
    """The costs of a run on `world` processes."""
    data, codes = config.mesh.planned(world)
    prior, tables = planned(config, planned_mesh(data, codes))
    images = config.data.batch // world // config.engine.accumulation
    tokens = images * config.prior.num_tokens
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in prior.named_children()}
    parameters |= {name: p.numel() for name, p in prior.named_parameters(recurse=False)}
    dense, still = sum(parameters.values()), frozen_numbers(prior)
    muon = sum(p.numel() for p in muon_matrices(prior, config.optim))
    parameters |= {name: table.num_codes * table.dim for name, table in tables.items()}
    stage = config.engine.zero_stage if config.engine.name == "deepspeed" else 0
    engine = config.engine.name if config.engine.name == "torch" else f"deepspeed, stage {stage}"
    held = [table.rows.numel() * FP32 * (4 if table.rows.requires_grad else 1) for table in tables.values()]
    learned = sum(table.rows.numel() for table in tables.values() if table.rows.requires_grad)
    low = num_rounded(prior, config.engine)
    average = FP32 * (learned + averaged(config.engine, dense - still, world))
    widths = [net.width for net in config.prior.transformers.values()]
    return Costs(
        f"{config.task} {config.run.folder}: {config.run.steps} steps of {config.data.batch} images, "
        f"data {data} x codes {codes} = {world} processes, {tokens} tokens per rank and micro-batch",
        parameters,
        {
            f"transformer, classes ({engine})": split_bytes(dense, stage, world, muon, still),
            "rows, their gradients and moments": sum(held),
            **({"average of the weights": average} if config.average.decay else {}),
            f"activations of {images} images": _activations(config, prior, images),
            f"gathered tokens of {codes} processes": 3 * tokens * codes * sum(widths) * FP32,
            **_head_activations(config, prior, tokens),
            "blocks of the scan": config.prior.head.scan_mib * MIB,
            **_exponentials(prior, tables, tokens * codes),
        },
        {
            "gradients and parameters of the replicated part": network_bytes(dense - still, low, config.engine, world),
            "gradients of the rows (data axis)": _ring(2, data, learned * FP32),
            "tokens of the head (code axis)": config.engine.accumulation
            * (sum(_head_bytes(tokens, width, codes, tables) for width in widths) // max(1, len(widths))),
        },
        operations(prior, tables),
    )


def planned(config: PriorRun, mesh: Mesh) -> tuple[Prior, dict[str, Codebook]]:
    """A prior on the meta device, and its tables by name, set aside."""
    with torch.device("meta"):
        prior = priors.build(config.prior, mesh)
    freeze(config, prior)
    return prior, {name: table for name, table in set_aside(prior).items() if isinstance(table, Codebook)}


def operations(prior: Prior, tables: Mapping[str, Codebook], settings: SampleConfig | None = None) -> dict[str, int]:
    """Of an image: products of the network (in training thrice those of its forward pass) and of the head: its tables
    of outputs (in training three or four of 2 K D per token, see codes/heads/passes.py) and its own network. Sampling
    is with these settings; where there are none, with the defaults, but for as many steps as there are tokens.
    """
    forward, (network, times) = _forward(prior), _head_network(prior)
    met = {
        name: 2 * prior.rows_met(name, table.num_codes) * table.dim
        for name, table in tables.items()
        if name.endswith("outputs")
    }
    each, trained_each = sum(met.values()), sum((3 if _at_once(prior, name) else 4) * n for name, n in met.items())
    if settings is None:
        settings = prior.config.sampling()
        if any(key == "steps" for key, _ in prior.config.against(settings)):
            settings = replace(settings, steps=prior.config.num_tokens)
    guided = sum(n * (1 + _guided(settings, stage)) for stage, n in forward.items())
    trained, sampled = prior.training_passes(), prior.sampling_passes(settings)
    looked = _condition_operations(prior)
    return {
        **({"training: image encoder": 3 * looked, "sampling: image encoder": looked} if looked else {}),
        "training: transformer": round(3 * sum(forward.values()) * trained.network),
        "training: head": round((trained_each + 3 * network) * trained.asked),
        f"sampling, {_words(sampled.network)}: transformer": round(guided * sampled.network),
        f"sampling, {_words(sampled.network)}: head": round((each + times * network) * sampled.asked),
    }


def counted(config: PriorRun, drawn_with: Mapping[str, Any] | None = None) -> dict[str, int]:
    """`operations` of the prior of a run, sampling with what is said of its samples, if anything."""
    prior, tables = planned(nulls.fill(config), Mesh(device="meta"))
    return operations(prior, tables, prior.config.sampling.of(drawn_with) if drawn_with else None)


def _at_once(prior: Prior, name: str) -> Head | None:
    """The head of this table of outputs, if its gradients are made with the logits of the loss and not again."""
    head = prior.get_submodule(name.rpartition(".")[0])
    return head if prior.asks_once and isinstance(head, Head) and head.tokens_at_once(LEAST_TOKENS) else None


def _exponentials(prior: Prior, tables: Mapping[str, Codebook], tokens: int) -> dict[str, int]:
    """What is kept of the logits for that, of the table that needs most: one is done after the other."""
    heads = [_at_once(prior, name) for name in tables if name.endswith("outputs")]
    held = [head.exponentials_bytes(tokens) for head in heads if head is not None]
    return {"exponentials of the head's logits": max(held)} if any(held) else {}


def _words(passes: float) -> str:
    return "1 pass" if passes == 1 else f"{passes:g} passes"


def _guided(settings: SampleConfig, stage: str) -> bool:
    """Whether this transformer looks twice at everything; the head does not, which is given what both looks make."""
    return getattr(settings, "fine_guidance" if stage == "fine" else "guidance", 1) != 1


def _forward(prior: Prior) -> dict[str, int]:
    """Operations of a pass of each transformer over the tokens of an image."""
    return {
        stage: sum(kernel.operations for kernel in forward_kernels(net, prior.grid))
        for stage, net in prior.config.transformers.items()
    }


@cache
def forward_kernels(net: TransformerConfig, grid: tuple[int, ...]) -> tuple[Kernel, ...]:
    """Of a pass of a transformer over the tokens of an image."""
    with torch.device("meta"):
        transformer = Transformer(net).eval()
        turns = rotary(net, grid)
        adapt = transformer.adapt(torch.empty(1, net.width))
        with KernelCounter() as counter, torch.no_grad():
            transformer(torch.empty(1, len(turns), net.width), turns, adapt, causal=False)
    return tuple(counter.kernels)


def _condition_operations(prior: Prior) -> int:
    """Of making the vectors of a condition that takes a network for it."""
    with torch.device("meta"), KernelCounter() as counter, torch.no_grad():
        example = prior.condition.example(1)
        if example is not None:
            prior.condition(example)
    return counter.operations


class _Head(nn.Module):
    """The network of a head, as a module that is counted."""

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.head = prior.head

    def forward(self, h_ND: Tensor) -> tuple[Tensor, int] | None:
        return self.head.beside_tables(h_ND)


def _head_network(prior: Prior) -> tuple[int, int]:
    """(operations of a pass of the head's network for one token, passes of drawing an id); zeros without one."""
    with torch.device("meta"), KernelCounter() as counter, torch.no_grad():
        found = _Head(prior)(torch.empty(1, prior.head.dim))
    return counter.operations, found[1] if found else 0


def _head_activations(config: PriorRun, prior: Prior, tokens: int) -> dict[str, int]:
    with torch.device("meta"):
        kept = activation_bytes(_Head(prior), torch.empty(tokens, prior.head.dim))
    kept = kept // 2 if config.engine.precision == "bf16" else kept
    return {f"activations of the head's network, {tokens} tokens": kept} if kept else {}


def _activations(config: PriorRun, prior: Prior, images: int) -> int:
    """Bytes that autograd keeps of the transformers for one micro-batch, counted on meta tensors."""
    kept = sum(_activations_of(net, prior.grid, images) for net in config.prior.transformers.values())
    with torch.device("meta"):
        example = prior.condition.example(images)
        kept += 0 if example is None else activation_bytes(prior.condition, example)
    return kept // 2 if config.engine.precision == "bf16" else kept


@cache
def _activations_of(net: TransformerConfig, grid: tuple[int, ...], images: int) -> int:
    with torch.device("meta"):
        transformer = Transformer(net)
        turns = rotary(net, grid)[:-1]
        adapt = transformer.adapt(torch.empty(images, net.width))
        return activation_bytes(transformer, torch.empty(images, len(turns), net.width), turns, adapt)


def _head_bytes(tokens: int, width: int, codes: int, tables: Mapping[str, Codebook]) -> int:
    """One pass of the head forward and backward: vectors of the embedding and of the loss go to all and come back, once
    for each table of outputs."""
    times = sum(name.endswith("outputs") for name in tables)
    vectors = 4 * _ring(1, codes, tokens * codes * width * FP32)
    numbers = _ring(1, codes, tokens * codes * (2 * INT64 + FP32)) + _ring(2, codes, tokens * codes * 3 * FP32)
    return times * (vectors + numbers)


def _ring(times: int, size: int, nbytes: int) -> int:
    """An all-gather or reduce-scatter of `nbytes` in all (times 1), or an all-reduce of them (times 2)."""
    return times * (size - 1) * nbytes // size
