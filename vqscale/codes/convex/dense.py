"""What exact.py and relaxed.py compute, on one process: tokens x codes, codes x codes, sorting, slow iterations.

The definition: the tests compare values and gradients with it. Not for training.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nearest(x: Tensor, rows: Tensor) -> Tensor:
    """One-onehot of the nearest code, the lowest id among equals; a constant."""
    ids = torch.cdist(x.detach(), rows.detach(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    return torch.nn.functional.one_hot(ids, len(rows)).to(x.dtype)


def objective(p: Tensor, x: Tensor, rows: Tensor, lam: float) -> Tensor:
    return (x - p @ rows).square().sum(1) + lam * (p - nearest(x, rows)).square().sum(1)


def project(s: Tensor) -> Tensor:
    """The nearest points of the simplex by sorting; differentiable."""
    ordered = torch.sort(s, dim=1, descending=True).values
    size = torch.arange(1, s.shape[1] + 1, dtype=s.dtype)
    theta = (torch.cumsum(ordered, 1) - 1) / size
    last = (ordered > theta).sum(1, keepdim=True) - 1
    return (s - theta.gather(1, last)).clamp_min(0)


def relaxed(x: Tensor, rows: Tensor, lam: float) -> Tensor:
    """(C C^T + lam I) P = C Z + lam onehot, K x K, then the projection; differentiable."""
    onehot = nearest(x, rows)
    matrix = rows @ rows.t() + lam * torch.eye(len(rows), dtype=x.dtype)
    return project(torch.linalg.solve(matrix, rows @ x.t() + lam * onehot.t()).t())


def exact(x: Tensor, rows: Tensor, lam: float, steps: int = 20000) -> Tensor:
    """Projected accelerated gradient with restarts, until nothing moves."""
    onehot = nearest(x, rows)
    curvature = float(torch.linalg.matrix_norm(rows, 2)) ** 2 + lam
    p = ahead = onehot
    age = 1.0
    for _ in range(steps):
        slope = (ahead @ rows - x) @ rows.t() + lam * (ahead - onehot)
        new = project(ahead - slope / curvature)
        if float(((ahead - new) * (new - p)).sum()) > 0:
            age = 1.0
        older, age = age, (1 + (1 + 4 * age * age) ** 0.5) / 2
        moved = float((new - p).abs().max())
        ahead, p = new + (older - 1) / age * (new - p), new
        if moved < 1e-16:
            break
    return p


def on_support(support: Tensor, x: Tensor, rows: Tensor, lam: float) -> Tensor:
    """P of known supports from the bordered K x K system of their KKT conditions; differentiable."""
    out = []
    for inside, token, onehot in zip(support, x, nearest(x, rows), strict=True):
        picked = rows[inside]
        size = len(picked)
        matrix = torch.ones(size + 1, size + 1, dtype=x.dtype)
        matrix[size, size] = 0
        system = matrix.clone()
        system[:size, :size] = picked @ picked.t() + lam * torch.eye(size, dtype=x.dtype)
        right = torch.cat([picked @ token + lam * onehot[inside], torch.ones(1, dtype=x.dtype)])
        p = torch.zeros(len(rows), dtype=x.dtype)
        out.append(p.masked_scatter(inside, torch.linalg.solve(system, right)[:size]))
    return torch.stack(out)


def violation(p: Tensor, x: Tensor, rows: Tensor, lam: float) -> Tensor:
    """How far P is from its KKT conditions: the slope is equal on the support and not smaller off it."""
    slope = (p @ rows - x) @ rows.t() + lam * (p - nearest(x, rows))
    level = (p * slope).sum(1, keepdim=True)
    off = (level - slope).clamp_min(0)
    return torch.where(p > 0, (slope - level).abs(), off).amax(1)
