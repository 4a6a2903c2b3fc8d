"""How a gradient passes a hard choice: estimators that share a forward value, exactly the code, and differ backward.

straight_through   d z / d x = I
rotation           d z / d x = |c| / |x| R with R the rotation of x's direction onto c's, both held constant
                   (Fifty et al. 2024); where the two point in opposite directions R is not defined: the identity there
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def straight_through(x_ND: Tensor, c_ND: Tensor) -> Tensor:
    """Exactly c forward, the identity to x backward."""
    return c_ND.detach() + (x_ND - x_ND.detach())


def rotation(x_ND: Tensor, c_ND: Tensor) -> Tensor:
    """Exactly c forward; backward the gradient is turned back by the rotation from x to c and scaled by |c| / |x|."""
    with torch.no_grad():
        from_ND, to_ND = F.normalize(x_ND, dim=1), F.normalize(c_ND, dim=1)
        half_ND = from_ND + to_ND
        opposite_N1 = half_ND.norm(dim=1, keepdim=True) < 1e-3
        half_ND = F.normalize(half_ND, dim=1)
        scale_N1 = c_ND.norm(dim=1, keepdim=True) / x_ND.norm(dim=1, keepdim=True).clamp_min(1e-6)
    # R x = x - 2 r (r . x) + 2 c^ (x^ . x), linear in x: the pieces below are constants to autograd.
    turned_ND = x_ND - 2 * half_ND * (half_ND * x_ND).sum(1, keepdim=True)
    turned_ND = turned_ND + 2 * to_ND * (from_ND * x_ND).sum(1, keepdim=True)
    moved_ND = torch.where(opposite_N1, x_ND, scale_N1 * turned_ND)
    return straight_through(moved_ND, c_ND)


ESTIMATORS = {"straight_through": straight_through, "rotation": rotation}
