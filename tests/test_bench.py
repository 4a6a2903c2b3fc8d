"""tools/bench codes and data: what it prints, that its forms compute the same, and its bytes. No time asserted."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import forks
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vqscale.codes import products
from vqscale.parallel.mesh import Mesh

SMALL = ("--tokens", "64", "--codes", "512", "--dim", "8", "--repeats", "2", "--threads", "1")
N, K, D = 64, 512, 8


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    done = forks.program("tools/bench", *words)
    assert done.returncode == 0, done.stderr
    return done


LOW = ("bf16",) if products.fast_on_cpu() else ()  # a step in bfloat16 products
HAS_FAISS = importlib.util.find_spec("faiss") is not None


def check_shape(report: dict, processes: int) -> None:
    assert set(report) == {"step", "search", "machine", "commit", "command", "config"}
    for work in ("step", "search"):
        names = (*LOW, "ours", "released", "dense") if work == "step" else ("ours", "dense", "bf16")
        assert set(report[work]) == {*names, "floor"} | ({"faiss"} if work == "search" and HAS_FAISS else set())
        for name in report[work].keys() - {"floor"}:
            cost = report[work][name]
            if name in ("dense", "faiss") and work == "search":
                assert cost.pop("same_ids") == 1.0
            assert set(cost) == {"seconds", "peak_bytes", "sent_bytes"}
            assert cost["seconds"] > 0
            assert cost["peak_bytes"] >= 0
        assert set(report[work]["floor"]) == {"seconds", "products"}
        assert report[work]["floor"]["seconds"] > 0
    assert report["step"]["floor"]["products"] == 6
    assert report["search"]["floor"]["products"] == 1
    assert {"cpu", "cores", "threads", "torch"} <= set(report["machine"])
    assert report["command"].startswith("vqscale bench codes --tokens 64")
    assert report["config"]["tokens"] == N
    assert report["config"]["processes"] == processes


@pytest.mark.slow
@pytest.mark.dist
def test_one_process_sends_nothing():
    report = json.loads(bench("codes", *SMALL, "--entropy", "--json").stdout)
    check_shape(report, 1)
    assert report["config"]["entropy"] is True
    sent = [report[work][name]["sent_bytes"] for work in ("step", "search") for name in ("ours", "dense")]
    assert sent == [0, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.dist
def test_sent_bytes_of_two_processes():
    report = json.loads(bench("codes", *SMALL, "--processes", "2", "--json").stdout)
    check_shape(report, 2)
    # A search gathers the tokens, then all-reduces a float64 score and an int64 id of each of the 2 N tokens.
    assert report["search"]["ours"]["sent_bytes"] == N * D * 4 + 2 * N * 8 + 2 * N * 8 + 8  # and whether all are finite
    assert report["search"]["dense"]["sent_bytes"] == 0
    assert report["step"]["dense"]["sent_bytes"] == K * D * 4
    # Tokens out, mean rows and codes back, the gradients of all three; less than 20 numbers per token; statistics.
    assert 6 * N * D * 4 < report["step"]["ours"]["sent_bytes"] < 6 * N * D * 4 + 2 * N * 20 * 4 + 256


@pytest.mark.slow
@pytest.mark.dist
def test_a_search_alone():
    done = bench("codes", *SMALL, "--work", "search")
    assert ("faiss is left out: faiss is not installed" in done.stderr) == (not HAS_FAISS)
    rows = [line.split() for line in done.stdout.splitlines()]
    forms = ["ours", "bf16", "dense", *(["faiss"] if HAS_FAISS else []), "floor"]
    assert [row[1] for row in rows if row[:1] == ["search"]] == forms
    assert not any(row[:1] == ["step"] for row in rows)
    assert "100.00% of the ids are ours" in done.stdout


@pytest.mark.slow
def test_no_faiss_on_other_numbers(tool, capsys):
    codes = tool("codes")
    setting = codes.choose(codes.arguments([*SMALL, "--dtype", "float64", "--work", "search"]))
    assert "faiss is left out: it searches in float32 on a CPU, not in float64 on cpu" in capsys.readouterr().err
    assert set(tool("measure").measure(setting)["search"]) == {"ours", "dense", "floor"}
    # nothing is said of a work that is not measured
    codes.choose(codes.arguments([*SMALL, "--dtype", "float64", "--work", "step", "--max-dense-gib", "8"]))
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_dense_form_over_the_limit_is_left_out(tool, capsys):
    codes, measure = tool("codes"), tool("measure")
    setting = codes.choose(codes.arguments([*SMALL, "--max-dense-gib", "0.0002"]))
    assert setting.dense == ("search",)
    assert "the dense step is left out: it needs about 0.8 MiB, more than the 0.0002 GiB" in capsys.readouterr().err
    costs = measure.measure(setting)
    report = {work: codes.merge([costs[work]], work, setting) for work in costs}
    assert report["step"]["dense"] == {"seconds": None, "peak_bytes": None, "sent_bytes": 0}
    assert report["search"]["dense"]["seconds"] > 0
    report |= tool("command").origin("codes", SMALL, "cpu", 1) | {"config": vars(setting)}
    rows = [line.split() for line in codes.table(report).splitlines()]
    assert ["step", "dense", "-", "-", "-", "0.00"] in rows


@pytest.mark.slow
@pytest.mark.dist
def test_the_upkeep_of_a_step_sends_a_number_where_nothing_is_dead_and_no_more_for_more_codes():
    for codes in ("512", "4096"):
        small = ("--tokens", "64", "--codes", codes, "--dim", "8", "--repeats", "1", "--threads", "1")
        report = json.loads(bench("upkeep", *small, "--processes", "2", "--json").stdout)
        sent = [report["upkeep"][name]["sent_bytes"] for name in ("step", "counted", "revived", "many dead")]
        ids, one = N * 8, 8
        assert sent[1] - sent[0] == ids
        assert sent[2] - sent[1] == one
        # a quarter of the tokens of both: their dead codes, then how used each token's code is, places and values
        assert ids < sent[3] - sent[2] < 2 * N * (8 + 8 + 8 + 4 * D)
        assert report["upkeep"]["step"]["ratio"] == 1.0


@pytest.mark.parametrize("entropy", [False, True])
def test_ours_and_the_dense_form_compute_the_same(tool, entropy):
    forms = tool("forms")
    # One code less than a power of two; float64, so that equal means equal.
    built = forms.build(forms.Setting(40, 127, 8, entropy=entropy, dtype="float64"), Mesh())
    ours, dense = built["step"]["ours"](), built["step"]["dense"]()
    torch.testing.assert_close(built["step"]["released"](), dense, rtol=1e-10, atol=1e-12)
    # The released entropy has an offset of 1e-5 inside a logarithm, ours has not.
    tolerance = 1e-4 if entropy else 1e-12
    for a, b in zip(ours, dense, strict=True):
        assert a.abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(built["search"]["ours"](), built["search"]["dense"]())


class Products(TorchDispatchMode):
    """Counts the operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.operations += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        elif func._overloadpacket.__name__ == "bmm":
            left, right = args
            self.operations += 2 * left.numel() * right.shape[2]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("entropy", [False, True])
