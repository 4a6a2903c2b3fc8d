"""Checkpoints: any world size reads any other's, damage is found, a save that fails or is killed leaves the last."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading

import pytest
import torch
import zarr

from vqscale.disk import checkpoint, tensors, writer
from vqscale.disk.checkpoint import CheckpointError
from vqscale.disk.held import Held, share, shared
from vqscale.disk.writer import Writer
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh

K = 37  # does not divide by 2, 3 or 4


def _whole():
    generator = torch.Generator().manual_seed(7)
    return {
        "rows": torch.randn(K, 5, generator=generator),
        "exp_avg/rows": torch.randn(K, 5, generator=generator),
        "counts": torch.randint(0, 1 << 40, (K,), generator=generator),
    }


def _bounds(rank, world):
    return rank * K // world, (rank + 1) * K // world


def _replicated():
    generator = torch.Generator().manual_seed(8)
    return {
        "w": torch.randn(3, 7, generator=generator),
        "view": torch.arange(10.0)[2:4],
        "moment": torch.randn(5, 11, generator=generator).double(),
        "count": torch.tensor(2**40 + 1),
        "nothing": torch.zeros(0, 3),
        "half": torch.randn(9, generator=generator).bfloat16(),
        "flags": torch.tensor([True, False, True]),
    }


def _held(rank, world):
    """As a training holds it: all on every rank, but for a moment whose cuts lie as they please; one rank has none."""
    held, moment = {name: shared(x) for name, x in _replicated().items()}, _replicated()["moment"].view(-1)
    cuts = [0, *(55 * i // world + 3 for i in range(1, world - 1)), 55, 55] if world > 1 else [0, 55]
    low, high = cuts[rank], cuts[rank + 1]
    return {**held, "moment": Held(moment[low:high].clone(), low, (5, 11))}


def save(folder, step, held, rows, facts, mesh, keep):
    writing = Writer(folder, mesh, keep)
    writing.save(step, held, rows, facts)
    writing.wait()
    return folder / f"{step:010d}"


def _save(folder, step, data=1, codes=1, keep=3):
    """Every rank saves its cut of the same whole tensors."""
    mesh = Mesh(data, codes)
    start, stop = _bounds(mesh.codes.rank, codes)
    rows = {name: (tensor[start:stop], start, K) for name, tensor in _whole().items()}
    facts = {"step": step, "rank": mesh.world.rank, "seed": 2**61 + 1}
    return save(folder, step, _held(mesh.world.rank, mesh.world.size), rows, facts, mesh, keep)


def _load(folder, world):
    """(path, reasons, rows of this rank, its facts); what is no rows is compared here, held and whole."""
    mesh = Mesh(1, world)
    path, passed_over = checkpoint.latest(folder, mesh)
    start, stop = _bounds(mesh.codes.rank, world)
    read = checkpoint.read(path)
    held = _held(mesh.world.rank, world)
    empty = {name: Held(torch.zeros_like(x.flat), x.start, x.shape, x.shared) for name, x in held.items()}
    rows = {name: torch.zeros_like(x[start:stop]) for name, x in _whole().items()}
    read.fill(empty, {name: (x, start, K) for name, x in rows.items()})
    for name, x in _replicated().items():
        assert torch.equal(empty[name].flat, held[name].flat), name
        assert torch.equal(read.whole(name), x), name
        assert read.whole(name).dtype == x.dtype
    return path, passed_over, rows, read.facts


def _same(answers):
    """The ranks' rows, one after the other, are the whole tensors to the bit."""
    for name, tensor in _whole().items():
        assert torch.equal(torch.cat([rows[name] for _, _, rows, _ in answers]), tensor)


