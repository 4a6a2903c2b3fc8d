"""What a tokenizer in training does to held-out images: PSNR, SSIM, usage, perplexity, pictures. Collective, each image
once. The full look at a trained one, with FID and LPIPS, is metrics/held_out.py.
"""

from __future__ import annotations

from functools import partial

import torch

from vqscale.data.samples import SampleStream
from vqscale.engine.engine import Engine
from vqscale.metrics.held_out import Pass, first_images
from vqscale.nets.mode import evaluating
from vqscale.parallel.mesh import Mesh
from vqscale.show import pictures
from vqscale.show.board import Board
from vqscale.tokenizer.model import Tokenizer


@torch.no_grad()
def evaluate(
    engine: Engine, tokenizer: Tokenizer, stream: SampleStream, mesh: Mesh, *, most: int, board: Board, step: int
) -> dict[str, float]:
    """Scores over the stream, the same on every rank: psnr, ssim, images, usage, perplexity, dead (Pass.numbers).

    `most` images at most are looked at, 0 is all. Originals above reconstructions and the histogram of hits go to the
    board.
    """
    passed = Pass(tokenizer.quantizer, mesh)
    with evaluating(tokenizer):
        for number, batch in enumerate(stream.batches()):
            if most and number * stream.batch >= most:
                break
            images = batch.samples.to(mesh.device)
            recon, quantized = engine(images)
            passed.add(images, recon.float(), quantized.ids, batch.valid.to(mesh.device))
            if number == 0:
                shown = first_images(images, recon.float(), mesh)
                scale = pictures.scale(*images.shape[2:])
                board.images(step, "reconstructions", partial(pictures.grid, *shown, scale=scale))
    scores, per_code = passed.numbers(), passed.per_code()
    board.histogram(step, "val/hits_per_code", per_code)
    board.images(step, "usage", lambda: pictures.usage(per_code, f"step {step}", passed.num_codes))
    return scores
