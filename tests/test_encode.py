"""tools/encode.py: the same bytes on any number of processes and after any interruption; what it says of bad input."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from jobs import at_call, hear
from PIL import Image
from shard_files import member_offset, patch, write_tar

from vqscale import config as configuration
from vqscale.data import pixels
from vqscale.data.config import VIEWS, ImagesConfig
from vqscale.data.config_tokens import TokensConfig
from vqscale.data.made import shapes
from vqscale.data.tokens import format as form
from vqscale.data.tokens.stream import Cache, TokenStream
from vqscale.disk.owner import own
from vqscale.parallel.spawn import RankError
from vqscale.programs.commands import encode as command
from vqscale.run import folder as run_folder
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.model import Tokenizer

TOOL = Path(__file__).parent.parent / "tools/encode.py"
SIDE, COUNTS = 16, (20, 17)  # of the two shards; 37 images are 5 storage shards of 8
NUM = sum(COUNTS)
NET = {"channels": 8, "multipliers": [1, 1], "patch": 2, "num_blocks": 1, "z_channels": 6, "num_groups": 4} | {
    "attention_levels": [],
    "mid_attention": False,
}
IBQ = {"name": "ibq", "num_codes": 101, "dim": 6, "init": "normal"}


def write_tokenizer(folder: Path, quantizer=IBQ, seed: int = 1) -> Path:
    config = configuration.parse(TokenizerConfig, {"net": NET, "quantizer": quantizer})
    return Tokenizer.from_config(config, seed=seed).save(folder)


def picture(number: int) -> np.ndarray:
    """Higher than wide, so that its middle is cut out."""
    return shapes.draw(number, 2 * SIDE, 0)[0][: 2 * SIDE, : SIDE + number % SIDE]


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(number)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tokenizer and two shards. Not to be changed."""
    folder = tmp_path_factory.mktemp("encode")
    write_tokenizer(folder / "tokenizer")
    numbers = iter(range(NUM))
    for shard, count in enumerate(COUNTS):
        chosen = [next(numbers) for _ in range(count)]
        members = [
            (f"{n:03d}.{kind}", data) for n in chosen for kind, data in (("cls", b"%d" % (n % 7)), ("png", png(n)))
        ]
        write_tar(folder / f"s-{shard}.tar", members)
    return folder


def words(place: Path, out: Path, *options: str) -> list[str]:
    settings = ["--batch", "6", "--storage", "8", "--image-size", str(SIDE), "--workers", "0", "--device", "cpu"]
    shards = [] if "--shards" in options else ["--shards", f"{place}/s-{{0..1}}.tar"]
    return [str(place / "tokenizer"), str(out), *shards, *settings, "--index-dir", str(place / "index"), *options]


def start(argv: list[str], before=None) -> tuple[int, str]:
    """(status, all that was said) of the tool in this process, which has a rank if there are several."""
    torch.set_num_threads(1)
    said = io.StringIO()
    number = int(os.environ.get("RANK", "0"))
    handlers = {name: signal.getsignal(name) for name in run_folder.STOP_SIGNALS}
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.MonkeyPatch.context() as changes:
        if before is not None:
            before(number, changes)
        try:
            status = runpy.run_path(str(TOOL))["main"](argv)
        except SystemExit as left:
            status = int(left.code or 0)
    for name, handler in handlers.items():
        signal.signal(name, handler)
    return status, said.getvalue()


def at(target: str, number: int, on_rank: int, action, rank: int, changes) -> None:
    """For `before`: an action on one rank before the number-th call of module:Class.method or module:function."""
    module, _, path = target.partition(":")
    owner = sys.modules.get(module) or __import__(module, fromlist=["x"])
    for part in path.split(".")[:-1]:
        owner = getattr(owner, part)
    name = path.split(".")[-1]
    changes.setattr(owner, name, getattr(owner, name))  # put back afterwards
    at_call(target, number, action, on_rank, rank)


AGREED = "vqscale.programs.encode:_Work._agree"
CARD = "vqscale.data.tokens.format:write_card"


def encode(argv: list[str], ranks=None, world: int = 1, before=None) -> str:
    """Start the tool on that many processes, which must end well; what rank 0 said."""
    answers = ranks(world, start, argv, before) if world > 1 else [start(argv, before)]
    assert [status for status, _ in answers] == [0] * world, answers
    return answers[0][1]


