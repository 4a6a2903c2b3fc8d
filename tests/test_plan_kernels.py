"""The model of a step on a GPU: its kernels, counted in Triton's interpreter, and its rates, read off a report."""

from __future__ import annotations

import json

import pytest
from interpreted import INTERPRETED

pytest.importorskip("triton")

from vqscale.plan import check, cost, interpreted, machines
from vqscale.plan.traffic import Work

counted = pytest.mark.skipif(not INTERPRETED, reason="the kernels run on the device")


@counted
def test_products_blocks_and_bytes_are_those_that_the_kernels_do():
    assert interpreted.available()
    rows = interpreted.compare()
    assert [row["products_predicted"] for row in rows] == [6, 8]
    for row in rows:
        for name in interpreted.NAMES:
            assert row[f"{name}_predicted"] == row[f"{name}_counted"] > 0, name
        assert row["blocks_counted"] == 2
    text = "\n".join(interpreted.text(rows))
    assert "without entropies: products 6 = 6, library 2 = 2, blocks 2 = 2" in text


@counted
def test_a_kernel_that_did_more_would_be_seen(monkeypatch):
    found = interpreted.count(*interpreted.SIZES, False, interpreted.LEAST_BLOCKS)
    monkeypatch.setattr(interpreted.cost, "LIBRARY", 3)
    monkeypatch.setattr(interpreted, "count", lambda *given: found)
    assert check.check([], [], as_json=True) == 1


def _report(card="NVIDIA H200", **seconds):
    rows = [{"case": "4096 x 262144 x 256", "form": form, "seconds": taken} for form, taken in seconds.items()]
    return {"machine": {"gpu": card}, "interpreted": False, "parts": {"step": {"rows": rows}}}


def test_what_kernels_and_library_reach_is_assumed_until_a_report_of_the_card_says_it(tmp_path):
    assert machines.from_results("h200", None) == (machines.MACHINES["h200"], "assumed")
    assert machines.from_results("h200", tmp_path) == (machines.MACHINES["h200"], "assumed")
    product = 2 * 4096 * 262144 * 256 / 700e12
    (tmp_path / "a.json").write_text(json.dumps(_report(floor=6 * product / 0.9, ours=(2 / 0.9 + 4 / 0.5) * product)))
    (tmp_path / "z.json").write_text(json.dumps({**_report(), "parts": {"search": {"rows": []}}}))  # --only search
    (tmp_path / "b.json").write_text(json.dumps(_report("NVIDIA A100-SXM4-80GB", floor=1.0, ours=2.0)))
    found, known = machines.from_results("h200", tmp_path)
    assert (found.library, found.kernels) == pytest.approx((0.9, 0.5))
    assert known == "measured, a.json"
    assert machines.from_results("h100", tmp_path)[1] == "assumed"
    work = Work(2**18, 256, 4096, codes_precision="medium")
    assert 6 * product * 700 / cost.codes_rate(work, found) == pytest.approx((2 / 0.9 + 4 / 0.5) * product)


BROKEN = ({}, {"ours": 1.0}, {"ours": 1.0, "floor": 9.0})  # seconds; the first was cut short


@pytest.mark.parametrize("text", ["no json", "{}", *(json.dumps(_report(**seconds)) for seconds in BROKEN)])
def test_a_report_that_cannot_be_read_is_refused_by_name(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=r"c\.json is no report of bench gpu.*move it away"):
        machines.from_results("h200", tmp_path)
