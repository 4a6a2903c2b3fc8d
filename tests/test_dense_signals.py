"""The signals depth, color and panoptic: what enters, what is asked for, what is predicted, against slow twins; and a
run of each with a small net.
"""

from __future__ import annotations

import json
import math

import dense_files
import dense_net
import pytest
import torch
from shard_files import write_tar
from test_dense_data import depth, segments

from vqscale import config as configuration
from vqscale import signals
from vqscale.data.samples import SampleStream
from vqscale.nets.config import NETS
from vqscale.parallel.mesh import Mesh
from vqscale.programs.score import score
from vqscale.signals.color import luminance
from vqscale.signals.config import DistanceConfig
from vqscale.signals.config_dense import ColorSignal, DepthSignal, PanopticSignal
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.config import Run
from vqscale.train.tokenizer import train

ENTROPY = DistanceConfig(reconstruction="cross_entropy")
SMALL = {"num_things": 2, "num_stuff": 2, "num_instances": 3}
LABELS = {"depth": [16], "color": [1, 1, 1], "panoptic": [5, 3]}


@pytest.fixture(autouse=True)
def _a_small_net(monkeypatch):
    for name, line in dense_net.LINE.items():
        monkeypatch.setitem(NETS, name, line)


def distances(signal, output, samples, config=ENTROPY):
    found = signals.build(signal).distances(config, Mesh())(output, samples, None)
    return {name: (distance.weight, distance.value.item()) for name, distance in found.items()}


def minus_log(logits, number):
    return math.log(sum(math.exp(value) for value in logits)) - logits[number]


# --- depth


@pytest.mark.parametrize(
    ("metres", "number"),
    [(0.0, 0), (0.04, 0), (0.0401, 1), (5.0, 127), (5.001, 128), (9.99, 255), (10.0, 255), (65.5, 255)],
)
def test_bins_of_depth_are_those_that_were_published(metres, number):
    signal = signals.build(DepthSignal())
    samples = torch.zeros(1, 4, 2, 2)
    samples[:, 3] = metres
    entered, context = signal.enter(samples)
    assert entered.unique().tolist() == [number]
    assert context.shape == (1, 3, 2, 2)
    assert signal.centres(torch.device("cpu"))[number] == pytest.approx(1e-3 + (number + 0.5) * 9.999 / 256)


def test_missing_depth_is_asked_for_nothing_and_counts_in_the_mean():
    config = DepthSignal(num_bins=4, near_m=1.0, far_m=5.0)
    samples, output = torch.randn(2, 4, 2, 3), torch.randn(2, 4, 2, 3)
    samples[:, 3] = torch.tensor([[0.0, 1.5, 2.5], [3.5, 4.5, 99.0]])  # bins 0 0 1 2 3 3
    total = 0.0
    for image in output.tolist():
        for (y, x), number in {(0, 2): 1, (1, 0): 2, (1, 1): 3, (1, 2): 3}.items():
            total += minus_log([channel[y][x] for channel in image], number)
    weighted = DistanceConfig(reconstruction="cross_entropy", reconstruction_weight=3.0)
    assert distances(config, output, samples, weighted) == {"cross_entropy": (3.0, pytest.approx(total / 12, rel=1e-6))}


def test_depth_is_the_likeliest_bin_or_the_mean_of_all():
    output = torch.tensor([0.1, 0.2, 0.4, 0.3]).log().view(1, 4, 1, 1).expand(1, 4, 2, 2)
    config = {"num_bins": 4, "near_m": 1.0, "far_m": 5.0}
    likeliest = signals.build(DepthSignal(**config)).predict(output)
    mean = signals.build(DepthSignal(**config, predict="expectation")).predict(output)
    assert likeliest.shape == mean.shape == (1, 1, 2, 2)
    assert likeliest.unique().tolist() == [3.5]
    assert mean.mean().item() == pytest.approx(1.5 * 0.1 + 2.5 * 0.2 + 3.5 * 0.4 + 4.5 * 0.3)


# --- color


