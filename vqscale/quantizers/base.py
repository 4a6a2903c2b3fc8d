"""What a quantizer is: tokens in, codes out, one type of answer for all. Concrete classes are never subclassed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vqscale.codes import tally
from vqscale.codes.codebook import Codebook
from vqscale.codes.config import SimilarityName, TableConfig
from vqscale.codes.ids import check_ids, whole_ids
from vqscale.codes.revival import Upkeep
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.beginning import Fit, fit_rows, late, undrawn
from vqscale.quantizers.moments import BLOCK, roots

Renewed = tuple[nn.Parameter, Tensor]


@dataclass
class Quantized:
    """The answer for N tokens: `losses` are weighted, training adds their sum; `stats` are shown, and train nothing.

    Losses are means over the tokens of this rank, or the same number on all ranks; stats likewise, those that cost
    something only while `tally.statistics` is on.
    """

    z: Tensor  # (N, D), for the decoder
    ids: Tensor  # (N,), or (N, num_ids) where a token has several
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module, ABC):
    """Tokens last-dim: quantizer(x_ND). Precision inside is float32 or better whatever the autocast."""

    dim: int
    num_codes: int
    mesh: Mesh
    # ids are (N,), or (N, num_ids) where a token has several; num_codes is then the K of one of them. Caches and priors
    # see them flattened, the last axis fastest: token 0's ids, then token 1's.
    num_ids: int = 1
    # How many values each digit of an id has, the most significant first; None where an id is the number of a row.
    digits: tuple[int, ...] | None = None
    # False where z is continuous, so that no id can say it (scq): decode(ids) is then the nearest that ids come to z.
    exact_decode: bool = True

    @abstractmethod
    def forward(self, x_ND: Tensor) -> Quantized:
        """Quantize; in training mode also count, and prepare what `update` does."""

    @abstractmethod
    def encode(self, x_ND: Tensor) -> Tensor:
        """ids_N alone: the search, no training terms, no gradient. FloatingPointError, on all ranks that share the
        codes, for tokens that are not finite: nothing is nearest to them; on a GPU the device itself fails. (`forward`
        gives them some id, and a z or a loss that is not finite, so that a training skips the step.)
        """

    @abstractmethod
    def decode(self, ids_N: Tensor) -> Tensor:
        """z_ND of ids: exactly what `forward` gave for them, if `exact_decode`. ValueError, on all ranks that share
        the codes, for ids that are none of these (codes/ids.py).
        """

    @abstractmethod
    def begin(self) -> None:
        """A training loop that will call `update` begins: warm-up, first values from data and revival are on."""

    @abstractmethod
    def update(self, stepped: bool = True) -> list[Renewed]:
        """After each optimiser step in training: moving averages, first values, revival.

        `stepped` False (a step skipped for gradients that are not finite) forgets what was seen since the last update.

        Returns (parameter, local rows) that got new values: an optimiser forgets its moments of them.
        """

    def settle(self) -> None:
        """Codes were put here that another training has made: no warm-up, no first values from data, no landing, and
        what is kept beside codes begins at them. Before a training loop resumes."""

    def freeze(self) -> None:
        """Codes stand still from here on: nothing learns, moves or is revived; hits are counted all the same. Before
        tables are set aside."""
        self.requires_grad_(False)

    @property
    def breaks_graph(self) -> str | None:
        """Why `forward` in one process is not one graph to a compiler, of fixed shapes and with no look at the host;
        None where it is. Whoever compiles it calls `note` before each pass."""
        return f"{type(self).__name__} is not known to be one graph"

    def note(self) -> None:
        """Before a pass in a compiled graph: what the host alone knows of this step, as a graph can read it."""

    def freeze_frame(self) -> None:
        """What is measured of latents to bring them to where codes are (running moments) stands still: part of
        `freeze`, and for latents that do not change."""

    @property
    def beginning(self) -> tuple[int, int]:
        """(steps of a training without codes, steps until the decoder is given whole codes)."""
        return 0, 0

    def taken(self, x_ND: Tensor) -> Tensor:
        """x in float32, or in float64 if it is. ValueError unless these are tokens of `dim` numbers."""
        if x_ND.ndim != 2 or x_ND.shape[1] != self.dim:
            raise ValueError(
                f"tokens of this quantizer have shape (N, {self.dim}), and these {tuple(x_ND.shape)}: bring their "
                "dimensions to the end, or change tokenizer.quantizer to what the network gives"
            )
        return full(x_ND)

    def findable(self, x_ND: Tensor) -> Tensor:
        """`taken`, of tokens that `encode` can find a code for; FloatingPointError on all ranks that share the codes.
        On a GPU the check waits for nobody and fails inside the device, as that of ids does (codes/ids.py)."""
        x_ND = self.taken(x_ND)
        wrong = ops.max_over((~x_ND.isfinite().all(1)).sum(), self.mesh.codes)
        why = "latents are not finite, and have no nearest code: look for samples or weights of this tokenizer that are"
        if x_ND.device.type != "cpu":
            torch._assert_async(wrong == 0, f"{why} nan or infinite")
        elif wrong.item():
            raise FloatingPointError(f"{wrong.item()} of {len(x_ND)} {why} nan or infinite")
        return x_ND

    def known(self, ids_N: Tensor) -> Tensor:
        """Ids as int64, that `decode` has codes for. In training a GPU is not waited for (check_ids)."""
        ids_N = whole_ids(ids_N, "ids")
        check_ids(ids_N, 0, self.num_codes, "ids", self.mesh.codes, wait=not self.training)
        return ids_N

    def shortages(self, tokens: int) -> list[str]:
        """What a run with `tokens` of all ranks in a forward pass should know beforehand, in words."""
        return []

    def forecast(self, steps: int, tokens: int) -> list[str]:
        """What a run of so many steps should know before it begins, of how its codes will."""
        return late(self.beginning, steps) or self.shortages(tokens)

    def fits(self) -> dict[str, Fit]:
        """What the last `update` fitted, by the name under which a run logs it; mostly nothing."""
        return {}


class UpheldQuantizer(Quantizer):
    """Abstract: an upkeep looks after the rows of a codebook, of which the codes are made."""

    codebook: Codebook
    upkeep: Upkeep

    def __init__(self) -> None:
        super().__init__()
        self._fits: dict[str, Fit] = {}

    @property
    def passing(self) -> bool:
        """Tokens pass as they are: a training that waits for rows from data."""
        return self.training and self.upkeep.warming

    def landed(self, x_ND: Tensor, z_ND: Tensor) -> Tensor:
        """What the decoder is given in training: z, or in a landing something between x and z."""
        return land(x_ND, z_ND, self.upkeep.landing) if self.training else z_ND

    def begin(self) -> None:
        self.upkeep.begin()

    def settle(self) -> None:
        self.upkeep.settle()

    def freeze(self) -> None:
        super().freeze()
        self.upkeep.freeze()

    def note(self) -> None:
        self.upkeep.note()

    @property
    def beginning(self) -> tuple[int, int]:
        return self.upkeep.beginning

    def shortages(self, tokens: int) -> list[str]:
        return self.upkeep.shortages(tokens)

    def fits(self) -> dict[str, Fit]:
        return self._fits


class TableQuantizer(UpheldQuantizer):
    """Abstract: a quantizer whose codes are the rows themselves."""

    def __init__(
        self, config: TableConfig, similarity: SimilarityName, mesh: Mesh | None, *, seed: int, learned: bool = True
    ) -> None:
        super().__init__()
        self.dim, self.num_codes, self.mesh = config.dim, config.num_codes, mesh or Mesh()
        self.codebook = Codebook.from_config(config, similarity, self.mesh, seed=seed, learned=learned)
        self.upkeep = Upkeep(self.codebook, config, self.mesh, seed)
        self._first_scale = config.init_scale

    def watch(self, x_ND: Tensor, ids_N: Tensor) -> dict[str, Tensor]:
        """Count in training; the statistics that every quantizer has, but for saturation."""
        if self.training:
            self.upkeep.observe(x_ND, ids_N)
        return table_stats(self.codebook, self.upkeep, x_ND, ids_N, self.training)

    def encode(self, x_ND: Tensor) -> Tensor:
        return self.codebook.nearest(self.findable(x_ND))[0]

    @torch.no_grad()
    def decode(self, ids_N: Tensor) -> Tensor:
        return self.codebook.lookup(self.known(ids_N))

    def update(self, stepped: bool = True) -> list[Renewed]:
        return [(self.codebook.rows, self.renew(stepped))]

    @torch.no_grad()
    def renew(self, stepped: bool) -> Tensor:
        """The upkeep's update, and the fit when it has completed the first values; returns the rows that changed."""
        changed, filled = self.upkeep.update(stepped), self.upkeep.filled
        self._fits = {}
        if filled is None:
            return changed
        self._fits["fit"], mean_D, covariance_DD = fit_rows(self.codebook, filled)
        rest, root_DD = undrawn(self.codebook, filled), roots(covariance_DD)[0]
        for rows_kD in self.codebook.rows[:rest].split(BLOCK):
            rows_kD.copy_(mean_D + rows_kD.double() / self._first_scale @ root_DD)
        return torch.cat([changed, torch.arange(rest, device=changed.device)])


