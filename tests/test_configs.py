"""Every shipped config loads, fits the processes it names, builds on the meta device and survives being written."""

from __future__ import annotations

from pathlib import Path

import pytest

from vqscale import config as configuration
from vqscale.train import study as studies
from vqscale.train.config import Run
from vqscale.train.plan import plan
from vqscale.train.study import StudyConfig

ROOT = Path(__file__).resolve().parents[1]
RUNS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "study")
STUDIES = sorted((ROOT / "configs" / "study").glob("*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_shipped_config_is_a_run(path, tmp_path):
    config = configuration.load(Run, path)
    costs = plan(config, config.mesh.codes or 2)
    assert sum(costs.parameters.values()) > 0
    copy = tmp_path / "run.yaml"
    copy.write_text(configuration.dump(config))
    assert configuration.load(Run, copy) == config
    assert path.read_text().startswith("# "), "a config begins with what it reproduces and the command"


def test_the_published_network_has_its_published_size():
    path = ROOT / "configs" / "tokenizer" / "ibq_imagenet256_262144_reference.yaml"
    parameters = plan(configuration.load(Run, path), 8).parameters
    assert parameters["encoder"] == 46_752_256
    assert parameters["decoder"] == 59_903_875
    assert parameters["codebook"] == 2**18 * 256


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_shipped_study_expands_to_runs(path):
    study = configuration.load(StudyConfig, path)
    members = studies.expand(study, path)
    assert len({member.name for member in members}) == len(members) > 1
    for member in members:
        assert plan(member.config, study.processes).memory


def test_a_typo_in_a_shipped_config_names_its_neighbour(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUNS[0].read_text().replace("checkpoint_every", "checkpoint_evry"))
    with pytest.raises(
        configuration.ConfigError, match=r"run\.yaml:\d+.*checkpoint_evry.*did you mean.*checkpoint_every"
    ):
        configuration.load(Run, path)
