"""Every shipped config loads, fits the processes it names, builds on the meta device and survives being written."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from webdataset.shardlists import expand_urls

from vqscale import config as configuration
from vqscale import priors, quantizers
from vqscale.codes import tally
from vqscale.codes.rows import set_aside
from vqscale.nets.config import grid
from vqscale.plan.prior import plan as plan_prior
from vqscale.plan.tokenizer import plan, planned_mesh
from vqscale.programs.claims import claims
from vqscale.programs.claims import findings as claim_findings
from vqscale.programs.claims import rules as claim_rules
from vqscale.programs.claims.config import ClaimsConfig, NotHereConfig
from vqscale.programs.commands import claims as claims_command
from vqscale.programs.commands import study
from vqscale.programs.studies import report as study_report
from vqscale.programs.studies import study as studies
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.config import Run

ROOT = Path(__file__).resolve().parents[1]
RUNS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in ("study", "claims"))
# What a cache and a tokenizer say that are not here.
KNOWN_ELSEWHERE = {
    f"configs/quickstart/{task}_prior.yaml": ("prior.num_codes=125", "prior.num_ids=1", "prior.grid=[4, 4]")
    for task in ("depth", "color", "panoptic")
} | {
    "configs/quickstart/sound_prior.yaml": ("prior.num_codes=4096", "prior.grid=[80]", "prior.feature_dim=8"),
    "configs/quickstart/prior.yaml": ("prior.num_codes=4096", "prior.grid=[8, 8]", "prior.feature_dim=16"),
}
HELD_OUT = {"photographs": 4 * 512}  # what its command makes of the photographs in the README beside it
STUDIES = sorted((ROOT / "configs" / "study").glob("*.yaml"))
CLAIMS = sorted((ROOT / "configs" / "claims").glob("*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_shipped_config_is_a_run(path, tmp_path):
    config = _loaded(path)
    config.mesh.resolve(config.mesh.codes or 2)
    copy = tmp_path / "run.yaml"
    copy.write_text(configuration.dump(config))
    assert configuration.load(Run, copy) == config
    assert path.read_text().startswith("# "), "a config begins with what it reproduces and the command"


def _loaded(path):
    return configuration.load(Run, path, KNOWN_ELSEWHERE.get(path.relative_to(ROOT).as_posix(), ()))


@pytest.mark.slow
@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_shipped_config_is_planned(path):
    config = _loaded(path)
    costs = (plan_prior if config.task == "prior" else plan)(config, config.mesh.codes or 2)
    assert sum(costs.parameters.values()) > 0


IBQ_NET = {"encoder": 46_752_256, "decoder": 59_903_875, "quant_conv": 65_792, "post_quant_conv": 65_792}
# Without the second level of 128 channels: residual blocks of 295,680 parameters, and a convolution between two sides.
F8_NET = IBQ_NET | {"encoder": 46_752_256 - 4 * 295_680 - 147_584, "decoder": 59_903_875 - 5 * 295_680 - 147_584}
# 12 blocks of ViT-B, a norm, and a map of patches of 16 x 16 pixels.
VIT_B = 12 * (4 * 768 * 769 + 4 * 768 + 2 * 768 * 3072 + 3072 + 768) + 2 * 768
VIT_NET = {"encoder": VIT_B + 768 * 769, "decoder": VIT_B + 768 * 769, "post_quant_conv": 257 * 768}
# Of the names and shapes in tests/lib/published.py, which test_magvit.py compares with the network.
SIMVQ_NET = {"encoder": 24_282_496, "decoder": 39_851_907, "quant_conv": 0, "post_quant_conv": 0}
# 71,952,898 trained in all, of the names and shapes in tests/lib/published_audio.py.
WAVE_NET = {"encoder": 8_802_816, "decoder": 62_887_426, "quantizer": 512 * 512 + 512}
# Of UViM's first stage, counted from its code: labels in and out of 256 pixels; to the codes and back.
UVIM_LABELS = {
    "depth": (50_332_416, 50_397_184),
    "color": (590_592, 590_592),
    "panoptic": (26_346_240 + 19_661_568, 26_379_776 + 19_686_400),
}
UVIM_EDGES = {
    "vq": {"quant_conv": 590_592, "post_quant_conv": 590_592, "codebook": 4096 * 768},
    "fsq": {"quant_conv": 3_845, "post_quant_conv": 4_608, "codebook": 0},
}
SIZES = {
    **{f"ibq_imagenet256_{K}": IBQ_NET | {"codebook": K * 256} for K in (1024, 8192, 16384, 262144)},
    "ibq_imagenet256_16384_f8": F8_NET | {"codebook": 2**14 * 256},
    "ibq_imagenet256_16384_f8_buckets": F8_NET | {"codebook": 2**14 * 256},
    "ibq_imagenet256_16384_vit": VIT_NET | {"codebook": 2**14 * 256},
    "ibq_imagenet256_262144_beyond": IBQ_NET | {"codebook": 2**18 * 256},
    **{
        f"simvq_imagenet128_{K}": SIMVQ_NET | {"codebook": K * 128, "quantizer": 128 * 128 + 128}
        for K in (1024, 8192, 65536, 262144)
    },
    **{
        f"simvq_libritts_{name}": WAVE_NET | {"codebook": int(name.split("_")[0]) * 512}
        for name in ("4096", "8192", "65536", "262144", "65536_beyond")
    },
    "vq_imagenet128": SIMVQ_NET | {"codebook": 65536 * 128},
    **{
        f"uvim_{task}_{name}": {
            "encoder": enters + 590_592 + 786_432 + 42_528_768,
            "decoder": 590_592 + 786_432 + 85_056_000 + leaves,
            **edges,
        }
        for task, (enters, leaves) in UVIM_LABELS.items()
        for name, edges in UVIM_EDGES.items()
    },
    # six channels in place of 128 between encoder and decoder
    "fsq_imagenet128": {"encoder": 24_282_496 - 122 * 513, "decoder": 39_851_907 - 122 * 512 * 9, "codebook": 0},
}


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "tokenizer").glob("*.yaml")), ids=lambda path: path.stem)
def test_published_networks_have_their_published_size(path):
    config = configuration.load(Run, path)
    with torch.device("meta"):
        tokenizer = Tokenizer.from_config(config.tokenizer, planned_mesh(1, 1), 0)
    tables = set_aside(tokenizer)
    found = {name: sum(p.numel() for p in part.parameters()) for name, part in tokenizer.named_children()}
    found["codebook"] = sum(p.numel() for table in tables.values() for p in table.parameters())
    assert {name: found[name] for name in SIZES[path.stem]} == SIZES[path.stem]
    for world in (8, 64):
        config.check_world(world)


# Parameters in millions, as published for K = 16384; the two tables have 2 x width x K of them.
PRIOR_SIZES = {"ibq_B": 343.0, "ibq_L": 649.6, "ibq_XL": 1076.1, "ibq_XXL": 2063.3} | {
    "llamagen_B": 111,
    "llamagen_L": 343,
    "llamagen_XL": 775,
    "llamagen_XXL": 1.4e3,
    "llamagen_3B": 3.1e3,
}


# Counted from the published code; the last norm stands once there, and here also before the head.
FACTORISED_SIZES = {"B": 343_570_432, "L": 804_362_240, "XL": 1_486_679_040}


@pytest.mark.parametrize("name", FACTORISED_SIZES)
def test_priors_of_digits_have_their_published_size(name):
    path = ROOT / "configs" / "prior" / f"openmagvit2_{name}.yaml"
    config = configuration.load(Run, path)
    with torch.device("meta"):
        prior = priors.build(config.prior, planned_mesh(1, 1))
    found = sum(p.numel() for p in prior.parameters())
    assert found == FACTORISED_SIZES[name] + config.prior.net.width
    text = path.read_text().replace("\n# ", " ")
    assert f"{FACTORISED_SIZES[name]:,} parameters" in text
    assert f"{found:,} parameters" in text
    assert prior.head.within.net.config.num_heads == config.prior.net.num_heads
    config.check_world(96 if name == "XL" else 32)


# Stage 1 over M = 512: LlamaGen's with tables of 512 ids (87M, 310M and 734M published).
COARSE = {"ctf_B": 87, "ctf_L": 310, "ctf_XL": 734}


@pytest.mark.parametrize("name", COARSE)
def test_the_first_stage_of_ctf_has_its_published_size(name):
    path = ROOT / "configs" / "prior" / f"{name}.yaml"
    config = configuration.load(Run, path)
    flat = configuration.load(Run, ROOT / "configs" / "prior" / f"llamagen_{name.removeprefix('ctf_')}.yaml")
    fine = configuration.load(Run, ROOT / "configs" / "prior" / "llamagen_L.yaml")
    with torch.device("meta"):
        prior, *others = (priors.build(each.prior, planned_mesh(1, 1)) for each in (config, flat, fine))
    size, (whole, large) = _count(prior.coarse), map(_count, others)
    assert size == whole - 2 * (16384 - 512) * config.prior.net.width
    assert round(size / 1e6) == COARSE[name]
    assert _count(prior) - size == large - (16384 - 512) * 1024 + 256 * 1024
    said = path.read_text().replace("\n# ", " ")
    assert f"{size / 1e6:.1f} M parameters" in said
    assert f"{(_count(prior) - size) / 1e6:.1f} M here" in said
    for world in (8, 32, 64):
        config.check_world(world)


UVIM_PRIORS = sorted((ROOT / "configs" / "prior").glob("uvim_*.yaml"))


@pytest.mark.parametrize("path", UVIM_PRIORS, ids=lambda path: path.stem)
def test_the_second_stages_of_uvim_fit_their_first(path):
    config, first = (configuration.load(Run, x) for x in (path, ROOT / "configs" / "tokenizer" / path.name))
    with torch.device("meta"):
        prior = priors.build(config.prior, planned_mesh(1, 1))
        quantizer = quantizers.build(first.tokenizer.quantizer, planned_mesh(1, 1))
    assert config.tokenizer == first.run.folder
    assert prior.num_codes == quantizer.num_codes
    assert tuple(config.prior.grid) == grid(first.tokenizer.net, first.data.train.sides)
    assert config.data.train.shape == first.data.train.shape
    assert prior.condition.shape == (3, *first.data.train.sides)
    config.check_world(8)


def _count(module):
    return sum(p.numel() for p in module.parameters())


def _sized(path):
    return path.stem.partition("_262144")[0] in PRIOR_SIZES


@pytest.mark.parametrize(
    "path", sorted(filter(_sized, (ROOT / "configs" / "prior").glob("*.yaml"))), ids=lambda path: path.stem
)
def test_published_priors_have_their_published_size(path):
    config = configuration.load(Run, path)
    with torch.device("meta"):
        prior = priors.build(config.prior, planned_mesh(1, 1))
    millions = sum(p.numel() for p in prior.parameters()) / 1e6
    name, _, _ = path.stem.partition("_262144")
    if config.prior.num_codes == 2**18:
        assert path.stem.endswith("_262144")
        assert f"{millions:.1f} M parameters" in path.read_text().replace("\n# ", " ")
        millions -= 2 * config.prior.net.width * (2**18 - 2**14) / 1e6
    size = PRIOR_SIZES[name]
    printed = 100 if size >= 1e3 and name.startswith("llamagen") else 0.1 if name.startswith("ibq") else 1
    assert round(millions / printed) == round(size / printed)
    for world in (8, 32, 64):
        config.check_world(world)


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_shipped_study_is_planned_and_prepared(path, tmp_path, capsys):
    words = [str(path), f"folder={tmp_path / 'study'}", "seeds=[0]"]
    assert study.main([*words, "--dry-run"]) == 0
    head, *planned = capsys.readouterr().out.splitlines()
    assert head.startswith(f"{len(planned)} runs of {2 if path.stem == 'code_axis' else 1} ")
    assert not (tmp_path / "study").exists()
    assert study.main([*words, "--prepare"]) == 0
    prepared = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(set(prepared)) == len(planned) > 1
    for line, config in zip(planned, prepared, strict=True):
        name, _, costs = line.strip().partition(": ")
        run = configuration.load(Run, config)
        assert (config.stem, Path(run.run.folder).name) == (name, name)
        assert f" {run.run.steps} steps" in costs


@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.stem)
def test_shipped_claims_have_rules_that_fit_their_runs(path, quick, monkeypatch):
    monkeypatch.chdir(ROOT)  # commands before a study name configs from there
    asked = claims_command.loaded(path, quick=quick)
    study.check_options(asked.study, asked.trials)
    assert 0 < asked.minutes <= 120
    assert path.read_text().startswith("# ")
    assert f"--only {path.stem} " in path.read_text(), "it shows its command"
    lines = [study_report.result_line(trial) for trial in asked.trials]
    for claim in asked.config.claims:
        verdict, _, findings = claim_rules.judge(claim, lines, asked.dials)
        assert verdict == claim_findings.UNTESTED, "nothing has run"
        if not quick and not isinstance(claim.rules[0], NotHereConfig):
            assert all(finding.why.endswith("is waiting") for finding in findings), claim.name
    if not quick:
        assert all(len(grid.seeds) > 1 for grid in asked.study.grids()), "one seed has no interval"


def test_claims_of_the_published_start_of_ibq_have_the_published_settings():
    """But for the sizes: as the config that repeats what was published value by value."""
    published = _loaded(ROOT / "configs/tokenizer/ibq_imagenet256_16384.yaml")
    asked = claims.load(ROOT / "configs/claims/ibq_start.yaml")
    found = [trial.config for trial in asked.trials if trial.labels["quantizer"] == "ibq-published"]
    wanted = dataclasses.asdict(published.tokenizer.quantizer)
    for config in found:
        mine = dataclasses.asdict(config.tokenizer.quantizer)
        assert {key for key in wanted if mine[key] != wanted[key]} <= {"num_codes", "dim"}
        assert config.tokenizer.latent_norm == published.tokenizer.latent_norm
        assert config.loss.quantizer_weight == published.loss.quantizer_weight
    assert {config.tokenizer.quantizer.dim for config in found} == {32, 256}


def test_shipped_claims_have_names_of_their_own_and_are_quick_in_45_minutes(monkeypatch):
    monkeypatch.chdir(ROOT)
    every = [configuration.load(ClaimsConfig, path) for path in CLAIMS]
    names = [claim.name for config in every for claim in config.claims] + [path.stem for path in CLAIMS]
    assert len(names) == len(set(names))
    assert sum(config.quick_minutes for config in every if not config.needs) <= 45
    assert {claim.paper for config in every for claim in config.claims} >= {"IBQ", "FSQ", "SCQ", "SimVQ", "CTF"}


ASKS_NO_USAGE = {"code_axis"}  # time, memory and bytes alone
OF_TOKENIZERS = [
    path
    for path in STUDIES
    if "tokenizer" in yaml.safe_load(path.read_text())["base"] and path.stem not in ASKS_NO_USAGE
]


@pytest.mark.parametrize("path", OF_TOKENIZERS, ids=lambda path: path.stem)
def test_a_shipped_study_counts_usage_on_enough_held_out_tokens(path):
    for trial in studies.expand(configuration.load(studies.StudyConfig, path), path):
        data, tokenizer = trial.config.data, trial.config.tokenizer
        with torch.device("meta"):
            quantizer = quantizers.build(tokenizer.quantizer, planned_mesh(1, 1))
        num_images = data.val.make.num_images if data.val.make else HELD_OUT[path.stem]
        tokens = num_images * math.prod(grid(tokenizer.net, data.val.sides))
        assert tally.ceiling(tokens, quantizer.num_codes) > 0.98, trial.name


def test_a_typo_in_a_shipped_config_names_its_neighbour(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUNS[0].read_text().replace("checkpoint_every", "checkpoint_evry"))
    with pytest.raises(
        configuration.ConfigError, match=r"run\.yaml:\d+.*checkpoint_evry.*did you mean.*checkpoint_every"
    ):
        configuration.load(Run, path)


LISTED = [
    (patterns, hours, expected)
    for patterns, _, hours, expected, _ in re.findall(
        r"^\| (`.*?`) \| (.*?) \| (.*?) \| (.*?) ?\| (.*?) ?\|$", (ROOT / "configs/README.md").read_text(), re.MULTILINE
    )
]


def _files(patterns):
    """The configs of a row: names in backquotes, with braces and stars as a shell has them."""
    named = [word for words in re.findall(r"`(.*?)`", patterns) for word in expand_urls(words)]
    return {word: sorted((ROOT / "configs").glob(word)) for word in named}


def test_every_config_is_in_the_list_once_and_all_in_it_are_there():
    found = [path for patterns, *_ in LISTED for paths in _files(patterns).values() for path in paths]
    assert sorted(found) == sorted((ROOT / "configs").rglob("*.yaml"))
    assert [name for patterns, *_ in LISTED for name, paths in _files(patterns).items() if not paths] == []


@pytest.mark.parametrize("row", LISTED, ids=lambda row: row[0])
def test_hours_and_expected_numbers_of_the_list_are_those_of_the_headers(row):
    patterns, hours, expected = row
    lines = [line for paths in _files(patterns).values() for path in paths for line in path.read_text().splitlines()]
    told = " ".join(line.removeprefix("#") for line in lines if line.startswith("#"))
    for number in re.findall(r"\d*\.?\d+", hours + " " + expected):
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\.?\d)", told), f"no header has {number}"
    assert hours, "a dash says that nobody knows"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("tokenizer/simvq_libritts_4096", "tokenizer.net.num_blocks"),
        ("tokenizer/uvim_depth_fsq", "tokenizer.net.encoder_layers"),
        ("tokenizer/ibq_imagenet256_16384_vit", "tokenizer.net.decoder_layers"),
        ("quickstart/tokenizer", "tokenizer.net.num_blocks"),
        ("quickstart/prior", "prior.net.num_layers"),
    ],
)
def test_a_depth_that_nothing_can_be_built_with_is_refused(name, key):
    with pytest.raises(configuration.ConfigError, match=rf"{key}: .* is 10000000000000, and a .* at most 10000"):
        configuration.load(Run, ROOT / "configs" / f"{name}.yaml", [f"{key}=10000000000000"])
