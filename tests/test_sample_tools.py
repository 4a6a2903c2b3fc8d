"""tools/sample.py and tools/sweep.py on a trained prior: what they draw is the prior's; what they say of bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jobs
import numpy as np
import prior_runs
import pytest
import test_sample
import torch
import yaml
from jobs import hear
from saved_runs import IBQ, small
from slow_metrics import Small
from test_sample import at

from vqscale.metrics.reconstruction import to_bytes
from vqscale.parallel.spawn import RankError
from vqscale.priors.base import Prior
from vqscale.programs.sampling import options
from vqscale.run import folder as run_folder
from vqscale.tokenizer.model import Tokenizer

pytestmark = pytest.mark.dist
TOOLS = Path(__file__).parents[1] / "tools"
QUICK = ("--device", "cpu", "--batch", "4")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tokenizer, another one, and two short runs of priors over ids of the first. Not to be changed."""
    folder = tmp_path_factory.mktemp("tools")
    codes = {**IBQ, "num_codes": prior_runs.CODES}
    tokenizer = small(quantizer=codes)
    tokenizer.save(folder / "tokenizer")
    small(quantizer=codes, seed=2).save(folder / "other")
    for split, number in (("train", prior_runs.NUM_TRAIN), ("val", prior_runs.NUM_VAL)):
        prior_runs.write_cache(folder / split, number, 1, tokenizer=tokenizer.fingerprint)
    short = ("run.steps=30", "run.eval_every=30", "run.checkpoint_every=30", "optim.lr=0.03", "average.decay=0")
    jobs.finish(prior_runs.write_config(folder / "prior", folder, *short))
    jobs.finish(prior_runs.write_config(folder / "undropped", folder, *short, "prior.class_dropout=0.0"))
    return folder


def tool(name: str, *words: object, network=None) -> tuple[int, str]:
    """(status, all that was said) of a tool in this process, which has a rank if there are several."""
    torch.set_num_threads(1)
    said = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in run_folder.STOP_SIGNALS}
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.MonkeyPatch.context() as changes:
        if network is not None:
            changes.setattr("vqscale.nets.inception.load", lambda path, sha256: network)
        try:
            status = runpy.run_path(str(TOOLS / f"{name}.py"))["main"]([str(word) for word in words])
        except SystemExit as left:
            status = int(left.code or 0)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return status, said.getvalue()


def draw(place: Path, out: Path, *words: object, prior: str = "prior", tokenizer: str = "tokenizer") -> tuple[int, str]:
    return tool("sample", place / prior / "run", place / tokenizer, out, *QUICK, *words)


SETTINGS = ("--per-class", 3, "--classes", "4,0-1", "--guidance", 1.5, "--schedule", "cosine", "--temperature", 0.9)


