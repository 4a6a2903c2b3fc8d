"""`vqscale evaluate tokenizer`: reconstructions of held-out images, and the use of codes."""

from __future__ import annotations

import argparse

from vqscale.programs.commands.evaluate import asked, generability, networks


def told(args: argparse.Namespace) -> str:
    """The lines for a terminal, on rank 0 alone; writes the folder of --out. Collective."""
    asked.images(args)
    generability.prepare(args)
    import torch

    from vqscale.data.samples import SampleStream
    from vqscale.metrics import fid
    from vqscale.nets.inception import PREPROCESSING
    from vqscale.programs import score
    from vqscale.show import pictures, report
    from vqscale.tokenizer.model import Tokenizer

    with asked.joined(args) as mesh:
        measures = networks.measures(args, mesh)
        tokenizer = Tokenizer.load(args.path, mesh=mesh, weights=args.weights)
        config = asked.images(args, tokenizer.card)
        stream = SampleStream(config, args.batch * mesh.world.size, mesh.world.rank, mesh.world.size, train=False)
        for shape in config.shapes:
            tokenizer.grid(torch.empty(1, *shape, device="meta"))  # refuses sides
        given = generability.opened(args, tokenizer, stream, measures, mesh)
        progress = asked.progress(stream.num_samples, args, mesh)
        found = score.score(tokenizer, stream, mesh, measures, progress.advance, given.beside)
        progress.close()
        more, about = generability.told(args, tokenizer, given, found, measures, mesh)
        numbers = found.numbers | more
        if args.save:
            measured = {"numbers": report.finite(numbers), "data": asked.data(config, stream)}
            tokenizer.save(args.save, {"measured": measured})
        fingerprint = tokenizer.fingerprint  # collective
    if mesh.world.rank:
        return ""
    of = {"path": args.path, "weights": args.weights, "sha256": fingerprint, "card": tokenizer.card}
    protocol = {
        "reconstructions": "from ids"
        if tokenizer.quantizer.exact_decode
        else "through the quantizer: no id says its z",
        "psnr, ssim": "means over images, of 8-bit values; SSIM with a Gaussian window of 11 x 11, sigma 1.5",
        "usage": f"share of the {found.num_codes} codes that these images hit at least once",
        "ceiling": "usage of as many tokens if every code were as likely, 1 - exp(-tokens / codes)",
        "id_bits": "entropy of the ids of a token in bits, each id for itself",
        "lpips": {"values": "clamped, not rounded", "vgg": report.file(args.vgg), "heads": report.file(args.heads)}
        if args.vgg
        else None,
        **report.about_inception(measures.inception, PREPROCESSING),
        "reference": report.file(args.reference) if args.reference else "the originals",
        **about,
    }
    result = asked.result(numbers, mesh, protocol, tokenizer=of, data=asked.data(config, stream))
    result["notes"] = report.notes(numbers, measures.inception, found.broken)
    statistics = found.statistics.get("originals")
    if statistics is not None and args.save_stats:
        fid.save(
            args.save_stats,
            statistics[0],
            statistics[1],
            {**report.about_inception(measures.inception, PREPROCESSING)["inception"], **result["data"]},
        )
    shown = {
        "reconstructions below their originals": tokenizer.signal.picture(found.originals, found.predicted),
        "usage of codes": pictures.usage(found.per_code, num_codes=found.num_codes),
    }
    return report.tell(result, args.out, f"Tokenizer {args.path}", shown)