@pytest.mark.dist
def test_what_four_ranks_saved_any_number_loads(ranks, tmp_path):
    paths = ranks(4, _save, tmp_path, 3, 1, 4)
    assert paths == [tmp_path / "0000000003"] * 4
    for world in (4, 2):
        answers = ranks(world, _load, tmp_path, world)
        _same(answers)
        assert all(path == paths[0] and not passed_over for path, passed_over, *_ in answers)
        assert all(facts == {"step": 3, "rank": 0, "seed": 2**61 + 1} for *_, facts in answers)
    _same([_load(tmp_path, 1)])


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_rank_writes_its_share_and_no_element_twice(world):
    whole = {name: x for name, x in _replicated().items() if name != "moment"}
    shares = [share({name: shared(x) for name, x in whole.items()}, rank, world) for rank in range(world)]
    for name, x in whole.items():
        parts = sorted(
            [part[name] for part in shares if name in part], key=lambda part: part.start
        )  # one after the other
        assert torch.equal(torch.cat([x.view(-1)[:0], *(part.flat for part in parts)]), x.view(-1)), name
        assert [part.start for part in parts] == [sum(len(p.flat) for p in parts[:i]) for i in range(len(parts))]
    sizes = [sum(len(part.flat) for part in each.values()) for each in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.dist
def test_replicas_share_the_writing_and_each_file_has_one_writer(ranks, tmp_path):
    ranks(4, _save, tmp_path, 1, 2, 2)
    starts = sorted(int(path.parent.name) for path in tmp_path.glob("0000000001/rows/counts/*/zarr.json"))
    assert starts == [0, 9, 18, 27]  # 18 and 19 rows of two code ranks, each halved over two replicas
    second = zarr.open_array(str(tmp_path / f"0000000001/rows/counts/{9:012d}"), mode="r")
    assert torch.equal(torch.from_numpy(second[...]), _whole()["counts"][9:18])
    assert len(list(tmp_path.glob("0000000001/ranges/*"))) == 4
    _same([_load(tmp_path, 1)])


def _save_with_an_empty_rank(folder):
    mesh = Mesh(1, 2)
    rows = torch.arange(6.0).reshape(3, 2)
    mine = (rows, 0, 3) if mesh.codes.rank == 0 else (rows[3:], 3, 3)
    return save(folder, 1, {}, {"rows": mine}, {}, mesh, keep=1)


@pytest.mark.dist
def test_a_rank_may_own_no_rows(ranks, tmp_path):
    path = ranks(2, _save_with_an_empty_rank, tmp_path)[0]
    assert checkpoint.latest(tmp_path) == (path, [])
    read = checkpoint.read(path)
    assert torch.equal(read.some_rows("rows", 1, 3, 3), torch.tensor([[2.0, 3.0], [4.0, 5.0]]))
    assert read.some_rows("rows", 3, 3, 3).shape == (0, 2)


def test_many_chunks_and_zero_chunks_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK_BYTES", 64)
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 64)
    rows = torch.cat([torch.zeros(20, 4), torch.ones(11, 4), torch.zeros(9, 4)])
    path = save(tmp_path, 1, {"x": shared(rows)}, {"r": (rows, 0, 40)}, {}, Mesh(), keep=1)
    assert torch.equal(checkpoint.read(path).some_rows("r", 3, 38, 40), rows[3:38])
    assert torch.equal(checkpoint.read(path).whole("x"), rows)
    assert len(list(path.glob("rows/r/*/c.*"))) == 3  # chunks of four rows: 5, 6 and 7 are the ones that hold ones


