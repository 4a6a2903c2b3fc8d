"""The help of a schema: each key with its type, default and doc line, of the whole tree or of one part of it.

A part that is the same under two keys (data.train, data.val) is told once, at the key that is nearest to the top.
"""

from __future__ import annotations

import difflib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING
from typing import Any, NamedTuple, get_args, get_origin

from vqscale.config.schema import (
    classes_of,
    doc_lines,
    dotted_keys,
    fields_of,
    is_config,
    join,
    members,
    named,
    plain,
    type_name,
)
from vqscale.config.text import inline

WIDTH = 120
DOC = 50  # the column in which doc lines begin
STAR = "*"  # of a key that may change when a run goes on


class Entry(NamedTuple):
    """A key and what is below it; names are relative, so that equal parts of the tree are equal.

    A member of a union has no name: what is below it has the key of the union.
    """

    name: str
    text: str  # what follows the key; "" where the entry has no line of its own
    doc: str
    below: tuple[Entry, ...] = ()


def describe(schema: Any, part: str = "") -> str:
    """The help of all keys, or of the key `part` and what is below it; ValueError where there is no such key.

    Lines are at most 120 wide. Of a union every member is told, under its name.
    """
    tree = tuple(_entries(schema, MISSING, (), ()))
    if not part:
        return "\n".join(_Printer(tree, "").lines(tree, "", 0))
    by_place: dict[str, tuple[Entry, ...]] = {}
    for place, entry in _find(tree, "", part, ""):
        by_place[place] = (*by_place.get(place, ()), entry)
    if not by_place:
        near = difflib.get_close_matches(part, list(dotted_keys(schema)), n=1)
        change = f"did you mean {near[0]}?" if near else "--help alone shows all keys"
        raise ValueError(f"there is no key {part}; {change}")
    return "\n".join(_by_place(by_place, part.rpartition(".")[0]))


def _by_place(by_place: dict[str, tuple[Entry, ...]], prefix: str) -> Iterator[str]:
    """Lines of the entries of one key, below the members of unions that have them where others have it otherwise."""
    for entries in dict.fromkeys(by_place.values()):
        places = [place for place in by_place if by_place[place] == entries]
        several = len(places) < len(by_place)
        if several:
            yield from textwrap.wrap(f"{', '.join(places)}:", WIDTH)
        yield from _Printer(entries, prefix).lines(entries, prefix, int(several))


def _entries(kind: Any, default: Any, above: tuple[type, ...], free: tuple[str, ...]) -> Iterator[Entry]:
    """What is below a key of this type. `default` is what stands there if nothing is given, `free` the names of keys
    that may change because of a mark further up."""
    for items in (choice for choice in members(kind) if get_origin(choice) is tuple):
        for item in dict.fromkeys(get_args(items)):
            if below := tuple(_entries(item, MISSING, above, ())):
                yield Entry("N", "", "", below)
    classes = classes_of(kind)
    if any(cls in above for cls in classes):
        yield Entry("*", " ", "the same keys as above")
        return
    key, by_name = named(classes)
    names = {cls: name for name, cls in by_name.items()}
    for cls in classes:
        fields = tuple(_fields(cls, default, (*above, cls), free, key))
        if key:
            yield Entry("", f"{key}={inline(names[cls])}", _first_line(cls) or doc_lines(cls).get(key, ""), fields)
        else:
            yield from fields


def _fields(cls: type, default: Any, above: tuple[type, ...], free: tuple[str, ...], key: str) -> Iterator[Entry]:
    """The keys of a dataclass but `key`, which tells it from the others of its union."""
    docs = doc_lines(cls)
    for name, field in fields_of(cls).items():
        if name == key:
            continue
        value = getattr(default, field.attribute) if isinstance(default, cls) else field.default
        star = f" {STAR}" if "" in field.free or name in free else ""
        below = tuple(_entries(field.kind, value, above, field.free))
        yield Entry(name, f": {_type_and_default(field.kind, value)}{star}", docs.get(name, ""), below)


