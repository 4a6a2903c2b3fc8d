"""How well a prior will do with ids, before there is one: each number against its slow form, and the command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import quantizer_cases
import saved_runs
import torch
from slow_metrics import Small, slow_frechet

from tests.lib import shown
from vqscale.codes import noise
from vqscale.codes.swaps import Swaps
from vqscale.data.config import ImagesConfig
from vqscale.data.samples import SampleStream
from vqscale.metrics.reconstruction import to_bytes
from vqscale.parallel.mesh import Mesh
from vqscale.programs import generability, score
from vqscale.programs.commands import classifier, evaluate
from vqscale.tokenizer.model import Tokenizer
from vqscale.train import probe

SIDE, K, SHARES = 16, 13, (0.3, 0.8)
SMALL = generability.Features("distance", 6, lambda images: Small()(images)[0])


def _stream(shards, mesh=None, batch=4):
    config, world = ImagesConfig(str(shards / "val.tar"), image_size=SIDE, num_workers=0), (mesh or Mesh()).world
    return SampleStream(config, batch, world.rank, world.size, train=False)


def _looked(data, codes, shards, batch):
    mesh = Mesh(data, codes)
    tokenizer, stream = saved_runs.small(mesh), _stream(shards, mesh, batch)
    swaps = generability.UnderSwaps(tokenizer, mesh, SHARES, 3, [SMALL])
    moved, codes = generability.Moved(tokenizer, mesh), score.Codes(stream.num_samples, mesh)
    score.score(tokenizer, stream, mesh, beside=[swaps, moved, codes])
    assert all(torch.equal(*pair) for pair in zip(codes.all(), score.codes(tokenizer, stream, mesh), strict=True))
    return swaps.numbers({}) | moved.numbers(), codes.all()


def _edged(image, down, right):
    """With numpy's padding."""
    moved = np.pad(image.numpy(), ((0, 0), (down, 0), (right, 0)), mode="edge")
    return torch.from_numpy(moved[:, :SIDE, :SIDE])[None]


def _share(pairs):
    """Of ids that differ."""
    return float(torch.cat([(a != b).flatten() for a, b in pairs]).double().mean())


def _slowly(shards):
    """Image by image."""
    tokenizer, batches = saved_runs.small(), list(_stream(shards, batch=1).batches())
    images = [batch.samples for batch in batches]
    ids = [tokenizer.encode(image) for image in images]
    swaps = {"near": Swaps.among_neighbours(tokenizer.quantizer.decode, K, 3, Mesh()), "any": Swaps(K)}

    def features(some):
        return np.concatenate([Small()(to_bytes(image))[0].numpy() for image in some])

    def decoded(some):
        return [tokenizer.decode(one).clamp(-1, 1) for one in some]

    found = {"distance": slow_frechet(features(decoded(ids)), features(images))}
    for kind, swap in swaps.items():
        for share in SHARES:
            keys = [noise.keys(0, batch.numbers) for batch in batches]
            others = [swap(one.flatten(1), key, share).view_as(one) for one, key in zip(ids, keys, strict=True)]
            recon = decoded(others)
            errors = [((to_bytes(a).double() - to_bytes(b)) ** 2).mean() for a, b in zip(images, recon, strict=True)]
            found[f"psnr_{kind}_{share}"] = float(np.mean([20 * math.log10(255) - 10 * math.log10(e) for e in errors]))
            found[f"distance_{kind}_{share}"] = slow_frechet(features(recon), features(images))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = [tokenizer.encode(image) for image in images]
    pixel, token = ([tokenizer.encode(_edged(image[0], by, by)) for image in images] for by in (1, 2))
    pairs = {
        "bf16": [(a, b) for a, b in zip(ids, rounded, strict=True)],
        "pixel": [(a[:, 1:, 1:], b[:, 1:, 1:]) for a, b in zip(ids, pixel, strict=True)],
        "token": [(a[:, :-1, :-1], b[:, 1:, 1:]) for a, b in zip(ids, token, strict=True)],
    }
    for name, some in pairs.items():
        found[f"moved_{name}"] = _share(some)
    found["token where it was"] = _share([(a[:, 1:, 1:], b[:, 1:, 1:]) for a, b in zip(ids, token, strict=True)])
    return found, torch.cat(ids)


