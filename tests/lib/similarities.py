"""Similarities under test: every one of SIMILARITIES, and two that no file of the package knows.

The two are what one adds: a class, a line of the dictionary, and a slow definition to be compared with. Inside `added`
they are there; it decorates tests and the functions that run on ranks, which are other processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.nn.functional as F
from torch import Tensor

from vqscale.codes import dense
from vqscale.codes.similarity import SIMILARITIES, Similarity


class Taxed(Similarity):
    """0.3 x . c - 0.1 |c|^2: keys that are not the rows and are rounded, and a bias with a gradient."""

    def keys(self, rows_kD: Tensor) -> Tensor:
        return 0.3 * rows_kD

    def bias(self, rows_kD: Tensor) -> Tensor:
        return -0.1 * rows_kD.square().sum(1)

    def add_bias_gradient(self, out_kD: Tensor, rows_kD: Tensor, grad_k: Tensor) -> None:
        out_kD.addcmul_(rows_kD, grad_k[:, None], value=-0.2)

    def key_error(self, keys_rD: Tensor, gamma: float) -> Tensor:
        return gamma * keys_rD.norm(dim=1)


class Angular(Similarity):
    """x . c / |x|: a factor of the token, and keys that are the rows."""

    def queries(self, x_ND: Tensor) -> Tensor:
        return F.normalize(x_ND, dim=1)

    def finish(self, score_B: Tensor, x_BD: Tensor) -> Tensor:
        return score_B / x_BD.double().norm(dim=1).clamp_min(1e-12)


ADDED = {
    "taxed": (Taxed(), lambda x_ND, rows: 0.3 * (x_ND @ rows.t()) - 0.1 * rows.square().sum(1)),
    "angular": (Angular(), lambda x_ND, rows: F.normalize(x_ND, dim=1) @ rows.t()),
}
NAMES = [*SIMILARITIES, *ADDED]


@contextmanager
def added() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, (similarity, definition) in ADDED.items():
            patch.setitem(SIMILARITIES, name, similarity)
            patch.setitem(dense.LOGITS, name, definition)
        yield
