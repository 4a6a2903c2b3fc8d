"""Whole recordings through a tokenizer of sounds, once each, of any length and on any number of processes.

A recording goes through encoder and decoder alone, because what stands beside it in a batch, padding above all, would
change it. On a code axis the ranks' tokens are searched together: latents are filled up to those of the longest
recording at hand, and what was found for the filling is dropped, so ids are those of the recording alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vqscale import signals
from vqscale.data.recordings import Recordings
from vqscale.data.sounds import Wave
from vqscale.metrics.sound import SpeechMeasures
from vqscale.metrics.sounds_classifier import Recognised, check_labels, check_rate
from vqscale.nets.mode import evaluating
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.held_out import Pass

HEARD, MOST_TOLD = 8, 5


class Heard(NamedTuple):
    """A recording for people to listen to."""

    key: str
    wave: Wave
    recon: Wave


@dataclass(frozen=True)
class Scored:
    """What `score` found, the same on every rank."""

    numbers: dict[str, float]
    per_code: Tensor
    num_codes: int
    heard: list[Heard]  # the first of the data set, in its order
    broken: list[str]  # a few of what could not be read
    by_class: dict[str, dict[str, float]]  # what a classifier recognises, of each class there is


@torch.no_grad()
def score(
    tokenizer: Tokenizer,
    recordings: Recordings,
    mesh: Mesh,
    speech: SpeechMeasures | None = None,
    advance: Callable[[int, float], None] | None = None,
    classifier: Any = None,
) -> Scored:
    """Look at every recording once, each by way of its ids; with a classifier, of drawn sounds, it names their class.
    Collective; the same answer on any number of ranks, but for rounding. ValueError on all ranks where no recording can
    be read, or at another rate than the tokenizer's, or has no class that the classifier knows.
    """
    signals.check_reads(tokenizer.signal.config, recordings.config)
    labels, recognised = recordings.index.samples.labels, None
    if classifier is not None:
        check_rate(recordings.config.sample_rate, classifier.config, "the tokenizer")
        check_labels(labels, "the recordings")
        recognised = Recognised(classifier, mesh)
    world, passed = mesh.world, Pass(tokenizer.signal, tokenizer.quantizer, mesh, speech)
    heard, told = list[tuple[int, Heard]](), list[str]()
    counts = torch.zeros(4, dtype=torch.float64)  # samples, tokens, broken, cut
    with evaluating(tokenizer):
        for begin in range(0, len(recordings), world.size):
            number, wave = begin + world.rank, torch.zeros(0)
            if number < len(recordings):
                try:
                    read, was_cut = recordings.read(number)
                    wave = torch.from_numpy(read)
                    counts += torch.tensor([len(read), 0, 0, was_cut])
                except ValueError as error:
                    counts[2] += 1
                    told.append(str(error))
            recon, ids = through(tokenizer, wave.to(mesh.device), mesh)
            predicted = tokenizer.signal.predict(recon)
            counts[1] += int((ids.flatten(1)[:, 0] >= 0).sum())
            there = torch.tensor([len(wave) > 0], device=mesh.device)
            passed.add(wave.to(mesh.device).view(1, 1, -1), predicted.view(1, 1, -1), ids, there)
            if recognised is not None and len(wave):
                recognised.add(wave.to(mesh.device), predicted, int(labels[number]), number)
            if number < HEARD and len(wave):
                heard.append((number, Heard(recordings.index.key(number), wave.numpy(), predicted.cpu().numpy())))
            if advance is not None:
                advance(min(world.size, len(recordings) - begin), 0.0)
    samples, tokens, broken, cut = ops.sum_over(counts.to(mesh.device), world).tolist()
    told = [line for lines in ops.gather_objects(told[:MOST_TOLD], world) for line in lines][:MOST_TOLD]
    if not tokens:
        raise ValueError(f"none of the {len(recordings)} recordings could be read ({'; '.join(told)}): change --shards")
    seconds = samples / recordings.config.sample_rate
    numbers = passed.numbers() | {"seconds": seconds, "tokens_per_s": tokens / seconds, "broken": broken, "cut": cut}
    columns = len(passed.columns)
    numbers["kbps"] = numbers["tokens_per_s"] * columns * math.log2(tokenizer.quantizer.num_codes) / 1000
    numbers["kbps_entropy"] = numbers["tokens_per_s"] * numbers["id_bits"] / 1000
    shares, by_class = recognised.numbers() if recognised is not None else ({}, {})
    every = sorted(pair for pairs in ops.gather_objects(heard, world) for pair in pairs)
    heard_first = [one for _, one in every]
    return Scored(numbers | shares, passed.per_code(), passed.num_codes, heard_first, told, by_class)


def through(tokenizer: Tokenizer, wave_T: Tensor, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """(what the decoder makes of a recording of this rank (T,), its ids (most, ids of a token), -1 beyond its own).

    Every rank gives one, empty where it has none; `most` are the tokens of the longest, or 1. Collective.
    """
    quantizer = tokenizer.quantizer
    x_ND = wave_T.new_zeros(0, quantizer.dim)
    if len(wave_T):
        x_ND = tokenizer.latents(*tokenizer.signal.enter(wave_T.view(1, 1, -1)))
    most = max(1, int(ops.max_over(torch.tensor(len(x_ND), device=wave_T.device), mesh.world)))
    filled = F.pad(x_ND, (0, 0, 0, most - len(x_ND)))
    if quantizer.exact_decode:
        ids = quantizer.encode(filled)
        z_ND = quantizer.decode(ids)
    else:
        found = quantizer(filled)
        ids, z_ND = found.ids, found.z
    ids = ids.view(most, quantizer.num_ids).clone()
    ids[len(x_ND) :] = -1
    if not len(wave_T):
        return wave_T, ids
    recon = tokenizer.reconstruct(z_ND[: len(x_ND)], (1, len(x_ND)))
    return recon.flatten()[: len(wave_T)], ids
