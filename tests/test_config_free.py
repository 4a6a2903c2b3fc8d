"""What may change when a run goes on: the marks on the fields, key by key, and what the check of a run folder makes of
them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import pytest

from vqscale import config as configuration
from vqscale.config import Free, FreeToChange
from vqscale.config.schema import dotted_keys
from vqscale.run import folder
from vqscale.train.config import PriorRun, TokenizerRun

EVERY_RUN = """
    run.folder run.steps run.device run.log_every run.eval_every run.eval_images run.checkpoint_every run.keep
    run.profile_steps run.compile run.cuda_graphs engine.name engine.zero_stage engine.max_skipped engine.timeout_s
    mesh.data mesh.codes engine.communication
"""
SHARDS = """
    data.train.shards data.train.num_workers data.train.max_broken data.train.cache_dir data.train.cache_gb
    data.train.index_dir data.val.shards data.val.medium data.val.image_size data.val.resize data.val.crop
    data.val.min_area data.val.clip data.val.peak_db data.val.sample_rate data.val.seconds data.val.short
    data.val.make.num_sounds data.val.make.sample_rate data.val.make.seconds
    data.val.flip data.val.interpolation data.val.window_shards data.val.num_workers data.val.max_broken
    data.val.cache_dir data.val.cache_gb data.val.index_dir data.val.make.num_images data.val.make.size
    data.val.make.first_index data.val.make.seed data.val.make.far data.val.make.source
    data.val.unit_m data.val.evaluation_crop data.val.categories data.val.buckets
"""
FREE = {
    TokenizerRun: EVERY_RUN
    + SHARDS
    + """
    tokenizer.signal.predict tokenizer.signal.min_fraction tokenizer.net.checkpointing
    tokenizer.quantizer.scan_mib tokenizer.quantizer.inner.scan_mib loss.perceptual.vgg loss.perceptual.heads
    loss.alignment.vision.weights loss.adversarial.net.vision.weights drawn.from
    """,
    PriorRun: EVERY_RUN
    + SHARDS
    + SHARDS.replace("data.train.", "data.train.contexts.").replace("data.val.", "data.val.contexts.")
    + """
    data.train.path data.val.path data.val.views data.val.window_shards data.val.tokenizer tokenizer
    prior.head.scan_mib prior.coarse_head.scan_mib prior.net.checkpointing prior.fine_net.checkpointing prior.clusters
    prior.condition.checkpointing engine.accumulation
    """,
}


def leaves(schema):
    keys = set(dotted_keys(schema))
    return {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}


def with_value(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def is_free(key, schema):
    """Whether the key is none of the differences of two configs in which it has two values."""
    free = list(configuration.free_keys(schema))
    return not configuration.differences(with_value(key, 1), with_value(key, 2), free)


@pytest.mark.parametrize("schema", FREE, ids=lambda schema: schema.__name__)
def test_these_keys_are_free_and_all_others_are_not(schema):
    """The keys that the text prefixes of version 0.1.0 freed; and scan_mib of the levels of a quantizer, which they
    forgot."""
    assert {key for key in leaves(schema) if is_free(key, schema)} == set(FREE[schema].split())


def test_a_group_that_is_null_or_absent_is_free_where_its_field_is_marked():
    free = list(configuration.free_keys(TokenizerRun))
    assert configuration.differences({"data": {"val": None}}, {"data": {"val": {"shards": "a.tar"}}}, free) == []
    assert configuration.differences({"run": {"steps": 1}}, {"run": {"steps_x": 2}}, free) == [
        "run.steps_x: (absent) -> 2"
    ]


@dataclass(frozen=True)
class Part:
    speed: Free[int] = 1
    size: int = 2


@dataclass(frozen=True)
class Whole:
    one: Part = field(default_factory=Part)
    two: Annotated[Part, FreeToChange("size")] = field(default_factory=Part)
    three: Free[Part | None] = None


def test_marks_stand_on_fields_at_any_depth_and_leave_types_alone():
    assert list(configuration.free_keys(Whole)) == ["one.speed", "two.size", "two.speed", "three", "three.speed"]
    loaded = configuration.parse(Whole, {"one": {"speed": 3}, "three": {"size": 4}})
    assert loaded == Whole(Part(3), Part(), Part(1, 4))
    with pytest.raises(configuration.ConfigError, match=r"one\.speed: expected int, found the text 'fast'"):
        configuration.parse(Whole, {"one": {"speed": "fast"}})


def test_a_run_folder_is_checked_by_the_marks_of_its_task(tmp_path):
    asked = {"task": "prior", "run": {"folder": str(tmp_path)}, "data": {"train": {"path": "cache"}}}
    (tmp_path / "run.yaml").write_text(configuration.dump(configuration.parse(PriorRun, asked)))
    moved = asked | {"engine": {"accumulation": 2}, "mesh": {"codes": 1}, "data": {"train": {"path": "elsewhere"}}}
    folder.check(configuration.parse(PriorRun, moved))
    with pytest.raises(ValueError, match=r"another config[^:]*:\n  engine\.clip_norm: 1\.0 -> 2\.0\nchange"):
        folder.check(configuration.parse(PriorRun, moved | {"engine": {"clip_norm": 2.0}}))
