"""IBQ's gradients in closed form, in float64 to 1e-10, on every grid of ranks.

With G = dL/dz, R = C[k] - Z, p = softmax(Z C^T / T), H the one-hot of k, s = 2 / (N D), and S(M) = p o (M - sum p o M):

    straight through    dZ = S(G C^T) C / T                    dC = H^T G + S^T Z / T
    quantization loss   dZ = S1 C / T - (1 + a) s R            dC = (1 + b) s H^T R + S1^T Z / T        S1 = S(s R C^T)
    entropies           dl = q o (-(log q + Hs) - (u - sum q u)) / N,    u = -(log qbar + 1),    q at temperature tau

with commitment weight a and codebook weight b, and without an epsilon in the logarithm.
"""

from __future__ import annotations

import pytest
import torch
from whole import CODES, GRIDS, close, engine_gradient, mine, normal, put

from vqscale import quantizers
from vqscale.codes import dense
from vqscale.parallel.mesh import Mesh

TOKENS, DIM = 24, 5
SIZES = [1, 3, 13, 300]  # on 4 ranks: ranks without rows, not divisible, several blocks of rows
PARTS = ["straight through", "quantization", "entropy", "all"]
# temperature, commitment weight, codebook weight, entropy temperature; the released form first, then the paper's
FORMS = {"released": (1.0, 1.0, 0.25, 1.0), "paper": (1.0, 0.25, 1.0, 0.3), "warm": (0.7, 0.6, 0.4, 0.2)}
ENTROPY_WEIGHT = 0.3


def ibq(mesh=None, num_codes=13, dim=DIM, **settings):
    quantizer = quantizers.build(
        {"name": "ibq", "num_codes": num_codes, "dim": dim, "init": "normal", "revive_every": 0, **settings}, mesh
    )
    quantizer.codebook.budget = 1
    return quantizer


def _rows(num_codes):
    return 0.7 * normal(num_codes, DIM, seed=num_codes)


def _given():
    """Tokens and the gradient that arrives at z."""
    return normal(TOKENS, DIM, seed=1), normal(TOKENS, DIM, seed=2)


def _gradients(data, codes):
    """Per case: z, ids, losses, gradients. The loss of a rank is such that the mean over ranks is that of the batch."""
    mesh = Mesh(data, codes)
    out = {}
    for form, (temperature, commitment, codebook, low) in FORMS.items():
        settings = {
            "temperature": temperature,
            "commitment_weight": commitment,
            "codebook_weight": codebook,
            "entropy_weight": ENTROPY_WEIGHT,
            "entropy_temperature": low,
        }
        for num_codes in SIZES:
            quantizer = ibq(mesh, num_codes, **settings)
            put(quantizer.codebook, _rows(num_codes))
            for part in PARTS:
                x, g = (mine(whole, mesh) for whole in _given())
                x.requires_grad_()
                quantizer.zero_grad()
                answer = quantizer(x)
                entropy = answer.losses.pop("entropy")
                terms = {
                    "straight through": (answer.z * g).sum() * mesh.world.size,
                    "quantization": sum(answer.losses.values()),
                    "entropy": entropy,
                }
                (sum(terms.values()) if part == "all" else terms[part]).backward()
                values = {key: value.detach() for key, value in terms.items()}
                out[form, num_codes, part] = (
                    answer.z.detach(),
                    answer.ids,
                    values,
                    x.grad,
                    quantizer.codebook.rows.grad,
                )
    return out


def _closed_form(form, num_codes):
    """{part: (value, dZ, dC)} and ids, from the formulas above."""
    temperature, a, b, low = FORMS[form]
    (z, g), c = _given(), _rows(num_codes)
    logits = z @ c.t()
    ids = logits.argmax(1)
    h = torch.nn.functional.one_hot(ids, num_codes).double()
    r, s = c[ids] - z, 2 / (TOKENS * DIM)
    p = torch.softmax(logits / temperature, 1)

    def soft(m):
        return p * (m - (p * m).sum(1, keepdim=True))

    through, quant = soft(g @ c.t()) / temperature, soft(s * r @ c.t()) / temperature
    q, logq = torch.softmax(logits / low, 1), torch.log_softmax(logits / low, 1)
    token = -(q * logq).sum(1, keepdim=True)
    mean = q.mean(0)
    u = -(mean.log() + 1)
    entropy = q * (-(logq + token) - (u - (q * u).sum(1, keepdim=True))) / (low * TOKENS)
    spread = -(mean * mean.log()).sum()
    parts = {
        "straight through": ((c[ids] * g).sum(), through @ c, h.t() @ g + through.t() @ z),
        "quantization": (
            (1 + a + b) * r.square().mean(),
            quant @ c - (1 + a) * s * r,
            (1 + b) * s * h.t() @ r + quant.t() @ z,
        ),
        "entropy": tuple(ENTROPY_WEIGHT * v for v in (token.mean() - spread, entropy @ c, entropy.t() @ z)),
    }
    parts["all"] = tuple(sum(part[which] for part in parts.values()) for which in range(3))
    return ids, parts