def land(x_ND: Tensor, z_ND: Tensor, share: float | Tensor) -> Tensor:
    """x + share (z - x), and z itself where all is shared: a soft end of a warm-up without quantization."""
    whole = not isinstance(share, Tensor) and share >= 1.0
    return z_ND if whole else x_ND + share * (z_ND - x_ND)


def full(x_ND: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x_ND if x_ND.dtype == torch.float64 else x_ND.float()


def table_stats(
    codebook: Codebook, upkeep: Upkeep, x_ND: Tensor, ids_N: Tensor, training: bool, norm_k: Tensor | None = None
) -> dict[str, Tensor]:
    """usage, perplexity, dead (over all K; of the window in a driven training, else of these tokens), mean norms, and
    landing: how much of its code a token is given, 0 in a warm-up and 1 where codes act.

    `norm_k` are the norms of codes that are not the rows. Two all-reduces of four numbers in all on the code axis;
    nothing at all where tally.statistics is off.
    """
    if not tally.statistics.on:
        return {}
    with torch.no_grad():
        if training and upkeep.driven:
            stats = upkeep.window.usage()
        else:
            counts_k = tally.counts(ids_N, codebook.layout, upkeep.mesh)
            stats = tally.usage(counts_k, codebook.axis, codebook.num_codes)
        norm_k = codebook.rows.norm(dim=1) if norm_k is None else norm_k
        code_norm = ops.sum_over(norm_k.sum(), codebook.axis) / codebook.num_codes
        latent_norm = x_ND.norm(dim=1).mean()
        share = upkeep.landing
        landing = share.to(x_ND.dtype) if isinstance(share, Tensor) else x_ND.new_full((), share)
        return {**stats, "code_norm": code_norm, "latent_norm": latent_norm, "landing": landing}
