"""Train a tokenizer: open, build, resume, loop, close.

Every rank runs these lines with its own samples: what they are, and what is asked of their reconstructions, the signal
says. The board and the progress bar are silent on all ranks but one, so nothing here asks which rank it is.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqscale import signals
from vqscale.codes import noise, products
from vqscale.codes.rows import set_aside
from vqscale.data.samples import SampleStream
from vqscale.disk.writer import Writer
from vqscale.engine.average import Average
from vqscale.engine.engine import Engine
from vqscale.nets.config import grid
from vqscale.parallel.clock import timed
from vqscale.parallel.mesh import Mesh
from vqscale.run import folder
from vqscale.run.profile import Trace
from vqscale.seed import derive
from vqscale.show.board import Board
from vqscale.show.progress import Progress
from vqscale.tokenizer.model import Tokenizer
from vqscale.train import first_weights, frozen, loop, swapped
from vqscale.train.adversarial import Discriminator
from vqscale.train.alignment import Alignment
from vqscale.train.compiled import compile_run
from vqscale.train.config import TokenizerRun
from vqscale.train.drawn_ids import DrawnIds
from vqscale.train.evaluate import evaluate
from vqscale.train.watch import Effort, Watch, peak_mib


def open_streams(config: TokenizerRun, mesh: Mesh) -> tuple[SampleStream, SampleStream | None]:
    """(training images, held-out images or None): what is wrong with the shards is said before a model is built."""
    cut = config.engine.accumulation
    batch = config.data.batch // cut
    place = (mesh.world.rank, mesh.world.size)
    stream = SampleStream(config.data.train, batch, *place, seed=derive(config.run.seed, "data"), accumulation=cut)
    return stream, None if config.data.val is None else SampleStream(config.data.val, batch, *place, train=False)


@folder.own_signals()
def train(config: TokenizerRun, mesh: Mesh, effort: Effort | None = None) -> dict[str, Any] | None:
    """Run to the last step and return the summary; None when the run was asked to stop, and saved itself.

    With `effort`, on rank 0, the log and the summary have the rate of operations.
    """
    with (
        products.precision(config.engine.matmul),
        loop.writer(Path(config.run.folder), mesh, config.run.keep) as writing,
    ):
        return _train(config, mesh, writing, effort)


def _train(config: TokenizerRun, mesh: Mesh, writing: Writer, effort: Effort | None) -> dict[str, Any] | None:
    run, place = config.run, Path(config.run.folder)
    mine = config.data.batch // config.engine.accumulation // mesh.world.size

    # open
    signal = signals.build(config.tokenizer.signal)
    distances = signal.distances(config.loss, mesh)
    stream, held_out = open_streams(config, mesh)
    request = folder.StopRequest(place, mesh)

    # build
    tokenizer = Tokenizer.from_config(config.tokenizer, mesh, run.seed)
    taken = first_weights.take(config, tokenizer, mesh)
    frozen.freeze(config, tokenizer)
    tables = set_aside(tokenizer)
    quantizer = tokenizer.quantizer
    quantizer.begin()
    if config.swaps is not None:
        tokenizer.inputs = swapped.inputs(tokenizer, config.swaps, mesh)
    drawn = None if config.drawn is None else DrawnIds(config.drawn, mine, mesh.device)
    if drawn is not None and taken.facts:
        drawn.expect(taken.facts["ids_of"])
    last_weight = tokenizer.last_weight
    engine = Engine(tokenizer, loop.learned_rows(tables), config.engine, config.optim, mesh, run.steps)
    captured = compile_run(config, tokenizer, mesh) if run.compile else []
    average = Average(engine, config.average)
    adversarial = config.loss.adversarial
    discriminator = None if adversarial is None else Discriminator(adversarial, config, mesh, taken.source)
    alignment = None
    if config.loss.alignment is not None:
        alignment = Alignment(config.loss.alignment, config, quantizer.dim, mesh)
    kept: list[loop.Kept] = [average, *(one for one in (discriminator, alignment) if one is not None)]

    # resume: nothing is written before it is known that the run goes on
    data, source = stream.fingerprint, ("data.train.shards", "shards")
    if drawn is not None:
        data, source = drawn.fingerprint(data), ("data.train.shards with drawn.from", "shards and ids")
    done, notes = loop.resume(place, engine, tables, data, mesh, kept, source)
    progress = Progress(run.steps, done.step, mesh.world.rank)
    if ended := loop.finished(place, done, run.steps, mesh, progress):
        return ended
    tokens = (
        config.data.batch // config.engine.accumulation * math.prod(grid(config.tokenizer.net, config.data.train.sides))
    )
    notes += [*taken.lines, *frozen.frozen_line(config), *captured, *quantizer.forecast(run.steps, tokens)]
    for note in [*folder.prepare(config, sys.argv, mesh), *notes]:
        progress.say(note)
    if taken.facts:
        folder.write_note(place, first_weights.NOTE, taken.facts, mesh)
    board = Board(place, mesh.world.rank, done.step)

    # loop
    watch, recent, scores = Watch(effort), deque[str](maxlen=5), dict[str, float]()
    batches = timed(stream.batches(done.consumed))
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
            samples = batch.samples.to(mesh.device, non_blocking=True)
            original, *context = signal.enter(samples)
            # What is random per sample follows from its place in the batch of the step, however that is cut.
            places = torch.arange(mine) + (micro * mesh.world.size + mesh.world.rank) * mine
            keys = noise.keys(derive(run.seed, "codes dropped"), step, places)
            given = None if drawn is None else drawn.ids(batch.labels, keys)
            keys = keys.to(mesh.device, non_blocking=True)
            recon, quantized = engine(original, context[0] if context else None, keys, given)
            active = discriminator if discriminator is not None and discriminator.trains(step) else None
            its_values = dict[str, Tensor]()

            # the discriminator, where it steps first
            if active is not None and active.config.first == "discriminator":
                its_values = active.learn(original, recon)

            # the tokenizer
            own = slice(None) if drawn is None else drawn.own  # of drawn ids there is no image
            found = distances(recon[own], samples[own], engine.autocast)
            parts = {name: distance.value for name, distance in found.items()}
            loss = torch.stack([distance.weight * distance.value for distance in found.values()]).sum()
            if alignment is not None:
                parts["alignment"] = alignment.distance(original, quantized.z)
                loss = loss + alignment.config.weight * parts["alignment"]
            if active is not None:
                theirs, weights, numbers = active.distances(original, recon, loss, last_weight, log)
                loss = loss + torch.stack([weights[name] * value for name, value in theirs.items()]).sum()
                parts, its_values = {**parts, **theirs}, its_values | numbers
            loss = loss + config.loss.quantizer_weight * sum(quantized.losses.values())
            engine.backward(loss)
            report = engine.step()

            # the discriminator, where it steps second
            if active is not None and active.config.first == "tokenizer":
                its_values |= active.learn(original, recon)

            if log:
                values = {"loss": loss, **loop.under("loss", {**parts, **quantized.losses})}
                values |= loop.under("codes", quantized.stats) | loop.under("discriminator", its_values)
                loop.add_share(means, values, 1 / config.engine.accumulation)
        for parameter, rows in quantizer.update(report.stepped):
            engine.forget(parameter, rows)
            average.forget(parameter, rows)
        average.update(step)
        watch.end(waited)
        for note in trace.end():
            progress.say(note)
        progress.advance(config.data.batch, waited)

        stop, broken = loop.agree(mesh, request.here(), broken, writing)
        done = done.after(step, config.data.batch, broken)
        loop.check_broken(done.broken, recent, config.data.train.max_broken)
        fitted = loop.tell_fits(step, quantizer.fits(), progress)
        if log:
            row = loop.mean_over_ranks(means, mesh)
            row |= {"lr": report.lr, "grad_norm": report.grad_norm, "skipped": engine.skipped, "broken": done.broken}
            if discriminator is not None:
                row |= loop.under("discriminator", discriminator.numbers())
                for note in discriminator.takeover.notes(step, row):
                    progress.say(note)
            board.scalars(step, row | fitted | loop.under("time", watch.logged(progress.rates(), mesh)))
            progress.show({name.rpartition("/")[2]: row[name] for name in SHOWN if name in row})
        elif fitted:
            board.scalars(step, fitted)
        if held_out is not None and (last or step % run.eval_every == 0):
            most = 0 if last else run.eval_images
            with average.applied():
                scores = evaluate(engine, tokenizer, held_out, mesh, most=most, board=board, step=step)
            loop.tell_scores(step, scores, board, progress)
        if last or stop or step % run.checkpoint_every == 0:
            loop.save(writing, done, engine, tables, kept)
        if stop and not last:
            writing.wait()
            loop.tell_stop(step, request, progress)
            return loop.close(batches, trace, board, progress, None)

    # close
    writing.wait()
    request.clear()
    if held_out is not None and not scores:  # the last start ended between its last checkpoint and the summary
        with average.applied():
            scores = evaluate(engine, tokenizer, held_out, mesh, most=0, board=board, step=done.step)
    summary: dict[str, Any] = {"num_codes": quantizer.num_codes, **scores, **watch.summary(config.data.batch)}
    summary |= dict(zip(("codes_begin", "codes_landed"), quantizer.beginning, strict=True))
    summary |= {
        "memory_mib": peak_mib(mesh),
        "steps": done.step,
        "processes": mesh.world.size,
        "quantizer": config.tokenizer.quantizer.name,
    }
    folder.write_summary(place, summary, mesh)
    return loop.close(batches, trace, board, progress, summary)


SHOWN = ("loss", "codes/usage", "codes/perplexity")
