"""Runs that begin from weights that are there, and parts that stand still: to the bit, in every engine and stage."""

from __future__ import annotations

import json
import shlex
import shutil
from functools import partial
from pathlib import Path

import dense_runs
import jobs
import prior_runs
import pytest
import quantizer_cases
import saved_runs
import token_caches
import torch
from torch.nn import functional as F

from vqscale import config as configuration
from vqscale import priors
from vqscale.codes.rows import set_aside
from vqscale.parallel.mesh import Mesh
from vqscale.plan.tokenizer import plan
from vqscale.programs.commands import train as command
from vqscale.tokenizer import matching
from vqscale.tokenizer.export import entries
from vqscale.tokenizer.model import Tokenizer
from vqscale.train import first_weights, frozen, tokenizer
from vqscale.train.config import Run, TokenizerRun

README = (Path(__file__).resolve().parents[1] / "vqscale/train/README.md").read_text()
SHORT = ("run.steps=2", "run.eval_every=9", "run.checkpoint_every=9", "data.val=null", "average.decay=0.5")
ADVERSARIAL = "loss.adversarial={net: {name: patchgan, channels: 4, num_layers: 1}, lecam_weight: 0.01}"
ENGINES = [["engine.name=torch"], *(["engine.name=deepspeed", f"engine.zero_stage={stage}"] for stage in range(4))]


def tensors(model):
    return {name: entry.tensor.detach().clone() for name, entry in entries(model).items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_shards):
    """The folder of a short run with averages and a discriminator."""
    path = jobs.write_config(tmp_path_factory.mktemp("source"), tiny_shards, *SHORT, ADVERSARIAL)
    assert command.main([str(path)]) == 0
    return path.parent / "run"


def _train(paths):
    for path in paths:
        tokenizer.train(configuration.load(Run, path), Mesh(1, 2))


@pytest.mark.dist
@pytest.mark.slow
def test_what_is_frozen_stays_to_the_bit_in_every_stage(ranks, tmp_path, tiny_shards, source):
    more = (f"init.from={source}", "trained=[decoder]", ADVERSARIAL, "tokenizer.quantizer.entropy_weight=0")
    more += ("init.parts=[encoder, codes, decoder, discriminator]",)
    paths = [jobs.write_config(tmp_path / str(i), tiny_shards, *SHORT, *more, *kind) for i, kind in enumerate(ENGINES)]
    ranks(2, _train, paths, timeout_s=240)
    taken, theirs = tensors(Tokenizer.load(source)), jobs.tensors(source, 2)
    for path in paths:
        kept = jobs.tensors(path.parent / "run", 2)
        for name, x in taken.items():
            rows = name == "quantizer.codebook.rows"
            now = kept[f"rows/{name}" if rows else f"parameter/{name}"]
            still = name.startswith(("encoder", "quant"))
            assert torch.equal(now, x) == still, name
            moments = {f"{key}/{name}" for key in ("exp_avg", "exp_avg_sq", "average")}
            assert moments & kept.keys() == (set() if still else moments)
            assert not {f"rows/{key}" for key in moments} & kept.keys()
        assert int(kept["buffer/quantizer.upkeep.steps"]) == 2  # hits are counted
        assert kept["rows/quantizer.upkeep.window.counts_k"].sum() > 0
        name = "discriminator/parameter/main.0.weight"
        moved = (kept[name] - theirs[name]).abs().max()
        assert 0 < moved < 3e-3  # two steps of at most lr from where it began
        twin = jobs.tensors(paths[0].parent / "run", 2)
        assert all(torch.allclose(x.double(), twin[name].double(), atol=1e-5) for name, x in kept.items())


