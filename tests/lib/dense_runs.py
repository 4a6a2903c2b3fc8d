"""Tiny runs of both stages of dense prediction for tests: colours of drawn pictures. See jobs.py."""

from __future__ import annotations

from pathlib import Path

import jobs

VIT = {"name": "vit", "labels": [1, 1, 1], "image_size": jobs.SIDE, "patch": 4, "bottleneck": 2}
VIT |= {"width": 16, "encoder_layers": 1, "decoder_layers": 1, "num_heads": 2, "mlp_width": 24}
CONDITION = {"name": "context", "image_size": jobs.SIDE, "patch": 4, "pool": 2, "dropout": 0.2}
CONDITION |= {"width": 12, "num_layers": 1, "num_heads": 2, "mlp_width": 16}
NET = {"width": 16, "num_layers": 1, "num_heads": 2, "ffn_multiple": 16, "num_prefix": 4, "adaln": True}
STILL = {"dropout_token": 0.0, "dropout_residual": 0.0, "dropout_ffn": 0.0}
CODES, GRID = 27, (2, 2)


def _run(folder: Path, steps: int) -> dict:
    run = {"folder": str(folder / "run"), "steps": steps, "log_every": 1, "eval_every": 4, "eval_images": 8}
    return run | {"checkpoint_every": 2, "keep": 10, "seed": 3, "device": "cpu"}


def _data(shards: Path) -> dict:
    images = {"image_size": jobs.SIDE, "num_workers": 0, "index_dir": str(shards / "index")}
    train = {"shards": str(shards / "train-{0..1}.tar"), "window_shards": 2, "crop": "resized", "flip": True, **images}
    return {"batch": 8, "train": train, "val": {"shards": str(shards / "val.tar"), **images}}


OTHERS = {"engine": {"name": "torch", "timeout_s": 60}, "average": {"decay": 0.9}}


def tokenizer(folder: Path, shards: Path, *overrides: str) -> Path:
    """FOLDER/run.yaml of stage 1 in FOLDER/run."""
    config = {
        "task": "tokenizer",
        "run": _run(folder, 4),
        "data": _data(shards),
        "tokenizer": {
            "signal": {"name": "color"},
            "net": VIT,
            "quantizer": {"name": "fsq", "levels": [3, 3, 3]},
            "latent_norm": "none",
            "code_dropout": "random",
            "no_code": "learned",
        },
        "optim": {"lr": 1e-2, "eps": 1e-4, "schedule": "constant"},
        **OTHERS,
    }
    return jobs.write(config, folder, *overrides)


def prior(folder: Path, shards: Path, made_by: Path, *overrides: str) -> Path:
    """FOLDER/run.yaml of stage 2 in FOLDER/run, on ids that the tokenizer in `made_by` encodes as they come."""
    config = {
        "task": "prior",
        "run": _run(folder, 6),
        "data": {key: x | {"medium": "images"} if key != "batch" else x for key, x in _data(shards).items()},
        "tokenizer": str(made_by),
        "prior": {
            "num_codes": None,
            "num_ids": None,
            "grid": None,
            "num_classes": 0,
            "condition": CONDITION,
            "net": NET | STILL,
        },
        "optim": {"lr": 1e-2, "eps": 1e-4, "lr_factors": [{"part": "image_encoder", "factor": 0.1}]},
        **OTHERS,
    }
    return jobs.write(config, folder, *overrides)
