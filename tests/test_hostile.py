"""Files that are damaged, made to harm, or not what they were: a clear error or a broken sample, bounded memory, and
nothing of the user's lost."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import shard_files
import torch
from PIL import Image
from saved_runs import IBQ, images, small, write_run
from test_strangers import reseal

from vqscale import Tokenizer
from vqscale import config as configuration
from vqscale.data.config import ImagesConfig
from vqscale.data.pixels import MOST_ASPECT, augment, resize_short, views
from vqscale.data.samples import SampleStream
from vqscale.data.shards import contents, index, tar
from vqscale.data.shards.patterns import expand
from vqscale.disk import checkpoint, files, manifest
from vqscale.disk.held import Held
from vqscale.disk.writer import Writer
from vqscale.parallel.mesh import Mesh
from vqscale.run import checkout, folder
from vqscale.show import document, page, study_page
from vqscale.train.config import Run

ROOT = Path(__file__).resolve().parents[1]
STRANGE = [
    "sweep #1",
    "a: b",
    "a, b",
    "a}b",
    "2024",
    "@x",
    "*x",
    "&x",
    "{x}",
    "%x",
    "g=h",
    "it's",
    '"q"',
    "- x",
    "null",
]


@pytest.mark.parametrize("name", STRANGE)
def test_a_path_in_a_command_of_the_quickstart_is_that_path(name):
    script = 'source launch/environment.sh; quoted "$1"'
    said = subprocess.run(["bash", "-c", script, "_", name], cwd=ROOT, capture_output=True, text=True, check=True)
    config = configuration.load(Run, ROOT / "configs/quickstart/tokenizer.yaml", [f"run.folder={said.stdout}"])
    assert config.run.folder == name


@pytest.mark.parametrize("script", ["quickstart", "sound", "dense"])
def test_every_path_that_a_script_puts_into_an_override_is_quoted(script):
    text = re.sub("^#.*", "", (ROOT / "launch" / f"{script}.sh").read_text(), flags=re.MULTILINE)
    keys = "run.folder|tokenizer|data.train.path|data.val.path|data.train.shards|data.val.shards"
    values = [value for _, value in re.findall(rf"[ (\"]({keys})=([^\s(*]\S*)", text)]
    assert values
    assert all(value.startswith(('"$(quoted', "$(quoted")) for value in values)


@pytest.mark.parametrize(("processes", "started"), [(1, []), (2, ["-m", "vqscale.parallel.local", "2"])])
def test_the_scripts_start_what_does_not_listen_to_the_network(processes, started):
    """test_local.py has what it listens on."""
    script = 'python() { echo python "$@"; }; source launch/environment.sh; start a b'
    environment = {**os.environ, "processes": str(processes)}
    said = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    assert said.stdout.split() == ["python", *started, "a", "b"]


def test_thin_images_take_memory_by_their_pixels(tmp_path):
    """65,000 x 1 pixels, 256 high, would be 17 GB."""
    config = ImagesConfig("x.tar", image_size=8, num_workers=0)
    for size in ((65_000, 1), (1, 65_000)):
        thin = Image.fromarray(np.arange(65_000, dtype=np.int64).astype(np.uint8).reshape(size[1], size[0])).convert(
            "RGB"
        )
        resized = resize_short(thin, 256, "bicubic")
        assert max(resized.size) == 256 * MOST_ASPECT
        assert augment(thin, config, None).shape == (8, 8, 3)
        assert views(thin, config, "ten_crop").shape[1:] == (8, 8, 3)
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20 * MOST_ASPECT, 3), dtype=np.uint8))
    assert resize_short(wide, 20, "bicubic") is wide
    longer = Image.new("RGB", (20 * MOST_ASPECT + 400, 20))
    longer.paste(wide, (200, 0))
    assert np.array_equal(augment(longer, config, None), augment(wide, config, None))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_ids_of_any_whole_numbers_are_the_same_image(kind):
    tokenizer = small()
    ids = torch.arange(16).view(1, 4, 4) % 12 + 1
    assert torch.equal(tokenizer.decode(ids.to(kind)), tokenizer.decode(ids))
    ids = torch.ones(13 * 4, dtype=torch.int64).view(-1, 2, 2)  # as many as there are codes: a mask would fit
    assert torch.equal(tokenizer.decode(ids.to(kind)), tokenizer.decode(ids))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_ids(value):
    for quantizer in (
        IBQ,
        {"name": "vq", "num_codes": 13, "dim": 4, "init": "normal"},
        {"name": "fsq", "levels": [5, 3]},
    ):
        tokenizer, samples = small(quantizer=quantizer), images()
        assert tokenizer.encode(samples).dtype == torch.int64
        samples[1, 0, 3, 3] = value
        with pytest.raises(FloatingPointError, match=r"\d+ of 32 latents are not finite, and have no nearest code"):
            tokenizer.encode(samples)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    tokenizer = small()
    with torch.no_grad():
        tokenizer.quantizer.codebook.rows[2, 1] = float("nan")
    tokenizer.save(tmp_path)
    with pytest.raises(ValueError, match=r"quantizer.codebook.rows has values that are not finite"):
        Tokenizer.load(tmp_path)


def test_a_shard_that_is_exchanged_under_its_size_and_time_is_read_again(tmp_path):
    old, new = (tmp_path / name for name in ("s-0.tar", "new.tar"))
    shard_files.write_tar(old, [m for n in range(4) for m in shard_files.sample(n)])
    shard_files.write_tar(new, [m for n in range(4, 8) for m in shard_files.sample(n)])
    assert old.stat().st_size == new.stat().st_size
    os.utime(new, ns=(old.stat().st_atime_ns, old.stat().st_mtime_ns))
    config = ImagesConfig(str(old), index_dir=str(tmp_path / "index"))
    assert index.build(config).samples.labels.tolist() == [0, 1, 2, 3]
    time.sleep(0.02)
    subprocess.run(["cp", "-p", str(new), str(old)], check=True)
    assert index.build(config).samples.labels.tolist() == [4, 5, 6, 0]


def test_the_diff_of_a_run_is_of_this_code_and_of_no_project_around_it(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    shutil.copytree(ROOT / "vqscale" / "run", tmp_path / "vqscale" / "run")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / ".env").write_text("KEY=old")
    subprocess.run([*git[:3], "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "all"], check=True)
    (tmp_path / ".env").write_text("KEY=secret")
    (tmp_path / "vqscale" / "run" / "seed.py").write_text("")
    (tmp_path / "vqscale" / "run" / "machine.py").write_text("changed = 1\n")
    monkeypatch.setattr(folder, "checkout", lambda: tmp_path)
    name, diff = folder._git()
    assert len(name) == 40
    assert "changed = 1" in diff
    assert "secret" not in diff
    inner = tmp_path / "third_party" / "vqscale"
    inner.mkdir(parents=True)
    monkeypatch.setattr(folder, "checkout", lambda: inner)
    assert folder._git() == ("unknown", "")


def test_another_project_is_no_checkout(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "vqscale" / "run").mkdir(parents=True)
    monkeypatch.setattr(checkout, "__file__", str(tmp_path / "vqscale" / "run" / "checkout.py"))
    for text in ("", '[project]\nname = "theirs"\n'):
        (tmp_path / "pyproject.toml").write_text(text)
        assert checkout.checkout() is None
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "vqscale"\n')
    assert checkout.checkout() == tmp_path


def test_what_a_study_says_is_text_on_its_page():
    script = "<script>alert(1)</script>"
    line = {"run": script, "status": "failed", "error": f"{script} <img src=x onerror=alert(1)>", script: script}
    told = study_page._failures([line]) + page.paragraphs([script]) + page.table([line], {script: "{}", "run": "{}"})
    told += page.page(script, [(script, page.img(b"", script))])
    assert told.count("<script>") == 1  # the page's own
    assert f"<script>{document.SCRIPT}</script>" in told
    assert "<img src=x" not in told
    assert html.escape(script) in told


def test_a_tokenizer_that_is_saved_over_another_on_a_full_disk_leaves_that(tmp_path, monkeypatch):
    first = small()
    first.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    original = files.write_json

    def full(path, value):
        if Path(path).name.startswith("card.json"):
            raise OSError(28, "No space left on device")
        original(path, value)

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(checkpoint.CheckpointError, match="No space left"):
        small(seed=2).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert Tokenizer.load(tmp_path).fingerprint == first.fingerprint


def test_odd_members_are_broken_samples_and_unknown_labels(tmp_path):
    tar = tmp_path / "a.tar"
    shard_files.write_tar(
        tar, [("a.json", b"[" * 200_000), ("a.png", shard_files.png(1)), ("b.png", shard_files.png(2))]
    )
    with open(tar, "rb") as file:
        found = contents.read_contents(file.fileno(), [("png",)])
    assert found.labels.tolist() == [-1, -1]
    large = tmp_path / "large.tar"
    info = tarfile.TarInfo("c.png")
    info.size = 5 << 30
    with large.open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + info.size)
        file.seek(512 + info.size)
        file.write(tar.read_bytes())
    config = ImagesConfig(str(large), image_size=8, num_workers=0, index_dir=str(tmp_path))
    (batch,) = SampleStream(config, 4, train=False).batches(0)
    assert batch.valid.tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        ("a-{0..99999999}.tar", "names 100000000 shards, and at most 1000000 are read"),
        ("{a,b}" * 40 + ".tar", "names 1099511627776 shards"),
        ("${NOBODY_SET_IT}/a.tar", "in the environment: set it"),
    ],
)
def test_a_pattern_of_too_many_shards_is_refused(pattern, rule):
    with pytest.raises(ValueError, match=rule):
        expand([pattern])


def test_a_header_of_very_many_records_is_read_by_its_length():
    records = b"4 =\n" * 250_000 + b"12 path=abc\n"
    assert tar._extended(records, None) == ("abc", None)
    for wrong in (b"0 a=b\n", b"99 a=b\n", b"x a=b\n", b"-5 a=b\n", b"a" * 30, b"1 "):
        with pytest.raises(ValueError):
            tar._extended(wrong, None)


@pytest.mark.parametrize("change", ["facts", "stamps", "counts", "less", "more"])
def test_an_index_that_does_not_fit_together_is_made_again(tmp_path, change):
    shard_files.write_shards(tmp_path, [3])
    config = ImagesConfig(str(tmp_path / "s-0.tar"), index_dir=str(tmp_path / "index"))
    labels = index.build(config).samples.labels.tolist()
    (path,) = (tmp_path / "index").glob("*.npz")
    with np.load(path) as file:
        arrays = dict(file)
    facts = json.loads(arrays["facts"].tobytes())
    told = {"facts": [1, 2], "stamps": {**facts, "stamps": []}}.get(change, facts)
    arrays["facts"] = np.frombuffer(json.dumps(told).encode(), np.uint8)
    arrays["counts"] = {"counts": np.array([10**12]), "less": np.array([-3]), "more": np.array([4])}.get(
        change, arrays["counts"]
    )
    np.savez(path, **arrays)
    assert index.build(config).samples.labels.tolist() == labels


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", small())


def _step(run: Path) -> Path:
    return run / "checkpoints" / "0000000007"


@pytest.mark.parametrize("name", ["/dev/zero", "../../run.yaml", "rows/../../../run.yaml"])
def test_a_manifest_names_files_of_its_folder_alone(run, name):
    old = manifest.read(_step(run))
    manifest.write(_step(run), {**old, "files": {**old["files"], name: {"bytes": 0, "sha256": ""}}})
    with pytest.raises(ValueError, match=rf"manifest.json names {name}, which is not in its folder"):
        Tokenizer.load(run)


def test_a_pipe_in_a_checkpoint_is_not_waited_for(run):
    os.mkfifo(_step(run) / "pipe")
    old = manifest.read(_step(run))
    manifest.write(_step(run), {**old, "files": {**old["files"], "pipe": {"bytes": 0, "sha256": ""}}})
    with pytest.raises(ValueError, match="pipe is no file"):
        Tokenizer.load(run)
    (_step(run) / "device").symlink_to("/dev/zero")
    manifest.write(_step(run), {**old, "files": {**old["files"], "device": {"bytes": 0, "sha256": ""}}})
    with pytest.raises(ValueError, match="device is no file"):
        Tokenizer.load(run)


@pytest.mark.parametrize("kind", ["rows", "ranges"])
@pytest.mark.parametrize("parts", [[], [[0, 1, 0]], [[0, 99, 0]], "text", [["a", "b", 0]], None])
def test_a_tensor_of_which_parts_are_missing_is_no_weights(run, kind, parts):
    layout = manifest.read(_step(run))
    for name, entry in layout[kind].items():
        if name.startswith("parameter/"):
            entry["parts"] = parts
    reseal(_step(run), **{kind: layout[kind]})
    with pytest.raises(ValueError, match="is no checkpoint that was written here"):
        Tokenizer.load(run)


@pytest.mark.parametrize(
    "changed", [{"rows": []}, {"rows": {"a": {}}}, {"rows": {"a": 3}}, {"files": []}, {"files": {"a": 3}}]
)
def test_a_manifest_of_another_form_is_refused(run, changed):
    manifest.write(_step(run), {**manifest.read(_step(run)), **changed})
    with pytest.raises(ValueError, match="checkpoint"):
        Tokenizer.load(run)


def test_the_type_of_a_tensor_is_one_of_torch(run):
    layout = manifest.read(_step(run))
    for entry in layout["rows"].values():
        entry["dtype"] = "load"
    reseal(_step(run), rows=layout["rows"])
    with pytest.raises(ValueError, match="has the type load"):
        Tokenizer.load(run)


ANCHORS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    "text", [ANCHORS, "[" * 5000, "tokenizer: " + "{a: " * 3000, "\x00", "tokenizer: !!python/name:os.system"]
)
def test_the_config_of_a_run_is_read_as_configs_are(run, text):
    (run / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"run\.yaml"):
        Tokenizer.load(run)


@pytest.mark.parametrize("name", ["summary.json", "tokens.json", "init.json"])
@pytest.mark.parametrize("text", ["{", "[1]", "3", "[" * 100_000])
def test_damaged_facts_of_a_run_are_named(run, text, name):
    (run / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} cannot be read .*: copy it again, or remove it"):
        Tokenizer.load(run)
    (run / name).unlink()
    assert Tokenizer.load(run)


def save(place: Path, step: int, keep: int = 1) -> None:
    with Writer(place, Mesh(), keep) as writer:
        writer.save(step, {"x": Held(torch.ones(3), 0, (3,))}, {}, {})


def test_links_and_strange_names_beside_checkpoints_end_no_save(tmp_path, caplog):
    place, archive = tmp_path / "checkpoints", tmp_path / "archive"
    save(place, 2)
    shutil.move(place / "0000000002", archive)
    (place / "0000000002").symlink_to(archive)
    (place / "notes.tmp").write_text("mine")
    (place / "mine.tmp").mkdir()
    (place / "0000000003.tmp").write_text("a file")
    (place / "0000000001.old.tmp").mkdir()
    (place / "0000000004.0123abcd.tmp").mkdir()
    (place / "left-abcd.tmp").mkdir()
    for step in (4, 6):
        save(place, step)
    assert sorted(path.name for path in place.iterdir()) == ["0000000006", "mine.tmp", "notes.tmp"]
    assert manifest.damage(archive) is None


def test_what_cannot_be_tidied_up_is_a_warning(tmp_path, caplog, monkeypatch):
    save(tmp_path, 2)
    monkeypatch.setattr(files, "remove", lambda path: (_ for _ in ()).throw(OSError("busy")))
    save(tmp_path, 4)
    assert checkpoint.latest(tmp_path)[0] == tmp_path / "0000000004"
    assert "cannot be removed (busy): remove it by hand" in caplog.text
