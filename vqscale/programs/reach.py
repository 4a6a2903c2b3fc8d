"""Which codes of a tokenizer a training step's gradient reaches: all of them with IBQ, those that were taken with VQ.

Not here: that these gradients are the exact ones (tests/test_ibq.py), and how far a step then moves a code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vqscale.data.samples import SampleStream
from vqscale.nets.mode import evaluating
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import TableQuantizer
from vqscale.tokenizer.model import Tokenizer

EVEN = 0.01
ABOUT = (
    "share of the codes with a gradient that is not 0, and with one of at least a hundredth of the mean norm, in one "
    "backward pass of the first batch: the squared error and the losses of the quantizer, each counting 1"
)


def check(tokenizer: Tokenizer, stream: SampleStream) -> None:
    """ValueError for a tokenizer whose codes are no rows that learn by gradient, and for too few images."""
    quantizer = tokenizer.quantizer
    if not isinstance(quantizer, TableQuantizer) or not quantizer.codebook.rows.requires_grad:
        raise ValueError(
            "--reach looks at the gradients of codes that are rows of a table, and those of "
            f"{type(quantizer).__name__} are none that learn by gradient: leave it out"
        )
    if stream.num_samples < stream.batch:
        raise ValueError(
            f"--reach takes a whole batch, and there are {stream.num_samples} images where {stream.batch} are one, of "
            "all processes: give a smaller --batch"
        )


@torch.enable_grad()
def reached(tokenizer: Tokenizer, stream: SampleStream, mesh: Mesh) -> dict[str, float]:
    """reached and reached_evenly of the first batch, as ABOUT says. Collective; the same on every rank, and in any
    division of a batch over processes."""
    quantizer = tokenizer.quantizer
    assert isinstance(quantizer, TableQuantizer), "check has looked"
    rows_kD = quantizer.codebook.rows
    samples = next(iter(stream.batches())).samples.to(mesh.device)
    with evaluating(tokenizer):
        entered = tokenizer.signal.enter(samples)
        recon, quantized = tokenizer(*entered)
        loss = F.mse_loss(recon, entered[0]) + torch.stack(list(quantized.losses.values())).sum()
        (slope_kD,) = torch.autograd.grad(loss, [rows_kD])
    norm_k = ops.sum_over(slope_kD, mesh.data).norm(dim=1)
    mean = ops.sum_over(norm_k.sum(), mesh.codes) / quantizer.num_codes
    counts = torch.stack([(norm_k > 0).sum(), (norm_k >= EVEN * mean).sum()])
    some, evenly = ops.sum_over(counts, mesh.codes).tolist()
    return {"reached": some / quantizer.num_codes, "reached_evenly": evenly / quantizer.num_codes}
