"""The full evaluation: the same numbers on one and two processes, each held-out image once, and what is refused."""

from __future__ import annotations

import functools
import importlib
import json
import math
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import png, write_tar
from slow_metrics import Small, slow_frechet
from test_metrics import slow_psnr, slow_ssim

from vqscale import config as configuration
from vqscale.data.config import ImagesConfig
from vqscale.data.made import shapes
from vqscale.data.samples import SampleStream
from vqscale.metrics import fid
from vqscale.metrics.features import Measures
from vqscale.metrics.reconstruction import to_bytes
from vqscale.parallel.mesh import Mesh
from vqscale.programs.score import score, statistics
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.model import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SIDE, COUNT, CODES = 16, 11, 37


def _tool():
    return importlib.import_module("vqscale.programs.commands.evaluate")


def config(quantizer):
    net = {"channels": 8, "patch": 2, "multipliers": [1, 1], "num_blocks": 1, "z_channels": 8}
    net |= {"attention_levels": [], "mid_attention": False, "num_groups": 4}
    data = {"net": net, "quantizer": {"num_codes": CODES, "dim": 8, **quantizer}, "latent_norm": "rms"}
    return configuration.parse(TokenizerConfig, data)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A config of a shard with 11 drawn images, one that is broken and one that is small."""
    folder = tmp_path_factory.mktemp("held_out")
    members = []
    for number in range(COUNT + 2):
        pixels, _ = shapes.draw(number, SIDE, 3)
        file = BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        data = {4: b"no image", 7: png(9, size=SIDE // 2)}.get(number, file.getvalue())
        members.append((f"{number:03d}.png", data))
    path = write_tar(folder / "val.tar", members)
    return ImagesConfig(shards=str(path), image_size=SIDE, num_workers=0, index_dir=str(folder))


def _distance(images, recon):
    return (images - recon).abs().mean(dim=(1, 2, 3))


def _scored(data, codes, images, quantizer, batch):
    mesh = Mesh(data, codes)
    tokenizer = Tokenizer.from_config(config(quantizer), mesh, seed=2)
    stream = SampleStream(images, batch, mesh.world.rank, mesh.world.size, train=False)
    found = score(tokenizer, stream, mesh, Measures(Small(published=True), _distance))
    of_originals, seen = statistics(stream, Small(), mesh)
    assert seen.images == found.numbers["images"]
    torch.testing.assert_close(of_originals.pool.sigma_DD, found.statistics["originals"][0].sigma_DD)
    assert of_originals.points_ND is None
    return found


@functools.cache
def _slowly(images, name):
    """The numbers, image by image."""
    tokenizer = Tokenizer.from_config(config({"name": name}), seed=2).eval()
    batches = list(SampleStream(images, 1, train=False).batches())
    x = torch.cat([batch.samples for batch in batches if batch.valid.all()])
    with torch.no_grad():
        pairs = [tokenizer(image[None]) for image in x]
    y, ids = torch.cat([recon for recon, _ in pairs]), torch.cat([quantized.ids.flatten() for _, quantized in pairs])
    features = [Small()(to_bytes(z))[0].numpy() for z in (x, y)]
    shares = ids.bincount(minlength=CODES).double() / len(ids)
    both = list(zip(x, y, strict=True))
    return {
        "images": float(len(x)),
        "rfid": slow_frechet(*features),
        "psnr": np.mean([slow_psnr(*pair) for pair in both]),
        "ssim": np.mean([slow_ssim(*pair) for pair in both]),
        "lpips": np.mean([_distance(a[None], b[None].clamp(-1, 1)).item() for a, b in both]),
        "usage": float((shares > 0).double().mean()),
        "dead": float((shares == 0).sum()),
        "ceiling": 1 - math.exp(-(COUNT + 1) * (SIDE // 4) ** 2 / CODES),
        "perplexity": float(torch.special.entr(shares).sum().exp()),
        "id_bits": -sum(p * math.log2(p) for p in shares.tolist() if p),
        "broken": 1,
        "enlarged": 1,
    }


IBQ, SCQ = {"name": "ibq"}, {"name": "scq"}


@pytest.mark.parametrize("quantizer", [IBQ, SCQ], ids=lambda settings: settings["name"])
def test_the_numbers_are_their_slow_forms(quantizer, held_out):
    found = _scored(1, 1, held_out, quantizer, 4)
    expected = _slowly(held_out, quantizer["name"])
    assert found.numbers.keys() == expected.keys()
    assert found.numbers == pytest.approx(expected, rel=1e-5)
    assert expected["images"] == COUNT + 1
    assert 1 / CODES < expected["usage"] < 1
    assert len(found.broken) == 1
    assert "val.tar 004" in found.broken[0]
    assert int(found.per_code.sum()) == (COUNT + 1) * (SIDE // 4) ** 2
    assert len(found.per_code) == found.num_codes == CODES


@pytest.mark.dist
@pytest.mark.parametrize(("data", "codes", "batch"), [(2, 1, 6), (1, 2, 16)])
def test_two_processes_find_the_same(ranks, held_out, data, codes, batch):
    """Batches that do not divide the images, a rank with no image in one: the same numbers to 1e-6."""
    alone = _scored(1, 1, held_out, IBQ, 4)
    for found in ranks(2, _scored, data, codes, held_out, IBQ, batch):
        assert found.numbers == pytest.approx(alone.numbers, rel=1e-6)
        assert torch.equal(found.per_code, alone.per_code)
        assert found.broken == alone.broken
        torch.testing.assert_close(found.originals[:4], alone.originals, rtol=0, atol=0)
        torch.testing.assert_close(found.predicted[:4], alone.predicted, rtol=0, atol=1e-5)


def test_statistics_take_the_place_of_the_originals(held_out):
    mesh, tokenizer = Mesh(), Tokenizer.from_config(config(IBQ), seed=2)
    stream = SampleStream(held_out, 4, train=False)
    alone = score(tokenizer, stream, mesh, Measures(Small(published=True)))
    measures = Measures(Small(published=True), reference=fid.Reference("a.npz", alone.statistics["originals"][0], None))
    again = score(tokenizer, stream, mesh, measures)
    assert "originals" not in again.statistics
    assert again.numbers == pytest.approx(alone.numbers, rel=1e-12)
    moved = fid.Statistics(alone.statistics["originals"][0].mu_D + 1, alone.statistics["originals"][0].sigma_DD)
    far = score(tokenizer, stream, mesh, Measures(Small(published=True), reference=fid.Reference("a.npz", moved, None)))
    assert far.numbers["rfid"] > again.numbers["rfid"] + 1


def _points(images, most, batch, data=1):
    mesh = Mesh(data)
    stream = SampleStream(images, batch, mesh.world.rank, mesh.world.size, train=False)
    return statistics(stream, Small(), mesh, points=most)[0].points_ND


@pytest.mark.dist
def test_points_are_of_the_same_images_on_any_number_of_ranks(ranks, held_out):
    """Of 13 images one is broken; a rank has none of them in one of the cases."""
    batches = list(SampleStream(held_out, 1, train=False).batches())
    every = Small()(to_bytes(torch.cat([batch.samples for batch in batches if batch.valid.all()])))[0].float()
    assert torch.equal(_points(held_out, 100, 4).sort(0).values, every.sort(0).values)
    some = _points(held_out, 5, 4)
    assert 4 <= len(some) <= 5
    assert all((every == point).all(1).sum() == 1 for point in some)
    assert not torch.equal(some, every[: len(some)])  # drawn from all, not the first
    for batch in (6, 16):
        for found in ranks(2, _points, held_out, 5, batch, 2):
            assert torch.equal(found, some)


def test_nothing_to_see_is_an_error(tmp_path):
    path = write_tar(tmp_path / "val.tar", [("0.png", b"no"), ("1.png", b"image")])
    stream = SampleStream(ImagesConfig(str(path), SIDE, num_workers=0, index_dir=str(tmp_path)), 2, train=False)
    with pytest.raises(ValueError, match=r"none of the 2 images of .*val.tar could be read \(.*are no image"):
        score(Tokenizer.from_config(config(IBQ)), stream, Mesh())


# The command line, with a small network in the place of Inception; its file is looked at in tests/test_inception.py.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return str(Tokenizer.from_config(config(IBQ), seed=2).save(tmp_path_factory.mktemp("tokenizer") / "saved"))


def _run(argv, published=True):
    """tools/evaluate.py in this process, with a small network for whatever file --inception names."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("vqscale.nets.inception.load", lambda path, sha256: Small(published))
        return _tool().main([str(word) for word in argv])


