"""Head: the flat vocabulary of a prior, K rows of D numbers split over the ranks of the code axis; logits are not sent.

What has K in its shape in a prior are two tables, of its inputs and of its outputs. Both are Codebooks, so the rows are
drawn, kept apart from the module, stepped and saved as a codebook's are. Traffic is as a codebook's: the tokens of the
M ranks of the code group are gathered (N x D per rank), a few numbers per token are merged, N x D go back to their
owners. N, the tokens of a rank, is the same on all ranks of a code group. With one process nothing is sent.

    embed    gather ids                reduce-scatter vectors                        gradient to the input rows
    loss     gather h, targets         merge log-sum-exp, target logit               gradients to h, the output rows
    weighted the same, and weights     the same, some tokens at a time               the same, made in the forward pass
    sample   gather h, keys            merge the best score, its id (and the set)    no gradient

Logits are h . row, without a bias. The definitions in plain torch are in dense.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor, nn

from vqscale.codes.codebook import SCAN_MIB, Codebook
from vqscale.codes.config import Products
from vqscale.codes.heads import draw, passes
from vqscale.codes.heads.base import Losses, Scored, Vocabulary, check_terms
from vqscale.codes.heads.config import Embedding, FlatConfig
from vqscale.codes.heads.flat_loss import FlatLoss, LossTerms
from vqscale.codes.heads.neighbours import Neighbours
from vqscale.codes.heads.neighbours import find as find_neighbours
from vqscale.codes.ids import check_ids, whole_ids
from vqscale.codes.merge import full_precision, own
from vqscale.codes.rows import Rows, decoded
from vqscale.matmul import Matrix
from vqscale.parallel import ops
from vqscale.parallel.clock import clock
from vqscale.parallel.mesh import Axis, Mesh
from vqscale.seed import derive


class Head(Vocabulary):
    """Embedding, loss and sampling over `num_codes` ids for a model of width `dim`. `mesh` None is one process.

    `embedding` says what an id looks like to the model:

        rows       a table of its own, drawn N(0, init_scale^2); the output rows begin at zero (loss log K exactly)
        tied       the output rows themselves, drawn N(0, init_scale^2)
        codebook   the frozen vector of its code, `feature_dim` numbers, through a learned linear map; give the vectors
                   to `set_features`. The output rows begin at zero or, with output_scale, as the same vectors in a
                   random frame of D dimensions, times output_scale: codes that are alike then begin with like logits,
                   which a short training does not find out by itself

    `outputs` and `inputs` are Tables: set_aside takes them from the module, and the linear map stays in it. Arithmetic
    is in the type of the rows (float32) whatever the autocast; `products: bf16` multiplies tokens with rows in bf16 and
    keeps the rest, the sums between blocks and all gradients of rows, in float32.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        mesh: Mesh | None = None,
        *,
        embedding: Embedding = "rows",
        feature_dim: int | None = None,
        init_scale: float = 0.02,
        output_scale: float = 0.0,
        neighbours: int = 0,
        neighbour_temperature: float = 1.0,
        products: Products = "fp32",
        seed: int = 0,
        scan_mib: int = SCAN_MIB,
    ) -> None:
        super().__init__()
        if (feature_dim is None) == (embedding == "codebook"):
            raise ValueError(
                f"embedding is {embedding} and feature_dim is {feature_dim}, arguments of Head: give feature_dim, the "
                "dimension of the codebook's vectors, with embedding codebook and with no other"
            )
        if neighbours > 1 and embedding != "codebook":
            raise ValueError(
                f"neighbours is {neighbours} and embedding is {embedding}, arguments of Head: neighbours are of the "
                "codes' vectors, which only embedding codebook has; use it, or leave neighbours at 0"
            )
        mesh = mesh or Mesh()
        self._num_neighbours, self._neighbour_temperature = neighbours, neighbour_temperature
        self.neighbours: Neighbours | None = None
        self._packed: list[Matrix] = []
        self.num_codes, self.dim, self.products = num_codes, dim, products
        self.embedding: Embedding = embedding
        self.output_scale, self._frame_seed = output_scale, derive(seed, "head", "frame")

        def table(name: str, width: int, scale: float, learned: bool = True) -> Codebook:
            chosen = derive(seed, "head", name)
            return Codebook(
                num_codes, width, mesh=mesh, init_scale=scale, seed=chosen, learned=learned, scan_mib=scan_mib
            )

        self.outputs = table("outputs", dim, init_scale if embedding == "tied" else 0.0)
        if embedding == "rows":
            self.inputs = table("inputs", dim, init_scale)
        elif feature_dim is not None:
            self.inputs = table("features", feature_dim, 0.0, learned=False)
            self.map = nn.Linear(feature_dim, dim)
            self.unrounded = ("map",)  # it runs without autocast: engine/rounded.py

    @classmethod
    def from_config(
        cls,
        config: FlatConfig,
        num_codes: int,
        dim: int,
        mesh: Mesh,
        *,
        seed: int,
        feature_dim: int | None = None,
        num_ids: int = 1,
    ) -> Head:
        """The head of a prior's settings; `feature_dim` counts with embedding: codebook only."""
        wanted = feature_dim if config.wants_features else None
        settings = {key: value for key, value in asdict(config).items() if key != "name"}
        settings["neighbours"] = config.neighbours or 0
        return cls(num_codes, dim, mesh, seed=seed, feature_dim=wanted, **settings)

    @property
    def rows(self) -> nn.Parameter:
        """The output rows of this rank, k x D."""
        return self.outputs.rows

    @property
    def layout(self) -> Rows:
        """Which ids this rank owns."""
        return self.outputs.layout

    @property
    def axis(self) -> Axis:
        return self.outputs.axis

    @torch.no_grad()
    def set_features(self, decode: Callable[[Tensor], Tensor]) -> None:
        """Read the frozen vectors of embedding: codebook from ids_N -> z_NF, a quantizer's `decode`. Collective.

        They are divided by the root mean square over all K codes. A checkpoint has them: a resumed run needs no call,
        but where targets are shared (neighbours), which training alone does.
        """
        assert self.embedding == "codebook", f"embedding is {self.embedding}"
        rows_kF, layout, first = self.inputs.rows, self.layout, 0
        for values_nF in decoded(decode, layout, rows_kF.device):
            if values_nF.shape[1] != self.inputs.dim:
                raise ValueError(
                    f"the vectors of codes have {values_nF.shape[1]} numbers, from the tokenizer, but feature_dim is "
                    f"{self.inputs.dim}, an argument of Head: give the dimension of the tokenizer's codes"
                )
            rows_kF[first : first + len(values_nF)] = values_nF
            first += len(values_nF)
        square = ops.sum_over(rows_kF.double().square().sum(), self.axis)
        rows_kF.div_((square / (self.num_codes * self.inputs.dim)).sqrt().clamp(min=1e-30))
        if self.output_scale:
            drawn = torch.Generator().manual_seed(self._frame_seed)
            frame_FD = torch.randn(self.inputs.dim, self.dim, generator=drawn) / self.dim**0.5
            self.outputs.rows.copy_(self.output_scale * rows_kF @ frame_FD.to(rows_kF))
        if self._num_neighbours > 1:
            count = min(self._num_neighbours, self.num_codes)
            self.neighbours = find_neighbours(rows_kF, layout, self.axis, count, self._neighbour_temperature)

    def embed(self, ids: Tensor) -> Tensor:
        """ids of any shape -> vectors, (*shape, D) in the type of the rows; the id -1 is nobody: zeros. Collective.

        ValueError on all ranks of the code group for other ids outside 0 .. K - 1; on a GPU the check waits for nobody
        and fails inside the device.
        """
        table = self.outputs if self.embedding == "tied" else self.inputs
        ids_N = whole_ids(ids.reshape(-1), "ids to embed")
        check_ids(ids_N, -1, self.num_codes, "ids to embed", self.axis)
        x_ND = table.lookup(ids_N)
        if self.embedding == "codebook":
            with full_precision(x_ND):
                x_ND = torch.where(ids_N[:, None] >= 0, self.map(x_ND.to(self.map.weight.dtype)), 0.0)
        return x_ND.unflatten(0, ids.shape) if ids.dim() else x_ND[0]

    def loss(
        self, h_ND: Tensor, targets_N: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0, ignore: int = -1
    ) -> Tensor:
        """Cross entropy of softmax(h rows^T) with the targets: loss_N, 0 at `ignore`; `losses` without its parts."""
        found = self.losses(h_ND, targets_N, label_smoothing=label_smoothing, z_loss=z_loss, ignore=ignore)
        return found.whole_N

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
        """The loss and what it is made of, 0 at `ignore`. Collective.

        Each of the N tokens by itself: take the mean over those that count. label_smoothing e mixes the target with the
        uniform distribution, (1 - e) one-hot + e / K; in training mode a head with `neighbours` has, in place of the
        one-hot, how the target is shared among them (neighbours.py). z_loss z adds z lse^2, which keeps the normaliser
        near 1. Memory is tokens x D and the blocks; logits are made once here and once more in the backward pass, but
        for a sum of losses (`weighted`). Targets outside 0 .. K - 1 are an error as in `embed`. `right` is by the
        logits of this pass, the lowest id among equals.
        """
        return self._losses(h_ND, targets_N, None, self._terms(label_smoothing, z_loss, ignore, right))[1]

    def weighted(
        self,
        h_ND: Tensor,
        targets_N: Tensor,
        weight_N: Tensor,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        ignore: int = -1,
        right: bool = False,
    ) -> tuple[Tensor, Losses]:
        """The gradients are made in the forward pass, with the logits that are there: three products in place of four.

        Memory is more by the exponentials of 512 tokens with the rows of this rank, or what the budget holds; where
        that is more than the budget and than two gradients of the rows, it is as `losses` (passes.tokens_at_once). From
        the forward to the backward pass both gradients are kept.
        """
        at_once = self.tokens_at_once(len(h_ND) * self.axis.size)
        terms = self._terms(label_smoothing, z_loss, ignore, right, at_once)
        if not at_once or not torch.is_grad_enabled():
            return self._losses(h_ND, targets_N, None, terms)[1].summed(weight_N)
        return self._losses(h_ND, targets_N, weight_N, terms)

    def tokens_at_once(self, num_tokens: int) -> int:
        """Of how many of B tokens `weighted` makes the gradients at once, on all ranks alike; 0: it is as `losses`."""
        return passes.tokens_at_once(num_tokens, self.layout.most, self.dim, self._kept_bytes, self.outputs.budget)

    def exponentials_bytes(self, num_tokens: int) -> int:
        """What is kept of the logits of these tokens for that."""
        return self.tokens_at_once(num_tokens) * self.layout.count * self._kept_bytes

    @property
    def _kept_bytes(self) -> int:
        return passes.kept_type(self.rows, self.products).itemsize

    def _terms(self, label_smoothing: float, z_loss: float, ignore: int, right: bool, at_once: int = 0) -> LossTerms:
        check_terms(label_smoothing, z_loss)
        shared = None
        if self._num_neighbours > 1 and self.training:
            shared = self.neighbours
            assert shared is not None, "set_features gives a head with neighbours what it shares targets by"
        terms = (label_smoothing, z_loss, ignore, self.products, self.outputs.budget, right, shared, at_once)
        return LossTerms(self.layout, self.axis, *terms)

    def _losses(
        self, h_ND: Tensor, targets_N: Tensor, weight_N: Tensor | None, terms: LossTerms
    ) -> tuple[Tensor, Losses]:
        with clock.span("codes"), full_precision(h_ND):
            total, *found = FlatLoss.apply(h_ND, self.rows, whole_ids(targets_N, "targets"), weight_N, terms)
            return total, Losses(*found)

    @contextmanager
    def laid_out(self) -> Iterator[None]:
        self._packed = draw.pack(self.rows)
        try:
            yield
        finally:
            self._packed = []

    def drawn(
        self,
        h_ND: Tensor,
        keys_N: Tensor,
        rule: draw.Rule,
        unguided_ND: Tensor | None,
        guidance: float | Tensor,
        scored: bool,
    ) -> Scored:
        """One pass over the rows finds the best perturbed logit of softmax(h rows^T) and, where `scored`, normalises:
        three more numbers per token are merged. Collective.

        keys_N are those of a seed, the image's number, the position. Equal logits are ordered by id. Guidance is of h,
        in which logits are linear, so it costs no second head. Products are float32 here. Memory is the blocks; with
        top-k or top-p one token's k logits at the least.
        """
        draw.check_guidance(guidance, unguided_ND)
        with clock.span("codes"), full_precision(h_ND):
            x_ND = draw.guided(h_ND.to(self.rows.dtype), unguided_ND, guidance)
            x_BD, keys_B = ops.gather(x_ND, self.axis), ops.gather(keys_N, self.axis)
            shard = draw.Shard(self.rows, self.layout, self.axis, self.outputs.budget, self._packed)
            drawn = draw.draw(x_BD, keys_B, shard, rule, scored)
            return Scored(*(own(part_B, self.axis) for part_B in drawn))
