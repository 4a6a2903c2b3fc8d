"""What makes one code nearer to a token than another: all that the code axis knows of a similarity, one class each.

    score of token x and code c  =  queries(x) . keys(c) + bias(c)

    dot      x . c
    euclid   x . c - |c|^2 / 2         the highest is the nearest code
    cosine   x . c / (|x| |c|)

Queries are tokens times a positive number each, which is one where there is a bias. A new similarity is a class and a
line of SIMILARITIES; for a config to name it, its name stands in config.SimilarityName, too. Who asks a class for what:

    queries, keys, bias     Codebook.nearest and mix; autograd differentiates the first two
    add_bias_gradient       softmax/autograd.py, because the backward pass is not autograd's from the bias on
    exact, finish           search/prefilter.py, which decides in float64 between the few rows that are left
    centred, key_error      search/bounds.py, whose bounds must hold for keys that float32 has rounded

The tests run over SIMILARITIES and two more (tests/lib/similarities.py); test_prefilter.py attacks the bounds of all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Similarity:
    """What a similarity says; as it stands here, the inner product says it. No state: one instance serves all."""

    centred = False
    """The bias is -|key|^2 / 2, so that moving tokens and keys by the same vector moves all scores of a token alike."""

    def queries(self, x_ND: Tensor) -> Tensor:
        """What tokens are in the products."""
        return x_ND

    def keys(self, rows_kD: Tensor) -> Tensor:
        """What rows are in the products, in the precision of the rows; the rows themselves, not a copy, if they are."""
        return rows_kD

    def bias(self, rows_kD: Tensor) -> Tensor | None:
        """What is added to the scores of each row, in the precision of the rows; None is zero."""
        return None

    def add_bias_gradient(self, out_kD: Tensor, rows_kD: Tensor, grad_k: Tensor) -> None:
        """Add to `out_kD`, in place, the gradient of the rows for that of their bias."""
        raise NotImplementedError(f"{type(self).__name__} has a bias and does not say its gradient")

    def exact(self, x_PD: Tensor, c_PD: Tensor) -> Tensor:
        """Scores of pairs in float64, up to a positive factor of the token, which moves no maximum.

        Equal codes must have equal scores: every pair is summed in the same order.
        """
        score_P, bias_P = (x_PD * self.keys(c_PD)).sum(1), self.bias(c_PD)
        return score_P if bias_P is None else score_P + bias_P

    def finish(self, score_B: Tensor, x_BD: Tensor) -> Tensor:
        """The factor of each token that `exact` leaves out, applied in place to float64 scores."""
        return score_B

    def key_error(self, keys_rD: Tensor, gamma: float) -> Tensor | float:
        """By how much (norm) float32 keys may be off; `gamma` is the share that a sum of D products may be off."""
        return 0.0


class Dot(Similarity):
    """x . c"""


class Euclid(Similarity):
    """x . c - |c|^2 / 2, which is |x|^2 / 2 - |x - c|^2 / 2."""

    centred = True

    def bias(self, rows_kD: Tensor) -> Tensor:
        return -0.5 * rows_kD.square().sum(1)

    def add_bias_gradient(self, out_kD: Tensor, rows_kD: Tensor, grad_k: Tensor) -> None:
        out_kD.addcmul_(rows_kD, grad_k[:, None], value=-1.0)


class Cosine(Similarity):
    """x . c / (|x| |c|), norms below 1e-12 taken as that."""

    def queries(self, x_ND: Tensor) -> Tensor:
        return F.normalize(x_ND, dim=1)

    def keys(self, rows_kD: Tensor) -> Tensor:
        return F.normalize(rows_kD, dim=1)

    def exact(self, x_PD: Tensor, c_PD: Tensor) -> Tensor:
        return (x_PD * c_PD).sum(1) / c_PD.norm(dim=1).clamp_min_(1e-12)

    def finish(self, score_B: Tensor, x_BD: Tensor) -> Tensor:
        return score_B.div_(torch.linalg.vector_norm(x_BD, dim=1, dtype=torch.float64).clamp_min_(1e-12))

    def key_error(self, keys_rD: Tensor, gamma: float) -> float:
        return gamma  # of keys of length one


DOT = Dot()
SIMILARITIES: dict[str, Similarity] = {"dot": DOT, "euclid": Euclid(), "cosine": Cosine()}


def by_name(name: str) -> Similarity:
    """The similarity of a name; ValueError for a name that nobody has."""
    if name not in SIMILARITIES:
        raise ValueError(f"similarity is {name!r}, and there are {', '.join(SIMILARITIES)}: choose one of these")
    return SIMILARITIES[name]
