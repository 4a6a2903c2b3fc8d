"""The SLURM scripts: what they start and when they requeue, with a made srun and scontrol, and on a real cluster."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jobs
import pytest
import saved_runs
import shard_files
import slurm
from slurm import TRAIN

from tests.lib import shown
from vqscale.data.tokens.stream import Cache

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for path in (ROOT / "launch" / "slurm").iterdir() if path.suffix in (".sh", ".sbatch"))

# srun runs its command here and passes signals on; torchrun writes down what it was given, runs it as rank 0 or ends as
# it is told to, or waits for USR1, which the agent itself must sleep through; scontrol knows one node and the state of
# one job.
SRUN = """
import os, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
child = subprocess.Popen(command, env={**os.environ, "SLURMD_NODENAME": "n1"})
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: child.send_signal(number))
sys.exit(child.wait())
"""
TORCHRUN = """
import os, signal, subprocess, sys, time
from pathlib import Path
assert all(signal.getsignal(n) == signal.SIG_IGN for n in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM))
here = Path(os.environ["FAKES"])
submitted = Path(os.environ["VQSCALE_SUBMIT_SCRIPT"]).read_text()
(here / "torchrun").write_text("\\n".join([submitted.splitlines()[1], *sys.argv[1:]]))
told = os.environ["TOLD"]
if told == "run":
    program = [word for word in sys.argv[1:] if not word.startswith("--")]
    rank = subprocess.Popen([sys.executable, *program], env={**os.environ, "RANK": "0"})
    signal.signal(signal.SIGUSR1, lambda number, frame: rank.send_signal(number))  # SLURM does, to every process
    sys.exit(rank.wait() != 0)
if told == "wait":
    heard = []
    signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    (here / "waiting").touch()
    while not heard:
        time.sleep(0.01)
    told = "75"
if told != "killed":
    Path(os.environ["VQSCALE_STATUS_FILE"]).write_text(told + "\\n")
sys.exit(told != "0")
"""
SCONTROL = """
import os, sys
from pathlib import Path
if sys.argv[1:3] == ["show", "job"]:
    print(f"JobId=7 JobName=x\\n   JobState={os.environ['STATE']} Reason=None")
elif sys.argv[1:3] == ["show", "node"]:
    print(f"NodeName={sys.argv[3]} NodeAddr=10.0.0.1 NodeHostName=here")
elif sys.argv[1:3] == ["show", "hostnames"]:
    print("n1\\nn2")
else:
    Path(os.environ["FAKES"], "scontrol").write_text(" ".join(sys.argv[1:]))
