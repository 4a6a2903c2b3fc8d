"""A quantizer is one file and one line: what every other one must keep, one that is added so keeps without a case."""

from __future__ import annotations

import pytest
import test_build
import test_numbers
import test_quantizers
import test_saved
import torch
from quantizer_cases import DIM, K
from whole import GRIDS, normal

from vqscale import quantizers
from vqscale.config import describe
from vqscale.config.schema import classes_of
from vqscale.quantizers import QUANTIZERS
from vqscale.quantizers.config import SingleConfig
from vqscale.tokenizer.config import TokenizerConfig

LINE = {"frozen": "frozen_rows:FrozenConfig"}
NAME = "frozen"


@pytest.fixture(autouse=True)
def added(monkeypatch):
    """The line, in this process."""
    for name, settings in LINE.items():
        monkeypatch.setitem(QUANTIZERS, name, settings)


def _with_the_line(function, *args):
    """The function in a process that has the line; such processes are used again by other tests."""
    QUANTIZERS.update(LINE)
    try:
        return function(*args)
    finally:
        del QUANTIZERS[NAME]


@pytest.fixture
def ranks_with_it(ranks):
    return lambda world, function, *args, timeout_s=60.0: ranks(
        world, _with_the_line, function, *args, timeout_s=timeout_s
    )


def test_a_name_builds_it_and_help_and_errors_know_it():
    test_build.test_a_name_is_enough(NAME)
    assert "quantizer.name=frozen" in describe(TokenizerConfig)
    with pytest.raises(ValueError, match=r"commitment_wieght.*did you mean commitment_weight"):
        quantizers.build({"name": NAME, "commitment_wieght": 1.0})
    with pytest.raises(ValueError, match=r"did you mean frozen"):
        quantizers.build({"name": "frosen"})


@pytest.mark.parametrize("training", [True, False])
def test_it_answers_as_all_do(training):
    test_quantizers.test_one_answer_for_all(NAME, training)
    test_quantizers.test_decode_is_exactly_what_forward_gave_and_encode_finds_its_ids(NAME, training)


def test_its_statistics_are_those_of_all():
    test_quantizers.test_stats_have_the_same_names_everywhere(NAME)
    test_quantizers.test_stats_say_what_their_names_say(NAME)
    test_quantizers.test_evaluation_changes_nothing(NAME)


@pytest.mark.parametrize("grid", GRIDS[:2])
def test_it_computes_the_same_on_two_processes(ranks_with_it, grid):
    test_quantizers.test_a_fixed_global_batch_gives_the_same_on_every_grid(ranks_with_it, grid, K, [NAME])
    test_quantizers.test_a_driven_training_is_the_same_on_every_grid(ranks_with_it, grid, NAME)


def test_its_precision_does_not_depend_on_autocast():
    test_numbers.test_half_precision_and_autocast_do_not_lower_the_precision(NAME, torch.bfloat16)


def test_a_tokenizer_with_it_is_saved_and_loaded(tmp_path):
    test_saved.test_what_is_saved_is_loaded_to_the_bit(NAME, tmp_path)


def test_it_composes():
    assert "FrozenConfig" in [settings.__name__ for settings in classes_of(SingleConfig)]
    inner = {"name": NAME, "num_codes": K, "dim": DIM, "init": "normal"}
    out = quantizers.build({"name": "residual", "levels": 2, "inner": inner})(normal(9, DIM, seed=1).float())
    assert out.ids.shape == (9, 2)


def test_without_its_line_nobody_knows_it(monkeypatch):
    monkeypatch.delitem(QUANTIZERS, NAME)
    with pytest.raises(ValueError, match="frozen"):
        quantizers.build({"name": NAME})
