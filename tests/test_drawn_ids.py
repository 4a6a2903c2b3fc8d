"""Ids that a prior has drawn: which image gives which of them, and how a decoder is trained on them."""

from __future__ import annotations

import shutil

import jobs
import numpy as np
import pytest
import test_sample
import token_caches
import torch
from torch.nn import functional as F

from vqscale import config as configuration
from vqscale.codes import noise
from vqscale.data.tokens.stream import Cache
from vqscale.engine.engine import Engine
from vqscale.errors import ExplainedError
from vqscale.parallel.mesh import Mesh
from vqscale.priors.config.autoregressive import AutoregressiveSampleConfig
from vqscale.programs.commands import train as command
from vqscale.programs.sampling.draw import sample
from vqscale.programs.sampling.request import SampleRequest
from vqscale.seed import derive
from vqscale.tokenizer.export import entries
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.adversarial import Discriminator
from vqscale.train.config import TokenizerRun
from vqscale.train.config.drawn_ids import DrawnIdsConfig
from vqscale.train.drawn_ids import DrawnIds

NUM, COUNT = 31, 6  # images of a cache, and ids of each
SHORT = ("run.eval_every=9", "run.checkpoint_every=2", "data.val=null", "average.decay=0.5")
ADVERSARIAL = "loss.adversarial={net: {name: patchgan, channels: 4, num_layers: 1, norm: sync}, weight: 0.3}"


class Rule(test_sample.Rule):
    """A prior of the ids of a tokenizer of jobs.py, of which every id is known."""

    def __init__(self, tokenizer, made_by=None):
        super().__init__(made_by or tokenizer.fingerprint)
        self.num_codes = tokenizer.quantizer.num_codes
        self.grid = tuple(tokenizer.encode(torch.zeros(1, 3, jobs.SIDE, jobs.SIDE)).shape[1:])

    def sample(self, condition_B, settings, *, numbers_B, seed):
        places = range(int(np.prod(self.grid)))
        rows = [[derive(seed, n, at) % self.num_codes for at in places] for n in numbers_B.tolist()]
        return torch.tensor(rows).view(-1, *self.grid)


def drawn_cache(folder, prior, tokenizer):
    """A cache of drawn ids, as `vqscale sample --ids` writes it."""
    request = SampleRequest(20, (0, 1, 2, 3, 4), AutoregressiveSampleConfig(), ids_only=True)
    assert sample(prior, tokenizer, folder, Mesh(), request).state == "sampled"
    return folder / "cache"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_shards):
    """A run of a tokenizer, and a cache of ids that a prior of it has drawn. Not to be changed."""
    folder = tmp_path_factory.mktemp("drawn")
    jobs.finish(jobs.write_config(folder / "first", tiny_shards, *SHORT, ADVERSARIAL, "run.steps=3"))
    tokenizer = Tokenizer.load(folder / "first" / "run")
    drawn_cache(folder / "samples", Rule(tokenizer), tokenizer)
    return folder


def _more(place, *others):
    """What makes a run one of its decoder on drawn ids."""
    found = (*SHORT, ADVERSARIAL, f"init.from={place / 'first' / 'run'}", "trained=[decoder]", "run.steps=4")
    cache = place / "samples" / "cache"
    return (*found, f"drawn={{from: {cache}, share: 0.25}}", "optim.schedule=constant", *others)