"""


@pytest.fixture
def start(tmp_path):
    """start(script, *words, TOLD=..., ...): the script as a job of SLURM 7 in a checkout of its own."""
    checkout, fakes = tmp_path / "checkout", tmp_path / "fakes"
    _checkout(checkout)
    fakes.mkdir()
    for name, text in (("srun", SRUN), ("torchrun", TORCHRUN), ("scontrol", SCONTROL)):
        (fakes / f"{name}.py").write_text(text)
        (fakes / "bin").mkdir(exist_ok=True)
        (fakes / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} {fakes / name}.py "$@"\n')
        (fakes / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_ON_NODE": "8"}
    job |= {"SLURM_SUBMIT_DIR": str(checkout), "FAKES": str(fakes), "STATE": "RUNNING", "VQSCALE_PROCESSES": "4"}
    job["PATH"] = f"{fakes / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def begin(script, *words, **more):
        command = ["bash", str(ROOT / "launch" / "slurm" / script), *words]
        kept = {key: value for key, value in os.environ.items() if not key.startswith("VQSCALE_")}
        return fakes, subprocess.Popen(
            command, env={**kept, **job, **more}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return begin


def _checkout(place):
    place.mkdir()
    for name in ("launch", "tools"):
        (place / name).symlink_to(ROOT / name)


def _ended(process):
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_is_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "launch/slurm" in script.read_text() or script.name == "job.sh"


@pytest.mark.parametrize(
    ("script", "why"),
    [("drills.sh", "SLURM's daemons are started as root"), ("nfs.sh", "hosts and their wires are made as root")],
)
def test_drills_say_why_they_are_left_out(tmp_path, script, why):
    stand_in = tmp_path / "id"
    stand_in.write_text('#!/bin/sh\n[ "$1" = -u ] && echo 1000 || echo somebody\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "tests" / script), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"skipped: {why}, and this is user somebody\n"
    assert not (tmp_path / "out").exists()


def test_the_run_is_started_on_every_node(start):
    fakes, process = start("train.sbatch", "some.yaml", "run.folder=a folder", TOLD="0")
    status, out = _ended(process)
    assert status == 0, out
    first, *words = (fakes / "torchrun").read_text().splitlines()
    assert first.startswith("# One command as one job")  # the script that was submitted is kept for the run folder
    assert words[-4:] == ["launch/slurm/rank.py", "launch/train.py", "some.yaml", "run.folder=a folder"]
    meeting = ["--rdzv-endpoint=10.0.0.1:20007", "--rdzv-id=7-0", "--rdzv-conf=is_host=true"]
    for word in ("--nnodes=2", "--nproc_per_node=4", "--local-addr=10.0.0.1", *meeting):
        assert word in words
    assert not (fakes / "scontrol").exists()


@pytest.mark.parametrize(
    ("told", "state", "count", "status", "requeued"),
    [
        ("75", "RUNNING", "0", 0, True),
        ("75", "COMPLETING", "0", 0, False),  # scancel
        ("75", "RUNNING", "3", 0, False),  # no restarts left
        ("2", "RUNNING", "0", 1, False),
        ("killed", "RUNNING", "0", 1, False),
    ],
)
def test_only_a_run_that_was_asked_to_stop_is_requeued(start, told, state, count, status, requeued):
    more = {"TOLD": told, "STATE": state, "SLURM_RESTART_COUNT": count, "VQSCALE_MAX_RESTARTS": "3"}
    fakes, process = start("train.sbatch", "some.yaml", **more)
    found, out = _ended(process)
    assert found == status, out
    assert (fakes / "scontrol").exists() == requeued, out
    if requeued:
        assert (fakes / "scontrol").read_text() == "requeue 7"


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["tools/encode.py", "--codes", "2"], ["tools/encode.py", "--codes", "2"]),
        (["run.folder=x.py", "some.yaml"], ["launch/train.py", "run.folder=x.py", "some.yaml"]),
        ([], ["launch/train.py"]),
    ],
    ids=str,
)
def test_the_first_word_may_name_the_program(start, words, command):
    fakes, process = start("train.sbatch", *words, TOLD="0")
    assert _ended(process)[0] == 0
    text = (fakes / "torchrun").read_text().splitlines()
    assert text[text.index("launch/slurm/rank.py") + 1 :] == command


def test_a_program_that_is_not_there_is_said_before_anything_starts(start):
    fakes, process = start("train.sbatch", "tools/encod.py", TOLD="0")
    status, out = _ended(process)
    assert (status, "there is no tools/encod.py in " in out) == (2, True), out
    assert not (fakes / "torchrun").exists()


# What any program of this repository does: it hears the signal, looks beside itself, and says how it ended.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import beside
heard = []
signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
Path(os.environ["FAKES"], "waiting").write_text(" ".join(sys.argv[1:]))
while sys.argv[1] == "wait" and not heard:
    time.sleep(0.01)
sys.exit(beside.STATUS if heard else {"nothing": None, "text": "wrong", "two": 2}[sys.argv[1]])
"""