def _options(images, *more):
    return ["--shards", images.shards, "--image-size", SIDE, "--workers", 0, "--batch", 4, "--device", "cpu", *more]


def _result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_a_tokenizer_from_the_command_line(held_out, trained, tmp_path, capsys):
    out, stats = tmp_path / "out", tmp_path / "stats.npz"
    options = _options(held_out, "--inception", "x", "--out", out, "--save-stats", stats)
    assert _run(["tokenizer", trained, *options]) == 0
    told, result = capsys.readouterr().out, _result(out)
    expected = {name: x for name, x in _slowly(held_out, "ibq").items() if name != "lpips"}
    assert result["numbers"] == pytest.approx(expected, rel=1e-5)
    assert f"rfid {result['numbers']['rfid']:.4f}" in told
    assert "note: 1 images could not be read and are in no number" in told
    assert "note: FID depends on the number of images: that of 12" in told
    assert result["tokenizer"]["sha256"] == Tokenizer.load(trained).fingerprint
    assert result["protocol"]["inception"]["sha256"] == Small().facts["sha256"]
    assert result["protocol"]["reference"] == "the originals"
    assert result["data"]["image_size"] == SIDE
    assert (result["processes"], len(result["commit"]) > 6, len(result["notes"])) == (1, True, 3)
    html = (out / "index.html").read_text()
    assert html.count("data:image/png;base64,") == 2
    assert "://" not in html.replace("https://download", ""), "everything is in the file"
    assert "psnr" in html

    # what --save-stats wrote, and what `statistics` writes, are the originals'
    made = tmp_path / "made.npz"
    assert _run(["statistics", made, *_options(held_out, "--inception", "x")]) == 0
    assert "statistics of 12 images" in capsys.readouterr().out
    for path in (stats, made):
        with_file = ["tokenizer", trained, *_options(held_out, "--inception", "x", "--out", out, "--reference", path)]
        assert _run(with_file) == 0
        assert _result(out)["numbers"] == pytest.approx(result["numbers"], rel=1e-9)
        assert _result(out)["protocol"]["reference"]["file"] == str(path)

    capsys.readouterr()
    assert _run(["tokenizer", trained, *_options(held_out, "--inception", "x", "--out", out)], published=False) == 0
    numbers = _result(out)["numbers"]
    assert numbers["distance_other_inception"] == pytest.approx(result["numbers"]["rfid"])
    assert "rfid" not in numbers
    assert "rfid" not in capsys.readouterr().out


