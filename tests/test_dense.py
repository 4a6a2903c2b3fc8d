"""Measuring guiding codes: every row of the table against decoding image by image, on any number of processes, and the
command with its page.
"""

from __future__ import annotations

import itertools
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_files import CATEGORIES, depth_sample, depth_shard, image, panoptic_sample, panoptic_shard, png, segment
from PIL import Image
from shard_files import write_tar
from slow_metrics import Small, slow_frechet

from vqscale import config as configuration
from vqscale.data.config import ImagesConfig
from vqscale.data.config_dense import DepthConfig, PanopticConfig
from vqscale.data.samples import SampleStream
from vqscale.parallel.mesh import Mesh
from vqscale.programs import dense
from vqscale.programs.dense_truth import Files
from vqscale.signals.color import as_published
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.model import Tokenizer

COUNT, SIDE = 5, 8
NET = {"name": "vit", "image_size": SIDE, "patch": 2, "bottleneck": 1, "width": 16, "encoder_layers": 1}
NET |= {"decoder_layers": 1, "num_heads": 2, "mlp_width": 16}
LABELS = {"depth": [256], "color": [1, 1, 1], "panoptic": [5, 8]}
SIGNALS = {
    "depth": {"name": "depth"},
    "color": {"name": "color"},
    "panoptic": {"name": "panoptic", "num_things": 2, "num_stuff": 2, "num_instances": 8},
}


def config(task):
    return {
        "signal": SIGNALS[task],
        "net": {**NET, "labels": LABELS[task]},
        "quantizer": {"name": "fsq", "levels": [7, 5, 5]},
        "latent_norm": "none",
        "code_dropout": "random",
    }


def tokenizer_of(task, mesh=None):
    """A tokenizer whose decoder listens: what begins at zero, as of a new one, is drawn."""
    found = Tokenizer.from_config(configuration.parse(TokenizerConfig, config(task)), mesh, seed=1).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in found.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=draw))
    return found


def medium(task, folder):
    """The held-out shards of a task, one sample of them broken."""
    folder = Path(folder)
    given = {"image_size": SIDE, "num_workers": 0, "index_dir": str(folder)}
    if task == "depth":
        return DepthConfig(depth_shard(folder / "depth.tar", COUNT), unit_m=0.001, **given)
    (folder / "categories.json").write_text(json.dumps(CATEGORIES))
    categories = {"categories": str(folder / "categories.json")} if task == "panoptic" else {}
    kind = PanopticConfig if task == "panoptic" else ImagesConfig
    return kind(panoptic_shard(folder / f"{task}.tar", COUNT), **given, **categories)