@pytest.mark.parametrize(
    ("word", "status", "said"),
    [("wait", 0, "75"), ("nothing", 0, "0"), ("text", 1, "1"), ("two", 1, "2"), ("unknown", 1, "none")],
)
def test_any_program_is_heard_and_requeued(start, tmp_path, word, status, said):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "beside.py").write_text("STATUS = 75\n")
    fakes, process = start("train.sbatch", str(tmp_path / "program.py"), word, "a word", TOLD="run")
    jobs.wait_for((fakes / "waiting").exists)
    if word == "wait":
        process.send_signal(signal.SIGUSR1)
    found, out = _ended(process)
    assert (found, f"rank 0 with {said}\n" in out) == (status, True), out
    assert (fakes / "waiting").read_text() == f"{word} a word"
    assert (fakes / "scontrol").exists() == (word == "wait")
    assert ("KeyError" in out) == (word == "unknown")


def test_usr1_reaches_the_workers_and_requeues(start):
    fakes, process = start("train.sbatch", "some.yaml", TOLD="wait")
    jobs.wait_for((fakes / "waiting").exists)
    process.send_signal(signal.SIGUSR1)
    status, out = _ended(process)
    assert status == 0, out
    assert (fakes / "scontrol").read_text() == "requeue 7"


def test_a_task_of_an_array_takes_its_line(start, tmp_path):
    (tmp_path / "list.txt").write_text("a.yaml\nb.yaml\n-rf\na=b.yaml\n")
    more = {"TOLD": "0", "SLURM_ARRAY_TASK_ID": "1"}
    fakes, process = start("array.sbatch", str(tmp_path / "list.txt"), "run.steps=3", **more)
    assert _ended(process)[0] == 0
    assert (fakes / "torchrun").read_text().splitlines()[-2:] == ["b.yaml", "run.steps=3"]
    for number, name in enumerate(["-rf", "a=b.yaml"], 2):  # neither an option nor a change of a key
        fakes, process = start("array.sbatch", str(tmp_path / "list.txt"), TOLD="0", SLURM_ARRAY_TASK_ID=str(number))
        assert _ended(process)[0] == 0
        assert (fakes / "torchrun").read_text().splitlines()[-1] == f"./{name}"
    fakes, process = start("array.sbatch", str(tmp_path / "list.txt"), **{**more, "SLURM_ARRAY_TASK_ID": "4"})
    status, out = _ended(process)
    assert status == 2
    assert "no line for task 4, counted from 0: change --array" in out


@pytest.mark.slow
def test_a_study_is_prepared_for_an_array(tmp_path, tiny_shards):
    jobs.write_config(tmp_path, tiny_shards)
    (tmp_path / "study.yaml").write_text(
        textwrap.dedent(f"""\
        base: run.yaml
        folder: {tmp_path / "study"}
        dials: [{{name: steps, key: run.steps, values: [1, 2]}}]
        """)
    )
    command = [sys.executable, str(ROOT / "tools" / "study.py"), str(tmp_path / "study.yaml"), "--prepare"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(listed) == 2
    assert all(Path(line).is_file() for line in listed)


def _submit(place, environment, *words):
    """(job, said(text) for wait_for) of train.sbatch with these words and two processes, its log in PLACE/log.txt."""
    log = place / "log.txt"
    job = slurm.submit(environment | {"VQSCALE_PROCESSES": "2"}, place, log, str(TRAIN), *map(str, words))
    return job, lambda text: lambda: log.exists() and text in log.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not slurm.available(), reason="no SLURM here, or not root")
def test_a_real_slurm_requeues_on_usr1_and_not_on_scancel(tmp_path, tiny_shards):
    config = jobs.write_config(tmp_path, tiny_shards, "run.steps=1000000", "run.eval_every=1000000", "run.keep=2")
    run, log = tmp_path / "run", tmp_path / "log.txt"
    with slurm.cluster(tmp_path / "slurm") as environment:
        job, said = _submit(tmp_path, environment, config)
        jobs.wait_for(lambda: (run / "metrics.jsonl").exists() and jobs.rows(run), 120.0)
        slurm.ask(environment, "scancel", "--batch", "--signal=USR1", job)
        jobs.wait_for(said("requeue"), 120.0)
        jobs.wait_for(said("going on after step"), 120.0)
        assert "asked to stop (SIGUSR1" in log.read_text()
        assert (run / "code" / "submit.sbatch").read_text() == TRAIN.read_text()
        before = len(jobs.rows(run))
        jobs.wait_for(lambda: len(jobs.rows(run)) > before, 120.0)
        slurm.ask(environment, "scancel", job)
        jobs.wait_for(lambda: "CANCELLED" in slurm.ask(environment, "scontrol", "show", "job", job), 120.0)
        jobs.wait_for(lambda: not slurm.ask(environment, "squeue", "-h"), 120.0)
    assert "start 1] " in log.read_text()
    assert log.read_text().count("going on after step") == 1
    steps = [row["step"] for row in jobs.rows(run)]
    assert steps == list(range(1, len(steps) + 1))  # no step twice, none left out


