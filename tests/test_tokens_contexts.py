"""Contexts of the images of a token cache, read again from the shards that it was encoded from."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import dense_files
import dense_runs
import jobs
import pytest
import torch

from vqscale import config as configuration
from vqscale.data.config import ImagesConfig
from vqscale.data.config_dense import PanopticConfig
from vqscale.data.config_tokens import TokensConfig
from vqscale.data.samples import SampleStream
from vqscale.data.tokens.stream import TokenStream
from vqscale.data.views import Source
from vqscale.errors import ExplainedError
from vqscale.parallel.mesh import Mesh
from vqscale.programs import encode
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.config import Run


def shards_of(folder, **changed):
    given = {"shards": str(folder / "train-{0..1}.tar"), "image_size": jobs.SIDE, "num_workers": 0}
    return ImagesConfig(**given | {"index_dir": str(folder / "index")} | changed)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_shards):
    """(tokenizer of colours, cache of the training shards by it, with mirrored views)."""
    asked = {"signal": {"name": "color"}, "net": dense_runs.VIT, "latent_norm": "none"}
    asked |= {"quantizer": {"name": "fsq", "levels": [3, 3, 3]}}
    tokenizer = Tokenizer.from_config(configuration.parse(TokenizerConfig, asked), seed=1).eval()
    folder = tmp_path_factory.mktemp("cache") / "cache"
    source = Source(shards_of(tiny_shards), "flip")
    encode.encode(tokenizer, source, folder, Mesh(), encode.Options(storage=8))
    return tokenizer, folder


@pytest.mark.parametrize(("train", "world"), [(True, 1), (True, 2), (False, 2)])
def test_the_context_of_an_image_is_that_which_its_ids_were_encoded_with(made, tiny_shards, train, world):
    tokenizer, folder = made
    config = TokensConfig(str(folder), contexts=shards_of(tiny_shards))
    views = next(Source(shards_of(tiny_shards), "flip").batches([list(range(jobs.NUM_TRAIN))])).samples
    seen, mirrored = [], 0
    for rank in range(world):
        stream = TokenStream(config, 10, rank, world, seed=1, train=train)
        stream.begin(lambda samples: tokenizer.signal.enter(samples)[1])
        for batch, _ in zip(stream.batches(), range(4), strict=False):
            there = batch.valid
            pictures = views[batch.numbers[there], batch.views[there]]
            entered, context = tokenizer.signal.enter(pictures)
            assert torch.equal(batch.context[there], context)
            assert torch.equal(batch.ids[there], tokenizer.encode(entered, context))
            seen += batch.numbers[there].tolist()
            mirrored += int(batch.views.sum())
    assert len(set(seen)) > jobs.NUM_TRAIN // 2
    assert (mirrored > 0) == train


def test_shards_that_the_cache_is_not_of_are_refused(made, tiny_shards, tmp_path):
    folder = str(made[1])
    with pytest.raises(ValueError, match=r"image_size: 16 there, 8 now; short_side: 16 there, 8 now"):
        TokenStream(TokensConfig(folder, contexts=shards_of(tiny_shards, image_size=8)), 4)
    others = shards_of(tiny_shards, shards=str(tiny_shards / "val.tar"))
    with pytest.raises(ValueError, match=rf"num_images: {jobs.NUM_TRAIN} there, {jobs.NUM_VAL} now; source: "):
        TokenStream(TokensConfig(folder, contexts=others), 4)
    for number in range(2):
        (tmp_path / f"train-{number}.tar").write_bytes((tiny_shards / f"train-{number}.tar").read_bytes())
    stream = TokenStream(TokensConfig(folder, contexts=shards_of(tmp_path)), 4, train=False)
    stream.begin(lambda samples: samples)
    first = int(stream.contexts.source.index.samples.offsets[0, 0])
    with open(tmp_path / "train-0.tar", "r+b") as file:
        file.seek(first)
        file.write(b"no picture")
    with pytest.raises(ExplainedError, match="was encoded and cannot be read any more"):
        next(stream.batches())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("tokenizer=null",), "tokenizer is None, and the prior takes vectors of its codes or contexts"),
        (("data.train.contexts=null",), "prior.condition is context, and a token cache has ids and no contexts"),
        (("prior.condition={name: classes}", "tokenizer=null"), "classes, which looks at no context: use contexts"),
    ],
)
def test_what_does_not_go_with_contexts_is_said(made, tiny_shards, tmp_path, overrides, said):
    contexts = f"{{shards: '{tiny_shards}/train-{{0..1}}.tar', image_size: {jobs.SIDE}}}"
    cached = (f"data.train={{path: {made[1]}, contexts: {contexts}}}", "data.val=null")
    path = dense_runs.prior(tmp_path, tiny_shards, Path("runs/x"), *cached)
    with pytest.raises(configuration.ConfigError, match=said):
        configuration.load(Run, path, list(overrides))


def test_labels_are_encoded_as_they_are_in_training(tmp_path, capsys):
    """The command: what is not asked for is as in the tokenizer's card and in what stands beside the shards."""
    asked = {"signal": {"name": "panoptic", "num_things": 2, "num_stuff": 2, "num_instances": 8}}
    asked |= {"net": dense_runs.VIT | {"labels": [5, 8]}, "quantizer": {"name": "fsq", "levels": [3, 3, 3]}}
    tokenizer = Tokenizer.from_config(configuration.parse(TokenizerConfig, asked | {"latent_norm": "none"}), seed=1)
    tokenizer.card = {"image_size": jobs.SIDE, "interpolation": "sampled"}
    saved, shards = tokenizer.eval().save(tmp_path / "saved"), dense_files.panoptic_shard(tmp_path / "a.tar", 5)
    (tmp_path / "_info.json").write_text(json.dumps({"categories": dense_files.CATEGORIES}))
    main = importlib.import_module("vqscale.programs.commands.encode").main
    words = [str(saved), str(tmp_path / "cache"), "--shards", shards, "--medium", "panoptic", "--workers", "0"]
    words += ["--device", "cpu", "--index-dir", str(tmp_path)]
    assert main([*words, "--views", "flip"]) == 0
    medium = PanopticConfig(shards, image_size=jobs.SIDE, num_workers=0, index_dir=str(tmp_path))
    stream = TokenStream(TokensConfig(str(tmp_path / "cache"), contexts=medium), 5, train=False)
    stream.begin(lambda samples: samples)
    (batch,) = stream.batches()
    (read,) = SampleStream(medium, 5, train=False).batches()
    assert torch.equal(batch.context, read.samples)
    assert torch.equal(batch.ids, Tokenizer.load(saved).encode(*tokenizer.signal.enter(read.samples)))
    assert main([*words, "--views", "ten_crop", "--resize", "20"]) == 2
    told = capsys.readouterr().err
    assert "--resize is not about images with segments: leave it out with --medium panoptic" in told
    assert "use center or flip" in told
