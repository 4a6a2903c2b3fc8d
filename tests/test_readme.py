"""Commands that READMEs show work: each of these runs here, made short by keys added to the very line that is printed.

That every other one is taken by its program, too, is shown in test_commands.py.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import forks
import pytest
import torch

import vqscale
from tests.lib import shown
from vqscale import config as configuration
from vqscale.data.made import sounds
from vqscale.disk import wav
from vqscale.programs.claims import findings as claim_words
from vqscale.tokenizer.config import TokenizerConfig

ROOT = Path(__file__).resolve().parents[1]
README, QUANTIZERS = ((ROOT / name).read_text() for name in ("README.md", "vqscale/quantizers/README.md"))

SHORT_RUN = (
    "run.steps=4 run.eval_every=4 run.checkpoint_every=4 run.log_every=2 run.folder={tmp}/run data.batch=8 "
    "data.train.shards={tmp}/shards/train-{{000..001}}.tar data.train.make.num_images=64 data.train.num_workers=0 "
    "data.val.shards={tmp}/shards/val-000.tar data.val.make.num_images=16 data.val.num_workers=0 "
    "data.train.index_dir={tmp}/index data.val.index_dir={tmp}/index tokenizer.quantizer.warmup_steps=2"
)
SHORT_PRIOR = "run.steps=4 run.eval_every=4 run.checkpoint_every=4 data.batch=8 prior.net.num_layers=1"
SHORT_JUDGE = "--steps 4 --batch 8 --num-images 32 --num-held-out 20"
SHORT_DENSE = (
    "run.steps=2 run.eval_every=2 run.checkpoint_every=2 run.log_every=1 data.batch=8 data.train.num_workers=0 "
    "data.val.num_workers=0 data.train.shards={tmp}/shards/train-0.tar data.train.make.num_images=32 "
    "data.val.shards={tmp}/shards/val-0.tar data.val.make.num_images=8 data.train.index_dir={tmp}/index "
    "data.val.index_dir={tmp}/index"
)
SHORT_SOUND = (
    "run.steps=2 run.eval_every=2 run.eval_images=8 run.checkpoint_every=2 run.log_every=1 data.batch=8 "
    "data.train.num_workers=0 data.val.num_workers=0 data.train.index_dir={tmp}/index data.val.index_dir={tmp}/index "
    "tokenizer.quantizer.warmup_steps=1 tokenizer.quantizer.landing_steps=1"
)
DRAWN_SOUND = (
    "data.train.shards={tmp}/shards/train-0.tar data.train.make.num_sounds=20 "
    "data.val.shards={tmp}/shards/val-0.tar data.val.make.num_sounds=8"
)
PRIOR_PLANNED = "--dry-run prior.num_codes=4096 prior.grid=[8,8] prior.feature_dim=16"
# A command begins with the first of these that fits; what is added makes it short.
SHORTER = {
    "bash launch/dense.sh": f"{SHORT_DENSE} run.folder={{tmp}}/dense -- {SHORT_DENSE} prior.net.num_layers=1 -- color",
    "bash launch/sound.sh": f"{SHORT_SOUND} {DRAWN_SOUND} -- {SHORT_PRIOR} -- {SHORT_JUDGE}",
    "bash launch/quickstart.sh": f"{SHORT_RUN} -- {SHORT_PRIOR} -- {SHORT_JUDGE}",
    "torchrun --nproc_per_node=2 launch/train.py configs/quickstart/prior.yaml": PRIOR_PLANNED,
    "python launch/train.py configs/quickstart/prior.yaml": PRIOR_PLANNED,
    "torchrun --nproc_per_node=2 launch/train.py": SHORT_RUN,
    "torchrun --nproc_per_node=8 launch/train.py": "--dry-run",
    # with weights to begin from: test_first_weights.py
    **{f"python launch/train.py run.folder=runs/{name}": "--dry-run" for name in ("finetuned", "wider", "decoder")},
    "python launch/train.py": "",
    "python tools/study.py": "--dry-run",
    "python tools/claims.py": "--list",
    "python tools/bench codes": "--tokens 16 --codes 64 --dim 8 --repeats 1",
    "python tools/bench memory": "--tokens 16 --codes 64 --dim 8",
    "python tools/plan.py": "",
}
FOLLOWED = shown.commands("launch/own_images.md")  # one after the other, in test_pages_followed.py
ELSEWHERE = {"--check", "--slurm", "--report"}  # measures a machine, needs a cluster, needs a study: test_study.py
SHOWN = [line for line in shown.commands() if line not in FOLLOWED and not ELSEWHERE & {*line.split()}]
RUN = [line for line in SHOWN if line.startswith(tuple(SHORTER))]


def test_every_short_form_is_of_a_command_that_is_shown():
    assert [begin for begin in SHORTER if not any(line.startswith(begin) for line in RUN)] == []


def _environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **more}


def _run(words, **more):
    """The quickstart is started as a shell starts it, torchrun and all; the others are forked, with the same words."""
    first, *others = words
    if first == "bash":
        return subprocess.run(words, cwd=ROOT, env=_environment(**more), capture_output=True, text=True, timeout=600)
    world = int(others.pop(0).removeprefix("--nproc_per_node=")) if first == "torchrun" else 1
    return forks.program(*others, world=world, env=_environment(), timeout_s=600)


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN, ids=lambda command: command[:60])
def test_a_command_of_the_readme_works(command, tmp_path):
    added = next(added for begin, added in SHORTER.items() if command.startswith(begin))
    if command.startswith("bash launch/sound.sh"):
        pytest.importorskip("soundfile", reason="the extra audio is not installed")
    words = shlex.split(command) + shlex.split(added.format(tmp=tmp_path))
    done = _run(words, RUN=str(tmp_path / "sound"))
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    if command.startswith("bash launch/sound.sh"):
        numbers = _check_heard(tmp_path / "sound-page", held_out=8, classes=10)
        assert {"recognised", "recognised_real", "recognised_noise", "recognised_samples"} <= numbers.keys()
    if command.startswith("bash launch/dense.sh"):
        rows = json.loads((tmp_path / "dense" / "color-measured" / "result.json").read_text())["rows"]
        assert {"true codes", "no code", "constant", "greedy", "sampled"} <= rows.keys()
        assert "from left to right: the image" in (tmp_path / "dense.html").read_text()
    if command.startswith("bash launch/quickstart.sh"):
        assert "PSNR on held-out images" in done.stdout
        assert (tmp_path / "run" / "reconstructions.png").exists()
        assert (tmp_path / "run.html").exists()


def _check_heard(folder, held_out, classes):
    """A page of whole recordings beside their reconstructions, and of twenty sounds that a prior drew."""
    numbers = json.loads((folder / "result.json").read_text())["numbers"]
    assert (numbers["images"], numbers["broken"]) == (held_out, 0)
    assert all(math.isfinite(numbers[name]) for name in ("mel", "stft", "si_sdr", "usage", "ceiling"))
    page = (folder / "index.html").read_text()
    assert page.count("<audio controls src=") == 2 * held_out + 20
    assert {f"class {label}" for label in range(classes)} <= set(re.findall(r"<figcaption>(class \d+)", page))
    return numbers


@pytest.mark.slow
def test_your_own_recordings_become_a_page_to_listen_to(tmp_path):
    pytest.importorskip("soundfile", reason="the extra audio is not installed")
    for number in range(20):
        file = tmp_path / "mine" / ("ah", "speech")[number % 2] / f"{number:02d}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(wav.encoded(sounds.draw(9 if number % 2 else 6, 16_000, 16_000, number)[0], 16_000))
    shutil.copy(ROOT / "tools/results/usage.png", tmp_path / "mine")
    added = shlex.split(f"{SHORT_SOUND} -- {SHORT_PRIOR}".format(tmp=tmp_path))
    place = {"RUN": str(tmp_path / "sound"), "SOURCE": str(tmp_path / "mine")}
    done = _run(["bash", "launch/sound.sh", *added], **place)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    _check_heard(tmp_path / "sound-page", held_out=2, classes=2)
    (tmp_path / "mine/ah/00.wav").unlink()
    done = _run(["bash", "launch/sound.sh"], **place)
    assert done.returncode == 2
    assert f"{tmp_path / 'mine'} has 19 recordings, and at least 20 are needed" in done.stderr


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("processes", [1, 8])
def test_the_default_run_on_other_numbers_of_processes(processes, tmp_path):
    added = shlex.split(SHORT_RUN.format(tmp=tmp_path))
    done = forks.program("launch/train.py", *added, world=processes, env=_environment(), timeout_s=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "run" / "summary.json").exists()


def test_the_readme_has_two_screens():
    lines = README.splitlines()
    assert len(lines) <= 90
    assert max(map(len, lines)) <= 200


def test_the_verdicts_of_the_readme_are_those_that_were_kept():
    kept = json.loads((ROOT / "tools/results/claims/claims.json").read_text())
    verdicts = {claim["name"]: claim["verdict"] for claim in kept["claims"]}
    rows = re.findall(r"(?m)^\| `([a-z0-9-]+)` .*\| ([^|]+) \|$", README)
    assert len(rows) >= 15
    assert dict(rows) == {name: verdicts[name] for name, _ in rows}
    counts = Counter(verdicts.values())
    for verdict in (claim_words.HOLDS, claim_words.IN_PART, claim_words.NOT_HERE, claim_words.UNTESTED):
        assert f"{counts[verdict]} {verdict}" in README.replace("\n", " ")


def _anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_of_a_page_leads_somewhere():
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    links = 0
    for name in listed.stdout.split():
        page = ROOT / name
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
            if not link.startswith("http"):
                path, _, anchor = link.partition("#")
                target = (page.parent / path).resolve() if path else page
                assert target.exists(), f"{name}: {link}"
                assert not anchor or anchor in _anchors(target), f"{name}: {link}"
                links += 1
    assert links > 20


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    blocks = [block for page in (README, QUANTIZERS) for block in re.findall(r"```python\n(.*?)```", page, re.S)]
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    small = {"net": {"channels": 32, "multipliers": [1, 1], "attention_levels": [], "num_blocks": 1, "z_channels": 8}}
    config = configuration.parse(TokenizerConfig, {**small, "quantizer": {"name": "vq", "num_codes": 16, "dim": 4}})
    vqscale.Tokenizer.from_config(config).save("runs/quickstart")
    names = {"vqscale": vqscale, "images": torch.zeros(2, 3, 8, 8)}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["ids"].shape == (2, 4, 4)
    assert names["images"].shape == (2, 3, 8, 8)
