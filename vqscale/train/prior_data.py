"""What a prior is trained on and measured on: the ids of a token cache, or of shards whose samples a frozen tokenizer
encodes as they come. Opened and checked here; how a run uses them is in prior.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import Tensor

from vqscale.data import samples
from vqscale.data.config import ShardsConfig
from vqscale.data.config_tokens import TokensConfig
from vqscale.data.tokens.stream import Cache, TokenBatch, TokenStream
from vqscale.metrics import unigram
from vqscale.parallel.mesh import Mesh
from vqscale.priors.config import PriorConfig
from vqscale.seed import derive
from vqscale.signals import check_reads
from vqscale.tokenizer import clusters, saved
from vqscale.tokenizer.matching import tokenizer_of
from vqscale.train import nulls
from vqscale.train.config.prior import PriorRun
from vqscale.train.encoded import EncodedStream

IdStream = TokenStream | EncodedStream


class HeldOut(Protocol):
    """Ids that an evaluation reads once: an IdStream, or what is in memory."""

    @property
    def batch(self) -> int: ...  # of all ranks together
    def batches(self) -> Iterator[TokenBatch]: ...


def open_streams(config: PriorRun, rank: int = 0, world: int = 1) -> tuple[IdStream, IdStream | None]:
    """(training ids, held-out ids or None). ValueError where they cannot be read or are not what the prior is for."""
    batch = config.data.batch // config.engine.accumulation
    place = (batch, rank, world)
    stream = _open(config.data.train, *place, seed=derive(config.run.seed, "data"))
    held_out = None if config.data.val is None else _open(config.data.val, *place, train=False)
    for each in [stream] if held_out is None else [stream, held_out]:
        if isinstance(each, TokenStream):
            expect(each.cache, None if each is stream else stream.tokenizer_fingerprint, config.prior)
        check_labels(each, config.prior)
    asked = config.prior
    if asked.wants_clusters and asked.clusters is not None:
        made_by = stream.tokenizer_fingerprint if isinstance(stream, TokenStream) else None
        clusters.check(asked.clusters, made_by, asked.num_codes, asked.num_clusters)
    return stream, held_out


def check(config: PriorRun) -> None:
    """All that can be wrong with the ids of a run, before there is a process group. ValueError."""
    open_streams(config)
    for shards in config.data.contexts.values():
        if shards is not None and config.tokenizer is not None:
            _expect_context(config.tokenizer, shards)
    if not isinstance(config.data.train, TokensConfig):
        _expect_tokenizer(config, nulls.of_tokenizer(config))


def _open(source: TokensConfig | ShardsConfig, batch: int, rank: int, world: int, **how: Any) -> IdStream:
    if isinstance(source, TokensConfig):
        if source.contexts is not None:
            samples.prepare(source.contexts)
        return TokenStream(source, batch, rank, world, **how)
    samples.prepare(source)
    return EncodedStream(source, batch, rank, world, **how)


def begin(streams: list[IdStream], config: PriorRun, mesh: Mesh) -> None:
    """Give those that encode the tokenizer of the run, and those that read contexts its signal; collective."""
    _begin_cached([each for each in streams if isinstance(each, TokenStream) and each.contexts], config, mesh)
    encoded = [each for each in streams if isinstance(each, EncodedStream)]
    if not encoded:
        return
    assert config.tokenizer is not None, "the config says that shards want one"
    tokenizer = tokenizer_of(config.tokenizer, None, mesh).requires_grad_(False)
    _expect_tokenizer(config, nulls.made_of(tokenizer.quantizer, tokenizer.net, encoded[0].config.sides))
    fingerprint = tokenizer.fingerprint
    for each in encoded:
        each.begin(tokenizer, fingerprint, mesh.device)


def _begin_cached(streams: list[TokenStream], config: PriorRun, mesh: Mesh) -> None:
    if not streams:
        return
    assert config.tokenizer is not None, "the config says that contexts want one"
    signal = tokenizer_of(config.tokenizer, streams[0].tokenizer_fingerprint, mesh).signal
    for each in streams:
        each.begin(lambda samples: signal.enter(samples)[1])


def _expect_context(path: str, config: ShardsConfig) -> None:
    """ValueError where the tokenizer in a folder has no context of samples of this medium."""
    found = saved.config_of(path)
    check_reads(found.signal, config)
    if not found.net.takes_context:
        raise ValueError(
            f"contexts of {', '.join(config.patterns)} are asked for, and the tokenizer in {path} encodes without one "
            f"(its signal is {found.signal.name}): give that of depth, color or panoptic, or prior.condition classes"
        )


def expect(cache: Cache, tokenizer: str | None, config: PriorConfig) -> None:
    """ValueError where a cache is none of what a prior models; a tokenizer (fingerprint) of None is not asked for."""
    there, here = cache.card.num_ids, config.num_ids
    if there != here:
        raise ValueError(
            f"a token has {there} ids in the cache in {cache.path}, and {here} in the prior (prior.num_ids): give the "
            f"prior prior.num_ids={there}"
            + (" and a head of several ids, prior.head.name=factorised or bits" if there > 1 else "")
        )
    cache.expect(tokenizer, config.num_codes, config.grid, here)


def _expect_tokenizer(config: PriorRun, there: nulls.Made) -> None:
    """ValueError where the tokenizer that is to encode makes other ids than the prior models, or gives no context."""
    prior = config.prior
    here = {"num_codes": prior.num_codes, "num_ids": prior.num_ids, "grid": list(prior.grid or ())}
    faults = [f"prior.{key}: {here[key]} -> {x}" for key, x in there.ids.items() if here[key] != x]
    if faults:
        raise ValueError(
            f"the tokenizer in {config.tokenizer} makes other ids of the samples of data.train than the prior models: "
            f"change {', '.join(faults)}, or leave these keys null to have them looked up"
        )
    if prior.condition.wants_context and not there.takes_context:
        raise ValueError(
            f"prior.condition is {prior.condition.name}, and the tokenizer in {config.tokenizer} encodes without a "
            "context (its net and signal know none): use a tokenizer of depth, color or panoptic, say, or "
            "prior.condition classes"
        )


def check_labels(stream: IdStream, config: PriorConfig) -> list[str]:
    """What there is to say of the labels of what is read, given to this prior. ValueError where they do not go
    together."""
    labels: NDArray[Any]
    if isinstance(stream, TokenStream):
        if config.condition.wants_context and stream.contexts is None:
            raise ValueError(
                f"prior.condition is {config.condition.name}, and the token cache in {stream.config.path} has ids "
                "and no contexts: give the shards that it was encoded from as `contexts` beside its path"
            )
        labels, path = stream.cache.labels, stream.config.path
    else:
        labels, path = stream.samples.index.samples.labels, stream.config.patterns[0]
    return config.condition.check_labels(labels, path, config.num_classes)


def seen(stream: IdStream, mesh: Mesh) -> Tensor:
    """counts_Ik: how often each code of this rank's rows occurs in training. Collective."""
    return stream.count(mesh) if isinstance(stream, EncodedStream) else unigram.count(stream, mesh)


def whose(stream: IdStream, config: PriorRun) -> dict[str, Any]:
    """What a prior was trained on, and the tokenizer of its ids, by fingerprint."""
    if isinstance(stream, EncodedStream):
        made_by = {"tokenizer": stream.tokenizer_fingerprint, "tokenizer_path": config.tokenizer}
        return made_by | {"tokens": stream.whose}
    card = stream.card
    facts = {"path": stream.config.path, "fingerprint": stream.fingerprint, "num_images": card.num_images}
    return {"tokenizer": card.tokenizer, "tokenizer_path": card.tokenizer_path, "tokens": facts}