def files(out: Path) -> dict[str, dict]:
    """What was sealed, but for the card, which names the command."""
    return json.loads((out / "manifest.json").read_text())["files"] | {"card.json": {}}


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """The cache made by one process to which nothing happened, two views."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    said = encode(words(place, out, "--views", "flip"))
    assert f"encoded 37 images x 2 views x 4 x 4 ids of 101 codes in {out}; 37 images in " in said
    return out


def test_what_is_encoded_are_the_ids_of_the_views(place, whole):
    tokenizer = Tokenizer.load(place / "tokenizer")
    cache = Cache(whole)
    cache.expect(tokenizer.fingerprint, 101, (4, 4), 1)
    wrong = 0
    for number in range(NUM):
        image = Image.fromarray(picture(number))
        width, height = image.size
        image = image.resize((SIDE, SIDE * height // width), Image.Resampling.BICUBIC)
        top = (image.height - SIDE) // 2
        square = np.asarray(image)[top : top + SIDE].astype(np.float32) / 127.5 - 1
        views = torch.from_numpy(np.stack([square, square[:, ::-1]]).transpose(0, 3, 1, 2).copy())
        wrong += int((tokenizer.encode(views).numpy() != cache.ids[number]).sum())
        assert (cache.labels[number], cache.key(number)) == (number % 7, f"{number:03d}")
    assert wrong <= 2  # of 1184; a tie within rounding may fall the other way in a batch of another size
    assert len(np.unique(cache.ids[:])) > 20


def test_the_stream_of_what_was_encoded(place, whole):
    stream = TokenStream(TokensConfig(str(whole), window_shards=2), 37)
    batch = next(iter(stream.batches()))
    assert sorted(batch.numbers.tolist()) == list(range(NUM))
    assert stream.fingerprint == TokenStream(TokensConfig(str(whole)), 8, 1, 2).fingerprint
    assert stream.tokenizer_fingerprint == Tokenizer.load(place / "tokenizer").fingerprint
    ids = zarr.open_group(str(whole), mode="r")["ids"][:]
    assert np.array_equal(ids[batch.numbers, batch.views], batch.ids.numpy())


@pytest.mark.dist
@pytest.mark.parametrize(("world", "codes"), [(2, 1), (2, 2)])
def test_any_number_of_processes_writes_the_same_bytes(place, whole, tmp_path, ranks, world, codes):
    """With a split codebook all ranks search together, also in the last of 3 rounds, where rank 1 has no images."""
    out = tmp_path / "cache"
    said = encode(words(place, out, "--views", "flip", "--codes", str(codes)), ranks, world)
    assert f"with {world} processes" in said
    assert files(out) == files(whole)


@pytest.mark.dist
def test_a_signal_ends_it_and_the_same_command_goes_on(place, whole, tmp_path, ranks):
    out = tmp_path / "cache"
    argv = words(place, out, "--views", "flip")
    before = partial(at, AGREED, 5, 1, partial(hear, signal.SIGTERM))  # in the second of three rounds of three steps
    answers = ranks(2, start, argv, before)
    assert [status for status, _ in answers] == [75, 75]
    assert f"stopped by SIGTERM: 2 of 5 storage shards of {out} are finished; the same command goes on" in answers[0][1]
    with pytest.raises(ValueError, match=r"2 of 5 storage shards are there, and no seal.*vqscale encode"):
        Cache(out)
    (out / "STOP").touch()
    status, said = start(argv)
    assert status == 75
    assert "stopped by the file STOP" in said
    assert "16 of 37 images are encoded already; 2 views of each, 3 storage shards to go" in said
    said = encode(argv, ranks, 2)
    assert "16 of 37 images are encoded already" in said
    assert "; 21 images in" in said
    assert files(out) == files(whole)


@pytest.mark.dist
def test_a_killed_process_leaves_a_cache_that_goes_on(place, whole, tmp_path, ranks):
    """Killed when the storage shard is written and its line is not: the ledger does not know it."""
    out = tmp_path / "cache"
    argv = words(place, out, "--views", "flip")
    with pytest.raises(RankError, match=r"rank . of 2 died"):  # rank 0 for want of rank 1
        ranks(2, start, argv, partial(at, "vqscale.disk.files:append", 2, 1, partial(hear, signal.SIGKILL)))
    assert (out / "ids" / "c.3.0.0.0").exists()
    assert {0, 1} <= set(form.finished(out, form.read_card(out))) <= {0, 1, 2}
    encode(argv)
    assert files(out) == files(whole)


def _full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("what", "call"), [(CARD, 1), ("vqscale.disk.manifest:seal", 3), (CARD, 2)])
def test_a_full_disk(place, whole, tmp_path, what, call):
    """At the beginning, at a storage shard, at the end."""
    out = tmp_path / "cache"
    argv = words(place, out, "--views", "flip")
    status, said = start(argv, partial(at, what, call, 0, _full))
    assert status == 1
    assert f"the disk of {out} is full (No space left on device): the storage shards that are finished stand" in said
    assert "Traceback" not in said
    encode(argv)
    assert files(out) == files(whole)


def test_a_finished_cache_is_done_and_left_alone(place, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    said = encode(words(place, whole, "--views", "flip"))
    assert f"{whole} is finished already: 37 images x 2 views x 4 x 4 ids of 101 codes" in said
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_damaged_cache_is_repaired_by_the_same_command(place, whole, tmp_path):
    out = tmp_path / "cache"
    subprocess.run(["cp", "-r", str(whole), str(out)], check=True)
    (out / "ids" / "c.3.0.0.0").unlink()
    assert "; 8 images in" in encode(words(place, out, "--views", "flip"))
    assert files(out) == files(whole)


def test_broken_images_are_left_out_and_listed(place, tmp_path):
    for shard in range(2):
        subprocess.run(["cp", str(place / f"s-{shard}.tar"), str(tmp_path)], check=True)
    for number in (4, 21):  # one in each shard
        path = tmp_path / f"s-{int(number >= COUNTS[0])}.tar"
        patch(path, member_offset(path, f"{number:03d}.png")[1] + 40, bytes(60))
    argv = [*words(place, tmp_path / "cache", "--shards", f"{tmp_path}/s-*.tar"), "--max-broken"]
    status, said = start([*argv, "1"])
    assert status == 1
    assert "error: 2 images or shards are broken, --max-broken is 1: repair or leave out the shards" in said
    assert "021: " in said
    assert "Traceback" not in said
    assert "2 broken images are left out" in encode([*argv, "2"])
    cache = Cache(tmp_path / "cache")
    assert [(number, key) for number, key, _ in cache.card.broken] == [(4, "004"), (21, "021")]
    assert np.all(cache.ids[[4, 21]] == -1)
    stream = TokenStream(TokensConfig(str(tmp_path / "cache")), 35)
    assert sorted(next(iter(stream.batches())).numbers.tolist()) == [n for n in range(NUM) if n not in (4, 21)]


def test_a_shard_that_cannot_be_read_is_no_broken_image(place, tmp_path):
    """What a disk does not give today it may give tomorrow: the cache waits for it."""
    subprocess.run(["cp", str(place / "s-0.tar"), str(tmp_path)], check=True)
    argv = words(place, tmp_path / "cache", "--shards", f"{tmp_path}/s-0.tar")
    content = (tmp_path / "s-0.tar").read_bytes()
    cut = partial((tmp_path / "s-0.tar").write_bytes, content[:1024])
    status, said = start(argv, partial(at, "vqscale.programs.encode:_begin", 1, 0, cut))
    assert status == 1
    assert "the same command goes on" in said
    assert "Traceback" not in said


def test_bad_input(place, whole, tmp_path):
    other = write_tokenizer(tmp_path / "other", seed=2)
    prints = [Tokenizer.load(folder).fingerprint for folder in (place / "tokenizer", other)]
    flip = words(place, whole, "--views", "flip")
    cases = [
        ([str(other), *flip[1:]], [f"tokenizer: {prints[0]} there, {prints[1]} now"]),
        (words(place, whole, "--views", "ten_crop"), ["views: ('center', 'center mirrored') there", "short_side: 16"]),
        (words(place, whole, "--shards", f"{place}/s-0.tar", "--views", "flip"), ["num_images: 37 there, 20 now"]),
        (words(place, tmp_path / "a", "--shards", f"{place}/t-*.tar"), ["no shard: the pattern", "t-*.tar"]),
        (words(place, tmp_path / "a", "--image-size", "15"), ["samples of 15 x 15 cannot be cut"]),
        (words(place, tmp_path / "a", "--resize", "8"), ["the short side is resized to 8"]),
        (words(place, tmp_path / "a", "--views", "ten_crop", "--resize", "16"), ["places of ten_crop are one"]),
        (words(place, tmp_path / "a", "--codes", "2"), ["--codes 2 does not divide the 1 processes that were started"]),
        (words(place, place), ["holds index, s-0.tar, s-1.tar ... and no card.json"]),
        (["nowhere", *words(place, tmp_path / "a")[1:]], ["nowhere"]),
        (words(place, place / "tokenizer"), ["does not describe a token cache"]),
    ]
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    for argv, expected in cases:
        status, said = start(argv)
        assert status == 2, said
        for text in ("error: ", *expected):
            assert text in said, said
        assert "Traceback" not in said
    without = words(place, tmp_path / "a")
    at_size = without.index("--image-size")
    status, said = start(without[:at_size] + without[at_size + 2 :])
    assert (status, "for images of which size it was trained: give --image-size" in said) == (2, True)
    assert not (tmp_path / "a").exists()
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_images_are_resized_as_the_tokenizer_knew_them(place, tmp_path):
    """The filter and the short side of its training, which its card says, unless others are asked for."""
    card = {"image_size": SIDE, "interpolation": "bilinear", "resize": SIDE + 2}
    Tokenizer.load(place / "tokenizer").save(tmp_path / "knows", card)
    argv = words(place, tmp_path / "cache", "--shards", f"{place}/s-0.tar")
    at_size = argv.index("--image-size")
    said = encode([str(tmp_path / "knows"), *argv[1:at_size], *argv[at_size + 2 :]])
    small = sum(min(picture(n).shape[:2]) < SIDE + 2 for n in range(COUNTS[0]))
    assert f"; {small} images had a shorter side than {SIDE + 2} and were enlarged" in said
    known = Cache(tmp_path / "cache").card
    assert (known.image_size, known.short_side, known.interpolation) == (SIDE, SIDE + 2, "bilinear")
    argv = words(place, tmp_path / "other", "--shards", f"{place}/s-0.tar", "--interpolation", "bicubic")
    assert "enlarged" not in encode([str(tmp_path / "knows"), *argv[1:]])
    other = Cache(tmp_path / "other").card
    assert (other.image_size, other.short_side, other.interpolation) == (SIDE, SIDE, "bicubic")


def test_two_writers_of_one_cache_are_one_too_many(place, tmp_path):
    out = tmp_path / "cache"
    with own(out, "the cache"):
        status, said = start(words(place, out))
    assert status == 2
    assert f"another process is writing the cache in {out}" in said


def test_several_ids_at_a_position(place, tmp_path):
    inner = {"name": "vq", "num_codes": 16, "dim": 6, "init": "normal"}
    write_tokenizer(tmp_path / "tokenizer", {"name": "residual", "levels": 2, "inner": inner})
    argv = words(place, tmp_path / "cache", "--shards", f"{place}/s-0.tar")
    said = encode([str(tmp_path / "tokenizer"), *argv[1:]])
    assert "20 images x 1 views x 4 x 4 x 2 ids of 16 codes" in said
    assert Cache(tmp_path / "cache").ids.shape == (20, 1, 4, 4, 2)
    assert Cache(tmp_path / "cache").card.digits == ()


def test_the_card_says_of_digits(place, tmp_path):
    write_tokenizer(tmp_path / "tokenizer", {"name": "fsq", "levels": [5, 3, 4]})
    argv = words(place, tmp_path / "cache", "--shards", f"{place}/s-0.tar")
    encode([str(tmp_path / "tokenizer"), *argv[1:]])
    assert Cache(tmp_path / "cache").card.digits == (4, 3, 5)


def test_help_answers_without_torch():
    code = f"""
