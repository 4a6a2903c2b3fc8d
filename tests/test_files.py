"""Writing what must last: whatever ends a writing leaves the old file whole, and nothing else in the package writes."""

from __future__ import annotations

import ast
import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vqscale.disk import files

ROOT = Path(__file__).resolve().parents[1]

# What opens, renames or replaces a file by itself, and why it may.
OTHERS = {
    "data/shards/cache.py": "a download of any size; files.place puts it in its place when it is whole",
    "disk/wav.py": "a file in memory",
    "disk/owner.py": "what names the writer of a folder is made by a link, and goes with it",
    "programs/claims/before.py": "what a command prints, as it prints it",
    "programs/sampling/folder.py": "an entry of the zip that files.writing writes",
    "run/processes.py": "words to whoever started this process, read when it has ended",
    "tokenizer/export.py": "weights come in blocks, over many calls; files.place puts them in their place",
}

WRITE = """
import os, signal
from vqscale.disk import files
calls = {}
def dies_at(name, number):
    original = getattr(files.os, name)
    def counted(*args):
        calls[name] = calls.get(name, 0) + 1
        if calls[name] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)
    setattr(files.os, name, counted)
dies_at(*WHERE)
files.write("a.txt", "new" * 10000)
"""


def _write_and_die(folder, where):
    code = WRITE.replace("WHERE", repr(where))
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


@pytest.mark.parametrize(
    ("where", "standing"),
    [(("fchmod", 1), "old"), (("fsync", 1), "old"), (("replace", 1), "old"), (("fsync", 2), "new" * 10000)],
    ids=["when it begins", "when all is written", "before the rename", "after the rename"],
)
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path, where, standing):
    (tmp_path / "a.txt").write_text("old")
    assert _write_and_die(tmp_path, where).returncode == -9
    assert (tmp_path / "a.txt").read_text() == standing
    assert {path.name for path in tmp_path.iterdir()} <= {"a.txt", "a.txt.tmp"}
    files.write(tmp_path / "a.txt", "next")  # over what was left
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "next"}


def test_a_file_is_on_the_disk_before_its_name_is_and_the_name_before_the_call_returns(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name) or fsync(handle)
    )
    monkeypatch.setattr(os, "replace", lambda made, path: done.append("rename") or replace(made, path))
    files.write(tmp_path / "a.txt", "new")
    assert done == ["a.txt.tmp", "rename", tmp_path.name]
    done.clear()
    files.place(tmp_path / "a.txt", tmp_path / "b.txt")
    assert done == ["a.txt", "rename", tmp_path.name]
    done.clear()
    files.append(tmp_path / "lines", "one")
    files.append(tmp_path / "lines", "two")
    assert done == ["lines", tmp_path.name, "lines"]
    assert (tmp_path / "lines").read_text() == "one\ntwo\n"


LIMITED = """
import resource
from vqscale.disk import files
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # the kernel refuses the rest, as a full disk does
try:
    files.write("a.txt", "new" * 10000)
except OSError as error:
    print(error.errno)
"""


def test_what_the_disk_does_not_take_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{errno.EFBIG}\n"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_at_the_last_moment_leaves_the_old_file(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        files.write(tmp_path / "a.txt", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old"}


def _half(path, error):
    with files.writing(path) as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_nothing_beside(tmp_path, error):
    for path in (tmp_path / "new.npz", tmp_path / "old.npz"):
        if path.name == "old.npz":
            path.write_bytes(b"old")
        with pytest.raises(error):
            _half(path, error)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"old.npz": b"old"}


def test_a_file_keeps_its_permissions_and_a_new_one_has_those_of_the_process(tmp_path):
    old = os.umask(0o027)
    try:
        files.write(tmp_path / "new", b"")
        (tmp_path / "mine").write_text("")
        (tmp_path / "mine").chmod(0o600)
        files.write(tmp_path / "mine", b"secret")
    finally:
        os.umask(old)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "mine")] == [0o640, 0o600]


def test_nothing_is_written_through_a_link_that_lies_beside(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "a.txt.tmp").symlink_to(tmp_path / "precious")
    files.write(tmp_path / "a.txt", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"precious": "precious", "a.txt": "new"}


def test_a_folder_takes_its_place_whole_and_leaves_it_whole(tmp_path):
    (tmp_path / "0000000002.tmp").mkdir()
    (tmp_path / "0000000002.tmp" / "a").write_text("a")
    files.place(tmp_path / "0000000002.tmp", tmp_path / "0000000002")
    assert [path.name for path in tmp_path.rglob("*")] == ["0000000002", "a"]
    assert files.set_aside(tmp_path / "0000000002") == tmp_path / "0000000002.old.tmp"
    assert [path.name for path in tmp_path.iterdir()] == ["0000000002.old.tmp"]


def test_a_disk_without_fsync_of_folders_is_written_to(tmp_path, monkeypatch):
    fsync = os.fsync

    def refused(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refused)
    files.write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").read_text() == '{\n "a": 1\n}\n'


ALWAYS = {"os.rename", "os.renames", "os.fsync", "shutil.move", "shutil.copy", "shutil.copy2", "shutil.copyfile"}


def _writes(call):
    """Whether a call writes, renames or replaces a file by itself."""
    owner, _, name = ast.unparse(call.func).rpartition(".")
    if name == "open":
        words = [x.value for x in [*call.args, *(k.value for k in call.keywords)] if isinstance(x, ast.Constant)]
        return any(isinstance(word, str) and set(word) <= set("wxb") for word in words)
    if name == "replace":  # of a path: that of a text takes two, dataclasses.replace names its fields
        return owner == "os" or (bool(owner) and len(call.args) == 1 and not call.keywords)
    return f"{owner}.{name}" in ALWAYS or (bool(owner) and name in {"rename", "write_text", "write_bytes"})


def _writes_by_itself(path):
    return any(isinstance(node, ast.Call) and _writes(node) for node in ast.walk(ast.parse(path.read_text())))


def test_nothing_else_in_the_package_writes_what_must_last():
    package = ROOT / "vqscale"
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if path != package / "disk" / "files.py" and _writes_by_itself(path)
    }
    assert found == set(OTHERS), "use vqscale.disk.files, or say in OTHERS why not"


def test_the_check_sees_what_writes(tmp_path):
    lines = [
        "os.replace(a, b)", "path.replace(other)", "path.rename(other)", "path.write_text(x)", "path.write_bytes(x)",
        "open(path, 'w')", "path.open('wb')", "open(path, mode='xb')", "os.fsync(3)", "shutil.move(a, b)",
    ]  # fmt: skip
    harmless = ["files.write(path, x)", "text.replace('a', 'b')", "replace(card, x=1)", "open(path)", "open(path, 'a')"]
    for line in [*lines, *harmless]:
        (tmp_path / "a.py").write_text(f"def f():\n    {line}\n")
        assert _writes_by_itself(tmp_path / "a.py") == (line in lines), line


def test_it_needs_no_torch():
    code = (
        "import sys, vqscale.disk.files, vqscale.disk.owner, vqscale.disk.manifest; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
