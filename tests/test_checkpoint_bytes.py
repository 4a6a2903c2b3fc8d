"""What saving and loading take, counted at every ZeRO stage: a rank's own share and some blocks; nothing is sent."""

from __future__ import annotations

import engines
import meter
import pytest
import torch
from safetensors import safe_open
from torch import distributed, nn

from vqscale.disk import checkpoint, tensors, writer
from vqscale.disk.checkpoint import range_file
from vqscale.disk.writer import Writer
from vqscale.engine.average import Average
from vqscale.engine.config import AverageConfig
from vqscale.parallel.mesh import Mesh

KINDS = [{"name": "torch"}, *({"name": "deepspeed", "stage": stage} for stage in range(4))]
BLOCK = 1 << 16
SMALL = 600 << 10  # the manifest and what zarr and json make of it
LARGE = 2_000_003  # numbers; a whole state has four times as many, of which a rank of four holds 7.6 MiB
SENDS = ("all_gather_into_tensor", "all_gather", "reduce_scatter_tensor", "broadcast", "all_to_all", "send", "gather")


class Net(engines.Net):
    """With so many numbers that a share of another rank cannot hide among blocks and manifests."""

    def __init__(self):
        super().__init__()
        self.large = nn.Parameter(torch.ones(LARGE))

    def forward(self, x):
        return engines.Out(super().forward(x).z + self.large.mean())


def _state(engine, average):
    held, rows, facts = engine.held()
    held |= {f"average/{name}": each for name, each in average.held()[0].items()}
    start = engines.K * engine.mesh.codes.rank // engine.mesh.codes.size
    return held, {name: (x, start, engines.K) for name, x in rows.items()}, facts


def _forbid(patch):
    """No tensor of more than a few numbers goes anywhere."""

    def refused(*args, **kwargs):
        raise AssertionError("a tensor was sent")

    for name in SENDS:
        patch.setattr(distributed, name, refused)
    all_reduce = distributed.all_reduce
    patch.setattr(distributed, "all_reduce", lambda x, *a, **k: refused() if x.numel() > 4 else all_reduce(x, *a, **k))


def _saved_and_loaded(folder, data, codes, kind):
    """(peaks of copy, of writing and of loading; numbers by name in this rank's file, and those it alone holds)"""
    mesh = Mesh(data, codes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "Net", Net)
        engine = engines.make(mesh, **kind)
    average = Average(engine, AverageConfig(0.9))
    engines.take_step(engine, 0)
    average.update(1)
    held, rows, facts = _state(engine, average)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "BLOCK_BYTES", BLOCK)
        patch.setattr(writer, "CHUNK_BYTES", BLOCK)
        peaks = []

        class Metered(writer.Task):
            def _run(self):
                work = self._work
                self._work = lambda: peaks.append(meter.peak(work)[1])
                super()._run()

        patch.setattr(writer, "Task", Metered)
        _forbid(patch)
        writing = Writer(folder, mesh, keep=1)
        with meter.NewBytes() as copied:
            writing.save(1, held, rows, facts)
        writing.wait()
        read = checkpoint.read(folder / "0000000001")
        _, loaded = meter.peak(lambda: read.fill(held, rows))
    engine.loaded(read.facts)
    with safe_open(range_file(read.path, mesh.world.rank), framework="pt") as file:
        mine = {name: file.get_slice(name).get_shape()[0] for name in file.keys()}  # noqa: SIM118
    alone = {name: len(each.flat) for name, each in held.items() if not each.shared and len(each.flat)}
    return copied.peak, max(peaks), loaded, mine, alone


def _every_kind(folder, data, codes):
    return [_saved_and_loaded(folder / str(i), data, codes, kind) for i, kind in enumerate(KINDS)]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("data", "codes"), [(1, 2), (2, 2)])
def test_a_save_and_a_load_take_a_share_and_send_nothing(ranks, tmp_path, data, codes):
    answers = ranks(data * codes, _every_kind, tmp_path, data, codes, timeout_s=120)
    net = Net()
    learned = {name: p.numel() for name, p in net.named_parameters() if p.requires_grad}
    whole = 4 * (4 * sum(learned.values()) + net.frozen.numel() + 2 * 255 + 3 * engines.K * engines.DIM) + 8
    for i, kind in enumerate(KINDS):
        for copied, written, loaded, mine, alone in (answer[i] for answer in answers):
            assert copied <= whole / len(answers) + 4 * BLOCK, kind  # of memory: parameters, moments, averages, rows
            assert written <= 4 * BLOCK + SMALL, kind  # beside what was copied
            assert loaded <= 4 * BLOCK + SMALL, kind
            assert {name: mine[name] for name in alone} == alone, kind  # what nobody else has, and all of that
        for name, size in learned.items():
            moments = [answer[i][3].get(f"exp_avg/{name}", 0) for answer in answers]
            assert sum(moments) == size, (kind, name)
            if kind.get("stage", 0) == 3 and name == "deep.weight":
                assert max(moments) == -(-size // len(answers))
