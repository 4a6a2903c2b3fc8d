"""Squares of photographs: against the pictures cut by numpy, all on one side of a split, and broken files named."""

from __future__ import annotations

import io
import json
import logging
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqscale.data import samples
from vqscale.data.config import ImagesConfig
from vqscale.data.made import photographs
from vqscale.data.made.squares import CropsConfig, box, split
from vqscale.data.pixels import decode
from vqscale.programs.commands.shards import arguments, main


def picture(number: int, width: int = 40, height: int = 30) -> Image.Image:
    """No two pixels of it are alike, nor of two of them."""
    down, across = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([across * 5, down * 7, (across + down) * 2 + number], -1).astype(np.uint8))


def packed(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures of six formats in folders, one of them twice, two broken ones, and what is no picture."""
    kinds = [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("tif", "TIFF"), ("bmp", "BMP"), ("gif", "GIF")]
    files = {f"a/{n}.{suffix}": packed(picture(n), kind) for n, (suffix, kind) in enumerate(kinds)}
    files |= {f"b/deep/er/p {n}\n'.é.PNG": packed(picture(n)) for n in range(10, 14)}
    files |= {"b/copy.png": files["a/0.png"], "b/cut.jpg": files["a/1.jpg"][:300]}
    files |= {"small.png": packed(picture(20, 9, 9)), "notes.txt": b"hello", "a/.thumb.png": packed(picture(21))}
    for name, data in files.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "in"


def words(folder: Path, *more: str) -> list[str]:
    return ["--source", str(folder), "--out", str(folder.parent / "out"), "--crops", "6", "--size", "10", *more]


def squares(place: Path, name: str = "train") -> dict[str, tuple[dict, np.ndarray, str | None]]:
    """(facts, pixels, class) of every sample by its key, by tarfile."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(place.glob(f"{name}-*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                key, suffix = info.name.split(".")
                found.setdefault(key, {})[suffix] = tar.extractfile(info).read()
    return {
        key: (json.loads(made["json"]), np.asarray(Image.open(io.BytesIO(made["png"]))), made.get("cls"))
        for key, made in found.items()
    }


def test_a_square_is_the_part_of_its_picture_that_it_says(folder: Path) -> None:
    assert main(words(folder, "--scales", "10")) == 0  # of their own size, so that nothing is resampled
    made = squares(folder.parent / "out")
    assert Counter(facts["file"] for facts, _, _ in made.values()) == Counter(
        {str(path.relative_to(folder)): 6 for path in [*folder.glob("a/[0-9]*"), *folder.glob("b/deep/er/*")]}
    )
    for facts, pixels, label in made.values():
        left, top, right, bottom = facts["box"]
        whole = np.asarray(Image.open(folder / facts["file"]).convert("RGB"))
        assert np.array_equal(pixels, whole[top:bottom, left:right])
        assert facts["class"] == facts["file"][0] == "ab"[int(label)]
    assert len({tuple(facts["box"]) for facts, _, _ in made.values()}) > 30


def test_a_run_reads_them_and_neighbours_are_of_many_photographs(folder: Path) -> None:
    assert main(words(folder, "--shard-size", "16")) == 0
    config = ImagesConfig(
        f"{folder.parent}/out/train-*.tar", image_size=10, num_workers=0, index_dir=str(folder.parent)
    )
    (batch,) = samples.SampleStream(config, batch=60, train=False).batches(0)
    assert batch.valid.all()
    assert sorted(batch.labels.tolist()) == [0] * 36 + [1] * 24
    assert len({key.split("-")[0] for key in batch.keys[:16]}) > 5


def test_sides_go_from_the_shortest_to_what_the_photograph_has() -> None:
    config = CropsConfig(1, size=8, scales=(8, 64))
    sides = []
    for number in range(4000):
        left, top, right, bottom = box(config, "digest", number, (100, 32))
        assert right - left == bottom - top
        assert 0 <= left < right <= 100
        assert 0 <= top < bottom <= 32
        sides.append(right - left)
    assert (min(sides), max(sides)) == (8, 32)
    # the logarithm is uniform: as many between 8 and 16 as between 16 and 32
    assert abs(np.mean(np.array(sides) < 16) - 0.5) < 0.05


def test_pictures_lie_as_their_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    (tmp_path / "in").mkdir()
    (tmp_path / "in/turned.png").write_bytes(packed(picture(0), exif=exif))
    assert main(words(tmp_path / "in", "--scales", "10,30")) == 0
    upright = Image.fromarray(np.ascontiguousarray(np.rot90(np.asarray(picture(0)), -1)))
    for facts, pixels, label in squares(tmp_path / "out").values():
        wanted = upright.resize((10, 10), Image.Resampling.BICUBIC, box=facts["box"])
        assert np.array_equal(pixels, np.asarray(wanted))
        assert label is None


def test_squares_depend_on_bytes_and_seed_and_on_no_name_or_neighbour(folder: Path) -> None:
    assert main(words(folder)) == 0
    first = squares(folder.parent / "out")
    (folder / "a/0.png").rename(folder / "z.png")
    (folder / "b/new.png").write_bytes(packed(picture(30)))
    assert main([*words(folder), "--out", str(folder.parent / "again")]) == 0
    second = squares(folder.parent / "again")
    assert len(second) == len(first) + 6
    for key, (facts, pixels, _) in first.items():
        assert np.array_equal(pixels, second[key][1])
        assert facts["box"] == second[key][0]["box"]
    assert main([*words(folder), "--out", str(folder.parent / "other"), "--seed", "1"]) == 0
    other = squares(folder.parent / "other")
    assert sum(other[key][0]["box"] == second[key][0]["box"] for key in other) < len(other) // 4


def test_the_same_command_makes_the_same_bytes(folder: Path) -> None:
    for place in ("one", "two"):
        assert main([*words(folder, "--held-out", "0.3"), "--out", str(folder.parent / place)]) == 0
    made = sorted((folder.parent / "one").glob("*.tar"))
    assert [path.name for path in made] == ["train-0000.tar", "val-0000.tar"]
    for path in made:
        assert path.read_bytes() == (folder.parent / "two" / path.name).read_bytes()


def test_photographs_are_held_out_with_all_their_squares(folder: Path) -> None:
    assert main(words(folder, "--held-out", "0.3")) == 0
    parts = [squares(folder.parent / "out", name) for name in ("train", "val")]
    counts = [Counter(key.split("-")[0] for key in part) for part in parts]
    assert [len(count) for count in counts] == [7, 3]
    assert {*counts[0].values(), *counts[1].values()} == {6}
    assert not counts[0].keys() & counts[1].keys()
    assert json.loads((folder.parent / "out/_info.json").read_text())["splits"]["val"]["num_samples"] == 18


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.01, 1), (0.2, 2), (0.99, 9)])
def test_both_sides_of_a_split_have_photographs(share: float, count: int) -> None:
    digests = [f"{number:032x}" for number in range(10)]
    train, held_out = split(digests, share, seed=3)
    assert sorted(train + held_out) == list(range(10))
    assert len(held_out) == count
    backwards = split(digests[::-1], share, seed=3)[1]
    assert {digests[place] for place in held_out} == {digests[::-1][place] for place in backwards}