@pytest.mark.parametrize("grid", GRIDS)
def test_gradients_are_the_closed_forms(ranks, grid):
    world = grid[0] * grid[1]
    results = ranks(world, _gradients, *grid, timeout_s=240.0)
    for form in FORMS:
        for num_codes in SIZES:
            ids, parts = _closed_form(form, num_codes)
            for part, (value, dz, dc) in parts.items():
                got = [result[form, num_codes, part] for result in results]
                assert torch.equal(torch.cat([g[1] for g in got]), ids)
                assert torch.equal(torch.cat([g[0] for g in got]), _rows(num_codes)[ids]), "z is the row, exactly"
                if part != "all":
                    close(torch.stack([g[2][part] for g in got]).mean(), value)
                grad_x = torch.cat([g[3] for g in got]) / world
                grad_rows = engine_gradient([g[4] for g in got], grid[1])
                close(grad_x, dz)
                close(grad_rows, dc)
                if part == "straight through":  # the soft part moves no mass: sum_j dC_j = sum_n g_n
                    close(grad_rows.sum(0), _given()[1].sum(0))
                if num_codes == 1 and part == "straight through":
                    close(grad_x, torch.zeros_like(grad_x))


@pytest.mark.parametrize("num_codes", SIZES)
def test_the_closed_forms_are_the_published_step(num_codes):
    """The released form by autograd through its one-hots: what the formulas and `dense` both have to be."""
    (x, g), c = _given(), _rows(num_codes).requires_grad_()
    x.requires_grad_()
    published = dense.published_ibq(x, c, beta=0.25, entropy_temperature=1.0)
    ids, parts = _closed_form("released", num_codes)
    assert torch.equal(published.ids_N, ids)
    close(published.z_ND.detach(), c.detach()[ids])
    for part, loss in (("straight through", (published.z_ND * g).sum()), ("quantization", published.quantization)):
        value, dz, dc = parts[part]
        close(loss.detach(), value)
        grad_x, grad_c = torch.autograd.grad(loss, (x, c), retain_graph=True)
        close(grad_x, dz)
        close(grad_c, dc)
    # its offset of 1e-5 inside the logarithm of the mean is an error of about K times that
    entropy, dz, _ = parts["entropy"]
    close(published.entropy.detach(), entropy / ENTROPY_WEIGHT, 2e-5 * num_codes)
    close(torch.autograd.grad(published.entropy, x)[0], dz / ENTROPY_WEIGHT, 2e-5 * num_codes)


def _shifted(codes):
    """What must not change: a vector added to all codes, a number added to all logits of a token."""
    mesh = Mesh(1, codes)
    x, g = (mine(whole, mesh) for whole in _given())
    rows, out = _rows(13), []
    wide = torch.cat([rows, torch.ones(13, 1, dtype=torch.float64)], 1)
    lift = mine(10 * normal(TOKENS, 1, seed=5), mesh)
    for whole, tokens, upstream in (
        (rows, x, g),
        (rows + normal(1, DIM, seed=4), x, g),
        (wide, torch.cat([x, lift], 1), torch.cat([g, torch.zeros_like(lift)], 1)),
    ):
        quantizer = ibq(mesh, dim=whole.shape[1], entropy_weight=1.0, entropy_temperature=0.5)
        put(quantizer.codebook, whole)
        tokens = tokens.clone().requires_grad_()
        answer = quantizer(tokens)
        ((answer.z * upstream).sum() + answer.losses["entropy"]).backward()
        stats = [answer.stats[key] for key in ("saturation", "entropy_token", "entropy_mean")]
        out.append((answer.ids, tokens.grad[:, :DIM], answer.losses["entropy"].detach(), *stats))
    return out


@pytest.mark.parametrize("codes", CODES)
def test_shifts_of_codes_and_logits_change_nothing(ranks, codes):
    for plain, *others in ranks(codes, _shifted, codes):
        for other in others:
            for got, expected in zip(other, plain, strict=True):
                close(got, expected)


def _permuted(codes, order):
    mesh = Mesh(1, codes)
    quantizer = ibq(mesh, entropy_weight=0.2, entropy_temperature=0.5)
    put(quantizer.codebook, _rows(13)[order])
    x, g = (mine(whole, mesh) for whole in _given())
    x.requires_grad_()
    answer = quantizer(x)
    (sum(answer.losses.values()) + (answer.z * g).sum()).backward()
    return answer.ids, answer.z.detach(), x.grad, quantizer.codebook.rows.grad


@pytest.mark.parametrize("codes", CODES)
def test_permuted_codes_give_permuted_answers(ranks, codes):
    order = torch.randperm(13, generator=torch.Generator().manual_seed(3))
    got, plain = (ranks(codes, _permuted, codes, which) for which in (order, torch.arange(13)))
    assert torch.equal(order[torch.cat([part[0] for part in got])], torch.cat([part[0] for part in plain]))
    for which in (1, 2):
        close(torch.cat([part[which] for part in got]), torch.cat([part[which] for part in plain]))
    close(torch.cat([part[3] for part in got]), torch.cat([part[3] for part in plain])[order])
