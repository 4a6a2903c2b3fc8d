"""Drawing images from a prior and a tokenizer: a pass over image numbers, on any number of processes, to be continued.

Image number i has class classes[i mod number of classes], and its ids depend on the seed, on i and on its class only.
Images are made in batches of consecutive numbers, dealt out to the ranks; what is in a batch does not depend on the
number of ranks, so neither do rounding and the bits of the images. All ranks take equal numbers of rounds, because
codes that are split over them are asked together, and agree after each on whether to stop. Not here: what is measured.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vqscale.disk.owner import own
from vqscale.parallel import ops
from vqscale.parallel.background import on_first
from vqscale.parallel.mesh import Mesh
from vqscale.priors.base import Prior, SampleWarning
from vqscale.programs.sampling import drawn_cache
from vqscale.programs.sampling import folder as sample_folder
from vqscale.programs.sampling.request import SampleRequest, parse_classes
from vqscale.run.folder import StopRequest, commit, own_signals, versions
from vqscale.show.progress import Progress
from vqscale.tokenizer.matching import ids_of, tokenizer_of

if TYPE_CHECKING:
    from vqscale.tokenizer.model import Tokenizer


@dataclass(frozen=True)
class Outcome:
    """What `sample` did in this start."""

    state: str  # "sampled", "already" (it was finished before), "stopped"
    images: int = 0  # made in this start, by all ranks
    seconds: float = 0.0
    missing: int = 0  # batches
    reason: str = ""  # of stopping

    @property
    def rate(self) -> float:
        return self.images / max(self.seconds, 1e-9)


def check(prior: Prior, tokenizer: Tokenizer, request: SampleRequest) -> None:
    """ValueError with all that does not go together; the same on every rank. Collective."""
    prior.sample_config(request.how)
    faults = [*request.problems(), *misfits(prior, tokenizer)]
    if prior.config.condition.wants_context:
        faults.append(
            f"the prior's condition is {prior.config.condition.name}, an image, and classes are drawn here: measure "
            "what it predicts with vqscale evaluate dense"
        )
    if request.resize is not None and len(tokenizer.net.strides) != 2:
        faults.append(f"--resize is for images, and the tokenizer is of {tokenizer.signal.config.name}: leave it out")
    # A prior without classes has the label -1 alone. Known ids bring the classes of their images.
    asked = request.classes or (() if request.known is None else np.unique(request.known.labels).tolist())
    wrong = [c for c in asked if not (c == -1 or 0 <= c < prior.num_classes)]
    if wrong:
        there = f"0 .. {prior.num_classes - 1}" if prior.num_classes else "none"
        faults.append(f"class {', '.join(map(str, wrong[:5]))} is none of the prior's ({there}): change --classes")
    if faults:
        raise ValueError("; ".join(faults))


def misfits(prior: Prior, tokenizer: Tokenizer) -> list[str]:
    """Why a tokenizer cannot decode the ids of a prior; the same on every rank. Collective."""
    faults = list[str]()
    made_by, mine = prior.card.get("tokenizer"), ids_of(tokenizer)
    for what, key in (("codes", "num_codes"), ("ids per token", "num_ids")):
        ours, theirs = int(getattr(prior, key)), int(getattr(tokenizer.quantizer, key))
        if ours != theirs:
            faults.append(
                f"the prior has {ours} {what} and the tokenizer {theirs}: give the tokenizer whose ids the prior was "
                "trained on"
            )
    if made_by and made_by not in mine:
        faults.append(
            f"the prior was trained on ids of the tokenizer with fingerprint {made_by}, and the one given has "
            f"{mine[0]}: its decoder does not know these ids; give that tokenizer, or train the prior on a cache of "
            "this one"
        )
    return faults


def models(args: Any, mesh: Mesh) -> tuple[Prior, Tokenizer]:
    """The prior that a command names, and the tokenizer whose ids it models. Collective. What there is to remark on
    settings is for the command to say, once."""
    warnings.simplefilter("ignore", SampleWarning)
    prior = Prior.load(args.prior, mesh=mesh, weights=args.weights)
    return prior, tokenizer_of(args.tokenizer, prior.card.get("tokenizer"), mesh)


def remark(lines: Iterable[str], mesh: Mesh) -> None:
    """Rank 0 says each warning once."""
    if mesh.world.rank == 0:
        for line in dict.fromkeys(lines):
            print(f"warning: {line}", file=sys.stderr, flush=True)


def classes_of(prior: Prior, text: str | None) -> tuple[int, ...]:
    """The classes of a list such as `0,5,10-19`, or all of the prior without one; a prior without classes has -1."""
    return tuple(range(prior.num_classes)) or (-1,) if text is None else parse_classes(text)


@own_signals()
def sample(
    prior: Prior,
    tokenizer: Tokenizer,
    folder: Path,
    mesh: Mesh,
    request: SampleRequest,
    *,
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    stop: StopRequest | None = None,
) -> Outcome:
    """Make or continue the samples in `folder` until all are there, or until somebody asks to stop. Collective.

    `about` is added to sample.json: paths, say. `stop` is the caller's, who does more than this and clears it; without
    one this function looks for signals, and for a file STOP in the folder. ValueError for what the user has to change,
    RunError for what went wrong, on all ranks. An OSError (a full disk) is raised on the rank that met it. Samples that
    were begun before a setting existed go on as they began (SampleConfig.as_begun).
    """
    check(prior, tokenizer, request)
    request = on_first(lambda: request.as_begun(sample_folder.settings(folder)), mesh)
    facts = _facts(prior, tokenizer, request, about or {})
    with ExitStack() as held:
        missing = on_first(lambda: _begin(folder, facts, request, overwrite, held), mesh)
        if missing is None:
            return Outcome("already")
        asked_to_stop = stop or StopRequest(folder, mesh)
        outcome = _Work(prior, tokenizer, folder, mesh, request, progress, asked_to_stop).make(missing)
        if stop is None:
            asked_to_stop.clear()
        made = {"images": outcome.images, "seconds": round(outcome.seconds, 3), "images_per_s": round(outcome.rate, 3)}
        facts["made"] = {**made, "processes": mesh.world.size, "device": mesh.device.type}
        if outcome.state == "sampled" and request.ids_only:
            on_first(lambda: drawn_cache.finish(folder, facts, drawn_cache.card(prior, tokenizer, facts)), mesh)
        elif outcome.state == "sampled":
            on_first(lambda: sample_folder.finish(folder, facts, tokenizer.signal), mesh)
        return outcome


def _begin(
    folder: Path, facts: Mapping[str, Any], request: SampleRequest, overwrite: bool, held: ExitStack
) -> list[int] | None:
    held.enter_context(own(folder, "samples"))
    return sample_folder.begin(folder, facts, overwrite, request.how.before())


def _facts(prior: Prior, tokenizer: Tokenizer, request: SampleRequest, about: Mapping[str, Any]) -> dict[str, Any]:
    """What sample.json says; collective."""
    return {
        "settings": request.facts(),
        "prior": {
            "name": prior.config.name,
            "fingerprint": prior.fingerprint,
            "codes": prior.num_codes,
            "card": prior.card,
        },
        "tokenizer": {"fingerprint": tokenizer.fingerprint},
        **about,
        "commit": commit(),
        "versions": versions(),
    }


class _Work:
    """The drawing of batches."""

    def __init__(
        self,
        prior: Prior,
        tokenizer: Tokenizer,
        folder: Path,
        mesh: Mesh,
        request: SampleRequest,
        progress: bool,
        stop: StopRequest,
    ) -> None:
        self.prior, self.tokenizer, self.folder = prior, tokenizer, folder
        self.mesh, self.request, self.progress, self.stop = mesh, request, progress, stop

    def make(self, missing: Sequence[int]) -> Outcome:
        """Draw and write these batches until all are there or a rank is asked to stop; the same on every rank."""
        rank, world = self.mesh.world.rank, self.mesh.world.size
        rounds = -(-len(missing) // world)
        bar = Progress(rounds, rank=rank if self.progress else 1)
        total = sample_folder.num_batches(self.request.facts())
        if len(missing) < total:
            bar.say(f"{total - len(missing)} of {total} batches are there already")
        began, images, left, stopped = time.perf_counter(), 0, len(missing), False
        for block in [*missing[rank::world], None][:rounds]:
            count = self.make_batch(block)
            here = torch.tensor([float(count), float(block is not None), float(self.stop.here())])
            made, batches, asked = ops.sum_over(here.to(self.mesh.device), self.mesh.world).tolist()
            images, left, stopped = images + int(made), left - int(batches), asked > 0
            bar.advance(int(made), 0.0)
            if stopped and left:
                break
        bar.close()
        reasons = ops.gather_objects(self.stop.reason, self.mesh.world)
        seconds = time.perf_counter() - began
        reason = next((reason for reason in reasons if reason), "another rank")
        return Outcome("stopped", images, seconds, left, reason) if left else Outcome("sampled", images, seconds)

    def make_batch(self, block: int | None) -> int:
        """Draw and write a batch; how many images. With None there is none for this rank in this round, but codes that
        are split over ranks need its part in those of the others.
        """
        size, split = self.request.batch, self.mesh.codes.size > 1
        if block is None and not split:
            return 0
        first = (block or 0) * size
        count = min(size, self.request.num_images - first)
        # Ranks of a code group have batches of one length: what is beyond the last image is thrown away.
        drawn = self.draw(first, size if split else count)
        if block is None:
            return 0
        sample_folder.write_part(self.folder, block, **{key: array[:count] for key, array in drawn.items()})
        return count

    @torch.no_grad()
    def draw(self, first: int, count: int) -> dict[str, NDArray[Any]]:
        """labels, ids as the prior's, and unless ids alone are asked for images (b, height, width, 3) or what else the
        signal keeps, of the images first, first + 1, ..."""
        request, device = self.request, self.mesh.device
        labels = request.labels(first, count)
        numbers_B = torch.arange(first, first + count, device=device)
        condition_B = torch.from_numpy(labels).to(device)
        known = request.known
        given = {} if known is None else {"known": torch.from_numpy(known.ids[known.turn(first, count)]).to(device)}
        ids = self.prior.sample(condition_B, request.how, numbers_B=numbers_B, seed=request.seed, **given)
        made = {"labels": labels, "ids": ids.cpu().numpy()}
        if request.ids_only:
            return made
        images = self.tokenizer.decode(ids)
        if request.resize is not None:
            images = resize(images, request.resize)
        return {"images": self.tokenizer.signal.stored(images), **made}


def resize(images: Tensor, side: int) -> Tensor:
    """(N, C, H, W) -> the shorter side at `side`, float32, not clamped: bicubic without antialiasing, as LlamaGen's
    samplers bring images of 384 pixels to the 256 that they are scored at. Another filter gives another FID.
    """
    height, width = images.shape[2:]
    size = [round(old * side / min(height, width)) for old in (height, width)]
    return F.interpolate(images.float(), size=size, mode="bicubic", align_corners=False)


def summary(outcome: Outcome, folder: Path, request: SampleRequest, world: int) -> str:
    """The closing line."""
    what = f"{request.num_images} images of {len(request.classes)} classes"
    if request.known is not None:
        what = f"{request.num_images} images with ids of {len(request.known)} known ones"
    if outcome.state == "stopped":
        return (
            f"stopped by {outcome.reason}: {outcome.missing} batches are missing in {folder}; the same command goes "
            "on, on any number of processes"
        )
    files = f"{folder / sample_folder.FILE}, {folder / sample_folder.GRID}"
    if request.ids_only:
        what, files = f"ids of {what}", str(folder / sample_folder.CACHE)
    if outcome.state == "already":
        return f"{what} are in {folder} already: {files}"
    return (
        f"{what}: {files}; {outcome.images} images in {outcome.seconds:.1f} s with {world} processes, "
        f"{outcome.rate:.1f} images/s"
    )
