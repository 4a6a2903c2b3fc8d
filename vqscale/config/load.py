"""YAML files to frozen dataclasses and back: strict keys, dotted overrides, all problems of a config in one error.

A schema is a frozen dataclass, or a union of dataclasses told apart by a key whose type is a one-value Literal
(`name: Literal["ibq"] = "ibq"`). Types are int, float, bool, str, Literal, tuple, `X | None`, dataclasses and such
unions. A file becomes nodes that know their place (text.py), overrides are put into the nodes, the nodes are
built into objects. A key that is not given has the value that `describe` prints: if the field that holds its dataclass
has a default, the value in that default (unless a union is given another name), else the dataclass's own.

What types cannot say, a dataclass says in `problems(self)`, which yields (key relative to itself, message). There is no
interpolation and no inheritance between files, so that a run can be read in one file; and no import of torch, so that
errors come at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, overload

from vqscale.config.schema import (
    allows_none,
    classes_of,
    dotted_keys,
    fields_of,
    join,
    members,
    named,
    notes,
    plain,
    type_name,
)
from vqscale.config.text import COMMAND_LINE, Node, as_text, inline, is_number, leaves, nodes_of, read, words, write

T = TypeVar("T")
_FAILED = object()
_REWRITE = {bool: "write true or false", int: "write plain digits, like 1000", float: "write it like 1000, 0.5 or 1e-3"}


class ConfigError(ValueError):
    """All problems of a config in one message; `problems` has them one by one."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        head = f"the config has {len(problems)} problems:\n  " if len(problems) > 1 else ""
        super().__init__(head + "\n  ".join(problems))


@overload
def load(schema: type[T], path: str | Path, overrides: Iterable[str] = (), *, written: bool = ...) -> T: ...
@overload
def load(schema: object, path: str | Path, overrides: Iterable[str] = (), *, written: bool = ...) -> Any: ...
def load(schema: Any, path: str | Path, overrides: Iterable[str] = (), *, written: bool = False) -> Any:
    """The config in a YAML file; overrides `dotted.key=value`, the value in YAML, are put in before all is checked.
    `written` as for `parse`."""
    problems: list[str] = []
    root = read(_text(Path(path)), str(path), problems)
    if root is None or not isinstance(root.value, dict):
        keys = ", ".join(dict.fromkeys(key for cls in classes_of(schema) for key in fields_of(cls)))
        found = "the file is empty" if root is None else f"found {words(root.value)}"
        said = f"{path}: a config is a mapping of keys to values, {found}; its keys are {keys}"
        raise ConfigError(problems or [said])
    _override(root, overrides, schema, problems)
    return _build(schema, root, problems, written)


@overload
def parse(schema: type[T], data: Mapping[str, Any], source: str = ..., *, written: bool = ...) -> T: ...
@overload
def parse(schema: object, data: Mapping[str, Any], source: str = ..., *, written: bool = ...) -> Any: ...
def parse(schema: Any, data: Mapping[str, Any], source: str = "the given mapping", *, written: bool = False) -> Any:
    """The config in plain data, in which config dataclasses may stand as values; errors name `source` as its place.
    `written`: they are older than some keys, perhaps; one that is missing is what it was before (marks.Before)."""
    return _build(schema, nodes_of(plain(data), source), [], written)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain data: dicts in the order of declaration, lists, scalars; `parse` gives an equal config back."""
    return plain(config)


def dump(config: Any, comments: bool = False) -> str:
    """A config as YAML that loads to an equal one: all keys, in order of declaration; `comments` adds the doc lines."""
    return "".join(f"{line}\n" for line in write(plain(config), dict(notes(config)) if comments else {}))


def text_of(config: Any, key: str) -> str:
    """What a config says of a dotted key, as it stands on a command line; "" for null, and below null. ValueError for
    what is no key of it."""
    known = list(dotted_keys(type(config)))
    if key not in known:
        near = _nearest(key, known)
        raise ValueError(f"there is no key {key} here; " + (f"did you mean {near}?" if near else "see --help"))
    found = plain(config)
    for part in key.split("."):
        found = (found or {}).get(part)
    return found if isinstance(found, str) else "" if found is None else inline(found)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """`optim.lr: 0.1 -> 0.2` for each dotted key whose value is not the same in two configs given as dicts; not for
    keys of `free`, and what is below them."""
    before, after = dict(leaves(plain(old))), dict(leaves(plain(new)))
    found = []
    for key in dict.fromkeys([*before, *after]):
        if any(key == name or key.startswith(f"{name}.") for name in free):
            continue
        if key not in before or key not in after or before[key] != after[key]:
            values = [inline(side[key]) if key in side else "(absent)" for side in (before, after)]
            found.append(f"{key}: {' -> '.join(values)}")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = _nearest(path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else [])
        hint = f"did you mean {path.parent / near}?" if near else "give the path of a YAML file"
        raise ConfigError([f"{path}: there is no such file (looked from {Path.cwd()}); {hint}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: this cannot be read: {error}; give the path of a YAML file in UTF-8"]) from None


def _override(root: Node, overrides: Iterable[str], schema: Any, problems: list[str]) -> None:
    """Put `dotted.key=value` into the nodes, the later over the earlier; their keys are checked with all others."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            near = _nearest(text, list(dotted_keys(schema))) or "key"
            problems.append(f"{COMMAND_LINE}: {text}: an override is key=value; did you mean {near}=...?")
            continue
        before = len(problems)
        new = read(value, COMMAND_LINE, problems)
        if len(problems) == before:
            root.put(key.strip().split("."), new or Node(None, COMMAND_LINE))


