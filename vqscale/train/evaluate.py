"""What a tokenizer does to held-out images: PSNR, SSIM, usage, perplexity, pictures. Collective, each image once."""

from __future__ import annotations

import torch
from torch import Tensor

from vqscale.codes.hits import Hits
from vqscale.data.images import Stream
from vqscale.metrics import pictures
from vqscale.metrics.board import Board
from vqscale.metrics.reconstruction import Reconstruction
from vqscale.parallel import ops
from vqscale.parallel.engine import Engine
from vqscale.parallel.mesh import Mesh
from vqscale.tokenizer import Tokenizer

PICTURES = 16
LEAST_SIDE = 128  # smaller images are shown enlarged


@torch.no_grad()
def evaluate(
    engine: Engine, tokenizer: Tokenizer, stream: Stream, mesh: Mesh, *, most: int, board: Board, step: int
) -> dict[str, float]:
    """Scores over the stream, the same on every rank: psnr, ssim, images, usage, perplexity, dead.

    usage is the share of codes that any of these images uses; with several ids per token, usage, perplexity and dead
    are means over their columns. `most` images at most are looked at, 0 is all. Originals
    above reconstructions and the histogram of hits go to the board.
    """
    columns = [Hits(tokenizer.quantizer.num_codes, mesh) for _ in range(tokenizer.quantizer.num_ids)]
    scores = Reconstruction(mesh.device)
    training = tokenizer.training
    tokenizer.eval()
    for number, batch in enumerate(stream.batches()):
        if most and number * stream.batch >= most:
            break
        images = batch.images.to(mesh.device)
        recon, quantized = engine(images)
        valid = batch.valid.to(mesh.device)
        scores.add(images, recon.float(), valid)
        # Padding counts for no code.
        per_image = quantized.ids_N.view(len(images), -1, len(columns))
        for column, hits in enumerate(columns):
            hits.add(torch.where(valid[:, None], per_image[:, :, column], -1).flatten())
        if number == 0:
            _show(images, recon.float(), mesh, board, step)
    tokenizer.train(training)
    found = Reconstruction.from_sums(ops.sum_over(scores.sums(), mesh.world))
    used = [hits.usage() for hits in columns]
    per_code = torch.cat([hits.per_code() for hits in columns])
    board.histogram(step, "val/hits_per_code", per_code)
    num_codes = sum(hits.num_codes for hits in columns)
    board.images(step, "usage", lambda: pictures.usage(per_code, f"step {step}", num_codes))
    return found | {name: sum(float(column[name]) for column in used) / len(used) for name in used[0]}


def _show(images: Tensor, recon: Tensor, mesh: Mesh, board: Board, step: int) -> None:
    """The first images of all ranks, in the global order, above their reconstructions."""
    both = torch.stack([images[:PICTURES], recon[:PICTURES]], dim=1).contiguous()
    both = ops.gather(both, mesh.world)[:PICTURES].cpu()
    scale = max(1, LEAST_SIDE // images.shape[-1])
    board.images(step, "reconstructions", lambda: pictures.grid(both[:, 0], both[:, 1], scale=scale))