def test_what_is_left_out_is_named_and_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (folder / "a/postscript.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n")
    assert main(words(folder)) == 0
    assert "10 photographs, 1 copies" in caplog.text
    assert "3 files are left out:\n  'a/postscript.jpg': these 63 bytes" in caplog.text
    assert "'b/cut.jpg': " in caplog.text
    assert "'small.png': 9 x 9 pixels are less than the 10" in caplog.text
    assert "1 of .txt" in caplog.text


def test_no_program_is_started_by_a_picture() -> None:
    """Pillow gives EPS to Ghostscript; here it is no image, whatever the file is called."""
    with pytest.raises(ValueError, match="are no image"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-broken", "1"], "2 files in .* at most 1 may: .* raise --max-broken.*'b/cut.jpg'"),
        (["--scales", "31,90", "--max-broken", "99"], "no picture in .* of which squares can be cut"),
        (["--source", "{in}/nowhere"], "nowhere is not a folder"),
        (["--source", "{in}/b/deep", "--held-out", "0.5", "--size", "10"], None),
        (["--source", "{in}/one", "--held-out", "0.5"], "1 photograph, of which 0.5 cannot be held out"),
    ],
)
def test_a_folder_of_which_nothing_is_made_leaves_nothing(
    folder: Path, more: list[str], message: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "one").mkdir()
    (folder / "one/0.png").write_bytes(packed(picture(0)))
    status = main(words(folder, *(word.replace("{in}", str(folder)) for word in more)))
    assert status == (0 if message is None else 2)
    if message is not None:
        assert re.search(message, capsys.readouterr().err, re.S)
        assert not (folder.parent / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--scales", "9,20"], "squares of 9 pixels would be enlarged to the 10"),
        (["--scales", "30,20"], "begin at 30 and end at 20"),
        (["--size", "4"], "size is 4, but must be at least 8"),
        (["--max-broken", "-1"], "max_broken is -1"),
        (["--held-out", "1"], "a share is at least 0 and below 1"),
        (["--held-out", "0.5", "--name", "val"], "--name is val"),
        (["--name", "a/b"], "without a folder"),
        (["--source", "shapes", "--scales", "10,20"], "--scales is about squares of photographs"),
    ],
)
def test_words_of_which_nothing_can_be_made(tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(words(tmp_path / "in", *more))


def test_what_is_in_the_way_of_one_part_is_said_before_the_other_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(folder, "--held-out", "0.3")) == 0
    out = folder.parent / "out"
    (out / "train-0000.tar").unlink()
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert main(words(folder, "--held-out", "0.3", "--seed", "1")) == 2
    assert "take another folder, or delete the old shards" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert main(words(folder, "--held-out", "0.3")) == 0  # the same again makes what is missing
    assert (out / "train-0000.tar").exists()


def test_a_group_is_cut_at_once_and_mixed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CropsConfig(6, size=10)
    found = photographs.find(folder, config)
    whole, _ = photographs.plans(folder, found, config)
    decoded = Counter[bytes]()

    def counting(data: bytes) -> Image.Image:
        decoded[data] += 1
        return decode(data)

    monkeypatch.setattr(photographs, "MOST_BYTES", 3 * 10 * 10 * 6 * 4)  # four photographs
    monkeypatch.setattr(photographs, "decode", counting)
    grouped, _ = photographs.plans(folder, found, config)
    keys = [grouped.sample(number)["__key__"] for number in range(60)]
    assert sorted(keys) == sorted(whole.sample(number)["__key__"] for number in range(60))
    assert [len({key.split("-")[0] for key in keys[at : at + 24]}) for at in (0, 24, 48)] == [4, 4, 2]
    assert keys[:24] != sorted(keys[:24])
    assert set(decoded.values()) == {2}  # once for each of the two plans


def test_a_photograph_that_changes_meanwhile_is_an_error(folder: Path) -> None:
    config = CropsConfig(2, size=10)
    plan, _ = photographs.plans(folder, photographs.find(folder, config), config)
    (folder / "a/0.png").write_bytes(packed(picture(40)))
    with pytest.raises(ValueError, match=r"a/0\.png has other bytes than when the folder was opened"):
        plan.sample(0)
