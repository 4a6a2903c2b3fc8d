"""How what the ranks of a code group know of the same tokens becomes one answer: best codes, normalisers, own tokens.

A few numbers per token and collective; nothing here knows rows. With one process the collectives are the identity.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from vqscale import matmul
from vqscale.codes.rows import Rows
from vqscale.codes.softmax.forward import Softmax
from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis


@contextmanager
def full_precision(x: Tensor) -> Iterator[None]:
    """A context in which products keep the precision of their operands, whatever the caller's autocast, and whatever
    torch is told of TF32 (engine.matmul: high): ids of a training are those of encoding.

    A graph that is compiled cannot turn that switch, which is the process's: what is compiled with codes in it needs
    engine.matmul: highest, or products that are all in the kernels' operators (Quantizer.breaks_graph says so).
    """
    kind = x.device.type  # devices that know no autocast (meta) need nothing
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        if torch.compiler.is_compiling():
            yield
        else:
            with matmul.full(kind):
                yield


def refuse_second_order(what: str) -> None:
    """RuntimeError in a backward pass that shall be differentiated itself: its formulas are those of values."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{what} has first derivatives only, but a backward pass with create_graph=True asks for second ones: "
            "leave create_graph out, or detach what goes through the codes from the term that needs them"
        )


def own(x_B: Tensor, axis: Axis) -> Tensor:
    """This rank's part of a tensor over the tokens of the code group."""
    num = len(x_B) // axis.size
    return x_B[axis.rank * num : (axis.rank + 1) * num]


def merge_best(score_B: Tensor, row_B: Tensor, layout: Rows, axis: Axis) -> tuple[Tensor, Tensor]:
    """The best id and score over all ranks of all B tokens; the lowest id among equal scores.

    A score that is not a number, or infinite, wins on any rank, and comes out as no number: what is wrong is reported.
    """
    score_B = score_B.masked_fill(score_B.isnan(), torch.inf)  # a maximum over ranks may leave out what is no number
    top_B = ops.max_over(score_B, axis)
    here_B = (score_B >= top_B) if layout.count else torch.zeros_like(score_B, dtype=torch.bool)
    ids_B = ops.min_over(torch.where(here_B, row_B + layout.start, layout.num_codes), axis)
    # A rank without rows has LOWEST: below it nobody reaches the top, and such a token takes an id that exists.
    return ids_B.clamp(max=layout.num_codes - 1), top_B.masked_fill(top_B == torch.inf, torch.nan)


def merge_softmax(part: Softmax, delta_B: Tensor, axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """(log of the sum relative to the top of all ranks, entropy, this rank's factor 2^(top_r - lse)), for all B tokens.

    `delta_B` is the top of this rank minus that of all ranks, in bits: 0 on the rank that has it, else negative.

    In bits. The log-normaliser is top + log; it is kept in two parts, because where logits are large their sum would
    round away what probabilities are made of.
    """
    delta_B = delta_B.clamp_min(-1e4)
    shrink_B = torch.exp2(delta_B)
    both_2B = torch.stack([part.sum_B * shrink_B, shrink_B * (part.excess_B + delta_B * part.sum_B)])
    sum_B, excess_B = ops.sum_over(both_2B, axis)
    log_B = sum_B.log2()
    return log_B, log_B - excess_B / sum_B, shrink_B / sum_B
