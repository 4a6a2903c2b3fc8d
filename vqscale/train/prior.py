"""Train a prior over ids, of a token cache or of samples that are encoded as they come (prior_data.py): open, build,
resume, loop, close.

Every rank runs these lines with its own images; the order of a step is that of tokenizer.py, without a discriminator.
Numbers to compare a loss with, in nats per token (all its ids, where it has several): `uniform`, log K of each id, is
knowing nothing; `unigram` (unigram.py) is knowing how often each id occurs in training, and nothing of the images.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqscale import priors
from vqscale.codes import noise, products, tally
from vqscale.codes.clusters import Clusters
from vqscale.codes.rows import Rows, set_aside
from vqscale.data.config_tokens import TokensConfig
from vqscale.disk.writer import Writer
from vqscale.engine.average import Average
from vqscale.engine.engine import Engine
from vqscale.metrics import unigram
from vqscale.nets.mode import evaluating
from vqscale.nets.transformer import Block
from vqscale.parallel import ops
from vqscale.parallel.clock import timed
from vqscale.parallel.mesh import Mesh
from vqscale.priors.base import Prior
from vqscale.priors.modelled import Modelled
from vqscale.run import folder
from vqscale.run.profile import Trace
from vqscale.seed import derive
from vqscale.show.board import Board
from vqscale.show.progress import Progress
from vqscale.tokenizer import clusters
from vqscale.tokenizer.matching import tokenizer_of
from vqscale.train import first_weights, frozen, loop
from vqscale.train.config.prior import PriorRun
from vqscale.train.prior_data import HeldOut, begin, check_labels, open_streams, seen, whose
from vqscale.train.watch import Effort, Watch, peak_mib

LARGEST_EXPONENT = 700.0  # of a perplexity that is a number


def take_features(prior: Prior, path: str, made_by: str, mesh: Mesh) -> None:
    """Give the head the vectors of the codes of the tokenizer in `path`, which must be the one that the ids are of."""
    prior.head.set_features(tokenizer_of(path, made_by, mesh).quantizer.decode)


def take_clusters(prior: Prior, path: str) -> None:
    """Let the codes be in the clusters of a file, which `open_streams` has checked."""
    table = prior.clusters
    assert isinstance(table, Clusters), "the config says that the prior wants clusters"
    table.take(clusters.read(path, table.layout))


@torch.no_grad()
def evaluate(
    model: Callable[..., Modelled],
    prior: Prior,
    stream: HeldOut,
    mesh: Mesh,
    most: int,
    seen_Ik: Tensor | None,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Scores over held-out ids, each image once, the same on every rank: loss (mean nats of a token, given the class),
    perplexity, accuracy (share of tokens that were the most probable), and of the ids themselves unigram, uniform (see
    above) and usage (of several ids per token the mean). Collective.

    `model` is the prior, or the engine that holds it. `most` images at most are looked at, 0 is all; seen_Ik is how
    often each code occurs in training (unigram.count); without it unigram is not there. What is random in the loss of a
    held-out image follows from (seed, its number in the cache or the shards).
    """
    layout = Rows(prior.num_codes, mesh.codes.size, mesh.codes.rank)
    held_Ik = torch.zeros(prior.num_ids, layout.count, dtype=torch.int64, device=mesh.device)
    sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)
    with evaluating(prior):
        for number, batch in enumerate(stream.batches()):
            if most and number * stream.batch >= most:
                break
            ids, valid_B = batch.ids.to(mesh.device), batch.valid.to(mesh.device)
            condition = prior.condition.of(batch).to(mesh.device)
            keys = noise.keys(derive(seed, "held out"), batch.numbers.to(mesh.device))
            modelled = model(ids, condition, keys)
            assert modelled.right_B is not None, f"{type(prior).__name__} does not say which ids it has right"
            each_3B = torch.stack([modelled.nats_B, modelled.right_B, valid_B]).double()
            sums += each_3B @ valid_B.double()
            counted = torch.where(valid_B.view(-1, *[1] * (ids.dim() - 1)), ids, -1)
            held_Ik += unigram.columns(counted, prior.num_ids, layout, mesh)
            if progress is not None:
                progress.advance(stream.batch, 0.0)
    nats, right, images = ops.sum_over(sums, mesh.world).tolist()
    scores = {"loss": nats / images, "perplexity": perplexity(nats / images), "accuracy": right / images}
    scores |= {"images": images}
    if seen_Ik is not None:
        scores["unigram"] = unigram.cross_entropy(seen_Ik, held_Ik, prior.num_codes, mesh)
    used = [tally.usage(held_k, mesh.codes, prior.num_codes)["usage"].item() for held_k in held_Ik]
    return scores | {"uniform": prior.num_ids * math.log(prior.num_codes), "usage": sum(used) / len(used)}


def perplexity(nats: float) -> float:
    return math.exp(min(nats, LARGEST_EXPONENT))


@folder.own_signals()
def train(config: PriorRun, mesh: Mesh, effort: Effort | None = None) -> dict[str, Any] | None:
    """Run to the last step and return the summary; None when the run was asked to stop, and saved itself.

    With `effort`, on rank 0, the log and the summary have the rate of operations.
    """
    with (
        products.precision(config.engine.matmul),
        loop.writer(Path(config.run.folder), mesh, config.run.keep) as writing,
    ):
        return _train(config, mesh, writing, effort)


