"""Keys of a prior that are null: what the token cache and the tokenizer say is planned with, written to the run folder
and compared when a run goes on.
"""

from __future__ import annotations

import importlib

import prior_runs
import pytest
import saved_runs
import torch
from prior_runs import CODES, GRID

from vqscale import config as configuration
from vqscale import priors
from vqscale.plan import costs_of
from vqscale.plan.tokenizer import planned_mesh
from vqscale.run import folder
from vqscale.train import nulls
from vqscale.train.config import PriorRun, Run

NULL = ("prior.num_codes=null", "prior.grid=null")
CODEBOOK = ("prior.head.embedding=codebook", "prior.feature_dim=null")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return prior_runs.write_caches(tmp_path_factory.mktemp("caches"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A run folder and a saved folder of codes of 4 dimensions."""
    place, made = tmp_path_factory.mktemp("tokenizer"), saved_runs.small()
    made.save(place / "saved")
    saved_runs.write_run(place / "run", made)
    return place


def asked(folder, caches, *overrides):
    return configuration.load(PriorRun, prior_runs.write_config(folder, caches, *overrides))


def test_null_is_what_the_cache_says(tmp_path, caches):
    given = nulls.fill(asked(tmp_path, caches))
    assert given == asked(tmp_path, caches, "prior.head.neighbours=0")
    assert nulls.fill(given) is given
    assert nulls.fill(asked(tmp_path, caches, *NULL)) == given
    assert costs_of(asked(tmp_path, caches, *NULL), 1) == costs_of(given, 1)
    only = nulls.fill(asked(tmp_path, caches, "prior.num_codes=38", "prior.grid=null"))
    assert (only.prior.num_codes, only.prior.grid) == (38, GRID)  # what is given stays, and is refused by the cache


@pytest.mark.parametrize(
    ("words", "neighbours"),
    [
        (("num_codes=65536", "head.embedding=codebook"), 8),
        (("num_codes=65536", "head.embedding=codebook", "head.neighbours=3"), 3),
        (("num_codes=65535", "head.embedding=codebook"), 0),
        (("num_codes=65536",), 0),
        (("num_codes=65536", "head.embedding=codebook", "name=masked"), 0),
        (("num_codes=65536", "head.embedding=codebook", "cluster_weight=1.0", "num_clusters=8", "clusters=nowhere"), 0),
    ],
)
def test_targets_are_shared_where_there_are_many_codes_with_vectors(tmp_path, caches, tokenizer, words, neighbours):
    vectors = ["prior.feature_dim=4", f"tokenizer={tokenizer / 'saved'}"] if "head.embedding=codebook" in words else []
    found = nulls.fill(asked(tmp_path, caches, *(f"prior.{word}" for word in words), *vectors))
    assert found.prior.head.neighbours == neighbours
    with torch.device("meta"):
        head = priors.build(found.prior, planned_mesh(1, 1)).head
    assert head._num_neighbours == neighbours


def test_both_flat_heads_of_two_stages_are_settled(tmp_path, caches):
    net = "{width: 16, num_layers: 1, num_heads: 2}"
    words = [
        f"num_codes: {CODES}",
        f"grid: {list(GRID)}",
        "num_clusters: 4",
        "clusters: nowhere",
        f"net: {net}",
        f"fine_net: {net}",
    ]
    found = nulls.fill(asked(tmp_path, caches, f"prior={{name: coarse_to_fine, {', '.join(words)}}}"))
    assert (found.prior.head.neighbours, found.prior.coarse_head.neighbours) == (0, 0)
    assert nulls.fill(found) is found


@pytest.mark.parametrize("kind", ["run", "saved", "run/checkpoints/0000000007"])
def test_null_is_what_the_tokenizer_says(tmp_path, caches, tokenizer, kind):
    found = nulls.fill(asked(tmp_path, caches, *CODEBOOK, f"tokenizer={tokenizer / kind}"))
    assert (found.prior.feature_dim, found.prior.num_codes) == (4, CODES)


def test_a_tokenizer_is_asked_for_the_dimension_whatever_it_quantizes_with(tmp_path, caches):
    made = saved_runs.small(quantizer={"name": "fsq", "levels": [3, 3, 2, 2, 2], "symmetric": True})
    made.save(tmp_path / "fsq")
    assert nulls.fill(asked(tmp_path, caches, *CODEBOOK, f"tokenizer={tmp_path / 'fsq'}")).prior.feature_dim == 5


def test_own_factors_are_the_digits_that_the_cache_says(tmp_path, caches):
    own = ("prior.head.name=factorised", "prior.head.factors=own")
    prior_runs.write_cache(tmp_path / "digits", 4, 1, num_codes=60, digits=(3, 4, 5))
    there = (f"data.train.path={tmp_path / 'digits'}", f"data.val.path={tmp_path / 'digits'}")
    filled = nulls.fill(asked(tmp_path, caches, *NULL, *own, *there))
    assert filled.prior.head.factors == (3, 4, 5)
    assert priors.build(filled.prior).head.factors == (3, 4, 5)
    with pytest.raises(ValueError, match=r"no digits of ids.*give the factors"):
        nulls.fill(asked(tmp_path, caches, *own))
    with pytest.raises(ValueError, match=r"head\.factors: null is as a token cache or a tokenizer says"):
        priors.build(asked(tmp_path, caches, *own).prior)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            (*NULL, "data.train.path=nowhere"),
            r"prior.num_codes and prior.grid is as the token cache .* none in nowhere .*encode one there first",
        ),
        (
            (*CODEBOOK, "tokenizer=nowhere"),
            "feature_dim is null, which is as the folder in the key tokenizer says: nowhere has neither",
        ),
        (("prior.grid=null", "prior.net.num_heads=8"), "prior.net.num_heads: a head of 2 numbers"),
    ],
)
def test_what_cannot_be_looked_up_or_does_not_fit_is_said(tmp_path, caches, overrides, said):
    with pytest.raises(ValueError, match=said):
        nulls.fill(asked(tmp_path, caches, *overrides))


def test_a_run_that_goes_on_is_compared_by_what_was_used(tmp_path, caches):
    """run.yaml has numbers; null means the same cache's, and another cache's are another run."""
    was = nulls.fill(asked(tmp_path, caches, *NULL))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(configuration.dump(was))
    assert configuration.load(Run, tmp_path / "run" / "run.yaml") == nulls.fill(asked(tmp_path, caches))
    folder.check(nulls.fill(asked(tmp_path, caches, *NULL)))
    prior_runs.write_cache(tmp_path / "other", 4, 1, num_codes=50)
    moved = nulls.fill(asked(tmp_path, caches, *NULL, f"data.train.path={tmp_path / 'other'}"))
    with pytest.raises(ValueError, match=r"another config[^:]*:\n  prior\.num_codes: 37 -> 50\nchange"):
        folder.check(moved)


def test_a_dry_run_says_what_was_looked_up(tmp_path, caches, capsys):
    path = prior_runs.write_config(tmp_path, caches, *NULL)
    assert importlib.import_module("vqscale.programs.commands.train").main([str(path), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "as the cache and the tokenizer say: prior.num_codes: null -> 37\n" in told
    assert "as the cache and the tokenizer say: prior.grid: null -> [2, 3]\n" in told


def test_a_script_asks_for_a_key_of_a_config(tmp_path, caches, capsys):
    """launch/quickstart.sh does, and leaves out the options of what is null."""
    path, summary = (
        prior_runs.write_config(tmp_path, caches),
        importlib.import_module("vqscale.programs.commands.summary"),
    )
    for key, said in (("run.folder", tmp_path / "run"), ("tokenizer", ""), ("prior.grid", "[2, 3]")):
        assert summary.main(["--key", key, str(path)]) == 0
        assert capsys.readouterr().out == f"{said}\n"
    assert summary.main([str(path), "--key"]) == 2
    assert "--key takes a key of the config" in capsys.readouterr().err