import runpy, sys
sys.argv = ["encode.py", "--help"]
try:
    runpy.run_path({str(TOOL)!r}, run_name="__main__")
except SystemExit as left:
    assert not left.code
assert not {{"torch", "zarr", "webdataset"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--max-broken" in done.stdout


@pytest.mark.parametrize(("width", "height"), [(40, 60), (61, 40), (40, 40)])
def test_the_ten_views(width, height):
    draw = np.random.default_rng(0)
    image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
    config = ImagesConfig("x.tar", image_size=20, resize=22)
    views = pixels.views(image, config, "ten_crop")
    small = image.resize((22, 22 * height // width) if width <= height else (22 * width // height, 22), 3)
    all_pixels = np.asarray(small)
    left, top = (small.width - 22) // 2, (small.height - 22) // 2
    square = all_pixels[top : top + 22, left : left + 22]
    places = {"top left": (0, 0), "top right": (0, 2), "bottom left": (2, 0), "bottom right": (2, 2)}
    assert np.array_equal(views[0], pixels.augment(image, config, None))
    for view, name in zip(views, VIEWS["ten_crop"], strict=True):
        if not name.startswith("center"):
            y, x = places[name.removesuffix(" mirrored")]
            cut = square[y : y + 20, x : x + 20]
            assert np.array_equal(view, cut[:, ::-1] if name.endswith("mirrored") else cut)
    assert np.array_equal(views[5:], views[:5, :, ::-1])
    for kind in ("center", "flip"):
        assert np.array_equal(pixels.views(image, config, kind)[0], views[0])
    assert np.array_equal(pixels.views(image, config, "flip")[1], views[0][:, ::-1])


def test_samples_of_several_shapes_have_no_one_grid_and_are_not_encoded(capsys):
    with pytest.raises(SystemExit):
        command.arguments(["runs/some", "caches/some", "--shards", "a.tar", "--medium", "buckets"])
    assert "invalid choice: 'buckets'" in capsys.readouterr().err
