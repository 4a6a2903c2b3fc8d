"""Whole runs of priors for tests: token caches whose ids follow from the class, and a tiny config. See jobs.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jobs
import numpy as np
import token_caches

from vqscale.data.tokens import format as form
from vqscale.data.tokens import write as writing
from vqscale.tokenizer import clusters
from vqscale.tokenizer.clusters import ClustersCard

CODES, GRID, NUM_TRAIN, NUM_VAL, TOKENIZER = 37, (2, 3), 24, 10, "f00d" * 16
COARSE = (
    "prior.name=coarse_to_fine",
    "prior.fine_net={width: 16, num_layers: 1, num_heads: 2, ffn_multiple: 16, dropout_token: 0.0, "
    "dropout_residual: 0.0, dropout_ffn: 0.0}",
    "prior.coarse_noise=0.1",
)


def write_cache(folder: Path, num_images: int, seed: int, unknown: int = 0, **others) -> Path:
    """A sealed cache of two views; an image has codes around seven times its label, and some noise.

    The labels of the first `unknown` images are not known.
    """
    settings = {"grid": GRID, "num_codes": CODES, "views": ("center", "center mirrored"), "storage": 4}
    card = token_caches.card(num_images, **(settings | {"tokenizer": TOKENIZER} | others))
    index = token_caches.index(num_images)
    labels = np.where(np.arange(num_images) < unknown, -1, index.samples.labels).astype(np.int32)
    index = replace(index, samples=replace(index.samples, labels=labels))
    made, _ = writing.begin(folder, card, index.samples)
    writer = writing.Writer(folder, made)
    random = np.random.default_rng(seed)
    for shard in range(made.num_shards):
        ids, span = writer.empty(), made.span(shard)
        noise = random.integers(0, 5, size=ids.shape)
        ids[: len(span)] = (
            np.array([number * 3 % token_caches.LABELS for number in span]).reshape(-1, *[1] * (ids.ndim - 1)) * 7
            + noise[: len(span)]
        )
        writer.write(shard, ids, [])
    assert writing.verify(folder, made, writer.entries, range(made.num_shards)) == []
    assert form.sealed(folder) is None
    writing.seal(folder, made, writer.entries, [])
    return folder


def write_caches(folder: Path) -> Path:
    """train and val of one tokenizer; returns the folder."""
    write_cache(folder / "train", NUM_TRAIN, 1)
    write_cache(folder / "val", NUM_VAL, 2)
    return folder


def write_config(folder: Path, caches: Path, *overrides: str) -> Path:
    """FOLDER/run.yaml of a run in FOLDER/run on the caches; K does not divide by the processes, an epoch is 3 steps."""
    config = {
        "task": "prior",
        "run": {"folder": str(folder / "run"), "steps": 8, "log_every": 1, "eval_every": 4, "eval_images": 8}
        | {"checkpoint_every": 2, "keep": 10, "seed": 3, "device": "cpu"},
        "data": {
            "batch": 8,
            "train": {"path": str(caches / "train"), "window_shards": 2},
            "val": {"path": str(caches / "val")},
        },
        "prior": {
            "num_codes": CODES,
            "grid": list(GRID),
            "num_classes": token_caches.LABELS,
            "class_dropout": 0.3,
            "label_smoothing": 0.1,
            "z_loss": 1e-3,
            "net": {"width": 16, "num_layers": 2, "num_heads": 2, "ffn_multiple": 16, "adaln": True}
            | {"dropout_token": 0.0, "dropout_residual": 0.0, "dropout_ffn": 0.0},
        },
        "average": {"decay": 0.9},
        "optim": {"lr": 1e-2, "warmup_steps": 2, "eps": 1e-4, "weight_decay": 0.05, "schedule": "linear"},
        "engine": {"name": "torch", "timeout_s": 60},
    }
    return jobs.write(config, folder, *overrides)


def clustered(place, values=None, **more):
    """A file of clusters of these ids, in ranges of seven codes as their classes have."""
    values = np.arange(CODES, dtype=np.int32) // 7 if values is None else values
    known = {"tokenizer": TOKENIZER, "num_codes": CODES, "num_clusters": 6, "method": "balanced", **more}
    clusters.write(place, values, ClustersCard(**known))
    return place