def test_products_of_the_dense_form_and_the_floor(tool, entropy, monkeypatch):
    forms = tool("forms")
    monkeypatch.setitem(forms.FLOOR_BLOCKS, "cpu", (256, 1024))
    # Neither number is a multiple of a block.
    built = forms.build(forms.Setting(600, 1500, 16, entropy=entropy, scan_mib=4), Mesh())
    counted = {}
    for work, some in built.items():
        for name, form in some.items():
            with Products() as seen:
                form()
            counted[work, name] = seen.operations / (2 * 600 * 1500 * 16)
    assert counted["step", "dense"] == counted["step", "released"] == 8
    assert counted["step", "floor"] == len(forms.PRODUCTS["step"])
    assert counted["search", "dense"] == counted["search", "floor"] == len(forms.PRODUCTS["search"])
    assert counted["search", "bf16"] == len(forms.PRODUCTS["search"])
    # Ours needs what the floor needs; with few pairs at the entropy's temperature, that is all.
    assert all(counted["step", name] == counted["step", "floor"] for name in ("ours", *LOW))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this kernel does not count peaks")
def test_peak_bytes_of_ours_are_not_tokens_times_codes(tool):
    forms, measure = tool("forms"), tool("measure")
    mesh, tokens, codes = Mesh(), 512, 16384
    pairs = tokens * codes * 4
    setting = forms.Setting(tokens, codes, 8, scan_mib=4)
    form = forms.build(setting, mesh)["step"]
    peaks = {name: measure.alone(form[name], mesh).peak_bytes for name in ("ours", "dense")}
    assert peaks["ours"] < pairs / 2
    # The dense form keeps p, u and h; its memory is counted in full, also after a smaller run.
    assert 3 * pairs < peaks["dense"] < forms.dense_memory(setting)["step"]


