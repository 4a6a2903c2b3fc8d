"""What a tokenizer in training does to held-out samples: the metrics of its signal (PSNR and SSIM of images), usage,
perplexity, pictures. Collective, each sample once. The full look at a trained one, with FID and LPIPS of images, is
programs/score.py.
"""

from __future__ import annotations

from functools import partial

import torch

from vqscale.data.samples import SampleStream
from vqscale.engine.engine import Engine
from vqscale.nets.mode import evaluating
from vqscale.parallel.mesh import Mesh
from vqscale.show import pictures
from vqscale.show.board import Board
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.held_out import Pass, first_ones


@torch.no_grad()
def evaluate(
    engine: Engine, tokenizer: Tokenizer, stream: SampleStream, mesh: Mesh, *, most: int, board: Board, step: int
) -> dict[str, float]:
    """Scores over the stream, the same on every rank: the signal's, usage, perplexity, dead (Pass.numbers).

    `most` samples at most are looked at, 0 is all. Originals above reconstructions and the histogram of hits go to the
    board.
    """
    signal = tokenizer.signal
    passed = Pass(signal, tokenizer.quantizer, mesh)
    with evaluating(tokenizer):
        for number, batch in enumerate(stream.batches()):
            if most and number * stream.batch >= most:
                break
            samples = batch.samples.to(mesh.device)
            output, quantized = engine(*signal.enter(samples))
            predicted = signal.predict(output)
            passed.add(samples, predicted, quantized.ids, batch.valid.to(mesh.device))
            if number == 0:
                board.images(step, "reconstructions", partial(signal.picture, *first_ones(samples, predicted, mesh)))
    scores, per_code = passed.numbers(), passed.per_code()
    board.histogram(step, "val/hits_per_code", per_code)
    board.images(step, "usage", lambda: pictures.usage(per_code, f"step {step}", passed.num_codes))
    return scores
