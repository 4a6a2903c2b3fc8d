"""A whole run of a masked prior: stopped in mid-epoch and continued on other processes, its number called a bound, its
draws the same on one process and two.
"""

from __future__ import annotations

import json
import math
from functools import partial

import jobs
import prior_runs
import pytest
import torch
from prior_runs import CODES, GRID

from vqscale import priors
from vqscale.parallel import mesh as meshes
from vqscale.priors import Prior
from vqscale.programs.sampling import options as sample_options
from vqscale.show import run_page, study_page

pytestmark = [pytest.mark.slow, pytest.mark.dist]

MASKED = ("prior.name=masked", "prior.unmasked_weight=0.1", "prior.mask_law=arccos")
SETTINGS = {"steps": 4, "guidance": 1.5, "schedule": "linear"}


def drawn(path, codes):
    prior = Prior.load(path, mesh=meshes.Mesh(codes=codes))
    labels, numbers = torch.tensor([0, 3, -1, 1]), torch.arange(4)
    rank = prior.mesh.codes.rank
    part = slice(4 // codes * rank, 4 // codes * (rank + 1))
    known = torch.full((4, *GRID), -1)
    known[:, 0] = 5
    each = [
        prior.sample(labels[part], {**SETTINGS, **more}, numbers_B=numbers[part], seed=2, known=given)
        for more, given in (({}, None), ({"order": "halton"}, None), ({}, known[part]))
    ]
    return torch.stack(each, 1), prior.fingerprint


def test_it_is_trained_stopped_continued_and_sampled_on_one_process_and_two(tmp_path, ranks):
    caches = prior_runs.write_caches(tmp_path / "caches")
    paths = [prior_runs.write_config(tmp_path / str(n), caches, *MASKED) for n in (1, 2)]
    alone = jobs.finish(paths[0])
    # stopped in step 5, the second of an epoch of three, on one process; ended by DeepSpeed on two
    stop = partial(jobs.at_call, "vqscale.engine.engine:Engine.backward", 5, partial(jobs.hear, 15), 0)
    job = jobs.start(paths[1], before=stop)
    assert job.wait() == [jobs.STOPPED], job.output
    assert jobs.steps_saved(tmp_path / "2" / "run") == [2, 4, 5]
    other = jobs.finish(paths[1], "engine.name=deepspeed", world=2)
    jobs.same_numbers(alone, other)

    rows, summary = jobs.rows(alone), json.loads((alone / "summary.json").read_text())
    assert rows[0]["loss/cross_entropy"] == pytest.approx(math.log(CODES), rel=1e-5)
    assert rows[-1]["val/loss"] < rows[0]["loss/cross_entropy"] - 0.05
    assert (summary["prior"], summary["bound"]) == ("masked", True)
    assert "an upper bound" in study_page.result(study_page.TASKS["prior"], summary, rows[-1])["verdict"]
    config = sample_options.prior_config(alone)
    settings = type("Run", (), {"prior": config, "data": type("Data", (), {"batch": 8})})
    assert "nats per id, an upper bound" in run_page.prior(settings, summary, [])[1]

    ids, fingerprint = drawn(alone, 1)
    assert (ids[:, 2, 0] == 5).all()
    for rank, (there, mark) in enumerate(ranks(2, drawn, alone, 2)):
        assert torch.equal(there, ids[2 * rank : 2 * rank + 2])
        assert mark == fingerprint

    job = jobs.start(paths[0], "--dry-run", "--world", "2")
    assert job.wait() == [0], job.output
    assert "GFLOP per image" in job.output
    assert "sampling, 6 passes: head" in job.output
    assert isinstance(priors.sampling("masked")(), config.sampling)
