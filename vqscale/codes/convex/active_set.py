"""Small quadratic programs on the simplex, many at once, by an active set. Nothing here talks, nothing here knows K.

    minimise  p . A p / 2 - b . p    over    p >= 0, sum p = 1        A symmetric and positive definite

Codes enter where the slope is lower than on the support, the equality-constrained minimum on the support is a Cholesky
solve, and a step towards it stops where a weight would fall below zero: that code leaves. Every step lowers the
objective, so no support comes twice and the answer is exact up to rounding, after about as many solves as codes enter
and leave. Arithmetic is float64: the problems are small and their conditioning is |c|^2 / lam. Suffixes: N programs, n
those not solved yet, s codes of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 400  # a bound that only rounding can reach; what is left of the slope then shows in the residual
ROUNDING = 1e-14  # of the largest entry of A: a slope that is lower by less is not lower
# Better codes enter together where that helps. Where none of them got a weight, the best one is tried alone; where that
# gets none either, what it promised was rounding, and the program is solved.
ALL, BEST, NONE = 2, 1, 0


@dataclass
class _State:
    """The programs that are not solved yet, n of them."""

    gram_nss: Tensor
    linear_ns: Tensor
    allowed_ns: Tensor
    p_ns: Tensor
    inside_ns: Tensor  # the support; entries may just have entered with weight zero
    settled_n: Tensor  # p is the minimum on its support
    helped_n: Tensor  # a code that entered since p was last settled has a positive weight
    entering_n: Tensor  # which codes enter at the next step: ALL, BEST or NONE

    def keep(self, which_n: Tensor) -> _State:
        return _State(**{name: value[which_n] for name, value in vars(self).items()})


def minimise(gram_Nss: Tensor, linear_Ns: Tensor, start_Ns: Tensor, allowed_Ns: Tensor) -> Tensor:
    """The minimisers p_Ns, exactly zero off their supports. `start_Ns` is a point of the simplex; only entries
    `allowed_Ns` may become positive. Problems that are not numbers come back as they started."""
    out_Ns = start_Ns.clone()
    live_n = torch.arange(len(out_Ns), device=out_Ns.device)
    yes_n = torch.ones_like(live_n, dtype=torch.bool)
    state = _State(
        gram_Nss, linear_Ns, allowed_Ns, start_Ns.clone(), start_Ns > 0, yes_n, yes_n, torch.full_like(live_n, ALL)
    )
    for step in range(STEPS):
        entering_ns = _entering(state)
        done_n = state.settled_n & ~entering_ns.any(1) if step else torch.zeros_like(yes_n)
        if bool(done_n.any()):
            out_Ns[live_n[done_n]] = state.p_ns[done_n]
            live_n, entering_ns, state = live_n[~done_n], entering_ns[~done_n], state.keep(~done_n)
        if not len(live_n):
            break
        state.inside_ns = state.inside_ns | entering_ns
        state.helped_n = state.helped_n & ~state.settled_n
        _step(state)
    out_Ns[live_n] = state.p_ns
    return out_Ns / out_Ns.sum(1, keepdim=True)


def _entering(state: _State) -> Tensor:
    """Which codes enter the support: those with a lower slope than its own, or the one with the lowest."""
    slope_ns = torch.einsum("nst,nt->ns", state.gram_nss, state.p_ns) - state.linear_ns
    below_ns = (state.p_ns * slope_ns).sum(1, keepdim=True) - slope_ns
    below_ns = torch.where(state.inside_ns | ~state.allowed_ns, 0.0, below_ns)
    better_ns = below_ns > ROUNDING * state.gram_nss.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)
    best_ns = torch.zeros_like(better_ns).scatter_(1, below_ns.argmax(1, keepdim=True), True)
    better_ns &= best_ns | (state.entering_n == ALL)[:, None]
    return better_ns & (state.settled_n & (state.entering_n > NONE))[:, None]


def _step(state: _State) -> None:
    """Towards the minimum on the support, as far as no weight falls below zero; weights that reach zero leave."""
    goal_ns = on_support(state.gram_nss, state.linear_ns, state.inside_ns)
    broken_n = ~torch.isfinite(goal_ns).all(1)
    goal_ns = torch.where(broken_n[:, None], state.p_ns, goal_ns)
    falling_ns = state.inside_ns & (goal_ns <= 0)
    reach_ns = torch.where(falling_ns, state.p_ns / (state.p_ns - goal_ns).clamp_min(1e-300), torch.inf)
    length_n = reach_ns.amin(1, keepdim=True).clamp_max(1.0)
    moved_ns = torch.where(length_n == 1.0, goal_ns, state.p_ns + length_n * (goal_ns - state.p_ns))
    state.inside_ns = state.inside_ns & ~(falling_ns & (reach_ns <= length_n))
    moved_ns = torch.where(state.inside_ns, moved_ns.clamp_min(0.0), 0.0)
    state.helped_n = state.helped_n | ((state.p_ns == 0) & (moved_ns > 0)).any(1)
    state.p_ns, state.settled_n = moved_ns, ~falling_ns.any(1)
    next_n = torch.where(state.helped_n, ALL, state.entering_n - 1)  # ALL, BEST, NONE, in this order
    state.entering_n = torch.where(broken_n, NONE, torch.where(state.settled_n, next_n, state.entering_n))


def on_support(gram_nss: Tensor, linear_ns: Tensor, inside_ns: Tensor) -> Tensor:
    """The minimum with sum one over the entries `inside_ns` alone, of either sign; zero elsewhere."""
    factor_nss, inside = factor(gram_nss, inside_ns)
    both_ns2 = torch.cholesky_solve(torch.stack([inside, linear_ns * inside], dim=2), factor_nss)
    ones_ns, free_ns = (both_ns2 * inside[:, :, None]).unbind(2)
    return free_ns + ones_ns * ((1.0 - free_ns.sum(1)) / ones_ns.sum(1))[:, None]


def differentiate(gram_nss: Tensor, inside_ns: Tensor, slope_ns: Tensor) -> Tensor:
    """(A^-1 - A^-1 1 1^T A^-1 / 1^T A^-1 1) slope on the support, zero elsewhere: how the minimum moves with b."""
    factor_nss, inside = factor(gram_nss, inside_ns)
    both_ns2 = torch.cholesky_solve(torch.stack([inside, slope_ns * inside], dim=2), factor_nss)
    ones_ns, out_ns = (both_ns2 * inside[:, :, None]).unbind(2)
    return out_ns - ones_ns * (out_ns.sum(1) / ones_ns.sum(1))[:, None]


def factor(gram_nss: Tensor, inside_ns: Tensor) -> tuple[Tensor, Tensor]:
    """(Cholesky factor of A on the support and the identity elsewhere, the support as numbers)."""
    inside = inside_ns.to(gram_nss.dtype)
    masked_nss = gram_nss * inside[:, :, None] * inside[:, None, :] + torch.diag_embed(1.0 - inside)
    return torch.linalg.cholesky_ex(masked_nss)[0], inside