def test_another_number_of_codes_or_another_model_is_refused(tmp_path):
    path = _save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"counts has 64 rows in this configuration, but 37 in .* change the number"):
        checkpoint.read(path).some_rows("counts", 0, 8, 64)
    with pytest.raises(ValueError, match=r"has no rows named code, only \['counts', 'exp_avg/rows', 'rows'\]"):
        checkpoint.read(path).some_rows("code", 0, 8, 37)


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        _save(tmp_path, step, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["0000000003", "0000000010"]
    _save(tmp_path, 5, keep=1)  # after going back: what lies ahead is not this run's to remove
    assert sorted(os.listdir(tmp_path)) == ["0000000005", "0000000010"]
    _save(tmp_path, 10, keep=1)  # the same step again replaces
    assert sorted(os.listdir(tmp_path)) == ["0000000010"]
    _same([_load(tmp_path, 1)])


def _flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "ranges": (lambda p: _flip(p / "ranges/00000.safetensors"), "ranges/00000.safetensors was changed"),
    "rows": (lambda p: _flip(next(p.glob("rows/rows/*/c.*"))), "rows/rows/000000000000/c.0.0 was changed"),
    "facts": (lambda p: (p / "facts.json").unlink(), "facts.json cannot be read"),
    "truncated": (lambda p: os.truncate(p / "ranges/00000.safetensors", 10), "ranges/00000.safetensors has 10 bytes"),
    "manifest gone": (lambda p: (p / "manifest.json").unlink(), "manifest.json cannot be read"),
    "manifest cut": (lambda p: os.truncate(p / "manifest.json", 200), "manifest.json cannot be read"),
    "manifest edited": (
        lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text().replace('"step": 2', '"step": 3')),
        "manifest.json was changed",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(tmp_path, kind):
    old, new = _save(tmp_path, 1), _save(tmp_path, 2)
    assert checkpoint.latest(tmp_path) == (new, [])
    harm, reason = DAMAGE[kind]
    harm(new)
    path, passed_over = checkpoint.latest(tmp_path)
    assert path == old
    assert len(passed_over) == 1
    assert passed_over[0].startswith(f"{new}: {reason}")
    harm(old) if kind != "manifest edited" else shutil.rmtree(old)
    assert checkpoint.latest(tmp_path)[0] is None


def test_no_folder_and_an_empty_folder_have_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path / "none") == (None, [])
    (tmp_path / "notes").mkdir()
    (tmp_path / "0000000009.tmp").mkdir()
    assert checkpoint.latest(tmp_path) == (None, [])
    (tmp_path / "0000000001").mkdir()
    with pytest.raises(ValueError, match=r"0000000001 is not a whole checkpoint: manifest.json cannot be read"):
        checkpoint.read(tmp_path / "0000000001")


def _killed_while_writing(folder, rank):
    """One rank dies inside its writing, as kill -9 does: nothing is cleaned up."""
    if Mesh(1, 2).world.rank == rank:
        writer._write_rows = lambda part, rows: (part.mkdir(parents=True), os._exit(9))
    return _save(folder, 2, 1, 2)


@pytest.mark.dist
def test_a_killed_save_leaves_the_last_and_the_next_save_cleans(ranks, tmp_path):
    old = ranks(2, _save, tmp_path, 1, 1, 2)[0]
    with pytest.raises(RuntimeError, match="died without a word"):
        ranks(2, _killed_while_writing, tmp_path, 1)
    assert len([*tmp_path.glob("0000000002.*.tmp")]) == 1
    assert checkpoint.latest(tmp_path) == (old, [])
    ranks(2, _save, tmp_path, 3, 1, 2)
    assert sorted(os.listdir(tmp_path)) == ["0000000001", "0000000003"]


def _steps_beside(folder, slow):
    """(what was saved, the steps until it stood, whether it stood before); rank `slow` writes as long as it is told."""
    mesh, told = Mesh(1, 2), threading.Event()
    before = writer._write_rows
    if mesh.world.rank == slow:
        writer._write_rows = lambda part, rows: told.wait(30) and before(part, rows)
    tensor = torch.arange(5.0)
    held, start = {"w": shared(tensor)}, 3 * mesh.codes.rank
    rows = torch.full((3, 2), 7.0)
    try:
        writing = Writer(folder, mesh, keep=2)
        writing.save(1, held, {"r": (rows, start, 6)}, {})
        tensor += 100  # the next step
        rows += 100
        stood = []
        for step in range(40):
            writing.advance(*ops.sum_over(torch.tensor(writing.state()), mesh.world).tolist())
            stood.append((folder / "0000000001").exists())
            if step == 20:
                told.set()
        writing.save(2, held, {"r": (rows, start, 6)}, {})  # waits for the first
        first_stands = (folder / "0000000001").exists()
        writing.wait()
    finally:
        writer._write_rows = before
    read = [checkpoint.read(folder / f"000000000{step}") for step in (1, 2)]
    return any(stood[:21]), first_stands, [(x.whole("w").tolist(), x.some_rows("r", 0, 6, 6).unique()) for x in read]


