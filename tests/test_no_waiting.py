"""A step that logs nothing waits for its device at few places, each of which is here with its reason.

The loops of train/ run as they are, on a device that stands in for a GPU, or on a GPU: waits.py, which says how.
"""

from __future__ import annotations

import forks
import jobs
import prior_runs
import pytest
import test_drawn_ids
import yaml

from vqscale import config as configuration
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.config import TokenizerRun

# Any wait is in one of these functions, or in what they call.
ALLOWED = {
    "engine/engine.py:Engine._norm": "whether a step is taken, and how it is clipped, all ranks decide by one number",
    "train/loop.py:agree": "whether any rank was asked to stop or met broken samples: what follows is the host's",
    "codes/revival.py:Upkeep._revive": "what ranks send each other of tokens follows from how many codes are dead",
    "codes/revival.py:Upkeep._fill": "which local rows were drawn, in the last steps of a warm-up",
    "quantizers/moments.py": "of eigenvalues, D x D, the library reads whether they converged; a fit tells its numbers",
    "quantizers/whitening.py:Whitening.update": "the first of a start asks whether running moments are there",
    "priors/positions.py:Positions.__init__": "the head is asked about masked ids alone: how many there are",
    "codes/clusters.py:_members": "which codes each cluster has: once, while they are the same clusters",
    "codes/heads/within.py": "blocks of tokens are as wide as their clusters have codes",
    "codes/convex/exact.py:solve": "a pass is over the tokens that are not solved yet, and the codes that they gain",
    "codes/convex/exact.py:_entries": "how many weights are positive: no more than these are kept",
    "codes/convex/simplex.py:project": "the same, and whether Newton's method has ended, which it does by itself",
}
COPIED = {"train/loop.py:agree", "codes/revival.py:Upkeep._fill"}  # where numbers of the host are copied to the device
ALWAYS = {"engine/engine.py:Engine._norm", "train/loop.py:agree"}
TABLE = {"num_codes": 101, "dim": 8}
KEPT = {"warmup_steps": 2, "revive_every": 2, "revive_after": 1, "revive_below": 0.5, "revive_most": 16}
MASKED = {"priors/positions.py:Positions.__init__"}
WITHIN = {"codes/clusters.py:_members", "codes/heads/within.py"}
FIT = {"quantizers/moments.py"}
FRAMED = {*FIT, "quantizers/whitening.py:Whitening.update"}
ROWS = {"codes/revival.py:Upkeep._revive", "codes/revival.py:Upkeep._fill", *FIT}
QUANTIZERS = {
    "ibq": ({"name": "ibq", **TABLE, **KEPT, "entropy_weight": 0.1}, ROWS),
    "vq": ({"name": "vq", **TABLE, **KEPT}, ROWS),
    "scq": (
        {"name": "scq", **TABLE, **KEPT},
        {*ROWS, "codes/convex/exact.py:solve", "codes/convex/exact.py:_entries"},
    ),
    "scq relaxed": (
        {"name": "scq", **TABLE, **KEPT, "solver": "relaxed"},
        {*ROWS, "codes/convex/simplex.py:project"},
    ),
    "simvq": ({"name": "simvq", **TABLE}, set()),
    "fsq": ({"name": "fsq", "levels": [8, 5, 5]}, FRAMED),
    "lfq": ({"name": "lfq", "num_codes": 256, "entropy_weight": 0.1}, FRAMED),
    "bsq": ({"name": "bsq", "num_codes": 256, "entropy_weight": 0.1}, FRAMED),
}
PRIORS = {
    "flat": ([], set()),
    "masked": (["prior.name=masked"], MASKED),
    "coarse_to_fine": (list(prior_runs.COARSE), WITHIN),
}
QUIET = ("data.val=null", "run.steps=6", "run.log_every=100", "run.checkpoint_every=100")


def waits(path):
    """What the loop of this config waited for, and the functions it was in, of all steps that log nothing."""
    done = forks.program("tests/lib/waits.py", path)
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, last = [line for line in done.stdout.splitlines() if "\t" in line or line == "left"]
    assert last == "left", "the loop ended before the step that logs"
    return [tuple(line.split("\t")) for line in lines]


def check(found, expected):
    """Every wait is in a place that is allowed, and in all that are expected there is one."""
    places = set()
    for what, functions in found:
        inside = {place for place in ALLOWED for function in functions.split(" < ") if function.startswith(place)}
        inside &= COPIED if what.startswith("copy from cpu") else inside
        assert inside, f"{what} waits for the device in {functions}"
        places |= inside
    assert places == expected


@pytest.mark.slow
def test_the_stand_in_sees_what_waits_and_nothing_else():
    done = forks.program("tests/lib/waits.py", "probe")
    assert done.returncode == 0, done.stderr[-3000:]
    seen = dict(line.split("\t") for line in done.stdout.splitlines() if "\t" in line)
    assert len(seen) == 14
    for name, waited in seen.items():
        assert waited == str(not name.startswith("nothing")), name


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_step_of_a_tokenizer_waits_where_it_must(name, tmp_path, tiny_shards):
    quantizer, expected = QUANTIZERS[name]
    path = jobs.write_config(tmp_path, tiny_shards, *QUIET)
    config = yaml.safe_load(path.read_text())
    config["tokenizer"]["quantizer"] = quantizer
    path.write_text(yaml.safe_dump(config))
    check(waits(path), ALWAYS | expected)


@pytest.mark.slow
def test_a_step_on_drawn_ids_waits_for_no_more(tmp_path, tiny_shards):
    first = jobs.write_config(tmp_path / "first", tiny_shards)
    tokenizer = Tokenizer.from_config(configuration.load(TokenizerRun, first).tokenizer)
    tokenizer.card["ids_of"] = ["abc"]  # its own name follows from its weights, which a stand-in does not have
    tokenizer.save(tmp_path / "tokenizer")
    cache = test_drawn_ids.drawn_cache(tmp_path / "samples", test_drawn_ids.Rule(tokenizer, "abc"), tokenizer)
    trained = [f"init.from={tmp_path / 'tokenizer'}", "trained=[decoder]", f"drawn.from={cache}"]
    path = jobs.write_config(tmp_path, tiny_shards, *QUIET, test_drawn_ids.ADVERSARIAL, *trained)
    check(waits(path), ALWAYS)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
def test_a_step_of_a_prior_waits_where_it_must(name, tmp_path):
    overrides, expected = PRIORS[name]
    caches = prior_runs.write_caches(tmp_path / "caches")
    if name == "coarse_to_fine":
        overrides = [*overrides, f"prior.clusters={prior_runs.clustered(tmp_path / 'clusters')}"]
    check(waits(prior_runs.write_config(tmp_path, caches, *QUIET, *overrides)), ALWAYS | expected)
