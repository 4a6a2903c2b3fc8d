"""The shapes classifier: trained alike on any number of processes, saved under its own name, and its numbers against
their slow forms."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from slow_metrics import slow_frechet

from vqscale.data.made.shapes import CLASS_NAMES, draw
from vqscale.metrics import shapes_classifier as judged
from vqscale.metrics.sample_file import SampleFile
from vqscale.nets.config.classifiers import ShapesClassifierConfig
from vqscale.parallel.mesh import Mesh
from vqscale.programs.commands import classifier, evaluate
from vqscale.seed import derive
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.classifiers import SHAPES, varied_pictures

TINY = ShapesClassifierConfig(image_size=8, width=8, steps=3, batch=4, num_images=6, num_held_out=10)
SIDE, SEED = 8, 3


class Averages:
    """A stand-in whose features anyone can compute: mean colours; it takes dark pictures for class 1, others for 3."""

    config = SimpleNamespace(image_size=SIDE, seed=SEED)
    num_features = 3

    def __call__(self, pictures):
        features = pictures.double().mean(dim=(2, 3))
        logits = torch.zeros(len(pictures), 10)
        logits[:, 1], logits[:, 3] = 1.0, 2.0 * (features.mean(1) > 120)
        return features, logits


def samples(path, labels, side=SIDE):
    pictures = np.random.default_rng(1).integers(0, 256, (len(labels), side, side, 3), dtype=np.uint8)
    pictures[::3] //= 4
    np.savez(path, pictures, np.asarray(labels))
    return SampleFile(path)


def trained(data, config):
    made = SHAPES.train(config, Mesh(data=data))
    return {name: p.clone() for name, p in made.state_dict().items()}


@pytest.mark.dist
def test_two_processes_train_what_one_does(ranks):
    alone = trained(1, TINY)
    for weights in ranks(2, trained, 2, TINY):
        for name, expected in alone.items():
            # Adam makes steps of what is rounding where a gradient is next to nothing: most are equal, all are near
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=TINY.lr / 5)
            assert (weights[name] - expected).abs().mean() < TINY.lr / 100
    other = trained(1, ShapesClassifierConfig(**{**vars(TINY), "seed": 1}))
    assert not torch.equal(other["stem.weight"], alone["stem.weight"])


def test_it_learns_what_it_is_shown():
    config = ShapesClassifierConfig(image_size=16, width=8, steps=60, batch=20, num_images=20, num_held_out=10, lr=1e-2)
    made = SHAPES.train(config, Mesh())
    images, labels = judged.pictures(list(range(20)), 16, config.seed)
    assert (made(images).logits_NC.argmax(1) == labels).float().mean() > 0.5  # a tenth by chance


def test_pictures_are_varied_by_their_keys_alone():
    images, _ = judged.pictures(list(range(64)), SIDE, 0)
    keys = torch.arange(64)
    once = varied_pictures(images, keys)
    assert torch.equal(once[10:20], varied_pictures(images[10:20], keys[10:20]))
    assert not torch.equal(once, images)

    def colours(x):  # a picture by its values, whatever their order, and whether it is inverted
        values = x.flatten(1).sort(1).values
        inverted = (255 - x).flatten(1).sort(1).values
        return [min(a.tolist(), b.tolist()) for a, b in zip(values, inverted, strict=True)]

    assert colours(once) == colours(images)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.dist)])
def test_the_numbers_are_their_slow_forms(ranks, tmp_path, monkeypatch, world):
    labels = [1, 3, 3, 1, 7, 3, 1]
    file = samples(tmp_path / "samples.npz", labels)

    def means(pictures):
        return np.stack([picture.astype(np.float64).mean(axis=(0, 1)) for picture in pictures])

    def real(first, count):  # as the docstring says: of the classifier's endless set, of the samples' classes
        numbers = [first + 10 * n + labels[n % len(labels)] for n in range(count)]
        drawn = [draw(number, SIDE, derive("shapes classifier", SEED)) for number in numbers]
        assert [label for _, label in drawn] == [labels[n % len(labels)] for n in range(count)]
        return means([picture for picture, _ in drawn])

    def share(features):
        guessed = np.where(features.mean(axis=1) > 120, 3, 1)
        return float((guessed == np.asarray(labels)).mean())

    reference, others = real(judged.FIRST_REAL, judged.FEWEST_REAL), real(judged.FIRST_OTHER, len(labels))
    found = means(np.load(tmp_path / "samples.npz")["arr_0"])
    expected = {
        "recognised": share(found),
        "recognised_real": share(others),
        "shapes_distance": slow_frechet(found, reference),
        "shapes_distance_real": slow_frechet(others, reference),
    }
    assert 0 < expected["recognised"] < 1
    for numbers in ranks(world, judge_alike, world, file.path):
        assert numbers == pytest.approx(expected, rel=1e-9)


def judge_alike(data, path):
    return judged.judge(SampleFile(path), Averages(), Mesh(data=data))


def test_pictures_that_it_does_not_know_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"are 16 x 16 pixels, and this shapes classifier was trained on 8 x 8"):
        judged.classes(samples(tmp_path / "large.npz", [1, 2], side=16), SIDE)
    for labels in ([0, 10], [-1, 3]):
        with pytest.raises(ValueError, match=rf"has classes from {labels[0]} to {labels[1]} \(arr_1\)"):
            judged.classes(samples(tmp_path / "other.npz", labels), SIDE)
    np.savez(tmp_path / "bare.npz", np.zeros((2, SIDE, SIDE, 3), np.uint8))
    with pytest.raises(ValueError, match=r"has no classes \(arr_1\): give the samples.npz of `vqscale sample`"):
        judged.classes(SampleFile(tmp_path / "bare.npz"), SIDE)
    np.savez(tmp_path / "short.npz", np.zeros((2, SIDE, SIDE, 3), np.uint8), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"arr_1 is int64 of shape \(3,\), and 2 images have as many"):
        SampleFile(tmp_path / "short.npz").labels()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a classifier made by its command, and samples for it. Not to be changed."""
    folder = tmp_path_factory.mktemp("judge")
    assert classifier.main([str(word) for word in (folder / "classifier", *options(TINY))]) == 0
    samples(folder / "samples.npz", [0, 1, 2, 9, 5, 5])
    return folder


