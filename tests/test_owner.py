"""A folder has one writer, whoever starts at once, is killed, or sits on another machine."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import jobs
import pytest

from vqscale.disk import lock, owner

PROGRAM = """
import sys, time
from vqscale.disk.owner import own
try:
    with own(sys.argv[1], "the run"):
        print("mine", flush=True)
        sys.stdin.readline()
except ValueError as error:
    print(error, flush=True)
"""


def start(folder: Path) -> subprocess.Popen:
    words = [sys.executable, "-c", PROGRAM, str(folder)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def end(process: subprocess.Popen) -> None:
    process.communicate("\n", timeout=30)


def named(folder: Path) -> dict:
    return json.loads((folder / owner.NAME).read_text())


def test_of_several_that_start_at_once_one_writes_and_the_others_name_it(tmp_path):
    processes = [start(tmp_path / "run") for _ in range(5)]
    said = [process.stdout.readline() for process in processes]
    holder = named(tmp_path / "run")
    assert [process.pid for process, line in zip(processes, said, strict=True) if line == "mine\n"] == [holder["pid"]]
    for line in said:
        who = f"process {holder['pid']} of {holder['host']} since {holder['since']}"
        assert line == "mine\n" or line.startswith(f"another process is writing the run in {tmp_path / 'run'}: {who}")
    for process in processes:
        end(process)
    assert {path.name for path in tmp_path.glob("run/*")} <= {owner.GUARD}  # nothing if the one who wrote had made it


def test_a_killed_writer_is_no_obstacle_and_a_stopped_one_is(tmp_path):
    first = start(tmp_path)
    assert first.stdout.readline() == "mine\n"
    os.kill(first.pid, signal.SIGSTOP)  # it lives
    with pytest.raises(ValueError, match=f"process {first.pid} of "), owner.own(tmp_path, "the run"):
        pass
    os.kill(first.pid, signal.SIGKILL)
    jobs.wait_for(lambda: not jobs.alive([first.pid]))  # not waited for: it is a zombie
    with owner.own(tmp_path, "the run"):
        assert named(tmp_path)["pid"] == os.getpid()
    end(first)


def test_the_number_of_a_dead_process_that_another_one_has_now_is_no_obstacle(tmp_path):
    (tmp_path / owner.NAME).write_text(json.dumps({**owner._me(), "start": "1"}))
    with owner.own(tmp_path, "the run"):
        assert named(tmp_path)["start"] != "1"


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"pid": "text"}', '{"pid": -1}', '{"pid": true}'])
def test_a_file_that_names_nobody_is_no_obstacle(tmp_path, text):
    (tmp_path / owner.NAME).write_text(text)
    with owner.own(tmp_path, "the run"):
        assert named(tmp_path)["pid"] == os.getpid()


def of_another_machine(folder: Path) -> Path:
    (folder / owner.NAME).write_text(json.dumps({**owner._me(), "where": "elsewhere", "host": "node7"}))
    return folder / owner.NAME


def test_a_writer_of_another_machine_counts_as_long_as_it_says_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "STALE_S", 20.0)
    monkeypatch.setattr(owner, "BEAT_S", 0.2)
    path, done = of_another_machine(tmp_path), threading.Event()
    beating = threading.Thread(target=owner._beat, args=(path, json.loads(path.read_text()), done))
    beating.start()
    with pytest.raises(ValueError, match=r"process \d+ of node7 since "), owner.own(tmp_path, "the run"):
        pass
    done.set()
    beating.join()
    monkeypatch.setattr(owner, "STALE_S", 0.5)
    with owner.own(tmp_path, "the run"):
        assert named(tmp_path)["host"] != "node7"


def test_a_writer_of_another_machine_that_ends_meanwhile_is_followed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "BEAT_S", 0.1)
    path = of_another_machine(tmp_path)
    threading.Timer(0.3, path.unlink).start()
    with owner.own(tmp_path, "the run"):
        assert named(tmp_path)["host"] != "node7"


def test_without_locks_on_the_disk_there_is_one_writer_too(tmp_path, monkeypatch):
    """As on a network disk without a lock server: names alone decide, also where all find the same dead holder."""

    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refused)
    for number in range(60):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / owner.NAME).write_text(json.dumps({**owner._me(), "start": "1"}))
        writing, most = [0], [0]
        together = threading.Barrier(4)

        def work(folder=folder, writing=writing, most=most, together=together):
            together.wait()
            try:
                with owner.own(folder, "the run"):
                    writing[0] += 1
                    most[0] = max(most[0], writing[0])
                    time.sleep(0.005)
                    writing[0] -= 1
            except ValueError:
                pass

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1]


def test_a_network_disk_that_makes_the_file_and_says_it_was_there_is_understood(tmp_path, monkeypatch):
    """As where the first answer of the server was lost; what is known of a file may be older than the link."""
    real = os.link

    def twice(made, path):
        known = os.stat(made)
        real(made, path)
        monkeypatch.setattr(Path, "stat", lambda self, **_: known if self == made else os.stat(self))
        raise FileExistsError

    monkeypatch.setattr(os, "link", twice)
    with owner.own(tmp_path, "the run"):
        assert named(tmp_path)["pid"] == os.getpid()
    assert not (tmp_path / owner.NAME).exists()


def test_a_file_that_another_machine_replaces_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    """NFS 3 knows the file that was opened no more: ESTALE."""
    real, stale = Path.read_bytes, iter([True, True])

    def replaced(path):
        if path.name == owner.NAME and next(stale, False):
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path)

    (tmp_path / owner.NAME).write_text(json.dumps(owner._me()))
    monkeypatch.setattr(Path, "read_bytes", replaced)
    with pytest.raises(ValueError, match=f"process {os.getpid()} of "), owner.own(tmp_path, "the run"):
        pass
    assert next(stale, None) is None


def test_whoever_lost_the_folder_ends_and_writes_no_more(tmp_path):
    code = "import time; from vqscale.disk import owner; owner.BEAT_S = 0.05\n"
    code += f"with owner.own({str(tmp_path)!r}, 'the run'):\n    print('mine', flush=True)\n    time.sleep(30)"
    words = [sys.executable, "-c", code]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    other = of_another_machine(tmp_path).read_text()
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "of node7 since" in complaint
    assert "took over" in complaint
    assert (tmp_path / owner.NAME).read_text() == other


def test_a_writer_whose_file_was_removed_by_hand_makes_it_again(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "BEAT_S", 0.05)
    with owner.own(tmp_path, "the run"):
        (tmp_path / owner.NAME).unlink()
        jobs.wait_for(lambda: (tmp_path / owner.NAME).exists())
        assert named(tmp_path)["pid"] == os.getpid()
    assert not (tmp_path / owner.NAME).exists()


def test_a_writer_of_an_older_version_that_holds_the_lock_alone_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "_GUARD_S", 0.1)
    refused = pytest.raises(ValueError, match=r"writing samples in .*: one without a name")
    with lock.hold(tmp_path / owner.GUARD), refused, owner.own(tmp_path, "samples"):
        pass


def test_who_waits_for_work_of_another_process_is_told_whose(tmp_path, caplog):
    caplog.set_level("INFO")
    with lock.hold(tmp_path / "index.lock", why="it reads"):
        waiting = threading.Thread(target=lambda: lock.hold(tmp_path / "index.lock", why="it reads").__enter__())
        waiting.start()
        jobs.wait_for(lambda: caplog.text)
    waiting.join()
    assert f"waiting for process {os.getpid()} of " in caplog.text


def _wait_for(path: Path) -> None:
    jobs.wait_for(path.exists)


def test_who_was_killed_while_it_took_the_place_of_another_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "_GUARD_S", 0.1)
    for name in (owner.NAME, owner.NEXT):
        (tmp_path / name).write_text(json.dumps({**owner._me(), "start": "1"}))
    with owner.own(tmp_path, "the run"):
        assert named(tmp_path)["start"] != "1"
    assert [path.name for path in tmp_path.iterdir()] == [owner.GUARD]


@pytest.mark.slow
def test_two_starts_of_one_run_lose_nothing(tmp_path, tiny_shards):
    """One is refused before it writes anything; the run ends as one that was started alone."""
    path = jobs.write_config(tmp_path, tiny_shards, "run.checkpoint_every=1")
    (tmp_path / "second").mkdir()
    wait = partial(_wait_for, tmp_path / "go")  # whoever writes goes on when the other one has ended
    before = partial(jobs.at_call, "vqscale.engine.engine:Engine.backward", 3, wait, 0)
    first, second = (jobs.Job(folder, [str(path)], 1, before, {}) for folder in (tmp_path, tmp_path / "second"))
    jobs.wait_for(lambda: "error:" in first.output + second.output)
    (tmp_path / "go").touch()
    statuses = sorted([first.wait(), second.wait()])
    alone = jobs.finish(jobs.write_config(tmp_path / "alone", tiny_shards, "run.checkpoint_every=1"))
    assert statuses == [[0], [2]]
    refused = first.output if second.output.count("error:") == 0 else second.output
    assert f"error: another process is writing the run in {tmp_path / 'run'}: process " in refused
    jobs.same_bits(alone, tmp_path / "run", 8)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_at_once(tmp_path, tiny_shards):
    path = jobs.write_config(tmp_path, tiny_shards)
    killed = partial(jobs.at_call, "vqscale.engine.engine:Engine.backward", 5, partial(jobs.hear, 9), 0)
    assert jobs.start(path, before=killed).wait() == [-9]
    assert (tmp_path / "run" / owner.NAME).exists()
    jobs.finish(path)
    assert not (tmp_path / "run" / owner.NAME).exists()
