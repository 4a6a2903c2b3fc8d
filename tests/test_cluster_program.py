"""`vqscale cluster`: from a saved tokenizer to a file, from there into a run; what does not fit is said beforehand."""

from __future__ import annotations

import json
import re
from functools import partial

import jobs
import numpy as np
import prior_runs
import pytest
import torch
from prior_runs import COARSE, CODES, GRID, clustered
from safetensors import safe_open
from saved_runs import IBQ, small

from vqscale import config as configuration
from vqscale.codes.kmeans import Method, kmeans
from vqscale.codes.rows import Rows
from vqscale.parallel.mesh import Mesh
from vqscale.priors import Prior
from vqscale.programs.commands import cluster as command
from vqscale.quantizers import build
from vqscale.tokenizer import clusters
from vqscale.train import nulls
from vqscale.train.config.prior import PriorRun
from vqscale.train.prior import open_streams


@pytest.fixture
def tokenizer(tmp_path):
    made = small(quantizer={**IBQ, "num_codes": CODES})
    made.save(tmp_path / "tokenizer")
    return made


def run(tmp_path, *words):
    return command.main([str(tmp_path / "tokenizer"), *map(str, words), "--device", "cpu"])


def read(path):
    with safe_open(path, framework="np") as file:
        return file.get_tensor("cluster")


def test_the_file_has_the_clusters_of_the_vectors_and_whose_they_are(tokenizer, tmp_path, capsys):
    assert run(tmp_path, "--clusters", 5, "--seed", 3, "--metric", "cosine", "--method", "kmeans") == 0
    path = tmp_path / "tokenizer" / "clusters-5.safetensors"
    with torch.no_grad():
        vectors = tokenizer.quantizer.decode(torch.arange(CODES))
    expected = kmeans(vectors, Rows(CODES), Mesh().codes, Method(5, "cosine", seed=3))
    np.testing.assert_array_equal(read(path), expected.numpy())
    card = clusters.read_card(path)
    assert card.tokenizer == tokenizer.fingerprint
    assert card.fingerprint == clusters.fingerprint(expected.numpy())
    assert (card.num_codes, card.num_clusters, card.method, card.metric, card.seed) == (CODES, 5, "kmeans", "cosine", 3)
    assert torch.equal(clusters.read(path, Rows(CODES, 3, 1)), expected[12:24])
    assert f"prior.clusters={path}" in capsys.readouterr().out

    assert run(tmp_path, "--clusters", 5, "--seed", 3, "--metric", "cosine", "--method", "kmeans") == 0
    assert run(tmp_path, "--clusters", 5) == 2  # other clusters
    assert "has other clusters, of method kmeans and seed 3" in capsys.readouterr().err
    assert run(tmp_path, "--clusters", 4, "--out", tmp_path / "even") == 0
    assert clusters.read_card(tmp_path / "even").method == "balanced"
    assert sorted(np.bincount(read(tmp_path / "even"))) == [9, 9, 9, 10]
    assert run(tmp_path, "--clusters", CODES + 1, "--out", tmp_path / "x") == 2
    assert run(tmp_path, "--clusters", 4, "--out", tmp_path / "x", "--method", "digits") == 2
    assert "have no digits" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_digits_of_an_id_are_those_of_its_code():
    fsq = build({"name": "fsq", "levels": [5, 3, 4]})
    lfq = build({"name": "lfq", "dim": 6})
    assert (fsq.digits, lfq.digits) == ((4, 3, 5), (2,) * 6)
    for quantizer, leading, digits in ((fsq, 4, slice(2, 3)), (lfq, 8, slice(0, 3))):
        codes = quantizer.decode(torch.arange(quantizer.num_codes)).view(leading, -1, quantizer.dim)
        assert (codes[:, :, digits] == codes[:, :1, digits]).all()
        assert len(codes[:, 0, digits].unique(dim=0)) == leading


def config_of(tmp_path, *more):
    path = prior_runs.write_config(tmp_path / "job", tmp_path / "caches", *COARSE, *more)
    return configuration.load(PriorRun, path)


def test_what_does_not_fit_is_said_before_processes_meet(tmp_path):
    prior_runs.write_caches(tmp_path / "caches")
    good = clustered(tmp_path / "good")
    config = nulls.fill(config_of(tmp_path, f"prior.clusters={good}"))
    assert config.prior.num_clusters == 6
    open_streams(config)
    with pytest.raises(configuration.ConfigError, match=r"prior\.clusters is null, .*vqscale cluster TOKENIZER"):
        config_of(tmp_path)
    wrong = {
        "tokenizer": (clustered(tmp_path / "a", tokenizer="beef"), "they are of the tokenizer with fingerprint beef"),
        "empty": (clustered(tmp_path / "b", num_clusters=7), "1 of the 7 clusters are empty"),
        "codes": (
            clustered(tmp_path / "c", np.arange(36, dtype=np.int32) // 6, num_codes=36),
            "they are 36 codes, but",
        ),
        "beyond": (clustered(tmp_path / "d", num_clusters=5), "codes are in others than these"),
    }
    for path, said in wrong.values():
        with pytest.raises(ValueError, match=re.escape(said)):
            open_streams(nulls.fill(config_of(tmp_path, f"prior.clusters={path}")))
    with pytest.raises(ValueError, match="they are 6 clusters, but expected are 4"):
        open_streams(config_of(tmp_path, f"prior.clusters={good}", "prior.num_clusters=4"))
    with pytest.raises(configuration.ConfigError, match="num_clusters is 38 and num_codes 37"):
        config_of(tmp_path, f"prior.clusters={good}", "prior.num_clusters=38")
    for text in (b"{}", b""):
        (tmp_path / "bad").write_bytes(text)
        with pytest.raises(ValueError, match=r"is no file of clusters .*vqscale cluster TOKENIZER"):
            nulls.fill(config_of(tmp_path, f"prior.clusters={tmp_path / 'bad'}"))


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_goes_on_in_mid_epoch_on_other_processes(tmp_path):
    """Both stages in one run; killed in step 5 (of epochs of three) on two processes, ended on one. And IAR's loss."""
    caches = prior_runs.write_caches(tmp_path / "caches")
    given = (*COARSE, f"prior.clusters={clustered(tmp_path / 'clusters')}")
    alone = jobs.finish(prior_runs.write_config(tmp_path / "1", caches, *given))
    path = prior_runs.write_config(tmp_path / "2", caches, *given)
    kill = partial(jobs.at_call, "vqscale.engine.engine:Engine.backward", 5, partial(jobs.hear, 9), 1)
    assert jobs.start(path, world=2, before=kill).wait() == [1, -9]
    jobs.same_numbers(alone, jobs.finish(path))
    summary = json.loads((alone / "summary.json").read_text())
    assert summary["loss"] < np.log(CODES) - 0.1
    prior = Prior.load(alone)
    assert prior.clusters.cluster_k.tolist() == [i // 7 for i in range(CODES)]
    assert prior.sample(torch.arange(3), numbers_B=torch.arange(3)).shape == (3, *GRID)
    zero = ("engine.name=deepspeed", "engine.zero_stage=3")
    jobs.same_numbers(alone, jobs.finish(prior_runs.write_config(tmp_path / "3", caches, *given, *zero), world=2))
