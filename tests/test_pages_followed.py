"""Pages that tell how something is done are followed to the letter: their files are written, their lines put in, their
commands run one after the other, each made short by words that are added to the very line that is printed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import forks
import numpy as np
import pytest
from PIL import Image

from tests.lib import shown

ROOT = Path(__file__).resolve().parents[1]
IMAGES, ADDING = "launch/own_images.md", "vqscale/ADDING.md"
RUN = "run.steps=4 run.eval_every=4 run.checkpoint_every=4 data.batch=8 engine.name=torch"
TOKENIZER = f"{RUN} data.train.num_workers=0 data.val.num_workers=0 tokenizer.quantizer.warmup_steps=2"
DRAWN = f"{TOKENIZER} data.train.make.num_images=64 data.val.make.num_images=16"
PRIOR = f"{RUN} prior.net.num_layers=1"
CLASSES, EACH = ("birds", "boats", "bread"), 8


def _environment(place):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(place / "cache")}


def _added(command, short):
    """What makes a command short: of the first words that it has."""
    return next((more for words, more in short.items() if words in command), "")


@pytest.mark.slow
@pytest.mark.dist
def test_from_a_folder_of_images_to_a_page_of_samples(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(len(CLASSES) * EACH):
        place = tmp_path / "images" / CLASSES[number % len(CLASSES)] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (70, 90, 3), np.uint8)).save(place)
    for name in ("launch", "tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    evaluated = "--batch 8 --workers 0 --device cpu"
    short = {"quickstart/prior.yaml": PRIOR, "launch/train.py": TOKENIZER, "evaluate.py": evaluated}
    short |= {"encode.py": "--batch 32 --workers 0", "sample.py": "--batch 24"}
    commands = shown.commands(IMAGES)
    assert len(commands) == 8
    for command in commands:
        first, *words = shlex.split(command.replace("/data/my_images", str(tmp_path / "images")))
        words += shlex.split(_added(command, short))
        world = int(words.pop(0).removeprefix("--nproc_per_node=")) if first == "torchrun" else 1
        done = forks.program(*words, world=world, cwd=tmp_path, env=_environment(tmp_path), timeout_s=300)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    runs = tmp_path / "runs"
    with tarfile.open(runs / "mine-shards" / "val-0000.tar") as held_out:
        assert sum(name.endswith(".png") for name in held_out.getnames()) % 16 == 0
    assert (runs / "mine-shards" / "classes.txt").read_text().split() == list(CLASSES)
    page = (runs / "mine.html").read_text()
    assert "Pictures of 64 x 64 pixels become 16 x 16 ids out of K = 4,096 codes" in page
    assert all(f"drawn from the prior: {name}" in page for name in CLASSES)


def _followed(page, place):
    """The commands of a page in their order, after what stands above them was written: a file where a paragraph ends
    with its path, a line of a dictionary where it names this."""
    above = ""
    for part in re.split(r"(```\w+\n.*?```\n)", (ROOT / page).read_text(), flags=re.S):
        kind, _, body = part.removeprefix("```").removesuffix("```\n").partition("\n")
        if not part.startswith("```"):
            above = part
        elif kind == "bash":
            yield from (line for line in body.splitlines() if line)
        elif line := re.search(r"line of `(\w+)` in `([\w/.]+)`:\s*$", above):
            path = place / line[2]
            head, found, rest = path.read_text().partition(f"{line[1]} = {{\n")
            assert found, f"{line[2]} has no {line[1]}"
            path.write_text(head + found + body + rest)
        elif file := re.search(r"`([\w/.]+)`[^`]*:\s*$", above):
            assert not (place / file[1]).exists()
            (place / file[1]).write_text(body)
        else:
            raise AssertionError(f"{page}: a block after {above[-80:]!r} says nowhere where it belongs")


@pytest.mark.slow
def test_a_quantizer_a_signal_and_a_prior_are_added(tmp_path):
    place = tmp_path / "checkout"
    place.mkdir()
    for name in ("vqscale", "tests", "configs", "launch", "tools", "pyproject.toml"):
        source, ignored = ROOT / name, shutil.ignore_patterns("__pycache__", "results", "golden")
        shutil.copy(source, place) if source.is_file() else shutil.copytree(source, place / name, ignore=ignored)
    short = {"quickstart/prior.yaml": PRIOR, "launch/train.py": DRAWN, "encode.py": "--batch 8 --workers 0"}
    short |= {"sample.py": "--batch 5"}
    environment = {**_environment(tmp_path), "PYTHONPATH": str(place)}
    commands = []
    for command in _followed(ADDING, place):
        words = [*shlex.split(command), *shlex.split(_added(command, short))]
        done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        commands.append((command, done.stdout))
    assert len(commands) == 7
    assert int(re.search(r"(\d+) passed", commands[0][1])[1]) > 5
    assert len([*(place / "runs/gray/samples/reconstructions").glob("*.png")]) > 0
    with np.load(place / "runs/unigram-samples/samples.npz") as samples:
        assert samples["arr_0"].shape == (10, 32, 32, 3)


def test_a_page_that_cannot_be_followed_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "page.md").write_text("A block.\n\n```python\nx\n```\n")
    with pytest.raises(AssertionError, match="says nowhere where it belongs"):
        list(_followed("page.md", tmp_path))
    (tmp_path / "page.md").write_text("Its line of `ALL` in `a.py`:\n\n```python\nx\n```\n")
    (tmp_path / "a.py").write_text("NONE = {\n}\n")
    with pytest.raises(AssertionError, match=r"a\.py has no ALL"):
        list(_followed("page.md", tmp_path))
