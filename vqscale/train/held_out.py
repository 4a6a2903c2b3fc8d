"""One look at held-out samples by a tokenizer: how near its predictions are, and which codes it used.

`Pass` keeps the sums of such a look, on any number of ranks, for the evaluations of a training (evaluate.py) and for
the full one of a trained tokenizer (programs/score.py). What is measured of a sample its signal says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vqscale.codes import tally
from vqscale.codes.usage import Hits
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantizer
from vqscale.signals import Signal

PICTURES = 16


class Pass:
    """Sums over the held-out samples of all ranks. Collective: every rank adds as many batches, each
    of one shape on all."""

    def __init__(self, signal: Signal, quantizer: Quantizer, mesh: Mesh, measures: Any = None) -> None:
        self.columns = [Hits(quantizer.num_codes, mesh) for _ in range(quantizer.num_ids)]
        self.sums = signal.sums(mesh, measures)
        self.mesh, self._tokens = mesh, torch.zeros((), dtype=torch.int64, device=mesh.device)

    @property
    def num_codes(self) -> int:
        """Codes of all columns together."""
        return sum(hits.num_codes for hits in self.columns)

    def add(self, samples: Tensor, predicted: Tensor, ids: Tensor, valid: Tensor) -> None:
        """Count samples (B, C, *sides), what was predicted of them, and the ids of their tokens; what is not valid is
        padding, and so is an id of -1."""
        per_sample = ids.reshape(len(samples), -1, len(self.columns))
        per_sample = torch.where(valid[:, None, None], per_sample, -1)  # padding counts for no code
        self._tokens += (per_sample[:, :, 0] >= 0).sum()
        for column, hits in enumerate(self.columns):
            hits.add(per_sample[:, :, column].flatten())
        self.sums.add(samples[valid], predicted[valid])

    def numbers(self) -> dict[str, float]:
        """The signal's metrics, usage, ceiling, perplexity, dead, id_bits; the same on every rank. Collective.

        usage is the share of codes that any of these samples uses, ceiling what it would be if as many tokens fell on
        all codes alike; with several ids per token, usage, perplexity and dead are means over their columns. id_bits is
        the entropy of the ids of a token in bits, a sum over their columns, each taken for itself.
        """
        used = [hits.usage() for hits in self.columns]
        means = {name: sum(float(column[name]) for column in used) / len(used) for name in used[0]}
        tokens = int(ops.sum_over(self._tokens, self.mesh.world))
        means["ceiling"] = tally.ceiling(tokens, self.columns[0].num_codes)
        means["id_bits"] = sum(math.log2(float(column["perplexity"])) for column in used)
        return self.sums.numbers() | means

    def per_code(self) -> Tensor:
        """How often each code was taken, column after column (Hits.per_code); on every rank. Collective."""
        return torch.cat([hits.per_code() for hits in self.columns])


def first_ones(samples: Tensor, predicted: Tensor, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """The first PICTURES samples of a global batch, in its order, and their predictions; on the CPU. Collective."""
    both = (ops.gather(x[:PICTURES].contiguous(), mesh.world)[:PICTURES].cpu() for x in (samples, predicted))
    return next(both), next(both)