@pytest.mark.slow
def test_peak_bytes_of_a_known_allocation(tool):
    measure, forms = tool("measure"), tool("forms")
    for mib in (40, 10, 40):
        peak = measure.peak_bytes(lambda mib=mib: torch.ones(mib, 2**18).sum(), torch.device("cpu"), Mesh().codes)
        assert mib - 1 < peak / 2**20 < mib + 2
    assert forms.dense_bytes(forms.Setting(1, 100, 10, processes=4))["step"] == 2 * 3 * 4000 // 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["codes", "--tokens", "0"], "tokens is 0 and must be at least 1; it comes from --tokens: give 1 or more"),
        (["codes", "--codes", "-5", "--dim", "0"], "codes is -5 and must be at least 1"),
        (["codes", "--spread", "0"], "spread is 0.0 and must be a positive number; it comes from --spread"),
        (["codes", "--scan-mib", "0"], "it comes from --scan-mib"),
        (["codes", "--max-dense-gib", "nan"], "the limit of the dense form is nan GiB"),
        (["data", "--num", "0"], "argument --num: 0 is not a number of things"),
        (["data", "--rounds", "-1"], "argument --rounds: -1 is not a number of things"),
        (["data", "--workers", "-1"], "argument --workers: -1 is below 0"),
        (["data", "--num", "62"], "62 images in 4 shards for 2 processes are 30 for one of them, and a batch is 64"),
        (["data", "--workers", "5"], "512 images in 4 shards for 5 processes are 0 for one of them"),
        (["kernels", "--dim", "0"], "argument --dim: 0 is not a number of things"),
        (["gpu", "--budget-s", "nan"], "the budget is nan s"),
        (["codes", "--dtype", "bfloat16"], "invalid choice: 'bfloat16'"),
        (
            ["code"],
            "there is no subcommand 'code', the first argument: use codes, data, gpu, head, kernels, memory, "
            "quickstart, rounding, sample, save, upkeep",
        ),
    ],
)
def test_wrong_arguments(tool, capsys, words, message):
    try:
        status = tool("__main__").main(words)
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1"])
def test_both_readers_of_images(workers):
    words = ("--num", "32", "--images", "16", "--batch", "8", "--rounds", "2", "--image-size", "32")
    report = json.loads(bench("data", *words, "--workers", workers, "--json").stdout)
    assert (report["samples"], report["shards"], report["workers"]) == (32, 4, int(workers))
    assert report["ratio"] == report["ours"]["images_per_s"] / report["webdataset"]["images_per_s"]
    assert all(len(report[reader]["rounds"]) == 2 for reader in ("ours", "webdataset"))
    assert report["command"].startswith("vqscale bench data --num 32")
    assert {"cpu", "cores", "threads", "torch"} <= set(report["machine"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_is_said_first(tool, capsys):
    with pytest.raises(SystemExit) as error:
        tool("__main__").main(["codes", "--device", "cuda", "--tokens", "0"])
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert "cuda needs a CUDA device" in text
    assert "use --device cpu" in text
    assert "tokens" not in text.split("error:")[1]


@pytest.mark.gpu
def test_on_a_gpu(tool):
    codes, forms = tool("codes"), tool("forms")
    report = codes.run(forms.Setting(512, 16384, 64, entropy=True, device="cuda", repeats=2))
    assert report["step"]["ours"]["seconds"] > 0
    assert 0 < report["step"]["ours"]["peak_bytes"] < report["step"]["dense"]["peak_bytes"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this kernel does not count peaks")
@pytest.mark.dist
def test_memory_grows_with_the_rows_and_the_tokens_and_not_with_their_product():
    words = ("--codes", "4096", "65536", "--tokens", "512", "--dim", "8", "--entropy", "--scan-mib", "16")
    done = bench("memory", *words, "--threads", "1", "--max-dense-gib", "0.1", "--json")
    assert "dense is left out for 65536 codes: it needs about 1156.0 MiB, more than the 0.1 GiB" in done.stderr
    few, many = json.loads(done.stdout)["memory"]
    assert (few["rows"], many["rows"]) == (4096 * 8 * 4, 65536 * 8 * 4)
    assert many["pairs"] == 512 * 65536 * 4
    assert few["dense"] > 3 * few["pairs"]
    assert many["dense"] is None
    # 16 times the codes: the dense form would need 16 times as much, beyond 128 MiB for each of its tensors
    assert many["without_gradient"] < many["pairs"] / 2
    assert many["ours"] - few["ours"] < 16 * many["rows"]


def test_a_table_of_memory(tool):
    memory = tool("memory")
    row = {
        "codes": 4096,
        "rows": 2**20,
        "ours": 3 * 2**20,
        "without_gradient": 2 * 2**20,
        "dense": None,
        "pairs": 2**21,
    }
    config = {"tokens": 8, "dim": 64, "entropy": False, "processes": 1, "threads": 1}
    report = {"memory": [row], "config": config} | tool("command").origin("memory", [], "cpu", 1)
    assert memory.table(report).splitlines()[-1].split() == ["4096", "1.0", "3.0", "2.0", "-", "2.0"]
