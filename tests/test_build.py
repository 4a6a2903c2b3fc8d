"""quantizers.build: from a dict or a dataclass to a quantizer, and what it says about a config that is wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from whole import CODES, normal

import vqscale
from vqscale import quantizers
from vqscale.config import ConfigError
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers import QUANTIZERS
from vqscale.quantizers.config.tables import EMAConfig, IBQConfig

TABLES = ["vq", "ema", "ibq"]  # what all settings of learned tables hold for


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_name_is_enough(name):
    quantizer = quantizers.build({"name": name})
    assert (type(quantizer).__name__.lower(), quantizer.config.name) == (name, name)
    assert vqscale.quantizers.build is quantizers.build


def test_a_dict_and_a_dataclass_give_the_same():
    settings = {"name": "ibq", "num_codes": 9, "dim": 3, "temperature": 2}
    before = dict(settings)
    first = quantizers.build(settings, seed=4)
    second = quantizers.build(IBQConfig(num_codes=9, dim=3, temperature=2.0), Mesh(), seed=4)
    assert settings == before
    assert first.config == second.config
    assert torch.equal(first.codebook.rows, second.codebook.rows)
    assert not torch.equal(first.codebook.rows, quantizers.build(settings, seed=5).codebook.rows)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "ibk"}, ["ibk", "vq", "ema", "ibq"]),
        ({"name": "nothing like it"}, ["nothing like it", "vq", "ema", "ibq"]),
        ({"num_codes": 4}, ["name", "vq", "ema", "ibq"]),
        ({"name": "ibq", "num_code": 4}, ["num_code", "did you mean num_codes"]),
        ({"name": "ibq", "entropy_wieght": 0.1}, ["entropy_wieght", "did you mean entropy_weight"]),
        ({"name": "vq", "temperature": 0.1}, ["temperature", "unknown"]),
        ({"name": "ibq", "similarity": "euklid"}, ["euklid", "dot", "euclid", "cosine"]),
        ({"name": "vq", "num_codes": "many"}, ["num_codes", "many"]),
        ({"name": "vq", "num_codes": 0}, ["num_codes is 0"]),
        ({"name": "vq", "init": "data", "warmup_steps": 0}, ["warm-up of 0 steps"]),
        ({"name": "ibq", "temperature": 0.0, "entropy_temperature": -1.0, "dim": 0, "window_decay": 1.0, "lr": 1}, [
            "temperature is 0.0", "entropy_temperature is -1.0", "dim is 0", "window_decay is 1.0", "lr",
        ]),
        ({"name": "ema", "decay": 1.0}, ["decay is 1.0"]),
    ],
)  # fmt: skip
def test_a_wrong_config_says_all_that_is_wrong(settings, words):
    with pytest.raises(ValueError) as caught:
        quantizers.build(settings)
    assert isinstance(caught.value, ConfigError)
    for word in words:
        assert word in str(caught.value)


def test_a_config_needs_no_torch():
    code = """
import sys
from vqscale import config
from vqscale.quantizers.config import QuantizerConfig
import vqscale.quantizers
try:
    vqscale.quantizers.build({"name": "ibq", "num_code": 4})
except ValueError:
    assert "torch" not in sys.modules
    print("answered")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "answered\n"


@pytest.mark.parametrize("name", TABLES)
def test_shapes_alone_on_the_meta_device(name):
    with torch.device("meta"):
        quantizer = quantizers.build({"name": name, "num_codes": 2**20, "dim": 8})
    assert quantizer.codebook.rows.is_meta


@pytest.mark.parametrize("name", TABLES)
def test_a_state_continues_in_another_quantizer(name):
    settings = {"name": name, "num_codes": 9, "dim": 3, "warmup_steps": 2, "revive_after": 1, "revive_every": 1}

    def drive(quantizer, steps):
        quantizer.begin()
        seen = []
        for step in steps:
            out = quantizer(normal(6, 3, seed=step).float())
            quantizer.update()
            seen += [out.z, out.ids, *out.losses.values(), *out.stats.values()]
        return [value.detach() for value in [*seen, *quantizer.state_dict().values()]]

    first = quantizers.build(settings, seed=1)
    drive(first, range(4))
    second = quantizers.build(settings, seed=1)
    second.load_state_dict(first.state_dict())
    for got, expected in zip(drive(second, range(4, 8)), drive(first, range(4, 8)), strict=True):
        assert torch.equal(got, expected)


def _first_rows(codes, name):
    quantizer = quantizers.build({"name": name, "num_codes": 1500, "dim": 3}, Mesh(1, codes), seed=6)
    return quantizer.codebook.rows.detach(), quantizer.upkeep.seed


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("codes", CODES)
def test_first_rows_do_not_depend_on_the_number_of_ranks(ranks, codes, name):
    results = ranks(codes, _first_rows, codes, name)
    whole = quantizers.build({"name": name, "num_codes": 1500, "dim": 3}, seed=6)
    assert torch.equal(torch.cat([rows for rows, _ in results]), whole.codebook.rows)
    assert {seed for _, seed in results} == {whole.upkeep.seed}


def test_moving_averages_begin_at_the_rows():
    quantizer = quantizers.build(EMAConfig(num_codes=5, dim=2), seed=1)
    assert torch.equal(quantizer.averages.sums_kD, quantizer.codebook.rows)
    assert quantizer.averages.counts_k.tolist() == [1.0] * 5


def test_every_public_name_is_there_and_another_one_is_told_of_them():
    for name in vqscale.__all__:
        assert getattr(vqscale, name).__name__.rpartition(".")[2] == name
    with pytest.raises(AttributeError, match="it has Codebook, Head, Mesh, Prior, Tokenizer, priors, quantizers"):
        vqscale.Vocabulary  # noqa: B018