def test_statistics_judge_samples_as_their_images_do(held_out, tmp_path, capsys):
    made, images, few, samples = (tmp_path / name for name in ("made.npz", "images.npz", "few.npz", "samples.npz"))
    batches = list(SampleStream(held_out, 1, train=False).batches())
    seen = to_bytes(torch.cat([batch.samples for batch in batches if batch.valid.all()])).permute(0, 2, 3, 1).numpy()
    np.savez(images, seen)
    noise = np.random.default_rng(1).integers(0, 256, (8, 2, 2, 3), dtype=np.uint8).repeat(SIDE // 2, 1)
    np.savez(samples, np.concatenate([*(seen[:1] ^ bits for bits in range(6)), noise.repeat(SIDE // 2, 2)]))
    for out, more in ((made, []), (few, ["--images", 0])):
        assert _run(["statistics", out, *_options(held_out, "--inception", "x", *more)]) == 0
        told = capsys.readouterr().out
        assert f"statistics of 12 images, features of {0 if more else 12}" in told
    found = {}
    for reference in (made, images, few):
        options = ["--reference", reference, "--inception", "x", "--out", tmp_path / "out", "--device", "cpu"]
        assert _run(["samples", samples, *options]) == 0
        found[reference] = _result(tmp_path / "out")
    assert found[made]["numbers"] == pytest.approx(found[images]["numbers"], rel=1e-9)
    assert 0 < found[made]["numbers"]["precision"] < found[made]["numbers"]["recall"] < 1
    assert [found[path]["protocol"]["reference images"] for path in (made, images, few)] == [12, 12, 0]
    assert found[made]["numbers"].keys() - found[few]["numbers"].keys() == {"precision", "recall"}


def test_originals_are_made_as_the_tokenizer_knew_them(held_out, tmp_path, capsys):
    """What is not asked for is in the card: another filter would measure other images than the run did."""
    card = {"image_size": SIDE, "interpolation": "bilinear", "resize": SIDE + 4}
    saved = Tokenizer.from_config(config(IBQ), seed=2).save(tmp_path / "saved", card)
    options = ["--shards", held_out.shards, "--workers", 0, "--batch", 4, "--device", "cpu", "--out", tmp_path / "out"]
    found = {}
    for name, more in (("card", []), ("asked", ["--interpolation", "bicubic"]), ("size", ["--image-size", SIDE + 4])):
        assert _run(["tokenizer", saved, *options, *more]) == 0
        found[name] = _result(tmp_path / "out")
    crops = {name: result["data"]["crop"].partition(" with")[0] for name, result in found.items()}
    assert crops == {
        "card": f"short side to {SIDE + 4}, bilinear",
        "asked": f"short side to {SIDE + 4}, bicubic",
        "size": f"short side to {SIDE + 4}, bilinear",
    }
    assert [result["data"]["image_size"] for result in found.values()] == [SIDE, SIDE, SIDE + 4]
    assert len({result["numbers"]["psnr"] for result in found.values()}) == 3


def _on_two(argv):
    assert _run(argv) == 0


@pytest.mark.slow
@pytest.mark.dist
def test_a_tokenizer_on_two_processes(ranks, held_out, trained, tmp_path):
    for name, world, more in (("one", 1, []), ("two", 2, ["--codes", 2])):
        options = _options(held_out, "--inception", "x", "--out", tmp_path / name, *more)
        ranks(world, _on_two, [str(word) for word in ["tokenizer", trained, *options]])
    one, two = _result(tmp_path / "one"), _result(tmp_path / "two")
    assert one["numbers"] == pytest.approx(two["numbers"], rel=1e-6)
    assert one["tokenizer"] == two["tokenizer"]
    assert (one["processes"], two["processes"]) == (1, 2)


def test_samples_from_the_command_line(held_out, tmp_path, capsys):
    draw = np.random.default_rng(0)
    samples, reference = (tmp_path / f"{name}.npz" for name in ("samples", "reference"))
    np.savez(samples, draw.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8))
    np.savez(reference, draw.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8))
    assert _run(["samples", samples, "--reference", reference, "--inception", "x", "--out", tmp_path / "out"]) == 0
    result = _result(tmp_path / "out")
    assert result["numbers"].keys() == {"fid", "sfid", "inception_score", "precision", "recall", "images"}
    assert result["protocol"]["reference images"] == 9
    shutil.copy(samples, reference)
    assert _run(["samples", samples, "--reference", reference, "--inception", "x", "--out", tmp_path / "out"]) == 0
    assert _result(tmp_path / "out")["numbers"]["fid"] == pytest.approx(0, abs=1e-9)
    assert _result(tmp_path / "out")["numbers"]["recall"] == 1
    assert "page: " in capsys.readouterr().out


def test_bad_input_is_told_and_nothing_is_written(held_out, trained, tmp_path, capsys):
    def refused(argv, *parts):
        assert _run(argv) == 2
        complaint = capsys.readouterr().err
        assert complaint.startswith("error: ")
        for part in parts:
            assert part in complaint, complaint

    ask = ["tokenizer", trained]
    refused([*ask, *_options(held_out, "--vgg", "a")], "LPIPS takes two files, and one was given")
    refused([*ask, *_options(held_out, "--reference", "a", "--save-stats", "b")], "no --inception", "give one")
    refused([*ask, "--shards", tmp_path / "*.tar"], "matches no file", "change the pattern")
    refused([*ask, *_options(held_out, "--image-size", 18)], "samples of 18 x 18 cannot be cut into tokens of 4 x 4")
    refused([*ask, *_options(held_out, "--codes", 2)], "--codes 2 does not divide the 1 processes")
    refused(["tokenizer", tmp_path / "none", *_options(held_out)], "does not exist")
    refused(["statistics", tmp_path / "o", *_options(held_out, "--inception", "x", "--images", 3)], "at least 4, or 0")
    np.savez(tmp_path / "other.npz", mu=np.zeros(9), sigma=np.eye(9))
    with_other = _options(held_out, "--inception", "x", "--reference", tmp_path / "other.npz", "--out", tmp_path / "o")
    refused([*ask, *with_other], "statistics of 6 and of 9 features", "the same network")
    np.savez(tmp_path / "images.npz", np.zeros((4, 8, 8, 3), np.uint8))
    with_images = _options(held_out, "--inception", "x", "--reference", tmp_path / "images.npz")
    refused([*ask, *with_images], "has images and no statistics")
    assert _tool().main([*map(str, ask), *map(str, _options(held_out, "--inception", tmp_path / "none.pth"))]) == 2
    assert "nothing is downloaded at run time" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_help_needs_no_torch():
    code = "import sys, runpy\nsys.argv = ['evaluate.py', '--help']; sys.path[:0] = ['tools']\n"
    code += "try:\n    runpy.run_path('tools/evaluate.py', run_name='__main__')\n"
    code += "except SystemExit as end:\n    assert not end.code\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("tokenizer", "statistics", "samples", "prior"))