def measured(task, held_out, batch, world=1):
    mesh = Mesh(world)
    part = (batch, mesh.world.rank, mesh.world.size)
    tokenizer = tokenizer_of(task, mesh)
    sums = dense.label_sums(dense.labelled(tokenizer), SampleStream(held_out, *part, train=False), mesh, COUNT - 1)

    def backwards(context, numbers):
        assert context.shape == (batch // mesh.world.size, 3, SIDE, SIDE)
        return (numbers[:, None] + torch.arange(16)).view(-1, 4, 4)

    stream = SampleStream(held_out, *part, train=False)
    return dense.measure(tokenizer, stream, mesh, constant=sums, draws={"drawn": backwards})


def slowly(task, held_out):
    """The same table, image by image, by the words of its rows."""
    tokenizer, mesh = tokenizer_of(task), Mesh()
    signal = tokenizer.signal
    batches = list(SampleStream(held_out, 1, train=False).batches())
    ids = [tokenizer.encode(*signal.enter(batch.samples)) for batch in batches]
    sums = {}
    for number, batch in enumerate(batches):
        _, context = signal.enter(batch.samples)
        masks = {share: dense.kept(torch.tensor([number]), (4, 4), share) for share in (0.5, 0.25, 0.125)}
        outputs = {
            "true codes": tokenizer.decode(ids[number], context),
            "no code": tokenizer.decode(ids[number], context, torch.zeros(1, 4, 4, dtype=torch.bool)),
            "codes of another image": tokenizer.decode(ids[(number + 1) % COUNT], context),
            "drawn": tokenizer.decode((number + torch.arange(16)).view(1, 4, 4), context),
            **{
                f"1/{int(1 / s)} of the codes": tokenizer.decode(ids[number], context, mask)
                for s, mask in masks.items()
            },
        }
        for name, output in outputs.items():
            sums.setdefault(name, signal.sums(mesh)).add(batch.samples, signal.predict(output))
    return {name: found.numbers() for name, found in sums.items()}


@pytest.mark.parametrize("task", list(SIGNALS))
def test_every_row_is_what_its_name_says(task, tmp_path):
    held_out = medium(task, tmp_path)
    found = measured(task, held_out, 2)
    constant = found.rows.pop("constant")
    expected = slowly(task, held_out)
    assert list(found.rows) == [*dense.KEPT, "codes of another image", "drawn"]
    assert found.rows.keys() == expected.keys()
    for name, numbers in expected.items():
        assert found.rows[name] == pytest.approx(numbers, rel=1e-5, nan_ok=True), name
        assert numbers["images"] == COUNT
    first = {"depth": "rmse", "color": "psnr", "panoptic": "pq"}[task]
    assert constant[first] >= 0
    if task != "panoptic":
        assert len({round(numbers[first], 6) for numbers in found.rows.values()}) == len(found.rows)
    assert all(len(shown) == 2 for shown in found.predicted.values())


def test_predictions_are_measured_at_the_size_of_the_files(tmp_path):
    """A file of 5 x 11 pixels, and one of 9 x 7: each pixel is compared with the prediction nearest to it."""
    steps = [
        np.random.default_rng(n).integers(0, 9000, size, dtype=np.uint16) for n, size in enumerate([(5, 11), (9, 7)])
    ]
    members = [m for n, x in enumerate(steps) for m in depth_sample(f"{n}", image(*x.shape, n), x)]
    path = str(write_tar(tmp_path / "a.tar", members))
    held_out = DepthConfig(path, unit_m=0.001, image_size=SIDE, num_workers=0, index_dir=str(tmp_path))
    tokenizer, errors = tokenizer_of("depth"), []
    for truth, batch in zip(steps, SampleStream(held_out, 1, train=False).batches(), strict=True):
        labels, context = tokenizer.signal.enter(batch.samples)
        predicted = tokenizer.signal.predict(tokenizer.decode(tokenizer.encode(labels, context), context))[0, 0]
        height, width = truth.shape
        square = [
            (predicted[int((y + 0.5) * SIDE / height), int((x + 0.5) * SIDE / width)].item() - truth[y, x] / 1000) ** 2
            for y in range(height)
            for x in range(width)
            if truth[y, x] > 1
        ]
        errors.append((sum(square) / len(square)) ** 0.5)
    stream = SampleStream(held_out, 2, train=False)
    found = dense.measure(tokenizer, stream, Mesh(), truth=Files(held_out, stream.index)).rows["true codes"]
    assert found["rmse"] == pytest.approx(sum(errors) / 2, rel=1e-5)
    assert found["rmse"] != pytest.approx(dense.measure(tokenizer, stream, Mesh()).rows["true codes"]["rmse"], rel=1e-3)
    with pytest.raises(ValueError, match="the shards hold images, whose samples have no labels"):
        Files(ImagesConfig(path, image_size=SIDE), stream.index)


@pytest.mark.dist
@pytest.mark.slow
def test_processes_find_the_same(ranks, tmp_path):
    held_out = medium("depth", tmp_path)
    alone = measured("depth", held_out, 2)
    for world, batch in ((2, 4), (4, 8)):
        for found in ranks(world, measured, "depth", held_out, batch, world):
            for name, numbers in alone.rows.items():
                assert found.rows[name] == pytest.approx(numbers, rel=1e-6), name


def test_places_that_are_kept_grow_with_the_share():
    numbers = torch.arange(50)
    masks = [dense.kept(numbers, (4, 4), share) for share in (0, 1 / 8, 1 / 4, 1 / 2, 1)]
    assert [mask.flatten(1).sum(1).unique().tolist() for mask in masks] == [[0], [2], [4], [8], [16]]
    for smaller, larger in itertools.pairwise(masks):
        assert not (smaller & ~larger).any()
    assert masks[2].float().mean(0).min() > 0, "every place is kept in some image"


def test_the_next_image_that_is_there():
    assert dense.following(torch.tensor([True, False, True, True, False])).tolist() == [2, 2, 3, 0, 0]


def test_constants_are_the_best_of_their_kind(tmp_path):
    """Depth: the mean of what is valid. Colour: one tint above the luminance. Panoptic: the most frequent class."""
    for task, check in (
        ("depth", lambda samples, made: (made - samples[:, 3][samples[:, 3] > 1e-3].mean()).abs().max() < 1e-5),
        ("color", lambda samples, made: (made - samples).mean((0, 2, 3)).abs().max() < 1e-2),
        ("panoptic", lambda samples, made: made.flatten(2).unique(dim=2).tolist() == [[[3], [1]]] * COUNT),
    ):
        signal = tokenizer_of(task).signal
        (batch,) = SampleStream(medium(task, tmp_path), COUNT, train=False).batches()
        made = signal.constant(signal.label_sums(batch.samples), batch.samples)
        assert check(batch.samples, made), task


def test_a_tokenizer_without_a_context_is_refused():
    shapes = Tokenizer.from_config(configuration.parse(TokenizerConfig, {"quantizer": {"name": "fsq"}}))
    with pytest.raises(ValueError, match=r"the signal images .* use `vqscale evaluate tokenizer`"):
        dense.labelled(shapes)


def run_yaml(folder, held_out, task="depth"):
    data = {"shards": str(held_out.shards), "image_size": SIDE, "num_workers": 0}
    data |= {"medium": "depth", "unit_m": 0.001} if task == "depth" else {}
    data |= {"medium": "panoptic"} if task == "panoptic" else {}
    data |= {"categories": held_out.categories} if task == "panoptic" else {}
    whole = {
        "task": "tokenizer",
        "run": {"folder": str(folder), "steps": 1},
        "data": {"batch": 2, "train": data, "val": data},
        "tokenizer": config(task),
        "loss": {"reconstruction": "l2" if task == "color" else "cross_entropy"},
    }
    (folder / "config.yaml").write_text(json.dumps(whole))
    return folder / "config.yaml"


def test_the_command_prints_a_table_and_writes_a_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    main = runpy.run_path(str(Path(__file__).parent.parent / "tools/evaluate.py"))["main"]
    held_out = medium("depth", tmp_path)
    saved, wanted = tokenizer_of("depth").save(tmp_path / "saved"), run_yaml(tmp_path, held_out)
    words = ["dense", saved, "--config", wanted, "--batch", 2, "--device", "cpu", "--out", tmp_path / "out"]
    assert main([str(word) for word in words]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].split()[:3] == ["rmse", "abs_rel", "log10"]
    assert [line.split("  ")[0] for line in told[1:8]] == [*dense.KEPT, "codes of another image", "constant"]
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert f"{result['rows']['no code']['rmse']:.4f}" in told[5].split()
    page = (tmp_path / "out/index.html").read_text()
    assert "from left to right: the image, the truth, true codes, no code" in page
    assert page.count("data:image/png;base64,") == 1
    tell = runpy.run_path(str(Path(__file__).parent.parent / "tools/page.py"))["main"]
    assert tell(["--dense", str(tmp_path / "out"), str(tmp_path / "out"), "--out", str(tmp_path / "all.html")]) == 0
    assert (tmp_path / "all.html").read_text().count("data:image/png;base64,") == 2
    assert tell(["--dense", str(tmp_path), "--out", str(tmp_path / "all.html")]) == 2
    assert tell([str(tmp_path), "--out", str(tmp_path / "all.html")]) == 2
    assert "1 folders are given: give TOKENIZER_RUN" in capsys.readouterr().err
    assert main([*map(str, words), "--json", "--training-images", "0", "--own-size"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["protocol"]["size"].startswith("of the files")
    assert "constant" not in again["rows"]
    assert again["rows"]["no code"] == pytest.approx(result["rows"]["no code"])
    assert main(["dense", str(saved)]) == 2
    assert "has no run.yaml that says on which samples" in capsys.readouterr().err


def official_pq(truths, folder, told):
    """PQ of each category as COCO's evaluator finds it, from a folder of PNGs and the JSON beside it."""
    sums = {category["id"]: [0.0, 0, 0, 0] for category in told["categories"]}
    predicted = {row["image_id"]: row for row in told["annotations"]}
    for image_id, ids, segments in truths:
        row = predicted[image_id]
        pixels = np.asarray(Image.open(folder / row["file_name"])).astype(np.int64)
        found = pixels[..., 0] + 256 * pixels[..., 1] + 256 * 256 * pixels[..., 2]
        there = {segment["id"]: segment["category_id"] for segment in row["segments_info"]}
        assert set(np.unique(found)) - {0} == set(there)
        left, matched = dict(there), set()
        for true in segments:
            for number, category in there.items():
                both = ((ids == true["id"]) & (found == number)).sum()
                union = (ids == true["id"]).sum() + (found == number).sum() - both
                union -= ((ids == 0) & (found == number)).sum()
                if category == true["category_id"] and not true["iscrowd"] and both / union > 0.5:
                    sums[category][0] += both / union
                    sums[category][1] += 1
                    matched.add(true["id"])
                    left.pop(number)
        for true in segments:
            sums[true["category_id"]][3] += true["id"] not in matched and not true["iscrowd"]
        for number, category in left.items():
            crowd = [true["id"] for true in segments if true["iscrowd"] and true["category_id"] == category]
            on = ((found == number) & ((ids == 0) | np.isin(ids, crowd))).sum()
            sums[category][2] += on / (found == number).sum() <= 0.5
    return {number: iou / (tp + fp / 2 + fn / 2) for number, (iou, tp, fp, fn) in sums.items() if tp + fp + fn}


def test_predicted_segments_are_files_whose_pq_is_that_of_the_table(tmp_path, capsys, monkeypatch):
    """Files of 11 x 9 and of 7 x 13 pixels; of the second labelling what is predicted without codes, but for a corner,
    is the truth. Samples that are not listed do not count."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    main = runpy.run_path(str(Path(__file__).parent.parent / "tools/evaluate.py"))["main"]
    (tmp_path / "categories.json").write_text(json.dumps(CATEGORIES))
    (tmp_path / "keys").write_text("val2017/1.jpg\n0\n\n")
    held_out = PanopticConfig(str(tmp_path / "a.tar"), image_size=SIDE, categories=str(tmp_path / "categories.json"))
    saved, wanted = tokenizer_of("panoptic").save(tmp_path / "saved"), run_yaml(tmp_path, held_out, "panoptic")
    words = ["dense", saved, "--config", wanted, "--batch", 2, "--device", "cpu", "--training-images", 0]
    words += ["--keys", tmp_path / "keys", "--out", tmp_path / "out"]
    files = ["--own-size", "--predictions", tmp_path / "maps"]

    def written(truths, name):
        members = [
            panoptic_sample(str(n), image(*ids.shape, n), ids, listed, image_id=image_id)
            for n, (image_id, ids, listed) in enumerate(truths)
        ]
        write_tar(tmp_path / "a.tar", [member for sample in members for member in sample])
        assert main([str(word) for word in [*words, *files]]) == 0
        return json.loads((tmp_path / f"maps/{name}.json").read_text())

    sizes = [(11, 9), (7, 13), (8, 8)]
    truths = [(f"a/{n}", np.ones(size, np.int64), [segment(1, 7)]) for n, size in enumerate(sizes)]
    for place, row in enumerate(written(truths, "no_code")["annotations"]):
        pixels = np.asarray(Image.open(tmp_path / "maps/no_code" / row["file_name"])).astype(np.int64)
        ids = pixels[..., 0] + 256 * pixels[..., 1]
        ids[:2, :3] = 0
        listed = [segment(x["id"], x["category_id"], x["id"] == 2) for x in row["segments_info"] if x["id"] in ids]
        truths[place] = (row["image_id"], ids, listed)
    for name, way in (("true_codes", "true codes"), ("no_code", "no code")):
        told = written(truths, name)
        assert [row["image_id"] for row in told["annotations"]] == ["a/0", "a/1"]
        expected = official_pq(truths[:2], tmp_path / "maps" / name, told)
        result = json.loads((tmp_path / "out/result.json").read_text())
        names = {category["id"]: category["name"] for category in CATEGORIES}
        by_class = {key: ways[way]["pq"] for key, ways in result["classes"].items() if ways[way]["pq"] is not None}
        assert by_class == pytest.approx({names[number]: pq for number, pq in expected.items()}, abs=1e-12)
        assert result["rows"][way]["pq"] == pytest.approx(sum(expected.values()) / len(expected), abs=1e-12)
        assert result["rows"][way]["images"] == 2
    assert result["rows"]["no code"]["pq"] > 0.5
    labels = [[(f"{n}.png", png(image())), (f"{n}.seg.png", png(np.full((8, 8), 7, np.uint8)))] for n in range(2)]
    write_tar(tmp_path / "a.tar", [member for sample in labels for member in sample])
    assert main([str(word) for word in [*words, *files]]) == 0
    told = json.loads((tmp_path / "maps/no_code.json").read_text())
    assert [row["image_id"] for row in told["annotations"]] == ["0", "1"], "keys, where no panoptic.json says more"
    assert "pq of each class:" in (tmp_path / "out/index.html").read_text()
    (tmp_path / "keys").write_text("0\n7\n")
    assert main([str(word) for word in words]) == 2
    assert "of 2 keys that are to be measured 1 are of no sample (7)" in capsys.readouterr().err
    assert main([str(word) for word in [*words, *files[1:]]]) == 2
    assert "give --own-size too" in capsys.readouterr().err


def test_the_distance_of_colored_images_from_listed_ones(tmp_path, capsys, monkeypatch):
    """FID-5k's: one list is predicted, another is the reference; values are round((x + 1) 128) and no more than 255."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("vqscale.nets.inception.load", lambda path, sha256: Small(published=True))
    main = runpy.run_path(str(Path(__file__).parent.parent / "tools/evaluate.py"))["main"]
    held_out, tokenizer = medium("color", tmp_path), tokenizer_of("color")
    shards, options = str(held_out.shards), ["--inception", "x", "--device", "cpu", "--batch", 2]
    lists = {"first": ["000", "003", "004"], "second": ["001", "002", "003", "004"]}
    for name, keys in lists.items():
        (tmp_path / name).write_text("\n".join(f"val/{key}.JPEG" for key in keys))
    words = ["statistics", tmp_path / "second.npz", "--shards", shards, "--image-size", SIDE, "--workers", 0]
    assert main([str(x) for x in [*words, *options, "--keys", tmp_path / "second"]]) == 0
    words = ["dense", tokenizer.save(tmp_path / "saved"), "--config", run_yaml(tmp_path, held_out, "color")]
    words += ["--out", tmp_path / "out", "--training-images", 0, "--keys", tmp_path / "first", *options]
    assert main([str(x) for x in [*words, "--reference", tmp_path / "second.npz"]]) == 0

    (batch,) = SampleStream(held_out, COUNT, train=False).batches()
    chosen = {name: [key in keys for key in batch.keys] for name, keys in lists.items()}
    _, context = tokenizer.signal.enter(batch.samples[chosen["first"]])
    ids, none = torch.zeros(3, 4, 4, dtype=torch.int64), torch.zeros(3, 4, 4, dtype=torch.bool)
    with torch.no_grad():
        predicted = tokenizer.decode(ids, context, none).clamp(-1, 1)
    seen = ((predicted + 1) * 128).round().clamp(max=255).to(torch.uint8)
    real = ((batch.samples[chosen["second"]] + 1) * 127.5).round().to(torch.uint8)
    expected = slow_frechet(*(Small()(images)[0].numpy() for images in (seen, real)))
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["rows"]["no code"]["fid"] == pytest.approx(expected, rel=1e-4)
    assert result["rows"]["no code"]["images"] == 3
    assert main([str(x) for x in words]) == 2
    assert "FID takes a reference and Inception" in capsys.readouterr().err


def test_larger_predictions_are_brought_to_256_pixels_by_area():
    images = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(1)) * 2 - 1
    means = images.view(1, 3, 256, 2, 256, 2).mean((3, 5))
    expected = ((means + 1) * 128).round().clamp(max=255)
    assert ((as_published(images) + 1) * 127.5 - expected).abs().max() < 1e-3