@pytest.mark.dist
def test_swaps_distances_and_moved_ids_are_their_slow_forms_on_one_and_two_processes(ranks, tiny_shards):
    expected, ids = _slowly(tiny_shards)
    assert 0 < expected["moved_bf16"] < 0.2 < expected["moved_pixel"]
    assert 0 < expected["moved_token"] < expected.pop("token where it was")
    for one in [_looked(1, 1, tiny_shards, 4), *ranks(2, _looked, 2, 1, tiny_shards, 6)]:
        found, (seen, is_there) = one
        assert is_there.all()
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-5)
        assert torch.equal(seen, ids)
    first, is_there = score.codes(saved_runs.small(), _stream(tiny_shards, batch=2), Mesh(), most=3)
    assert torch.equal(first, ids[:3])
    assert is_there.shape == (3,)


def test_known_statistics_are_compared_with_and_no_image_is_looked_at(tiny_shards):
    images = torch.cat([batch.samples[batch.valid] for batch in _stream(tiny_shards).batches()])
    moments = generability.Moments(6)
    moments.add(Small()(to_bytes(images))[0])
    seen = []

    def of(images):
        seen.append(len(images))
        return Small()(images)[0]

    real, found = {"distance": moments.statistics(Mesh().world)}, []
    for network in (generability.Features("distance", 6, of, known=True), SMALL):
        swaps = generability.UnderSwaps(saved_runs.small(), Mesh(), SHARES, 3, [network])
        score.score(saved_runs.small(), _stream(tiny_shards), Mesh(), beside=[swaps])
        found.append(swaps.numbers(real if network.known else {}))
    found, expected = found
    assert expected.pop("distance") > 0
    assert found == pytest.approx(expected)
    assert sum(seen) == 4 * len(images)