def _numbers(drawn, labels, images):
    """Of images on a process that has so many at a time the number in the cache, -1 where they keep their own ids."""
    found = []
    for first in range(0, len(labels), images):
        mine = torch.arange(first, first + images)
        ids = drawn.ids(labels[mine], noise.keys(7, mine)).flatten(1)
        found += [(1 << 18) // COUNT - 1 - int(row[0]) // COUNT if row[0] >= 0 else -1 for row in ids]
        own = drawn.own.tolist()
        assert [at for at, row in enumerate(ids) if (row == -1).all()] == own
    return found


def test_a_share_of_the_images_gives_drawn_ids_of_its_class_on_any_number_of_processes(tmp_path):
    card = token_caches.write(tmp_path, NUM, views=("drawn",), num_codes=(1 << 18) // COUNT * COUNT, prior="f00d")
    config, labels = DrawnIdsConfig(str(tmp_path), 0.25), torch.arange(400) % token_caches.LABELS
    alone = _numbers(DrawnIds(config, 400, torch.device("cpu")), labels, 400)
    assert alone == _numbers(DrawnIds(config, 4, torch.device("cpu")), labels, 4)
    assert [number >= 0 for number in alone] == [False, False, False, True] * 100
    there = Cache(tmp_path).labels
    assert all(there[number] == labels[at] for at, number in enumerate(alone) if number >= 0)
    assert len(set(alone)) > 0.9 * card.num_images
    others = _numbers(DrawnIds(config, 400, torch.device("cpu")), torch.full((400,), 77), 400)
    assert len({there[number] for number in others if number >= 0}) == token_caches.LABELS


def test_ids_that_were_damaged_are_met_at_the_start(tmp_path):
    token_caches.write(tmp_path, 5, views=("drawn",), prior="f00d")
    path = next((tmp_path / "ids").glob("c.0.*"))
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(ExplainedError, match=r"ids/c\.0\.\S+ was damaged after .* or draw it again .*: python tools"):
        DrawnIds(DrawnIdsConfig(str(tmp_path)), 8, torch.device("cpu"))


@pytest.mark.parametrize(("share", "images"), [(0.25, 6), (0.1, 4), (0.9, 5)])
def test_a_share_that_is_no_whole_number_of_images_is_refused(share, images):
    with pytest.raises(ValueError, match=f"has {images} images at a time .* of which that is {share * images:g}"):
        DrawnIdsConfig("x", share).count(images)


def test_the_gradient_is_that_of_images_alone_and_of_the_discriminator(place, tmp_path, tiny_shards, monkeypatch):
    seen, distances, step, forward = {}, Discriminator.distances, Engine.step, Tokenizer.forward

    def first_distances(self, *args):
        seen.setdefault("judge", {name: x.clone() for name, x in self.engine.module.state_dict().items()})
        seen["net"] = self.engine.module
        return distances(self, *args)

    def first_step(self):
        if isinstance(self.module, Tokenizer) and "gradients" not in seen:
            learns = self.module.named_parameters()
            seen["gradients"] = {name: x.grad.clone() for name, x in learns if x.grad is not None}
        return step(self)

    def first_forward(self, samples, context, keys_B, given):
        seen.setdefault("batch", (samples, given))
        return forward(self, samples, context, keys_B, given)

    monkeypatch.setattr(Discriminator, "distances", first_distances)
    monkeypatch.setattr(Engine, "step", first_step)
    monkeypatch.setattr(Tokenizer, "forward", first_forward)
    path = jobs.write_config(tmp_path, tiny_shards, *_more(place, "run.steps=1"))
    assert command.main([str(path)]) == 0

    samples, given = seen["batch"]
    twin, made, apart = Tokenizer.load(place / "first" / "run"), [], []
    for sample_, ids in zip(samples, given, strict=True):
        drawn = bool((ids >= 0).all())
        z_ND = twin.quantizer.decode((ids if drawn else twin.encode(sample_[None])[0]).flatten())
        made.append(twin.reconstruct(z_ND, (1, *ids.shape))[0])
        apart += [] if drawn else [(made[-1] - sample_).square().mean()]
    assert len(apart) == 6
    seen["net"].load_state_dict(seen["judge"])
    (answer,) = seen["net"](torch.stack(made))
    loss = torch.stack(apart).mean() + 0.3 * F.softplus(-answer.values.flatten(1).mean(1)).mean()
    names = [name for name, x in twin.named_parameters() if name in seen["gradients"]]
    assert all(name.startswith(("decoder", "post_quant")) for name in names)
    wanted = torch.autograd.grad(loss, [twin.get_parameter(name) for name in names])
    for name, x in zip(names, wanted, strict=True):
        assert torch.allclose(seen["gradients"][name], x, atol=1e-6, rtol=1e-4), name


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_on_drawn_ids_goes_on_as_one_that_was_not_stopped_on_any_number_of_processes(
    place, tmp_path, tiny_shards
):
    paths = {name: jobs.write_config(tmp_path / name, tiny_shards, *_more(place)) for name in ("whole", "cut", "two")}
    whole = jobs.finish(paths["whole"])
    jobs.finish(paths["cut"], "run.steps=2")
    jobs.same_bits(whole, jobs.finish(paths["cut"]), 4)
    jobs.finish(paths["two"], "run.steps=2", world=2)
    jobs.same_numbers(whole, jobs.finish(paths["two"]))
    first, last = (entries(Tokenizer.load(folder)) for folder in (place / "first" / "run", tmp_path / "two" / "run"))
    for name, entry in first.items():
        assert torch.equal(entry.tensor, last[name].tensor) == name.startswith(("encoder", "quant")), name

    other = shutil.copytree(place / "samples" / "cache", tmp_path / "moved")
    assert command.main([str(paths["cut"]), "run.steps=5", f"drawn.from={other}"]) == 0
    tokenizer = Tokenizer.load(place / "first" / "run")
    prior = Rule(tokenizer)
    prior.fingerprint = "beef"
    other = drawn_cache(tmp_path / "other", prior, tokenizer)
    assert command.main([str(paths["cut"]), "run.steps=6", f"drawn.from={other}"]) == 2


def test_ids_that_are_none_of_a_prior_of_the_tokenizer_are_refused(place, tmp_path, tiny_shards, capfd):
    tokenizer = Tokenizer.load(place / "first" / "run")
    tokenizer.card["ids_of"] = ["abc"]
    made = {
        "models those of the tokenizer abc": drawn_cache(tmp_path / "strange", Rule(tokenizer, "abc"), tokenizer),
        "a cache of ids of images": tmp_path / "encoded",
        "positions along the sides": tmp_path / "sides",
        "no token cache": tmp_path / "nothing",
    }
    sized = {"views": ("drawn",), "num_codes": tokenizer.quantizer.num_codes}
    token_caches.write(tmp_path / "encoded", 1, grid=Rule(tokenizer).grid, **sized)
    token_caches.write(tmp_path / "sides", 5, prior="f00d", **sized)
    for number, (text, cache) in enumerate(made.items()):
        path = jobs.write_config(tmp_path / str(number), tiny_shards, *_more(place, f"drawn.from={cache}"))
        assert command.main([str(path)]) == 2
        assert text in capfd.readouterr().err
        assert not (tmp_path / str(number) / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["trained=null"], r"use trained: \[decoder\]"),
        (["loss.adversarial=null"], "a discriminator alone can say"),
        (["loss.adversarial.feature_weight=1.0"], "use 0"),
        (["drawn.share=1.0"], "less than 1"),
        (["drawn.from=''"], "names no cache"),
    ],
)
def test_drawn_ids_that_teach_nothing_are_refused_with_the_config(place, tmp_path, tiny_shards, changes, text):
    with pytest.raises(configuration.ConfigError, match=text):
        configuration.load(TokenizerRun, jobs.write_config(tmp_path, tiny_shards, *_more(place)), changes)