@pytest.fixture(scope="module")
def drawn(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("drawn") / "samples"
    status, said = draw(place, out, *SETTINGS)
    assert status == 0, said
    assert f"9 images of 3 classes: {out}/samples.npz, {out}/grid.png; 9 images in " in said
    assert "with 1 processes" in said
    return out


@pytest.mark.slow
def test_the_images_are_those_of_the_prior(place, drawn):
    prior, tokenizer = Prior.load(place / "prior" / "run"), Tokenizer.load(place / "tokenizer")
    labels = torch.tensor([4, 0, 1] * 3)
    how = {"guidance": 1.5, "schedule": "cosine", "temperature": 0.9, "cached": False}
    ids = prior.sample(labels, how, numbers_B=torch.arange(9))
    with np.load(drawn / "samples.npz") as file:
        np.testing.assert_array_equal(file["arr_1"], labels)
        np.testing.assert_array_equal(file["ids"], ids)
        pixels = to_bytes(tokenizer.decode(ids)).permute(0, 2, 3, 1).numpy()
        assert np.abs(file["arr_0"].astype(int) - pixels).max() <= 1
    assert len(ids.unique()) > 5
    shares = [float((ids[labels == label] // 7 == label).float().mean()) for label in (4, 0, 1)]
    assert min(shares) > 0.5  # most codes of a class are about seven times its label; by chance 0.14
    facts = json.loads((drawn / "sample.json").read_text())
    assert facts["prior"]["fingerprint"] == prior.fingerprint
    assert facts["tokenizer"]["fingerprint"] == tokenizer.fingerprint == facts["prior"]["card"]["tokenizer"]
    assert facts["command"].startswith("vqscale sample ")
    assert facts["commit"]


@pytest.mark.slow
@pytest.mark.parametrize("codes", [1, 2])
def test_two_processes_draw_the_same(place, drawn, tmp_path, ranks, codes):
    answers = ranks(2, draw, place, tmp_path / "out", *SETTINGS, "--codes", codes)
    assert [status for status, _ in answers] == [0, 0], answers
    assert "with 2 processes" in answers[0][1]
    assert answers[1][1] == ""
    with np.load(tmp_path / "out" / "samples.npz") as mine, np.load(drawn / "samples.npz") as theirs:
        for key in mine.files:
            np.testing.assert_array_equal(mine[key], theirs[key])


@pytest.mark.slow
def test_the_same_command_does_nothing_twice(place, drawn):
    before = jobs.contents(drawn)
    status, said = draw(place, drawn, *SETTINGS)
    assert (status, said.strip()) == (
        0,
        f"9 images of 3 classes are in {drawn} already: {drawn}/samples.npz, {drawn}/grid.png",
    )
    assert jobs.contents(drawn) == before


def test_without_the_cache_of_keys_and_values(place, drawn, tmp_path):
    assert draw(place, tmp_path / "out", *SETTINGS, "--uncached")[0] == 0
    with np.load(tmp_path / "out" / "samples.npz") as mine, np.load(drawn / "samples.npz") as theirs:
        np.testing.assert_array_equal(mine["ids"], theirs["ids"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--temperature", -1, "--top-p", 0, "--classes", "x", "--codes", 2, "--timeout-s", 0, "--num-images", 0),
            "error: --codes 2 does not divide the 1 processes that were started: change --codes or --nproc_per_node; "
            "--classes has 'x': give numbers and ranges such as 0,5,10-19; num_images is 0: use at least 1; "
            "command line: temperature: temperature is -1.0: use 0 (the likeliest id) or more; "
            "command line: top_p: top_p is 0.0: use a share above 0 and at most 1; "
            "--timeout-s is 0.0, and processes have to wait for each other: use more than 0\n",
        ),
        (("--classes", "2,2"), "class 2 is in the list of classes twice"),
        (("--classes", "3,5"), r"error: class 5 is none of the prior's (0 .. 4): change --classes"),
        (("--classes", ","), "error: --classes names no class"),
        (("--num-images", 0), "num_images is 0: use at least 1"),
        (("--per-class", 0), "num_images is 0: use at least 1"),
        (("--temperature", -1), "temperature is -1.0: use 0"),
        (("--temperature", "hot"), "error: command line: temperature: expected float, found the text 'hot'"),
        (("--schedule", "step"), "schedule: expected constant | linear | cosine, found the text 'step'"),
        (("--resize", 0), "resize is 0: use at least 1 pixel"),
        (("--codes", 2), "error: --codes 2 does not divide the 1 processes that were started"),
    ],
)
def test_bad_input_is_said_and_nothing_written(place, tmp_path, words, message):
    status, said = draw(place, tmp_path / "out", *words)
    assert status == 2
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_options_are_checked_before_processes_meet_and_models_are_read(tmp_path):
    taken, prior = tmp_path / "taken", without_weights(tmp_path / "prior")
    taken.touch()
    for out in (taken, taken / "below"):
        status, said = tool("sample", prior, tmp_path, out, "--temperature", -1, "--device", "cuda")
        assert (status, said) == (
            2,
            "error: command line: temperature: temperature is -1.0: use 0 (the likeliest id) or more; "
            f"OUT {out} cannot be written: {taken} is no folder; choose another OUT\n",
        )
    status, said = tool("sample", tmp_path / "no prior", tmp_path, tmp_path / "out", "--device", "cuda")
    assert status == 2
    assert said.startswith(f"error: PRIOR {tmp_path}/no prior does not exist (looked from {Path.cwd()}): give a run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prior", "taken"]


def without_weights(folder: Path) -> Path:
    """A folder of which one can read that it is a prior, and nothing else."""
    folder.mkdir()
    prior = {"name": "autoregressive", "num_codes": 5}
    (folder / "run.yaml").write_text(yaml.safe_dump({"task": "prior", "prior": prior}))
    return folder


@pytest.mark.parametrize("program", ["sample", "sweep"])
def test_help_and_refused_options_need_no_torch(tmp_path, program):
    files = ["--reference", "r.npz", "--inception", "i.pth"] if program == "sweep" else []
    words = [without_weights(tmp_path / "prior"), tmp_path, tmp_path / "out", "--temperature", -1, *files]
    code = f"""
import contextlib, sys
from vqscale.programs.commands import {program}
with contextlib.suppress(SystemExit):
    {program}.main(["--help"])
assert {program}.main({[str(word) for word in words]!r}) == 2
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "how ids are drawn (autoregressive, " in done.stdout
    assert "temperature is -1.0: use 0" in done.stderr


def test_options_of_a_sweep_are_checked_before_processes_meet_and_models_are_read(tmp_path):
    files = ("--reference", tmp_path / "r.npz", "--inception", tmp_path)
    words = ("--temperature", "1,-1", "--top-k", ",", "--schedule", "step", "--classes", ",", "--num-images", 3)
    prior = without_weights(tmp_path / "prior")
    command = [TOOLS / "sweep.py", prior, tmp_path, tmp_path / "out", *files, *words]
    done = subprocess.run(
        [sys.executable, *map(str, command), "--device", "cuda"],
        env={**os.environ, "WORLD_SIZE": "4", "RANK": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    for message in (
        "error: --classes names no class",
        "--top-k names no value",
        "schedule: expected constant | linear | cosine, found the text 'step'",
        "temperature is -1.0: use 0",
        "--num-images 3 is less than the 4 processes that were started, of which each measures a part: give more",
        f"--reference {tmp_path}/r.npz does not exist (looked from {Path.cwd()}), and nothing is downloaded: give the",
        f"--inception {tmp_path} is no file, and nothing is downloaded: give the path of pt_inception",
    ):
        assert done.stderr.count(message) == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["prior"]


def test_another_tokenizer_is_refused_with_both_fingerprints(place, tmp_path):
    status, said = draw(place, tmp_path / "out", tokenizer="other")
    assert status == 2
    for name in ("tokenizer", "other"):
        assert Tokenizer.load(place / name).fingerprint in said
    status, said = tool("sample", place / "tokenizer", place / "tokenizer", tmp_path / "out")
    assert status == 2
    assert "tokenizer" in said


def _cubic(images, side):
    """(N, H, W, C) -> (N, side, side, C) by Keys' kernel with a = -3/4 on the four nearest pixels, none but the last
    beyond the border.
    """

    def weight(x):
        x = abs(x)
        return 1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    for axis in (1, 2):
        old = images.shape[axis]
        places = [(new + 0.5) * old / side - 0.5 for new in range(side)]
        near = [range(int(np.floor(place)) - 1, int(np.floor(place)) + 3) for place in places]
        rows = [
            sum(weight(place - at) * images.take(min(max(at, 0), old - 1), axis) for at in taps)
            for place, taps in zip(places, near, strict=True)
        ]
        images = np.stack(rows, axis)
    return images


def test_images_are_resized_before_they_are_rounded(tmp_path):
    assert test_sample.draw(tmp_path, resize=5).state == "sampled"
    with np.load(tmp_path / "samples.npz") as file:
        decoded = small().decode(torch.from_numpy(file["ids"])).permute(0, 2, 3, 1).double().numpy()
        expected = (_cubic(decoded, 5).clip(-1, 1) + 1) * 127.5
        assert file["arr_0"].shape == (23, 5, 5, 3)
        assert np.abs(file["arr_0"] - expected).max() < 0.51
    with pytest.raises(ValueError, match=r"holds other samples .*\n  settings.resize is null, and was 5\n"):
        test_sample.draw(tmp_path)


def test_samples_from_before_there_was_resize_are_those_as_they_are_decoded(tmp_path):
    test_sample.draw(tmp_path)
    facts = json.loads((tmp_path / "sample.json").read_text())
    del facts["settings"]["resize"]
    (tmp_path / "sample.json").write_text(json.dumps(facts))
    assert test_sample.draw(tmp_path).state == "already"
    with pytest.raises(ValueError, match=r"settings.resize is 5, and was null"):
        test_sample.draw(tmp_path, resize=5)


def test_the_tools_resize(place, tmp_path):
    assert draw(place, tmp_path / "samples", "--resize", 2, "--num-images", 5)[0] == 0
    assert sweep(*sweeping(place, tmp_path, "--resize", 2, "--keep"))[0] == 0
    for path in tmp_path.rglob("samples.npz"):
        with np.load(path) as file:
            assert file["arr_0"].shape[1:] == (2, 3, 3)  # 4 x 6 as they are decoded
    status, said = sweep(*sweeping(place, tmp_path, "--resize", 3))
    assert (status, "settings.resize is 3, and was 2" in said) == (2, True)


def test_parts_that_a_killed_process_left_are_removed(tmp_path, ranks):
    kill = partial(at, "vqscale.programs.sampling.folder:_remove_parts", 1, 0, partial(hear, signal.SIGKILL))
    with pytest.raises(RankError):
        ranks(2, test_sample.draw, tmp_path, 1, kill)
    assert json.loads((tmp_path / "sample.json").read_text())["state"] == "done"
    assert (tmp_path / "parts").exists()
    assert test_sample.draw(tmp_path).state == "already"
    assert not (tmp_path / "parts").exists()


def test_parts_are_removed_when_what_replaces_them_is_on_the_disk(tmp_path, monkeypatch):
    done = []

    def told(module, name, where):
        original = getattr(module, name)

        def tell(*args, **kwargs):
            result = original(*args, **kwargs)
            done.append((name, Path(where(args[0])).name))
            return result

        monkeypatch.setattr(module, name, tell)

    told(os, "fsync", lambda handle: os.readlink(f"/proc/self/fd/{handle}"))
    told(os, "replace", str)
    told(os, "rmdir", str)
    test_sample.draw(tmp_path)
    last = ["samples.npz.tmp", "sample.json.tmp"]
    assert [call for call in done[done.index(("fsync", last[0])) :] if call[1] in last] == [
        (name, file) for file in last for name in ("fsync", "replace")
    ]
    assert done[-2:] == [("fsync", tmp_path.name), ("rmdir", "parts")]


def test_guidance_without_a_null_class_is_warned_of_once(place, tmp_path):
    status, said = draw(place, tmp_path / "out", "--guidance", 2, "--num-images", 5, prior="undropped")
    assert status == 0
    assert said.count("guidance is 2.0") == 1, said
    assert "warning: guidance is 2.0, but this prior was trained with class_dropout 0: its null class has its" in said


def sweeping(place: Path, folder: Path, *words: object) -> list[object]:
    """What tools/sweep.py is told, to fill folder/out."""
    np.savez(folder / "reference.npz", np.random.default_rng(0).integers(0, 256, (20, 4, 6, 3), dtype=np.uint8))
    (folder / "small.pth").touch()  # `sweep` puts a network in its place
    models = [place / "prior" / "run", place / "tokenizer", folder / "out", "--reference", folder / "reference.npz"]
    return [*models, "--inception", folder / "small.pth", "--num-images", 10, *QUICK, *words]


def sweep(*words: object) -> tuple[int, str]:
    return tool("sweep", *words, network=Small())


@pytest.mark.slow
def test_a_sweep_from_the_command_line(place, tmp_path):
    words = sweeping(place, tmp_path, "--guidance", "1,2", "--temperature", "0.9,1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "STOP").touch()
    status, said = sweep(*words)
    assert (status, "stopped after 0 of 4 settings: the same command goes on" in said) == (75, True), said
    status, said = sweep(*words)
    assert status == 0, said
    table = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [(row["temperature"], row["guidance"]) for row in table["rows"]] == [(0.9, 1), (0.9, 2), (1, 1), (1, 2)]
    assert len({row["distance_other_inception"] for row in table["rows"]}) == 4
    assert len(table["judge"]["reference"]["sha256"]) == 64
    assert "guidance  temperature  distance_other_inception" in said
    same = ["--reference", tmp_path / "out" / ".." / "reference.npz"]
    assert sweep(*words, *same) == (
        0,
        said[said.index("guidance  temp") :],
    )  # nothing is drawn
    status, said = sweep(*words, "--top-k", ",")
    assert (status, "error: --top-k names no value" in said) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("codes", [1, 2])
def test_a_sweep_on_two_processes_draws_the_same(place, tmp_path, ranks, codes):
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
    assert sweep(*sweeping(place, alone, "--keep"))[0] == 0
    answers = ranks(2, sweep, *sweeping(place, together, "--keep", "--codes", codes))
    assert [status for status, _ in answers] == [0, 0], answers
    scores = [
        {
            key: value
            for key, value in json.loads(path.read_text())["row"].items()
            if key not in ("schedule", "precision")
        }
        for path in (*alone.rglob("result.json"), *together.rglob("result.json"))
    ]
    assert scores[1] == pytest.approx(scores[0], rel=0.02)  # a pixel may be rounded the other way
    with np.load(*alone.rglob("samples.npz")) as mine, np.load(*together.rglob("samples.npz")) as theirs:
        np.testing.assert_array_equal(mine["ids"], theirs["ids"])


def test_a_sweep_refuses_codes_that_do_not_divide_the_processes(place, tmp_path):
    status, said = sweep(*sweeping(place, tmp_path, "--codes", 2))
    assert (status, said.startswith("error: --codes 2 does not divide the 1 processes that were started")) == (2, True)


def test_a_prior_whose_name_no_folder_can_have_is_refused():
    with pytest.raises(ValueError, match=r"is no folder \(File name too long\)"):
        options.prior_config(Path("a" * 5000))
