"""How well a prior will do with the ids of a tokenizer, before there is one: what reconstructions show of this little.

Two looks beside that of `score`, at the same held-out images and their ids: decoders that meet wrong ids (UnderSwaps),
and ids that a rounding or a pixel moves (Moved). Each is the same on any number of ranks. Not here: what ids say of
each other (train/probe.py), and the command with its options (commands/evaluate/generability.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.codes import noise
from vqscale.codes.swaps import Swaps
from vqscale.metrics.fid import Moments, Statistics, frechet
from vqscale.metrics.reconstruction import to_bytes
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.programs.score import Looked
from vqscale.tokenizer.model import Tokenizer

RIGHT, REAL = ("", 0.0), ("real", 0.0)  # beside (kind of swaps, share): ids as they are, and the images themselves


@dataclass(frozen=True)
class Features:
    """A network on the mesh's device, by whose features pictures are compared: uint8 (N, 3, H, W) -> (N, dim).

    `name` is that of its Fréchet distance. Where it is `known`, its statistics of real pictures are found elsewhere,
    and so is the distance of reconstructions from ids as they are; else the images of the stream are looked at.
    """

    name: str
    dim: int
    of: Callable[[Tensor], Tensor]
    known: bool = False


class UnderSwaps:
    """How a decoder bears wrong ids: images of an evaluation stream where a share of their ids is swapped, for one of
    so many codes nearest to each (near) or for any other code (any).

    The same ids are swapped on any number of ranks, and those of a smaller share are swapped for the same at a larger
    one. Beside `score`; making one is collective.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        mesh: Mesh,
        shares: Sequence[float],
        neighbours: int,
        features: Sequence[Features] = (),
    ) -> None:
        quantizer = tokenizer.quantizer
        self._tokenizer, self._signal, self._mesh, self._features = tokenizer, tokenizer.signal, mesh, features
        self._kinds = {"any": Swaps(quantizer.num_codes)}
        if shares:
            self._kinds["near"] = Swaps.among_neighbours(quantizer.decode, quantizer.num_codes, neighbours, mesh)
        swapped = [(kind, share) for kind in ("near", "any") for share in shares]
        self._sums = {key: self._signal.sums(mesh, None) for key in swapped}
        self._seen = [{key: Moments(one.dim, mesh.device) for key in (*swapped, RIGHT, REAL)} for one in features]

    def __call__(self, looked: Looked) -> None:
        ids, keys_B, valid = looked.ids, noise.keys(0, looked.numbers), looked.valid
        for key, counted in self._sums.items():
            other = self._kinds[key[0]](ids.flatten(1), keys_B, key[1]).view_as(ids)
            predicted = self._predicted(other, looked)
            counted.add(looked.samples[valid], predicted)
            self._see(key, predicted)
        if not all(network.known for network in self._features):
            self._see(RIGHT, self._predicted(ids, looked))
            self._see(REAL, looked.samples[valid])

    def _predicted(self, ids: Tensor, looked: Looked) -> Tensor:
        return self._signal.predict(self._tokenizer.decode(ids, *looked.entered[1:]))[looked.valid]

    def _see(self, key: tuple[str, float], images: Tensor) -> None:
        for network, moments in zip(self._features, self._seen, strict=True):
            if len(images) and (not network.known or key in self._sums):
                moments[key].add(network.of(to_bytes(images)))

    def numbers(self, real: Mapping[str, Statistics]) -> dict[str, float]:
        """psnr_near_SHARE and psnr_any_SHARE, and of each of the features the Fréchet distance from real pictures,
        NAME_near_SHARE and NAME_any_SHARE, and NAME, nothing swapped, where it is not known; `real` are the statistics
        of those that are. Collective. ValueError where there are too few images for a covariance.
        """
        found = {f"psnr_{kind}_{share:g}": sums.numbers()["psnr"] for (kind, share), sums in self._sums.items()}
        for network, moments in zip(self._features, self._seen, strict=True):
            there = real[network.name] if network.known else moments[REAL].statistics(self._mesh.world)
            for key in [*([] if network.known else [RIGHT]), *self._sums]:
                found[_named(network.name, key)] = frechet(moments[key].statistics(self._mesh.world), there)
        return found


def _named(name: str, key: tuple[str, float]) -> str:
    return name if key == RIGHT else f"{name}_{key[0]}_{key[1]:g}"


class Moved:
    """Shares of the ids of an evaluation stream that are others

    moved_bf16     where everything before the search is computed under autocast to bfloat16
    moved_pixel    where the image stands one pixel further right and down, at the same places
    moved_token    where it stands one token further, at the places that the tokens have gone to

    The tokens of the first row and column, which the edge has entered, are not compared, so that a grid with a side of
    one has the first number alone. Beside `score`; collective, the same on any number of ranks up to rounding.
    """

    def __init__(self, tokenizer: Tokenizer, mesh: Mesh) -> None:
        self._tokenizer, self._mesh = tokenizer, mesh
        names = ("bf16", "pixel", "token")
        self._counts = {name: torch.zeros(2, dtype=torch.float64, device=mesh.device) for name in names}

    def __call__(self, looked: Looked) -> None:
        samples, ids = looked.samples, looked.ids[looked.valid]

        def encoded(images: Tensor) -> Tensor:
            return self._tokenizer.encode(*self._tokenizer.signal.enter(images))[looked.valid]

        with torch.autocast(self._mesh.device.type, torch.bfloat16):
            self._count("bf16", ids, encoded(samples))
        self._count("pixel", ids[:, 1:, 1:], encoded(shifted(samples, 1, 1))[:, 1:, 1:])
        moved = encoded(shifted(samples, *self._tokenizer.net.strides))
        self._count("token", ids[:, :-1, :-1], moved[:, 1:, 1:])

    def _count(self, name: str, ids: Tensor, others: Tensor) -> None:
        self._counts[name] += torch.tensor([int((ids != others).sum()), ids.numel()], device=self._mesh.device)

    def numbers(self) -> dict[str, float]:
        """By name; collective."""
        sums = {name: ops.sum_over(counted, self._mesh.world).tolist() for name, counted in self._counts.items()}
        return {f"moved_{name}": others / every for name, (others, every) in sums.items() if every}


def shifted(images: Tensor, down: int, right: int) -> Tensor:
    """(B, C, H, W) moved by so many pixels; what enters at the edge repeats it, what leaves is lost."""
    height, width = images.shape[2:]
    return F.pad(images, (right, 0, down, 0), mode="replicate")[..., :height, :width]