def test_images_are_encoded_once_whatever_is_asked_for(tiny_shards, monkeypatch):
    tokenizer, stream, encoded = saved_runs.small(), _stream(tiny_shards), []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, *given: encoded.append(len(given[0])) or encode(self, *given))
    beside = [generability.UnderSwaps(tokenizer, Mesh(), SHARES, 3, [SMALL]), score.Codes(stream.num_samples, Mesh())]
    score.score(tokenizer, stream, Mesh(), beside=beside)
    assert sum(encoded) == -(-stream.num_samples // 4) * 4


TOKENS = 4, 4


def _ids(seed, count, kind):
    """`alone`: each id one of 8 of the codes, for itself; `alike`: all ids of an image are one such code."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(8, (count, *(TOKENS if kind == "alone" else (1, 1))), generator=generator)
    return drawn.expand(count, *TOKENS).contiguous()


def _entropies(data, codes, kind, steps=40):
    mesh = Mesh(data, codes)
    quantizer = quantizer_cases.built("vq", mesh)
    return probe.entropies(quantizer, _ids(1, 150, kind), _ids(2, 45, kind), steps, mesh)


@pytest.mark.slow
@pytest.mark.dist
def test_a_small_prior_finds_what_ids_say_of_each_other_and_no_more(ranks):
    alone, alike = _entropies(1, 1, "alone"), _entropies(1, 1, "alike")
    codes = quantizer_cases.K
    for found in (alone, alike):
        assert found["uniform_nats"] == pytest.approx(math.log(codes))
        assert found["unigram_nats"] == pytest.approx(math.log(8), rel=0.05)
        assert all(found[f"{key}_image"] == pytest.approx(16 * found[key]) for key in list(found)[:3])
    assert math.log(8) * 0.98 < alone["prior_nats"] < math.log(8) * 1.1
    assert math.log(8) / 16 < alike["prior_nats"] < 0.5 * alike["unigram_nats"]
    for found in ranks(2, _entropies, 1, 2, "alike"):  # each with images and half of the rows of its own
        assert found == pytest.approx(alike, rel=2e-3)


def test_frequencies_are_counted_once_where_images_do_not_divide_by_batches():
    ids, codes = (_ids(1, 7, "alone"), _ids(2, 5, "alone")), quantizer_cases.K
    found, again = (probe.entropies(quantizer_cases.built("vq"), *ids, 2, Mesh()) for _ in range(2))
    assert found == again
    seen, held = (np.bincount(_ids(*which, "alone").flatten(), minlength=codes) for which in ((1, 7), (2, 5)))
    assert found["unigram_nats"] == pytest.approx(
        -(held * np.log((seen + 1) / (seen.sum() + codes))).sum() / held.sum()
    )


@pytest.mark.slow
def test_the_command_of_the_readme_tells_all_of_it_and_the_card_of_what_it_saves(tmp_path, tiny_shards, capsys):
    words = ["--image-size=16", "--width=8", "--steps=3", "--batch=4", "--num-images=6", "--num-held-out=10"]
    assert classifier.main([str(tmp_path / "judge"), *words, "--device=cpu"]) == 0
    run = saved_runs.small().save(tmp_path / "tokenizer", {"image_size": SIDE})
    (line,) = (line for line in shown.commands("vqscale/tokenizer/README.md") if "--agreement" in line)
    name, given = shown.program(line)
    assert name == "evaluate"
    asked = evaluate.arguments(given)
    paths = {
        asked.path: run,
        asked.shards: tiny_shards / "val.tar",
        asked.training: f"{tiny_shards}/train-{{0..1}}.tar",
        asked.classifier: tmp_path / "judge",
        asked.out: tmp_path / "out",
        asked.save: tmp_path / "saved",
    }
    short = ["--prior-steps", "3", "--batch", "4", "--workers", "0", "--device", "cpu", "--training-images", "20"]
    assert evaluate.main([str(paths.get(word, word)) for word in given] + short) == 0
    result, told = json.loads((tmp_path / "out" / "result.json").read_text()), capsys.readouterr().out
    shares = [f"{kind}_{share:g}" for kind in ("near", "any") for share in asked.swaps]
    names = {f"{number}_{share}" for number in ("psnr", "shapes_distance") for share in shares}
    names |= {"shapes_distance", "moved_bf16", "moved_pixel", "moved_token"}
    names |= {f"{name}_nats{whole}" for name in ("prior", "unigram", "uniform") for whole in ("", "_image")}
    assert names <= result["numbers"].keys()
    assert all(f"\n{name} " in told for name in names)
    assert f"moved_bf16 {result['numbers']['moved_bf16']:.3%}" in told
    assert {"shapes classifier", "moved", "prior_nats", "_near_, _any_"} <= result["protocol"].keys()
    assert result["protocol"]["prior_nats, training"]["images"] == 20
    assert result["numbers"]["uniform_nats_image"] == pytest.approx(64 * math.log(K))
    saved = Tokenizer.load(tmp_path / "saved")
    assert saved.fingerprint == result["tokenizer"]["sha256"]
    assert saved.card["measured"]["numbers"] == result["numbers"]
    assert saved.card["image_size"] == SIDE

    small = [run, "--shards", tiny_shards / "val.tar", "--image-size", 8, "--device", "cpu", "--workers", 0]
    assert evaluate.main([str(word) for word in ("tokenizer", *small, "--classifier", tmp_path / "judge")]) == 2
    assert "the images are 8 x 8 pixels, and this shapes classifier was trained on 16 x 16" in capsys.readouterr().err


def test_what_cannot_be_said_is_refused_before_an_image_is_looked_at(tmp_path, tiny_shards, capsys):
    with pytest.raises(ValueError, match="--prior-steps of at least 2, and these are 4096 and 1"):
        evaluate.arguments(["tokenizer", "x", "--shards", "y", "--training", "z", "--prior-steps", "1"])
    several = {"name": "residual", "levels": 2, "inner": saved_runs.IBQ}
    run = saved_runs.small(quantizer=several).save(tmp_path / "several")
    words = ["tokenizer", run, "--shards", tiny_shards / "val.tar", "--image-size", SIDE, "--device", "cpu"]
    for more in (["--swaps", 0.1], ["--training", tiny_shards / "train-0.tar"]):
        assert evaluate.main([str(word) for word in (*words, *more)]) == 2
        assert "a token of this tokenizer has" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"batches of 32, which do not divide by 3 processes .*a divisor of 32"):
        probe.check(_Three())


class _Three:
    class world:
        size = 3