def test_a_run_begins_with_what_it_took_and_never_takes_it_again(tmp_path, tiny_shards, source):
    theirs = shutil.copytree(source, tmp_path / "theirs")
    wide = ("tokenizer.quantizer.num_codes=128", "data.train.image_size=8", f"init.from={theirs}")
    path = jobs.write_config(tmp_path, tiny_shards, *SHORT, *wide)
    config, before = configuration.load(Run, path), tensors(Tokenizer.load(theirs))
    began = Tokenizer.from_config(config.tokenizer, seed=config.run.seed)
    taken = first_weights.take(config, began, Mesh())
    now, rows = tensors(began), "quantizer.codebook.rows"
    assert all(torch.equal(now[name], x) for name, x in before.items() if name != rows)
    assert torch.equal(now[rows][:101], before[rows])
    spread = (now[rows][101:].std() / before[rows].std()).item()
    assert 0.7 < spread < 1.4
    assert taken.facts["rows"] == {rows: {"there": 101, "here": 128}}
    assert began.quantizer.beginning == (0, 0)  # no warm-up would draw the rows again

    assert command.main([str(path)]) == 0
    told = json.loads((tmp_path / "run" / first_weights.NOTE).read_text())
    assert told == taken.facts
    shutil.rmtree(theirs)
    assert command.main([str(path), "run.steps=3"]) == 0
    assert jobs.steps_saved(tmp_path / "run") == [2, 3]
    again = jobs.write_config(tmp_path / "again", tiny_shards, *SHORT, *wide)
    assert command.main([str(again)]) == 2


def test_a_decoder_trained_alone_decodes_what_models_the_ids_of_its_first_weights(tmp_path, tiny_shards, source):
    first, more = Tokenizer.load(source).fingerprint, ("run.steps=1", "trained=[decoder]")
    once = jobs.write_config(tmp_path / "once", tiny_shards, *SHORT, *more, f"init.from={source}")
    assert command.main([str(once)]) == 0
    repaired = matching.tokenizer_of(tmp_path / "once" / "run", first, Mesh())
    assert repaired.fingerprint != first
    saved = repaired.save(tmp_path / "saved")
    twice = jobs.write_config(tmp_path / "twice", tiny_shards, *SHORT, *more, f"init.from={saved}")
    assert command.main([str(twice)]) == 0
    again = Tokenizer.load(tmp_path / "twice" / "run")
    assert matching.ids_of(again) == (again.fingerprint, repaired.fingerprint, first)
    images = saved_runs.images(2, jobs.SIDE)
    assert torch.equal(again.encode(images), Tokenizer.load(source).encode(images))

    whole = jobs.write_config(tmp_path / "whole", tiny_shards, *SHORT, "run.steps=1", f"init.from={source}")
    assert command.main([str(whole)]) == 0
    with pytest.raises(ValueError, match=f"made by the one with {first}"):
        matching.tokenizer_of(tmp_path / "whole" / "run", first, Mesh())