SHORT = (
    "run.steps=4 run.eval_every=4 run.checkpoint_every=4 data.batch=8 data.train.num_workers=0 data.val.num_workers=0 "
    "data.train.make.num_images=64 data.val.make.num_images=16 tokenizer.quantizer.warmup_steps=2 engine.name=torch"
)


@pytest.mark.slow
@pytest.mark.skipif(not slurm.available(), reason="no SLURM here, or not root")
def test_the_first_jobs_of_the_page_are_done_by_a_real_slurm(tmp_path):
    """As they are printed, but for the GPUs and nodes that are not there, and for words that make them short."""
    first, second = [line for line in shown.commands("launch/README.md") if line.startswith("sbatch")][:2]
    checkout = tmp_path / "checkout"
    _checkout(checkout)
    (checkout / "configs").symlink_to(ROOT / "configs")
    with slurm.cluster(tmp_path / "slurm") as environment:
        environment |= {"VQSCALE_PROCESSES": "2", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        for line, more in ((first, SHORT), (second, "--batch 8 --workers 0")):
            words = [word for word in shlex.split(line) if not word.startswith(("--nodes", "--gpus-per-node"))]
            words[1:1] = ["--parsable"]
            told = {"cwd": checkout, "env": environment, "capture_output": True, "text": True, "check": True}
            job = subprocess.run([*words, *shlex.split(more)], **told).stdout.strip()
            jobs.wait_for(lambda: not slurm.ask(environment, "squeue", "-h"), 240.0)
            log = (checkout / f"vqscale-{job}.out").read_text()
            assert "JobState=COMPLETED" in slurm.ask(environment, "scontrol", "show", "job", job), log
    assert (checkout / "runs/quickstart/summary.json").exists()
    assert Cache(checkout / "runs/quickstart-cache/train").ids.shape[0] == 64


@pytest.mark.slow
@pytest.mark.skipif(not slurm.available(), reason="no SLURM here, or not root")
def test_a_real_slurm_requeues_a_tool(tmp_path):
    saved_runs.small().save(tmp_path / "tokenizer")
    shards = shard_files.write_shards(tmp_path / "shards", [300, 300])
    cache = tmp_path / "cache"
    words = ["tools/encode.py", tmp_path / "tokenizer", cache, "--shards", *shards, "--image-size", "8", "--batch", "1"]
    words += ["--workers", "0", "--storage", "10", "--views", "flip", "--index-dir", tmp_path / "index"]
    with slurm.cluster(tmp_path / "slurm") as environment:
        job, said = _submit(tmp_path, environment, *words)
        jobs.wait_for(lambda: [*cache.glob("ids/c.*")], 120.0)  # the first storage shards are there
        slurm.ask(environment, "scancel", "--batch", "--signal=USR1", job)
        jobs.wait_for(said("stopped by SIGUSR1"), 120.0)
        jobs.wait_for(said("images are encoded already"), 120.0)
        jobs.wait_for(lambda: not slurm.ask(environment, "squeue", "-h"), 180.0)
        assert "JobState=COMPLETED" in slurm.ask(environment, "scontrol", "show", "job", job)
    log = (tmp_path / "log.txt").read_text()
    assert "start 0] requeue" in log
    assert "start 1] the step ended with status 0, rank 0 with 0" in log
    assert Cache(cache).ids.shape[0] == 600
