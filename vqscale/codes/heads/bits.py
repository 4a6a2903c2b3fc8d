"""Ids as bits that a small network unmasks, given h, in a few steps (BAR, 2602.09024): K = 2^b costs b numbers.

In training a random part of a token's bits is masked, and the loss is of all bits, the masked ones weighing 1. A token
is decoded in steps, each of which reveals some bits: those revealed together are independent given h and the bits
before.

    order fixed        bits are revealed in their order, the most significant first. In evaluation the loss is the sum
                       over these steps: exact nats of just what `sample` draws
    order confidence   the likeliest bits first, with noise, as published. The loss in evaluation is that of the fixed
                       order: a proper code length of the ids, but of another way of drawing than the one in use; read
                       it as a bound on what the network knows, and not as the entropy of samples

With all steps of one bit the fixed order is autoregression over bits. Nothing here has K in its shape: there are no
tables, and nothing is sent but the check of ids. Different from what is published: a bit is drawn at the temperature of
sampling, where BAR anneals the noise of the draw with that of the order; the loss is normalised in each token, where
BAR's is a ratio of sums over a batch, which depends on how that is cut.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqscale.codes import bits, noise
from vqscale.codes.heads import draw
from vqscale.codes.heads.base import Losses, Scored, Vocabulary, check_terms
from vqscale.codes.heads.config import BitsConfig
from vqscale.codes.ids import check_ids, whole_ids
from vqscale.nets.masked_bits import MASKED, MaskedBits
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.seed import derive


class Bits(Vocabulary):
    """Embedding, loss and sampling over `num_ids` ids of `num_codes` = 2^b each, all their bits in one row."""

    def __init__(
        self,
        num_codes: int,
        dim: int,
        mesh: Mesh | None = None,
        *,
        config: BitsConfig | None = None,
        num_ids: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, mesh = config or BitsConfig(), mesh or Mesh()
        for _, message in self.config.misfits(num_codes, num_ids):
            raise ValueError(message)
        self.num_codes, self.dim, self.num_ids, self.axis = num_codes, dim, num_ids, mesh.codes
        self.num_bits = (num_codes - 1).bit_length()  # of one id
        self.reveal = self.config.steps(self.num_bits * num_ids)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "bits"))
            self.inputs = nn.Linear(self.num_bits * num_ids, dim)
            nn.init.normal_(self.inputs.weight, 0.0, self.config.init_scale)
            nn.init.zeros_(self.inputs.bias)
            self.net = MaskedBits(self.num_bits * num_ids, dim, self.config.width, self.config.num_layers)
        if not torch.empty(0).is_meta:
            self.to(mesh.device)

    @classmethod
    def from_config(
        cls,
        config: BitsConfig,
        num_codes: int,
        dim: int,
        mesh: Mesh,
        *,
        seed: int,
        feature_dim: int | None = None,
        num_ids: int = 1,
    ) -> Bits:
        return cls(num_codes, dim, mesh, config=config, num_ids=num_ids, seed=seed)

    def split(self, ids: Tensor) -> Tensor:
        """bits_NS of ids, the most significant first, one id after the other; int64."""
        return bits.to_bits(ids.reshape(-1), self.num_bits).to(torch.int64).view(-1, self.num_bits * self.num_ids)

    def join(self, bits_NS: Tensor) -> Tensor:
        """The inverse of `split`: ids (N,), or (N, num_ids)."""
        ids = bits.to_ids(bits_NS.reshape(-1, self.num_bits))
        return ids.view(-1, self.num_ids) if self.num_ids > 1 else ids

    def embed(self, ids: Tensor) -> Tensor:
        """A linear map of the bits as -1 and 1."""
        shape = ids.shape if self.num_ids == 1 else ids.shape[:-1]
        check_ids(ids, -1, self.num_codes, "ids to embed", self.axis)
        nobody_N = (ids.reshape(-1, self.num_ids) < 0).any(1, keepdim=True)
        signs_NS = (2 * self.split(ids.clamp(min=0)) - 1).to(self.inputs.weight.dtype)
        return torch.where(nobody_N, 0.0, self.inputs(signs_NS)).view(*shape, self.dim)

    def losses(
        self,
        h_ND: Tensor,
        targets_N: Tensor,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        ignore: int = -1,
        right: bool = False,
    ) -> Losses:
        """In evaluation mode the exact nats of the fixed order, with a pass of the network for each step. In training
        one pass over bits of which some are masked: the number of bits times the weighted mean over them, and as
        cross entropy the same of the masked ones; torch's generator says which.
        """
        check_terms(label_smoothing, z_loss)
        targets_N = whole_ids(targets_N, "targets")
        ignored_N = (targets_N.reshape(-1, self.num_ids) == ignore).any(1)
        targets_N = torch.where(targets_N == ignore, 0, targets_N)
        check_ids(targets_N, 0, self.num_codes, "targets", self.axis)
        true_NS = self.split(targets_N)
        if self.training:
            masked_NS = self._mask(true_NS)
            l_NS2 = self._logits(torch.where(masked_NS, MASKED, true_NS), h_ND)
        else:
            l_NS2 = self._in_order(true_NS, h_ND)
            masked_NS = torch.ones_like(true_NS, dtype=torch.bool)
        counts_NS = masked_NS.to(l_NS2.dtype)
        weight_NS = counts_NS + self.config.unmasked_weight * (1 - counts_NS)

        def of_tokens(values_NS: Tensor, weight_NS: Tensor) -> Tensor:
            mean_N = (values_NS * weight_NS).sum(1) / weight_NS.sum(1)
            return torch.where(ignored_N, 0.0, values_NS.shape[1] * mean_N)

        nats_NS, smooth_NS = self._nats(l_NS2, true_NS), self._nats(l_NS2, true_NS, label_smoothing)
        square_NS = l_NS2.logsumexp(2).square()
        right_N = ((l_NS2[..., 1] > l_NS2[..., 0]) == true_NS.bool()).all(1) & ~ignored_N if right else None
        return Losses(
            of_tokens(smooth_NS + z_loss * square_NS, weight_NS),
            of_tokens(nats_NS.detach(), counts_NS),
            of_tokens(square_NS.detach(), weight_NS),
            right_N,
        )

    def _nats(self, l_NS2: Tensor, true_NS: Tensor, smoothing: float = 0.0) -> Tensor:
        flat = F.cross_entropy(l_NS2.flatten(0, 1), true_NS.flatten(), label_smoothing=smoothing, reduction="none")
        return flat.view(true_NS.shape)

    def _mask(self, true_NS: Tensor) -> Tensor:
        """Which bits are masked: a share of them, logit-normal as published, at least one."""
        num, size = true_NS.shape
        share_N = torch.sigmoid(self.config.mask_spread * torch.randn(num, device=true_NS.device))
        count_N = (size * share_N).round().clamp(min=1)
        place_NS = torch.rand(num, size, device=true_NS.device).argsort(1)
        return place_NS < count_N[:, None]

    def _in_order(self, true_NS: Tensor, h_ND: Tensor) -> Tensor:
        """The logits of each bit when it is revealed in the fixed order, the bits of the steps before being true."""
        parts, first = list[Tensor](), 0
        for count in self.reveal:
            seen_NS = torch.where(torch.arange(true_NS.shape[1], device=true_NS.device) < first, true_NS, MASKED)
            parts.append(self._logits(seen_NS, h_ND)[:, first : first + count])
            first += count
        return torch.cat(parts, 1)

    def _logits(self, bits_NS: Tensor, h_ND: Tensor) -> Tensor:
        """Float32 at least, whatever the autocast."""
        l_NS2: Tensor = self.net(bits_NS, h_ND.to(self.inputs.weight.dtype))
        return l_NS2 if l_NS2.dtype == torch.float64 else l_NS2.float()

    def beside_tables(self, h_ND: Tensor) -> tuple[Tensor, int]:
        bits_NS = torch.full((len(h_ND), sum(self.reveal)), MASKED, device=h_ND.device)
        return self.net(bits_NS, h_ND), len(self.reveal)

    def drawn(
        self,
        h_ND: Tensor,
        keys_N: Tensor,
        rule: draw.Rule,
        unguided_ND: Tensor | None,
        guidance: float | Tensor,
        scored: bool,
    ) -> Scored:
        """Bit by bit of the order: guidance, temperature, top-k and top-p of the two values of each bit. log p is the
        sum over the drawn bits along the order in which they were revealed."""
        draw.check_guidance(guidance, unguided_ND)
        bits_NS = torch.full((len(h_ND), sum(self.reveal)), MASKED, device=h_ND.device)
        log_p_N = h_ND.new_zeros(len(h_ND))
        for step, count in enumerate(self.reveal):
            null_NS = None if unguided_ND is None else self._odds(bits_NS, unguided_ND)
            odds_NS = draw.guided(self._odds(bits_NS, h_ND), null_NS, guidance) * rule.scale
            drawn_NS = _one(odds_NS, noise.keys(keys_N, step), rule)
            score_NS = F.logsigmoid(torch.where(drawn_NS, odds_NS, -odds_NS))
            now_NS = self._revealed(bits_NS == MASKED, score_NS, count, keys_N, step)
            bits_NS = torch.where(now_NS, drawn_NS.to(torch.int64), bits_NS)
            log_p_N = log_p_N + torch.where(now_NS, score_NS, 0.0).sum(1)
        return Scored(self.join(bits_NS), log_p_N)

    def _odds(self, bits_NS: Tensor, h_ND: Tensor) -> Tensor:
        """The log-odds of 1. FloatingPointError on all ranks of the code group where they are not finite."""
        l_NS2 = self._logits(bits_NS, h_ND)
        odds_NS = l_NS2[..., 1] - l_NS2[..., 0]
        draw.check_scores(ops.gather(odds_NS.abs().amax(1), self.axis))
        return odds_NS

    def _revealed(self, masked_NS: Tensor, score_NS: Tensor, count: int, keys_N: Tensor, step: int) -> Tensor:
        """Which masked bits a step reveals: the first ones, or those with the highest score, ties by position."""
        if self.config.order == "fixed":
            rank_NS = masked_NS.cumsum(1) - 1
        else:
            left = 1.0 - step / len(self.reveal)
            gumbel_NS = noise.gumbel(noise.keys(keys_N, step, 1), 0, masked_NS.shape[1], score_NS.dtype)
            confidence_NS = score_NS + self.config.order_noise * left * gumbel_NS
            confidence_NS = confidence_NS.masked_fill(~masked_NS, -torch.inf)
            rank_NS = confidence_NS.argsort(dim=1, descending=True, stable=True).argsort(1)
        return masked_NS & (rank_NS < count)


def _one(odds_NS: Tensor, keys_N: Tensor, rule: draw.Rule) -> Tensor:
    """Which bits are drawn as 1; the likelier value alone where temperature, top-k or top-p leave no other."""
    likelier_NS = torch.sigmoid(odds_NS.abs())
    sure_NS = likelier_NS >= (rule.top_p if rule.top_p < 1 else 2.0)
    if rule.temperature == 0 or rule.top_k == 1:
        sure_NS = torch.ones_like(sure_NS)
    uniform_NS = noise.uniform(keys_N, 0, odds_NS.shape[1], odds_NS.dtype)
    return torch.where(sure_NS, odds_NS > 0, uniform_NS < torch.sigmoid(odds_NS))
