"""YAML to frozen dataclasses and back. No torch, nothing of vqscale."""

from vqscale.config.load import ConfigError, describe, differences, dump, load, parse, to_dict

__all__ = ["ConfigError", "describe", "differences", "dump", "load", "parse", "to_dict"]