def options(config):
    return [f"--{key.replace('_', '-')}={value}" for key, value in vars(config).items() if key != "lr"]


def test_it_is_saved_under_its_own_name_and_loads_to_the_bit(place, capsys):
    loaded, card = SHAPES.load(place / "classifier", Mesh())
    assert card["name"] == "shapes classifier"
    assert card["classes"] == list(CLASS_NAMES)
    assert 0 <= card["metrics"]["accuracy"] <= 1
    assert card["metrics"]["images"] == TINY.num_held_out
    for name, weights in trained(1, TINY).items():
        assert torch.equal(loaded.state_dict()[name], weights)
    with pytest.raises(ValueError, match=r"is the card of 'vqscale shapes classifier' and not of"):
        Tokenizer.load(place / "classifier")
    with pytest.raises(ValueError, match=r"does not exist|is no folder"):
        SHAPES.load(place / "none", Mesh())


def test_a_folder_that_has_it_stays_as_it_is(place, capsys):
    stamp = (place / "classifier" / "card.json").stat().st_mtime_ns
    words = [str(place / "classifier"), *options(TINY)]
    assert classifier.main(words) == 0
    assert "10 pictures right" in capsys.readouterr().out
    assert classifier.main([*words, "--seed", "4"]) == 2
    assert "give another folder, or remove this one" in capsys.readouterr().err
    assert (place / "classifier" / "card.json").stat().st_mtime_ns == stamp


def test_a_classifier_of_other_classes_is_refused(place, tmp_path):
    for name in ("model.safetensors", "card.json"):
        (tmp_path / name).write_bytes((place / "classifier" / name).read_bytes())
    card = json.loads((tmp_path / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps({**card, "classes": ["cat", "dog"]}))
    with pytest.raises(ValueError, match=r"trained on the classes \['cat', 'dog'\], and shapes are now"):
        SHAPES.load(tmp_path, Mesh())


@pytest.mark.slow
def test_evaluate_shows_it_and_calls_nothing_fid(place, tmp_path, capsys):
    words = ["samples", place / "samples.npz", "--classifier", place / "classifier", "--out", tmp_path / "out"]
    assert evaluate.main([str(word) for word in words]) == 0
    told = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    names = {"recognised", "recognised_real", "shapes_distance", "shapes_distance_real", "images"}
    assert result["numbers"].keys() == names
    assert all(f"{name} " in told for name in names)
    assert not re.search("fid", told, re.IGNORECASE)
    assert "shapes classifier" in result["protocol"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "nothing was given: give --reference and --inception, or --classifier"),
        (["--reference", "a"], "FID takes a reference and Inception, and one was given"),
        (["--inception", "a", "--classifier", "b"], "FID takes a reference and Inception, and one was given"),
    ],
)
def test_what_judges_is_given_whole(given, told):
    with pytest.raises(ValueError, match=told):
        evaluate.arguments(["samples", "samples.npz", *given])


@pytest.mark.parametrize(
    ("given", "told"),
    [(["--image-size", "4"], "image_size is 4: use at least 8"), (["--width", "12"], "use a multiple of 8")],
)
def test_a_classifier_that_cannot_be_is_refused(given, told):
    with pytest.raises(ValueError, match=told):
        classifier.arguments(["folder", *given])
