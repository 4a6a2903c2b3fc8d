"""`vqscale evaluate prior`: how likely held-out ids are to a trained prior."""

from __future__ import annotations

import argparse

from vqscale.data.config_tokens import TokensConfig
from vqscale.programs.commands.evaluate import asked


def told(args: argparse.Namespace) -> str:
    """The lines for a terminal, on rank 0 alone; writes the folder of --out. Collective."""
    from vqscale.data.tokens.stream import TokenStream
    from vqscale.metrics import unigram
    from vqscale.priors.base import Prior
    from vqscale.show import report
    from vqscale.train import prior, prior_data

    TokenStream(TokensConfig(args.cache), args.batch, train=False)  # refused before processes meet
    with asked.joined(args) as mesh:
        model, notes = Prior.load(args.path, mesh=mesh, weights=args.weights), list[str]()

        def stream(path: str, train: bool) -> TokenStream:
            world = mesh.world
            found = TokenStream(TokensConfig(path), args.batch * world.size, world.rank, world.size, train=train)
            prior_data.expect(found.cache, model.card.get("tokenizer"), model.config)
            notes.extend(prior_data.check_labels(found, model.config))
            return found

        held_out = stream(args.cache, train=False)
        seen_Ik = unigram.count(stream(args.training, train=True), mesh) if args.training else None
        progress = asked.progress(min(args.images or held_out.num_samples, held_out.num_samples), args, mesh)
        numbers = prior.evaluate(model, model, held_out, mesh, args.images, seen_Ik, seed=0, progress=progress)
        progress.close()
        fingerprint = model.fingerprint  # collective
    if mesh.world.rank:
        return ""
    if numbers["images"] < held_out.num_samples:
        notes.append(f"the first {numbers['images']:.0f} of {held_out.num_samples} images alone were looked at")
    if model.config.bound:
        notes.append(f"loss and perplexity are upper bounds: {model.config.bound}")
    of = {"path": args.path, "weights": args.weights, "sha256": fingerprint, "card": model.card}
    data = {"cache": args.cache, "fingerprint": held_out.fingerprint, "tokenizer": held_out.tokenizer_fingerprint}
    protocol = {
        "loss": "mean cross entropy of the ids of the first view, given the class, in nats; nothing is dropped",
        "accuracy": "share of ids that are the most probable, the lowest id among equals",
        "unigram": "with add-one frequencies of storage shards spread over the cache of --training",
    }
    said = {"bound": bool(model.config.bound), "notes": notes}
    result = {**asked.result(numbers, mesh, protocol, prior=of, data=data), **said}
    return report.tell(result, args.out, f"Prior {args.path}", {})