def _train(config: PriorRun, mesh: Mesh, writing: Writer, effort: Effort | None) -> dict[str, Any] | None:
    run, place, batch_size = config.run, Path(config.run.folder), config.data.batch
    mine = batch_size // config.engine.accumulation // mesh.world.size

    # open
    stream, held_out = open_streams(config, mesh.world.rank, mesh.world.size)
    streams = [each for each in (stream, held_out) if each is not None]
    begin(streams, config, mesh)
    request = folder.StopRequest(place, mesh)

    # build
    prior = priors.build(config.prior, mesh, seed=derive(run.seed, "model"))
    frozen.freeze(config, prior)
    tables = set_aside(prior)
    if config.prior.head.wants_features and config.tokenizer is not None:
        take_features(prior, config.tokenizer, stream.tokenizer_fingerprint, mesh)
    if config.prior.wants_clusters and config.prior.clusters is not None:
        take_clusters(prior, config.prior.clusters)
    taken = first_weights.take(config, prior, mesh)
    engine = Engine(prior, loop.learned_rows(tables), config.engine, config.optim, mesh, run.steps)
    if run.compile:
        for part in [part for part in prior.modules() if isinstance(part, Block)]:
            part.compile()
    average = Average(engine, config.average)

    # resume: nothing is written before it is known that the run goes on
    cached = isinstance(config.data.train, TokensConfig)
    source = ("data.train.path", "cache") if cached else ("data.train.shards with tokenizer", "shards and tokenizer")
    done, notes = loop.resume(place, engine, tables, stream.fingerprint, mesh, [average], source)
    progress = Progress(run.steps, done.step, mesh.world.rank)
    if ended := loop.finished(place, done, run.steps, mesh, progress):
        return ended
    for each in streams:
        notes += check_labels(each, config.prior)
    notes += [*taken.lines, *frozen.frozen_line(config)]
    for note in [*folder.prepare(config, sys.argv, mesh), *notes]:
        progress.say(note)
    if taken.facts:
        folder.write_note(place, first_weights.NOTE, taken.facts, mesh)
    folder.write_note(place, "tokens.json", whose(stream, config), mesh)
    board = Board(place, mesh.world.rank, done.step)
    seen_Ik = None if held_out is None else seen(stream, mesh)

    # loop
    watch, recent, scores = Watch(effort), deque[str](maxlen=5), dict[str, float]()
    batches = timed(stream.batches(done.consumed))
    most_broken = getattr(config.data.train, "max_broken", 0)  # a cache has left them out
    trace = Trace(place, run.profile_steps, mesh)
    for step in range(done.step + 1, run.steps + 1):
        last, log = step == run.steps, step % run.log_every == 0 or step == run.steps
        loop.seed_step(run.seed, step, mesh)
        watch.begin(log)
        trace.begin()
        waited, broken, means = 0.0, 0, dict[str, Tensor]()
        for micro in range(config.engine.accumulation):
            batch, seconds = next(batches)
            waited, broken = waited + seconds, broken + len(batch.broken)
            recent.extend(batch.broken)
            ids = batch.ids.to(mesh.device, non_blocking=True)
            condition = prior.condition.of(batch).to(mesh.device, non_blocking=True)
            # What is random per image follows from its place in the batch of the step, however that is cut.
            places = torch.arange(mine, device=mesh.device) + (micro * mesh.world.size + mesh.world.rank) * mine
            keys = noise.keys(derive(run.seed, "condition"), step, places)
            modelled = engine(ids, condition, keys)
            engine.backward(modelled.loss)
            report = engine.step()
            if log:
                values = {"loss": modelled.loss} | loop.under("loss", modelled.parts) | modelled.stats
                loop.add_share(means, values, 1 / config.engine.accumulation)
        average.update(step)
        watch.end(waited)
        for note in trace.end():
            progress.say(note)
        progress.advance(batch_size, waited)

        stop, broken = loop.agree(mesh, request.here(), broken, writing)
        done = done.after(step, batch_size, broken)
        loop.check_broken(done.broken, recent, most_broken)
        if log:
            row = loop.mean_over_ranks(means, mesh)
            row |= {"perplexity": perplexity(row["loss/cross_entropy"]), "lr": report.lr}
            row |= {"grad_norm": report.grad_norm, "skipped": engine.skipped}
            row |= {"broken": done.broken} if most_broken else {}
            rates = progress.rates()
            rates["tokens_per_s"] = rates["images_per_s"] * config.prior.num_tokens
            board.scalars(step, row | loop.under("time", watch.logged(rates, mesh)))
            progress.show({name: row[name] for name in ("loss", "perplexity")})
        if held_out is not None and (last or step % run.eval_every == 0):
            with average.applied():
                scores = evaluate(engine, prior, held_out, mesh, 0 if last else run.eval_images, seen_Ik, run.seed)
            loop.tell_scores(step, scores, board, progress)
        if last or stop or step % run.checkpoint_every == 0:
            loop.save(writing, done, engine, tables, [average])
        if stop and not last:
            writing.wait()
            loop.tell_stop(step, request, progress)
            return loop.close(batches, trace, board, progress, None)

    # close
    writing.wait()
    request.clear()
    if held_out is not None and not scores:  # the last start ended between its last checkpoint and the summary
        with average.applied():
            scores = evaluate(engine, prior, held_out, mesh, 0, seen_Ik, run.seed)
    summary: dict[str, Any] = {"num_codes": prior.num_codes, **scores, **watch.summary(batch_size)}
    if "images_per_s" in summary:
        summary["tokens_per_s"] = summary["images_per_s"] * config.prior.num_tokens
    summary |= {
        "memory_mib": peak_mib(mesh),
        "steps": done.step,
        "processes": mesh.world.size,
        "prior": config.prior.name,
    }
    summary |= {"bound": True} if config.prior.bound else {}  # of loss, perplexity
    folder.write_summary(place, summary, mesh)
    return loop.close(batches, trace, board, progress, summary)