def _type_and_default(kind: Any, default: Any) -> str:
    if default is MISSING:
        return f"{type_name(kind)} (required)"
    if not is_config(default):
        return f"{type_name(kind)} = {inline(plain(default))}"
    tag, _ = named(classes_of(kind))
    return type_name(kind) + (f" = {{{tag}: {inline(getattr(default, tag))}, ...}}" if tag else "")


def _first_line(cls: type) -> str:
    """The first line of a docstring that a person wrote: without one, dataclass makes one of the signature."""
    doc = inspect.cleandoc(cls.__doc__ or "")
    return "" if doc.startswith(f"{cls.__name__}(") else doc.split("\n")[0]


def _label(entry: Entry, prefix: str) -> str:
    return join(prefix, entry.name or entry.text)


def _walk(entries: tuple[Entry, ...], prefix: str) -> Iterator[tuple[str, Entry]]:
    """(label, entry) of all."""
    for entry in entries:
        yield _label(entry, prefix), entry
        yield from _walk(entry.below, join(prefix, entry.name))


def _find(entries: tuple[Entry, ...], prefix: str, part: str, place: str) -> Iterator[tuple[str, Entry]]:
    """(the member of a union that it belongs to, entry) of each that has the dotted key `part`. For the key that tells
    members apart: the members, without what is below them."""
    for entry in entries:
        key = join(prefix, entry.name)
        if entry.name and key == part:
            yield place, entry
        elif not entry.name and join(prefix, entry.text.partition("=")[0]) == part:
            yield place, entry._replace(below=())
        else:
            yield from _find(entry.below, key, part, place if entry.name else join(prefix, entry.text))


class _Printer:
    """Lines of entries. What is below two keys alike is told at one of them; a key that is the same for two members of
    a union, at the first."""

    def __init__(self, entries: tuple[Entry, ...], prefix: str) -> None:
        self._home: dict[tuple[Entry, ...], str] = {}
        for label, entry in _walk(entries, prefix):
            home = self._home.setdefault(entry.below, label)
            if label.count(".") < home.count("."):
                self._home[entry.below] = label
        self._printed: set[tuple[Entry, ...]] = set()

    def lines(self, entries: tuple[Entry, ...], prefix: str, depth: int) -> Iterator[str]:
        told: dict[Entry, str] = {}  # keys of members -> the first member that has them
        for entry in entries:
            label = _label(entry, prefix)
            elsewhere = self._elsewhere(entry, label)
            if entry.text:
                left = label + entry.text if entry.name else label
                yield from _columns("  " * depth + left.rstrip(), f"{entry.doc} {elsewhere}".strip())
            if elsewhere:
                continue
            if entry.name:
                yield from self.lines(entry.below, label, depth)
                continue
            yield from _as_for(entry, told, "  " * (depth + 1))
            yield from self.lines(tuple(key for key in entry.below if key not in told), prefix, depth + 1)
            told = dict.fromkeys((key for key in entry.below if not key.below), entry.text) | told

    def _elsewhere(self, entry: Entry, label: str) -> str:
        """Where what is below an entry is told, if not here."""
        if len(entry.below) < 2:
            return ""
        if self._home[entry.below] != label:
            return f"(keys as in {self._home[entry.below]})"
        if entry.below in self._printed:
            return "(keys as above)"
        self._printed.add(entry.below)
        return ""


def _as_for(member: Entry, told: dict[Entry, str], indent: str) -> Iterator[str]:
    """The keys of a member that were told of members before it, by name."""
    shared: dict[str, list[str]] = {}
    for key in member.below:
        if key in told:
            shared.setdefault(told[key], []).append(key.name)
    for other, names in shared.items():
        text = f"as for {other}: {', '.join(names)}"
        yield from textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}    ")


def _columns(left: str, doc: str) -> list[str]:
    """A key on the left and its doc line on the right, each wrapped to its column."""
    indent = " " * (len(left) - len(left.lstrip()) + 4)
    keys = textwrap.wrap(left, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
    docs = textwrap.wrap(doc, WIDTH - DOC, break_on_hyphens=False)
    if docs and len(keys[-1]) <= DOC - 2:
        keys[-1] = f"{keys[-1]:<{DOC}}{docs.pop(0)}"
    return keys + [" " * DOC + line for line in docs]
