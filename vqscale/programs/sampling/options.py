"""The options of the programs that draw: an option for each field of every prior's SampleConfig. Imports no torch.

Which prior it is, its folder says (run.yaml or card.json), so an option of another is refused before processes meet.
Until then values are text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from vqscale import config as configuration
from vqscale import priors
from vqscale.config.schema import doc_lines, fields_of
from vqscale.config.text import COMMAND_LINE, data_of, inline, read
from vqscale.disk import manifest
from vqscale.priors.config import PriorConfig, SampleConfig


def add(parser: argparse.ArgumentParser, *, lists: bool = False) -> None:
    """The options of all priors, those that some have in common once. With `lists` the dials alone, several values each
    between commas.
    """
    groups: dict[str, Any] = {}
    for key, names in _owners().items():
        kind = priors.sampling(names[0])
        title = f"how ids are drawn ({', '.join(names)})"
        if not lists or key in kind.dials():
            groups[title] = groups.get(title) or parser.add_argument_group(title)
            _add(groups[title], kind, key, lists)


def _owners() -> dict[str, list[str]]:
    """Fields of a SampleConfig -> names of the priors that have it."""
    owners: dict[str, list[str]] = {}
    for name in priors.PRIORS:
        for one in fields(priors.sampling(name)):
            owners.setdefault(one.name, []).append(name)
    return owners


def _add(group: Any, kind: Any, key: str, lists: bool) -> None:
    field, doc, option = fields_of(kind)[key], doc_lines(kind)[key].replace("%", "%%"), _option(kind, key)
    if key not in kind.dials():
        group.add_argument(option, dest=key, action="store_const", const="false", help=f"turn off: {doc}")
    elif field.kind is bool and not lists:
        group.add_argument(option, action="store_const", const="true", help=doc)
    else:
        words = ",".join(map(str, get_args(field.kind))) if get_origin(field.kind) is Literal else ""
        several = "; several, with commas" if lists else ""
        usual = f"{doc}{several} (default: {inline(field.default)})"
        group.add_argument(option, metavar=f"{{{words}}}" if words else None, help=usual)


def _option(kind: type[SampleConfig], key: str) -> str:
    off = next(one.metadata.get("off") for one in fields(kind) if one.name == key)
    return f"--{(off or key).replace('_', '-')}"


def sample_config(args: argparse.Namespace) -> SampleConfig:
    """How the prior of args.prior is to be sampled. ValueError for options that are not this prior's, or wrong."""
    config, given = _given(args)
    return _parsed(config, {key: _value(text) for key, text in given.items()})


def dials(args: argparse.Namespace) -> tuple[SampleConfig, dict[str, list[Any]]]:
    """(the prior's usual settings, the values of each dial that was given). ValueError as in `sample_config`."""
    config, given = _given(args)
    kind = config.sampling
    wrong: dict[str, None] = {}
    found: dict[str, list[Any]] = {}
    for key, text in given.items():
        found[key] = []
        for word in filter(None, map(str.strip, text.split(","))):
            try:
                found[key].append(getattr(_parsed(config, {key: _value(word)}), key))
            except configuration.ConfigError as error:
                wrong |= dict.fromkeys(error.problems)
        if not text.strip(", "):
            wrong[f"{_option(kind, key)} names no value: give some, with commas between them"] = None
    if wrong:
        raise configuration.ConfigError(list(wrong))
    return kind(), found


def _parsed(config: PriorConfig, given: Mapping[str, Any]) -> SampleConfig:
    """The SampleConfig of a prior. ValueError for what is wrong with it, or does not go with this prior."""
    how: SampleConfig = configuration.parse(config.sampling, given, source=COMMAND_LINE)
    if wrong := [f"{COMMAND_LINE}: {message}" for _, message in config.against(how)]:
        raise configuration.ConfigError(wrong)
    return how


def _given(args: argparse.Namespace) -> tuple[PriorConfig, dict[str, str]]:
    """(config of the prior, the options that were given). ValueError where one is another prior's."""
    config, owners = prior_config(args.prior), _owners()
    kind = config.sampling
    given = {key: getattr(args, key) for key in owners if getattr(args, key, None) is not None}
    strange = [_option(priors.sampling(owners[key][0]), key) for key in given if config.name not in owners[key]]
    if strange:
        raise ValueError(
            f"{', '.join(strange)} does not go with {args.prior}, a prior of name {config.name}, which has "
            f"{', '.join(_option(kind, dial) for dial in kind.dials()) or 'no such options'}: leave it out"
        )
    return config, given


def _value(text: str) -> Any:
    """A word of the command line as YAML reads it."""
    problems: list[str] = []
    node = read(text, COMMAND_LINE, problems)
    if problems:
        raise configuration.ConfigError(problems)
    return None if node is None else node.value


def prior_config(path: Path) -> PriorConfig:
    """The config of the prior at a path that Prior.load takes; nothing else is looked at. ValueError without one."""
    try:
        checkpoint = (path / manifest.NAME).is_file()
    except OSError as error:  # of a name that no file can have
        raise ValueError(f"PRIOR {str(path)[:100]} is no folder ({error.strerror}): give a run folder") from None
    for file in (path / "card.json", (path.absolute().parent.parent if checkpoint else path) / "run.yaml"):
        if file.is_file():
            found: PriorConfig = configuration.parse(PriorConfig, _prior_in(file), source=str(file))
            return found
    what = "does not exist" if not path.exists() else "has neither run.yaml nor card.json"
    raise ValueError(
        f"PRIOR {path} {what} (looked from {Path.cwd()}): give a run folder, a folder NNNNNNNNNN in its checkpoints, "
        "or a folder that a prior was saved to"
    )


def _prior_in(file: Path) -> Mapping[str, Any]:
    """The part of a run's config, or of a card, that is a prior's."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.suffix == ".json" else data_of(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error}): copy the folder again") from None
    keys: Sequence[str] = ("format", "config") if file.suffix == ".json" else ("task", "prior")
    kind, part = (found.get(key) if isinstance(found, dict) else None for key in keys)
    if kind not in ("vqscale prior", "prior") or not isinstance(part, dict):
        raise ValueError(f"{file} is of {kind!r}, and not of a prior: give the folder of a prior as PRIOR")
    return part