def _build(schema: Any, root: Node, problems: list[str], written: bool = False) -> Any:
    config = _Builder(schema, problems, written).value(schema, root, "", None)
    if problems:
        raise ConfigError(problems)
    return config


class _Builder:
    """Nodes to objects. What cannot be built is reported and is _FAILED, and so is what holds it; all else is still
    built and checked. `key` is the dotted name of a node, `default` the node of what stands there if nothing is given.
    """

    def __init__(self, schema: Any, problems: list[str], written: bool = False) -> None:
        self.schema, self.problems, self.written = schema, problems, written

    def report(self, source: str, key: str, text: str) -> Any:
        self.problems.append(": ".join(filter(None, [source, key, text])))
        return _FAILED

    def value(self, kind: Any, node: Node, key: str, default: Node | None) -> Any:
        if node.value is None and allows_none(kind):
            return None
        choices, classes = members(kind), classes_of(kind)
        if classes and (isinstance(node.value, dict) or len(classes) == len(choices)):
            return self.member(kind, node, key, default)
        if len(choices) == 1:
            return self.single(choices[0], node, key)
        others = [choice for choice in choices if choice not in classes]
        lists = [choice for choice in others if get_origin(choice) is tuple]
        if isinstance(node.value, list) and len(lists) == 1:
            return self.single(lists[0], node, key)
        for choice in others:
            if (built := _Builder(self.schema, [], self.written).single(choice, node, key)) is not _FAILED:
                return built
        text = f"expected {type_name(kind)}, found {words(node.value)}; write one of these"
        return self.report(node.source, key, text)

    def single(self, kind: Any, node: Node, key: str) -> Any:
        """A type that is neither a union nor a dataclass."""
        if get_origin(kind) is tuple:
            return self.items(kind, node, key)
        if get_origin(kind) is Literal:
            return self.literal(get_args(kind), node, key)
        if kind in (bool, int, float, str):
            return self.scalar(kind, node, key)
        raise TypeError(
            f"{key}: a config has no fields of type {kind}; the head of vqscale/config/load.py lists those it has"
        )

    def scalar(self, kind: type, node: Node, key: str) -> Any:
        value = node.value
        number = is_number(value)
        if (isinstance(value, kind) and (number or kind in (bool, str))) or (kind is float and number):
            return kind(value)
        change = _REWRITE.get(kind) or as_text(value)
        if kind is int and number and value == value // 1:
            change = f"write {int(value)}"
        return self.report(node.source, key, f"expected {type_name(kind)}, found {words(value)}; {change}")

    def literal(self, choices: tuple[Any, ...], node: Node, key: str) -> Any:
        for choice in choices:
            if type(choice) is type(node.value) and choice == node.value:
                return choice
        near = _nearest(str(node.value), [str(choice) for choice in choices])
        change = f"did you mean {near}?" if near else "choose one of them"
        names = " | ".join(inline(choice) for choice in choices)
        return self.report(node.source, key, f"expected {names}, found {words(node.value)}; {change}")

    def items(self, kind: Any, node: Node, key: str) -> Any:
        kinds, items = get_args(kind), node.value
        if not isinstance(items, list):
            text = f"expected a list {type_name(kind)}, found {words(items)}; write it in [ ]"
            return self.report(node.source, key, text)
        if kinds[-1] is ...:
            kinds = kinds[:1] * len(items)
        if len(kinds) != len(items):
            text = f"expected a list of {len(kinds)}, {type_name(kind)}, found one of {len(items)}; give {len(kinds)}"
            return self.report(node.source, key, text)
        built = [self.value(kinds[i], item, join(key, str(i)), None) for i, item in enumerate(items)]
        return _FAILED if any(item is _FAILED for item in built) else tuple(built)

    def member(self, kind: Any, node: Node, key: str, default: Node | None) -> Any:
        """The dataclass of a type that the node names, or its only one."""
        if not isinstance(node.value, dict):
            text = f"expected {type_name(kind)}, found {words(node.value)}; write its keys indented below it"
            return self.report(node.source, key, text)
        classes = classes_of(kind)
        tag, by_name = named(classes)
        inherited = default.value if default is not None and isinstance(default.value, dict) else {}
        if not tag:
            return self.mapping(classes[0], classes, node, key, inherited)
        name = node.value.get(tag) or inherited.get(tag)
        if name is None:
            name = next((Node(at, "default") for at, cls in by_name.items() if getattr(cls, "without_name", 0)), None)
        if name is None:
            names = " | ".join(inline(choice) for choice in by_name)
            text = f"this key is required, as it decides which others there are; choose {names}"
            return self.report(node.source, join(key, tag), text)
        chosen = self.literal(tuple(by_name), name, join(key, tag))
        if chosen is _FAILED:
            return _FAILED
        if tag in inherited and inherited[tag].value != chosen:
            inherited = {}
        return self.mapping(by_name[chosen], classes, node, key, inherited)

    def mapping(self, cls: type, classes: tuple[type, ...], node: Node, key: str, inherited: dict[str, Node]) -> Any:
        """An object of a dataclass, checked; `classes` are those that the node could have named."""
        for name in node.value:
            if name not in fields_of(cls):
                self.unknown(name, cls, classes, node, key)
        values = {}
        for name, field in fields_of(cls).items():
            usual = field.before if self.written else field.default
            own = None if usual is MISSING else nodes_of(plain(usual), "default")
            default = inherited.get(name, own)
            given = node.value.get(name, default)
            if given is None:
                text = f"this key is required; add it: {type_name(field.kind)}"
                values[name] = self.report(node.source, join(key, name), text)
            else:
                values[name] = self.value(field.kind, given, join(key, name), default)
        if any(value is _FAILED for value in values.values()):
            return _FAILED
        try:
            built = cls(**{field.attribute: values[name] for name, field in fields_of(cls).items()})
        except (ValueError, ArithmeticError) as error:
            return self.report(node.source, key, str(error))
        self.check(built, node, key)
        return built

    def check(self, built: Any, node: Node, key: str) -> None:
        try:
            for relative, text in built.problems() if hasattr(built, "problems") else ():
                self.report(node.source_of(relative), join(key, relative), text)
        except Exception:
            # it may have stumbled over what is already reported, as a size of zero by which it divides
            if not self.problems:
                raise

    def unknown(self, name: str, cls: type, classes: tuple[type, ...], node: Node, key: str) -> None:
        tag, by_name = named(classes)
        owners = [inline(choice) for choice, other in by_name.items() if name in fields_of(other)]
        near = _nearest(name, list(fields_of(cls)))
        elsewhere = [known for known in dotted_keys(self.schema) if known.endswith(f".{name}")]
        if owners:
            chosen = inline(next(choice for choice, other in by_name.items() if other is cls))
            before = tag in node.value and node.value[tag].replaced
            text = f"unknown key for {tag} {chosen}; it belongs to {' | '.join(owners)}; remove it"
            if before and before.value is not None:
                had = f"{tag} {inline(before.value)} ({before.source})"
                text += f", or replace all that {had} had by {key}='{{{tag}: {chosen}}}'"
        elif near or elsewhere:
            text = f"unknown key; did you mean {join(key, near) if near else elsewhere[0]}?"
        else:
            text = f"unknown key; the keys here are {', '.join(fields_of(cls)) or 'none'}"
        self.report(node.value[name].source, join(key, name), text)


def _nearest(key: str, known: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(key, known, n=1)), None)
