"""YAML to frozen dataclasses and back. No torch, nothing of vqscale."""

from vqscale.config.load import ConfigError, describe, differences, dump, load, parse, to_dict
from vqscale.config.marks import Free, FreeToChange
from vqscale.config.schema import free_keys

__all__ = [
    "ConfigError",
    "Free",
    "FreeToChange",
    "describe",
    "differences",
    "dump",
    "free_keys",
    "load",
    "parse",
    "to_dict",
]