def test_the_context_of_colours_is_their_luminance():
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    entered, context = signals.build(ColorSignal()).enter(images)
    assert torch.equal(entered, images)
    red, green, blue = ((images + 1) / 2).unbind(1)
    gray = (0.2989 * red + 0.587 * green + 0.114 * blue) * 2 - 1
    assert torch.allclose(context, gray[:, None].expand(-1, 3, -1, -1), atol=1e-6)
    shuffled = luminance(images[:, [1, 0, 2]])
    assert not torch.allclose(shuffled, context, atol=0.1)


def test_colours_are_trained_in_all_three_channels_and_cut_to_their_range():
    images, output = torch.rand(1, 3, 2, 2), torch.tensor([-2.0, 0.5, 3.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    ((weight, value),) = distances(ColorSignal(), output, images, DistanceConfig()).values()
    assert (weight, value) == (1.0, pytest.approx((output - images).square().mean().item()))
    assert signals.build(ColorSignal()).predict(output)[0, :, 0, 0].tolist() == [-1.0, 0.5, 1.0]


# --- panoptic


def test_void_is_a_class_and_an_instance_beyond_the_numbers_is_asked_for_nothing():
    config = PanopticSignal(num_things=1, num_stuff=1, num_instances=3, semantics_weight=0.5, instances_weight=2.0)
    samples, output = torch.zeros(1, 6, 1, 4), torch.randn(1, 6, 1, 4)
    samples[0, 3, 0], samples[0, 4, 0] = torch.tensor([0.0, 1, 2, 2]), torch.tensor([0.0, 2, 3, 7])
    columns = output[0, :, 0].T.tolist()
    semantics = sum(minus_log(column[:3], n) for column, n in zip(columns, [0, 1, 2, 2], strict=True)) / 4
    instances = sum(minus_log(column[3:], n) for column, n in zip(columns[:2], [0, 2], strict=True)) / 4
    assert distances(config, output, samples) == {
        "semantics": (0.5, pytest.approx(semantics, rel=1e-6)),
        "instances": (2.0, pytest.approx(instances, rel=1e-6)),
        "beyond_instances": (0.0, 0.5),
    }
    entered, context = signals.build(config).enter(samples)
    assert (entered.shape, context.shape) == ((1, 2, 1, 4), (1, 3, 1, 4))


def test_segments_without_a_number_are_counted(tmp_path):
    ids = torch.arange(1, 17).view(4, 4).numpy()
    listed = [dense_files.segment(number, 3) for number in range(1, 17)]
    crowded = dense_files.panoptic_sample("0", dense_files.image(4, 4), ids, listed)
    path = write_tar(
        tmp_path / "a.tar", [*crowded, *dense_files.panoptic_sample("1", dense_files.image(4, 4), ids * 0, [])]
    )
    samples = next(SampleStream(segments(path, side=4), 2, train=False).batches()).samples
    assert samples[0, 4].unique().tolist() == list(range(1, 17))
    sums = signals.build(PanopticSignal(**SMALL)).sums(Mesh())
    sums.add(samples, samples[:, 3:5])
    found = sums.numbers()
    assert found["beyond_instances"] == 16 - 2
    assert (found["images"], found["pq"], found["pq_things"]) == (2, 1, 1)


@pytest.mark.parametrize("min_fraction", [0.0, 0.2])
def test_an_instance_has_the_class_of_the_largest_sum_of_its_logits(min_fraction):
    config = PanopticSignal(num_things=2, num_stuff=1, num_instances=5, min_fraction=min_fraction)
    output = torch.randn(3, 9, 5, 4, generator=torch.Generator().manual_seed(1))
    found = signals.build(config).predict(output)
    for image, maps in zip(output.double(), found, strict=True):
        pixels = [(y, x) for y in range(5) for x in range(4)]
        numbers = {place: int(image[4:, *place].argmax()) for place in pixels}
        for place in pixels:
            same = [other for other in pixels if numbers[other] == numbers[place]]
            kind = int(sum(image[:4, *other] for other in same).argmax())
            expected = (kind, numbers[place]) if len(same) > min_fraction * 20 else (0, 0)
            assert tuple(maps[:, *place].tolist()) == expected


# --- together


@pytest.mark.slow
@pytest.mark.parametrize("name", ["depth", "color", "panoptic"])
def test_each_trains_and_is_measured_and_shown_with_a_small_net(tmp_path, name):
    medium = {"num_workers": 0, "index_dir": str(tmp_path), "image_size": 16}
    if name == "depth":
        medium |= {"medium": "depth", "shards": dense_files.depth_shard(tmp_path / "a.tar", 6, 16), "unit_m": 0.001}
    elif name == "panoptic":
        listed = [{**category, "isthing": bool(category["isthing"])} for category in dense_files.CATEGORIES]
        shards = dense_files.panoptic_shard(tmp_path / "a.tar", 6, 16)
        medium |= {"medium": "panoptic", "shards": shards, "categories": listed}
    else:
        medium |= {"shards": dense_files.depth_shard(tmp_path / "a.tar", 6, 16)}
    asked = {
        "task": "tokenizer",
        "run": {"folder": str(tmp_path / "run"), "steps": 2, "log_every": 1, "checkpoint_every": 2, "device": "cpu"},
        "data": {"train": medium, "val": medium, "batch": 4},
        "tokenizer": {
            "signal": {"name": name} | {"depth": {"num_bins": 16}, "color": {}}.get(name, SMALL),
            "net": {"name": "patches", "labels": LABELS[name]},
            "quantizer": {"name": "fsq", "levels": [5, 5]},
            "latent_norm": "none",
        },
        "loss": {"reconstruction": "l2" if name == "color" else "cross_entropy"},
        "optim": {"schedule": "constant"},
        "engine": {"name": "torch"},
    }
    config = configuration.parse(Run, asked)
    assert train(config, Mesh()) is not None
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {key for row in rows for key in row if key.startswith("loss/")}
    parts = {"depth": {"cross_entropy"}, "color": {"l2"}}.get(name, {"semantics", "instances", "beyond_instances"})
    assert losses == {f"loss/{part}" for part in parts}
    tokenizer = Tokenizer.load(tmp_path / "run")
    found = score(tokenizer, SampleStream(config.data.val, 4, train=False), Mesh())
    assert found.numbers["images"] == 6
    picture = tokenizer.signal.picture(found.originals, found.predicted)
    assert picture.shape == (3 * 128, 4 * 128, 3)
    assert len({part.tobytes() for part in picture.reshape(3, 128, -1)}) == 3


def test_what_does_not_fit_is_refused_with_all_its_problems():
    asked = {
        "task": "tokenizer",
        "run": {"folder": "x"},
        "data": {"train": {"shards": "x.tar", "image_size": 16}},
        "tokenizer": {"signal": {"name": "depth"}, "net": {"name": "patches", "labels": [134, 100]}},
        "loss": {"adversarial": {}},
    }
    with pytest.raises(configuration.ConfigError) as error:
        configuration.parse(Run, asked)
    for part in (
        "signal depth is for one with labels [256], and the net patches has [134, 100]",
        "the shards hold images, and tokenizer.signal depth takes images with depth",
        "expected cross_entropy, the distances of tokenizer.signal depth, found l2",
        "gives logits of classes back: use adversarial: null",
    ):
        assert part in str(error.value)
    with pytest.raises(configuration.ConfigError, match=r"signal images is for a net without labels, .* has \[256\]"):
        configuration.parse(TokenizerConfig, {"net": {"name": "patches"}})
    with pytest.raises(configuration.ConfigError, match=r"labels \[1, 1, 1\], and the net conv has none"):
        configuration.parse(TokenizerConfig, {"signal": {"name": "color"}})


def test_categories_that_the_signal_has_no_classes_for_are_refused(tmp_path):
    config = segments(tmp_path / "a.tar")
    assert list(PanopticSignal(**SMALL).misfits(config, ENTROPY)) == []
    ((key, message),) = PanopticSignal().misfits(config, ENTROPY)
    assert key == "tokenizer.signal.num_things"
    assert "2 things and 2 stuff, and tokenizer.signal is for num_things 80 and num_stuff 53" in message
    assert list(DepthSignal().misfits(depth(tmp_path / "a.tar"), ENTROPY)) == []