REFUSED = {
    "another dim": (["tokenizer.quantizer.dim=4"], "quantizer.dim: 8 -> 4"),
    "another net": (["tokenizer.net.channels=16"], "net.channels: 8 -> 16"),
    "another similarity": (["tokenizer.quantizer.similarity=dot"], "similarity: euclid -> dot"),
    "another norm": (["tokenizer.latent_norm=none"], "latent_norm: rms -> none"),
    "frozen rows that are new": (["tokenizer.quantizer.num_codes=128", "trained=[decoder]"], "quantizer.codebook.rows"),
    "a factor of what is frozen": (
        ["trained=[decoder]", "optim.lr_factors=[{part: encoder, factor: 0.1}]"],
        "lr_factors has the part encoder",
    ),
    "rows alone under deepspeed": (["trained=[codes]", "engine.name=deepspeed"], "use engine.name=torch"),
    "no discriminator there": (
        ["init.parts=[decoder, discriminator]", ADVERSARIAL.replace("num_layers: 1", "num_layers: 2")],
        "num_layers: 1 -> 2",
    ),
    "no such folder": (["init.from=nowhere"], "nowhere has neither card.json nor run.yaml"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_processes_meet(tmp_path, tiny_shards, source, case):
    changes, text = REFUSED[case]
    path = jobs.write_config(tmp_path, tiny_shards, *SHORT, f"init.from={source}", *changes)
    with pytest.raises(ValueError, match=text.replace(".", r"\.")):
        first_weights.check(configuration.load(Run, path))


def test_a_folder_of_another_kind_or_signal_is_refused_before_processes_meet(tmp_path, tiny_shards):
    there = configuration.load(Run, prior_runs.write_config(tmp_path / "prior", tmp_path)).prior
    priors.build(there).save(tmp_path / "saved-prior")
    saved_runs.small().save(tmp_path / "saved-tokenizer")
    token_caches.write(tmp_path / "cache")
    dense = configuration.load(Run, dense_runs.tokenizer(tmp_path / "dense", tiny_shards))
    Tokenizer.from_config(dense.tokenizer).save(tmp_path / "of-colours")
    (tmp_path / "images").mkdir()
    write_tokenizer = partial(jobs.write_config, tmp_path / "run", tiny_shards)
    write_prior = partial(prior_runs.write_config, tmp_path / "other", tmp_path)
    for write, name, text in (
        (write_tokenizer, "saved-prior", "card of 'vqscale prior' and not of a 'vqscale tokenizer': give a folder"),
        (write_prior, "saved-tokenizer", "card of 'vqscale tokenizer' and not of a 'vqscale prior': give a folder"),
        (write_tokenizer, "cache", "card of 'vqscale token cache' and not of a 'vqscale tokenizer': give a folder"),
        (write_tokenizer, "prior", "config of task 'prior', and a tokenizer comes from a run with task 'tokenizer'"),
        (write_tokenizer, "images", "images has neither card.json nor run.yaml: give the folder of a tokenizer"),
        (write_tokenizer, "of-colours", "signal.name: color -> images"),
    ):
        with pytest.raises(ValueError, match=text):
            first_weights.check(configuration.load(Run, write(f"init.from={tmp_path / name}")))


def test_commands_of_the_readme_begin_from_a_run(tmp_path, tiny_shards, source):
    section = README.partition("## From weights that are there")[2].partition("\n## ")[0]
    lines = [shlex.split(line)[2:] for line in section.splitlines() if line.startswith("python launch/train.py ")]
    assert len(lines) == 5
    lines = [words for words in lines if not any(word.startswith("drawn") for word in words)]  # test_drawn_ids.py
    own = ("optim.lr_factors", "trained", "optim.lr", "swaps")
    for number, words in enumerate(lines):
        path = jobs.write_config(tmp_path / str(number), tiny_shards, *SHORT, f"init.from={source}")
        codes = [word.replace("16384", "120") for word in words if word.startswith("tokenizer.quantizer.num_codes")]
        assert command.main([str(path), "run.steps=1", *(w for w in words if w.startswith(own)), *codes]) == 0


def test_a_plan_counts_no_gradients_and_moments_of_what_is_frozen(tmp_path, tiny_shards):
    path = jobs.write_config(tmp_path, tiny_shards, "init.from=x")
    whole, decoder = (plan(configuration.load(Run, path, changes), 1) for changes in ([], ["trained=[decoder]"]))
    name = "encoder, decoder (plain torch)"
    still = whole.parameters["encoder"] + whole.parameters["quant_conv"]
    assert whole.memory[name] - decoder.memory[name] == 12 * still
    rows = "rows, their gradients and moments"
    assert whole.memory[rows] - decoder.memory[rows] == 12 * 101 * 8


def test_codes_of_another_dim_are_new_and_so_are_the_maps_to_them(tmp_path, tiny_shards, source):
    changes = (f"init.from={source}", "init.parts=[encoder, decoder]", "tokenizer.quantizer.dim=4")
    config = configuration.load(Run, jobs.write_config(tmp_path, tiny_shards, *SHORT, *changes))
    began = Tokenizer.from_config(config.tokenizer)
    assert set(first_weights.take(config, began, Mesh()).facts["new"]) == {
        *("quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight")
    }
    before, now = tensors(Tokenizer.load(source)), tensors(began)
    assert all(torch.equal(now[name], x) for name, x in before.items() if name.startswith(("encoder", "decoder")))


@pytest.mark.parametrize("case", quantizer_cases.CASES)
def test_frozen_codes_stand_still_in_training_and_are_counted(case):
    quantizer = quantizer_cases.built(case, init="data", warmup_steps=3, landing_steps=2, revive_every=1)
    for part in quantizer.modules():
        if hasattr(part, "covariance_DD"):
            part.steps.fill_(1.0)
            part.mean_D.fill_(0.25)
    quantizer.settle()
    quantizer.freeze()
    quantizer.begin()
    before, decoded = tensors(quantizer), quantizer.decode(quantizer.encode(_tokens(quantizer, 0)))
    for step in range(5):
        answer = quantizer(_tokens(quantizer, step).requires_grad_())
        (answer.z.square().mean() + sum(answer.losses.values())).backward()
        assert not any(len(rows) for _, rows in quantizer.update())
        if quantizer.exact_decode:
            assert torch.allclose(answer.z, quantizer.decode(answer.ids), atol=1e-6)
    assert all(torch.equal(x, before[name]) for name, x in tensors(quantizer).items())
    assert all(p.grad is None for p in quantizer.parameters())
    assert torch.equal(quantizer.decode(quantizer.encode(_tokens(quantizer, 0))), decoded)
    assert quantizer.beginning == (0, 0)
    windows = [part for part in quantizer.modules() if hasattr(part, "counts_k") and hasattr(part, "age_k")]
    assert windows
    assert all(window.counts_k.sum() > 0 for window in windows)


def _tokens(quantizer, step):
    return torch.randn(quantizer_cases.TOKENS, quantizer.dim, generator=torch.Generator().manual_seed(step))


def test_rows_of_moving_averages_begin_where_they_were_put():
    quantizer = quantizer_cases.built("ema", init="data", warmup_steps=3)
    with torch.no_grad():
        quantizer.codebook.rows.add_(5.0)
    quantizer.settle()
    assert torch.equal(quantizer.averages.sums_kD, quantizer.codebook.rows)
    quantizer.begin()
    assert not quantizer.passing


def test_positions_are_resized_to_another_grid(tmp_path, tiny_shards):
    config = configuration.load(Run, dense_runs.tokenizer(tmp_path, tiny_shards))
    there = Tokenizer.from_config(config.tokenizer, seed=5)
    there.save(tmp_path / "saved")
    larger = dense_runs.tokenizer(
        *(tmp_path / "larger", tiny_shards),
        *("tokenizer.net.image_size=32", "data.train.image_size=32", "data.val.image_size=32"),
        f"init.from={tmp_path / 'saved'}",
    )
    config = configuration.load(Run, larger)
    first_weights.check(config)
    here = Tokenizer.from_config(config.tokenizer, seed=6)
    taken = first_weights.take(config, here, Mesh())
    names = ["decoder.blocks.positions", "encoder.blocks.positions"]
    assert taken.facts["positions"] == names
    before, now = tensors(there), tensors(here)
    for name in names:
        plane = before[name].T.unflatten(1, (4, 4))[None]
        wanted = F.interpolate(plane, size=(8, 8), mode="bilinear")[0].flatten(1).T
        assert torch.allclose(now[name], wanted)
    assert all(torch.equal(now[name], x) for name, x in before.items() if name not in names)


def test_a_prior_begins_from_another_with_more_codes_other_classes_and_another_grid(tmp_path):
    changes = ("prior.num_codes=37", "prior.grid=[2, 3]")
    path = prior_runs.write_config(tmp_path, tmp_path, *changes)
    there = priors.build(configuration.load(Run, path).prior, seed=4)
    saved_runs.shift(there, 0.01)
    there.save(tmp_path / "saved")
    changes = ("prior.num_codes=50", "prior.grid=[4, 4]", "prior.num_classes=3")
    more = (f"init.from={tmp_path / 'saved'}", "init.parts=[network, head]", "trained=[head, condition]")
    config = configuration.load(Run, prior_runs.write_config(tmp_path, tmp_path, *changes, *more))
    first_weights.check(config)
    here = priors.build(config.prior)
    frozen.freeze(config, here)
    set_aside(here)
    taken = first_weights.take(config, here, Mesh())
    before, now = tensors(there), tensors(here)
    for name, x in before.items():
        if name.startswith("head."):
            assert torch.equal(now[name][: len(x)], x)
        elif name.startswith("net."):
            assert torch.equal(now[name], x)
            assert not here.get_parameter(name).requires_grad
    assert all(rows == {"there": 37, "here": 50} for rows in taken.facts["rows"].values())
    assert not here.net.training
    assert here.condition.training

    wrong = configuration.load(
        Run, prior_runs.write_config(tmp_path, tmp_path, *changes, f"init.from={tmp_path / 'saved'}")
    )
    with pytest.raises(ValueError, match="num_classes"):
        first_weights.check(wrong)


def test_parts_that_cannot_be_frozen_are_told_with_the_config(tmp_path, tiny_shards):
    for changes, text in (
        (["trained=[decoder]"], "encoder and codes would stay as first drawn"),
        (["trained=[]", "init.from=x"], "everything is frozen"),
        (["init.from=x", "init.parts=[decoder, discriminator]"], "loss.adversarial is null"),
        (["init.from=x", "trained=[encoder]", "loss.adversarial={adaptive: true}"], "freezes the decoder"),
        (["init.from=x", "init.parts=[heads]"], "expected encoder"),
    ):
        path = jobs.write_config(tmp_path, tiny_shards, *changes)
        with pytest.raises(configuration.ConfigError, match=text):
            configuration.load(TokenizerRun, path)