@pytest.mark.dist
def test_steps_go_on_while_a_rank_writes_what_was_there_when_it_saved(ranks, tmp_path):
    for slow in (0, 1):
        for early, stands, (first, second) in ranks(2, _steps_beside, tmp_path / str(slow), slow):
            assert (early, stands) == (False, True)
            assert first == ([0.0, 1.0, 2.0, 3.0, 4.0], torch.tensor([7.0]))
            assert second == ([100.0, 101.0, 102.0, 103.0, 104.0], torch.tensor([107.0]))


def _full_disk(folder, rank, small):
    """Rank `rank` has no space left; every rank says what it saw, then all save again elsewhere in good health."""
    mesh = Mesh(1, 2)
    before = writer._write_rows
    if mesh.world.rank == rank:
        if small is None:

            def full(part, rows):
                before(part, rows)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part))

            writer._write_rows = full
        else:
            (small / "ballast").write_bytes(bytes(os.statvfs(small).f_bavail * os.statvfs(small).f_frsize - (16 << 10)))
    try:
        _save(folder, 2, 1, 2)
        return "no error"
    except CheckpointError as error:
        return str(error)
    finally:
        writer._write_rows = before


def _check_full_disk(messages, folder, old):
    assert messages[0] == messages[1]
    assert "the checkpoint of step 2 was not written: rank" in messages[0]
    assert "No space left on device" in messages[0]
    assert f"The last good one stands: {old}. Make room" in messages[0]
    assert not list(folder.glob("*.tmp"))
    assert checkpoint.latest(folder) == (old, [])


def _names(folder):
    """Under which names this rank writes the checkpoint of step 1, twice; the first time it fails."""
    found, before = [], writer._write

    def noted(new, *others):
        found.append(new.name)
        if len(found) == 1:
            raise OSError("no")
        before(new, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_write", noted)
        with pytest.raises(CheckpointError, match="not written: rank 0: OSError: no"):
            _save(folder, 1, 1, 2)
        _save(folder, 1, 1, 2)
    return found


@pytest.mark.dist
def test_a_save_is_written_under_a_name_that_was_never_there_and_all_ranks_know_it(ranks, tmp_path):
    """Another machine of a network disk may see under an old name what has been moved away: a killed run's save."""
    (tmp_path / "0000000001.tmp").mkdir()
    one, other = ranks(2, _names, tmp_path)
    assert one == other
    assert len({*one, "0000000001.tmp"}) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["0000000001"]


@pytest.mark.dist
def test_no_space_on_one_rank_is_an_error_on_all(ranks, tmp_path):
    old = ranks(2, _save, tmp_path, 1, 1, 2)[0]
    _check_full_disk(ranks(2, _full_disk, tmp_path, 1, None), tmp_path, old)
    ranks(2, _save, tmp_path, 2, 1, 2)
    assert checkpoint.latest(tmp_path) == (tmp_path / "0000000002", [])


@pytest.mark.dist
def test_a_full_file_system_is_an_error_on_all(ranks, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        old = ranks(2, _save, small / "run", 1, 1, 2)[0]
        _check_full_disk(ranks(2, _full_disk, small / "run", 0, small), small / "run", old)
        (small / "ballast").unlink()
        ranks(2, _save, small / "run", 2, 1, 2)
        assert checkpoint.latest(small / "run")[0] == small / "run" / "0000000002"
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_no_space_for_ranges_is_named(tmp_path, monkeypatch):
    old = _save(tmp_path, 1)
    monkeypatch.setattr(writer.tensors, "write", _buried)
    with pytest.raises(
        CheckpointError, match=rf"OSError: \[Errno {errno.ENOSPC}\] No space left .* stands: {old}\. Make"
    ):
        _save(tmp_path, 2)
    assert checkpoint.latest(tmp_path) == (old, [])


def _buried(*_):
    """What a library does on a full disk: the error that counts is the context of another."""
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        raise RuntimeError("unexpected pos 704 vs 598")
