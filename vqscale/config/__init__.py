"""YAML to frozen dataclasses and back. No torch, nothing of vqscale."""

from vqscale.config.help import describe
from vqscale.config.load import ConfigError, differences, dump, load, parse, text_of, to_dict
from vqscale.config.marks import Before, Free, FreeToChange
from vqscale.config.schema import OneOf, free_keys, load_class

__all__ = [
    "Before",
    "ConfigError",
    "Free",
    "FreeToChange",
    "OneOf",
    "describe",
    "differences",
    "dump",
    "free_keys",
    "load",
    "load_class",
    "parse",
    "text_of",
    "to_dict",
]
