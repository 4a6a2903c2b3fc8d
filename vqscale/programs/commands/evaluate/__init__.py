"""Measure a tokenizer or a prior on held-out images, or generated images against a reference; plain or by torchrun.

    torchrun --nproc_per_node=8 -m vqscale evaluate tokenizer RUN --shards 'val-{00..49}.tar' --inception FILE.pth
    vqscale evaluate statistics OUT.npz --shards 'train-{000..999}.tar' --inception FILE.pth
    vqscale evaluate samples SAMPLES.npz --reference VIRTUAL_imagenet256_labeled.npz --inception FILE.pth
    torchrun --nproc_per_node=8 -m vqscale evaluate prior PRIOR --cache caches/imagenet-val
    vqscale evaluate dense RUN --out runs/depth-measured
    torchrun --nproc_per_node=8 -m vqscale evaluate sounds RUN --shards 'test-{00..03}.tar' --out results/speech

tokenizer    PSNR, SSIM, usage, perplexity; rFID with --inception, LPIPS with --vgg and --heads; how well a prior will
             do with its ids, before there is one: --swaps, --training, --agreement; which codes
             a gradient reaches: --reach
statistics   mean and covariance of Inception's features, and the features of some images: a --reference
samples      FID, sFID, Inception score, precision and recall of an npz with uint8 images (ADM's layout); of drawn
             shapes, with --classifier, how many are recognised as their class, which needs no download
prior        nats, perplexity and accuracy of held-out ids, the first view of every image of a token cache
dense        depth, color, panoptic: metrics with all codes, a part, none, another image's, and of a constant
sounds       whole recordings: distances of spectra, SI-SDR, measures of speech, bits per second, a page to listen to;
             of drawn sounds, with --classifier, how many are recognised by their reconstruction

Nothing is downloaded: --inception takes pt_inception-2015-12-05-6726825d.pth. Numbers by other weights get other names.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vqscale.run import processes


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the numbers are there, 1 failed on the way, 2 the user's input."""
    return processes.status_of(lambda: _evaluate(arguments(sys.argv[1:] if argv is None else argv)))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked as far as no file is needed; ValueError for options that do not go together."""
    from vqscale.programs.commands.evaluate import options

    args = options.parser(__doc__).parse_args(given)
    options.check(args)
    return args


def _evaluate(args: argparse.Namespace) -> int:
    from vqscale.programs.commands.evaluate import dense, prior, samples, sounds, statistics, tokenizer

    commands = {
        "tokenizer": tokenizer.told,
        "statistics": statistics.told,
        "samples": samples.told,
        "prior": prior.told,
        "dense": dense.told,
        "sounds": sounds.told,
    }
    told = commands[args.command](args)
    if told:
        print(told)
    return 0
