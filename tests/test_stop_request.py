"""Requests to stop: heard while there is work, left to whoever listened before when it is done."""

from __future__ import annotations

import os
import signal

import pytest
import test_sample

from vqscale.parallel.mesh import Mesh
from vqscale.run import processes
from vqscale.run.folder import STOP_SIGNALS, StopRequest, own_signals


def _handlers():
    return [signal.getsignal(number) for number in STOP_SIGNALS]


@own_signals()
def _listen(folder, number, error=None):
    request = StopRequest(folder, Mesh())
    os.kill(os.getpid(), number)
    if error is not None:
        raise error
    return request


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_heard_while_there_is_work_and_the_handlers_of_before_are_back_after_it(tmp_path, number):
    mine = [lambda *_: None for _ in STOP_SIGNALS]
    for each, handler in zip(STOP_SIGNALS, mine, strict=True):
        signal.signal(each, handler)
    assert _listen(tmp_path, number).reason == number.name
    assert _handlers() == mine
    with pytest.raises(KeyError):
        _listen(tmp_path, number, KeyError())
    assert _handlers() == mine


def test_who_samples_from_python_keeps_their_handlers(tmp_path):
    before = _handlers()
    assert test_sample.draw(tmp_path).state == "sampled"
    assert _handlers() == before


def test_a_program_whose_work_is_done_does_not_hear_what_comes_late():
    with processes.joined("cpu", (1, 1)):
        assert _handlers() == [signal.SIG_DFL] * len(STOP_SIGNALS)
    for number in STOP_SIGNALS:
        os.kill(os.getpid(), number)  # would end this process
