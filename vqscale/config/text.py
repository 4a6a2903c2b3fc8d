"""The text of a config: YAML to nodes that know their file and line, plain data back to YAML. No schema is known here.

What a scalar means is decided here: plain decimal numbers, true, false and null (or ~, or nothing) are values, all else
is text. Scanning and parsing are PyYAML's (syntax.py), which is loaded where there is text: configs made of plain data
need none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMAND_LINE = "command line"
_MOST_DIGITS = 300  # of a whole number

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
FLOAT = re.compile(r"[-+]?(((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|\.inf)")
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}


@dataclass
class Node:
    """A value and the place it was read from. Mappings are dicts of nodes, sequences are lists of nodes."""

    value: Any
    source: str
    replaced: Node | None = None
    """What overrides put this in place of, as it was before the first of them."""

    def child(self, step: str) -> Node | None:
        """The node under a key, or under the number of an item."""
        if isinstance(self.value, list) and step.isdecimal() and int(step) < len(self.value):
            return self.value[int(step)]
        return self.value.get(step) if isinstance(self.value, dict) else None

    def put(self, steps: list[str], new: Node) -> None:
        """Put a node below this one, through items of lists that are there, and mappings, made where they are not."""
        old = self.child(steps[0])
        if old is None:
            old = Node(None, COMMAND_LINE)
            if not isinstance(self.value, dict):
                self.value, self.source = {}, COMMAND_LINE
            self.value[steps[0]] = old
        if steps[1:]:
            old.put(steps[1:], new)
        else:
            new.replaced = old.replaced or old
            self.value[int(steps[0]) if isinstance(self.value, list) else steps[0]] = new

    def source_of(self, key: str) -> str:
        """Where the value of a dotted key below this node was given."""
        node: Node | None = self
        for step in key.split(".") if key else ():
            node = node.child(step) if node else None
        return node.source if node else "default"


def read(text: str, name: str, problems: list[str]) -> Node | None:
    """The nodes of a YAML text, None if it is empty or no YAML. `name` is its file, or COMMAND_LINE, without lines."""
    from vqscale.config import syntax

    return syntax.read(text, name, problems)


def data_of(path: Path) -> Any:
    """What a YAML file says, as plain data, by the rules of configs. ValueError for what is none; OSError."""
    problems: list[str] = []
    try:
        node = read(path.read_text(encoding="utf-8"), str(path), problems)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: this is no text in UTF-8 ({error})") from None
    if problems:
        raise ValueError("; ".join(problems))
    return None if node is None else _plain(node)


def _plain(node: Node) -> Any:
    if isinstance(node.value, dict):
        return {key: _plain(child) for key, child in node.value.items()}
    return [_plain(item) for item in node.value] if isinstance(node.value, list) else node.value


def scalar(text: str) -> Any:
    """What text without quotes means. 007, 1_000, 0x10, 1:30, on and yes are text: no other meaning of them is sure."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) <= _MOST_DIGITS and _INT.fullmatch(text):
        return int(text)
    if not FLOAT.fullmatch(text):
        return text
    number = float(text.replace(".inf", "inf"))
    return text if math.isinf(number) and ".inf" not in text else number  # 1e999 means no number that there is


def nodes_of(data: Any, source: str) -> Node:
    """The nodes of plain data: mappings, lists, scalars."""
    if isinstance(data, Mapping):
        return Node({str(key): nodes_of(value, source) for key, value in data.items()}, source)
    return Node([nodes_of(item, source) for item in data] if isinstance(data, list) else data, source)


def inline(value: Any) -> str:
    """A value as YAML on one line, as 1.0e-05, null, [1, 2] or {a: 1}; reading it gives the value back."""
    from vqscale.config import syntax

    return syntax.inline(value)


def write(data: Mapping[str, Any], notes: Mapping[str, str], key: str = "") -> Iterator[str]:
    """The lines of a mapping: mappings and lists of them as blocks, the rest inline; `notes` are comments by key."""
    for name, value in data.items():
        dotted = f"{key}{name}"
        note = f"  # {notes[dotted]}" if dotted in notes else ""
        if isinstance(value, dict) and value:
            yield f"{name}:{note}"
            yield from (f"  {line}" for line in write(value, notes, f"{dotted}."))
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield f"{name}:{note}"
            for i, item in enumerate(value):
                lines = list(write(item, notes, f"{dotted}.{i}.")) if isinstance(item, dict) else []
                first, *rest = lines or [inline(item)]
                yield f"  - {first}"
                yield from (f"    {line}" for line in rest)
        else:
            yield f"{name}: {inline(value)}{note}"


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all in plain data; a list counts as one value unless it holds mappings."""
    holds = isinstance(value, list) and any(isinstance(item, Mapping) for item in value)
    below = enumerate(value) if holds else value.items() if isinstance(value, Mapping) and value else None
    if below is None:
        yield key, value
    for name, item in below or ():
        yield from leaves(item, f"{key}.{name}" if key else str(name))


def words(value: Any) -> str:
    """A value of a node, or of plain data, as an error names it."""
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 200 else f"a text of {len(value)} signs, {value[:40]!r} first"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    return inline(value) if value is None or isinstance(value, bool | int | float) else f"a {type(value).__name__}"


def as_text(value: Any) -> str:
    """What to change where text is wanted and a value was found."""
    return "write one text" if isinstance(value, list | dict) else f"put it in quotes: '{inline(value)}'"


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that fits into a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 10**_MOST_DIGITS
