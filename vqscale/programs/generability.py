"""How well a prior will do with the ids of a tokenizer, before there is one: what reconstructions show of this little.

Two looks at held-out images: decoders that meet wrong ids (`under_swaps`), and ids that a rounding or a pixel moves
(`moved`). Each is the same on any number of ranks. Not here: what ids say of each other (train/probe.py), and the
command with its options (commands/evaluate/generability.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.codes import noise
from vqscale.codes.swaps import Swaps
from vqscale.data.samples import SampleStream
from vqscale.metrics.fid import Moments, Statistics, frechet
from vqscale.metrics.reconstruction import to_bytes
from vqscale.nets.mode import evaluating
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.programs.score import look_over
from vqscale.tokenizer.model import Tokenizer

RIGHT, REAL = ("", 0.0), ("real", 0.0)  # beside (kind of swaps, share): ids as they are, and the images themselves


@dataclass(frozen=True)
class Features:
    """A network on the mesh's device, by whose features pictures are compared: uint8 (N, 3, H, W) -> (N, dim).

    `name` is that of its Fréchet distance. `real` are its statistics of real pictures where they are known, and then
    the distance of reconstructions from ids as they are is known too; None: the images of the stream are looked at.
    """

    name: str
    dim: int
    of: Callable[[Tensor], Tensor]
    real: Statistics | None = None


@torch.no_grad()
def under_swaps(
    tokenizer: Tokenizer,
    stream: SampleStream,
    mesh: Mesh,
    shares: Sequence[float],
    neighbours: int,
    features: Sequence[Features] = (),
) -> dict[str, float]:
    """How a decoder bears wrong ids: images of an evaluation stream where a share of their ids is swapped, for one of
    so many codes nearest to each (near) or for any other code (any): psnr_near_SHARE and psnr_any_SHARE, and of each of
    the features the Fréchet distance from real pictures, NAME_near_SHARE and NAME_any_SHARE, and NAME, nothing swapped.

    Collective; the same ids are swapped on any number of ranks, and those of a smaller share are swapped for the same
    at a larger one. ValueError where there are too few images for a covariance.
    """
    signal, quantizer = tokenizer.signal, tokenizer.quantizer
    kinds = {"any": Swaps(quantizer.num_codes)}
    if shares:
        kinds["near"] = Swaps.among_neighbours(quantizer.decode, quantizer.num_codes, neighbours, mesh)
    swapped = [(kind, share) for kind in ("near", "any") for share in shares]
    sums = {key: signal.sums(mesh, None) for key in swapped}
    unknown = any(network.real is None for network in features)
    seen = [{key: Moments(network.dim, mesh.device) for key in (*swapped, RIGHT, REAL)} for network in features]

    def see(key: tuple[str, float], images: Tensor) -> None:
        for network, moments in zip(features, seen, strict=True):
            if len(images) and (network.real is None or key in swapped):
                moments[key].add(network.of(to_bytes(images)))

    def look(samples: Tensor, valid: Tensor, numbers: Tensor) -> None:
        entered, keys_B = signal.enter(samples), noise.keys(0, numbers)
        ids = tokenizer.encode(*entered)
        for key, counted in sums.items():
            other = kinds[key[0]](ids.flatten(1), keys_B, key[1]).view_as(ids)
            predicted = signal.predict(tokenizer.decode(other, *entered[1:]))[valid]
            counted.add(samples[valid], predicted)
            see(key, predicted)
        if unknown:
            see(RIGHT, signal.predict(tokenizer.decode(ids, *entered[1:]))[valid])
            see(REAL, samples[valid])

    with evaluating(tokenizer):
        look_over(stream, mesh, look)
    found = {f"psnr_{kind}_{share:g}": sums[kind, share].numbers()["psnr"] for kind, share in swapped}
    for network, moments in zip(features, seen, strict=True):
        real = network.real or moments[REAL].statistics(mesh.world)
        asked = [*([RIGHT] if network.real is None else []), *swapped]
        found |= {_named(network.name, key): frechet(moments[key].statistics(mesh.world), real) for key in asked}
    return found


def _named(name: str, key: tuple[str, float]) -> str:
    return name if key == RIGHT else f"{name}_{key[0]}_{key[1]:g}"


@torch.no_grad()
def moved(tokenizer: Tokenizer, stream: SampleStream, mesh: Mesh) -> dict[str, float]:
    """Shares of the ids of an evaluation stream that are others

    moved_bf16     where everything before the search is computed under autocast to bfloat16
    moved_pixel    where the image stands one pixel further right and down, at the same places
    moved_token    where it stands one token further, at the places that the tokens have gone to

    The tokens of the first row and column, which the edge has entered, are not compared, so that a grid with a side of
    one has the first number alone. Collective, the same on any number of ranks up to rounding.
    """
    signal, strides = tokenizer.signal, tokenizer.net.strides
    counts = {name: torch.zeros(2, dtype=torch.float64, device=mesh.device) for name in ("bf16", "pixel", "token")}

    def count(name: str, ids: Tensor, others: Tensor) -> None:
        counts[name] += torch.tensor([int((ids != others).sum()), ids.numel()], device=mesh.device)

    def look(samples: Tensor, valid: Tensor, numbers: Tensor) -> None:
        def encoded(images: Tensor) -> Tensor:
            return tokenizer.encode(*signal.enter(images))[valid]

        ids = encoded(samples)
        with torch.autocast(mesh.device.type, torch.bfloat16):
            count("bf16", ids, encoded(samples))
        count("pixel", ids[:, 1:, 1:], encoded(shifted(samples, 1, 1))[:, 1:, 1:])
        count("token", ids[:, :-1, :-1], encoded(shifted(samples, *strides))[:, 1:, 1:])

    with evaluating(tokenizer):
        look_over(stream, mesh, look)
    sums = {name: ops.sum_over(counted, mesh.world).tolist() for name, counted in counts.items()}
    return {f"moved_{name}": others / every for name, (others, every) in sums.items() if every}


def shifted(images: Tensor, down: int, right: int) -> Tensor:
    """(B, C, H, W) moved by so many pixels; what enters at the edge repeats it, what leaves is lost."""
    height, width = images.shape[2:]
    return F.pad(images, (right, 0, down, 0), mode="replicate")[..., :height, :width]
