"""What a config schema says of itself: keys, types, defaults, doc lines, what tells a union's members apart.

A schema is a frozen dataclass, or a union of dataclasses, closed (X | Y) or open (OneOf). Nothing here reads a config:
that is load.py.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import keyword
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, is_dataclass
from importlib import import_module
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vqscale.config.marks import Before, FreeToChange
from vqscale.config.text import inline


@dataclass(frozen=True)
class Field:
    """One key of a dataclass: its type with all names resolved, and its default (MISSING: the key must be given).

    `free` are the keys that may change on resume, relative to this one: "" is the key itself. `before` is the default
    that files have which are older than it: the default, unless a mark says another.
    """

    kind: Any
    default: Any
    before: Any
    free: tuple[str, ...] = ()
    attribute: str = ""
    """its name in Python: the key, and an underscore behind one that Python has a use for (from)"""


@functools.cache
def fields_of(cls: type) -> dict[str, Field]:
    """The keys of a dataclass in the order of declaration, its name (a one-value Literal) before what it inherits.

    A field that is derived (init=False) is no key.
    """
    kinds, marked = get_type_hints(cls), get_type_hints(cls, include_extras=True)
    found = {}
    for field in sorted(dataclasses.fields(cls), key=lambda field: not _is_name(kinds[field.name])):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.init:
            marks = getattr(marked[field.name], "__metadata__", ())
            free = [key for mark in marks if isinstance(mark, FreeToChange) for key in mark.keys]
            earlier = [mark.value for mark in marks if isinstance(mark, Before)]
            before = earlier[0] if earlier else as_before(default)
            found[key_of(field.name)] = Field(kinds[field.name], default, before, tuple(free), field.name)
    return found


def key_of(attribute: str) -> str:
    """The key of an attribute: itself, but for the underscore of one that would be a word of Python."""
    key = attribute.removesuffix("_")
    return key if keyword.iskeyword(key) else attribute


def as_before(value: Any) -> Any:
    """A default as it was: every marked key of its dataclasses at what it was before."""
    if not is_config(value):
        return value
    fields = {field.attribute: field for field in fields_of(value.__class__).values()}
    changed = {name: field.before for name, field in fields.items() if field.before != field.default}
    kept = {name: as_before(getattr(value, name)) for name in fields if name not in changed}
    return dataclasses.replace(value, **kept, **changed)


def _is_name(kind: Any) -> bool:
    return get_origin(kind) is Literal and len(get_args(kind)) == 1


@functools.cache
def doc_lines(cls: type) -> dict[str, str]:
    """Key -> the string literal under the field in the source, on one line; empty where there is no source to read."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        except (OSError, TypeError, SyntaxError):
            continue
        assert isinstance(tree.body[0], ast.ClassDef)
        for field, below in itertools.pairwise(tree.body[0].body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[key_of(key)] = " ".join(text.split())
    return docs


class OneOf:
    """A union of dataclasses that stays open: those that a dictionary names, `module:Class` each, looked up on use.

    A member may say `without_name = True`: it is meant where a config gives no name, as those from before there were
    others. A new line of the dictionary makes a new member; with `fits`, if that says so. Keys of a config have such a
    union as their type.
    """

    def __init__(self, paths: Mapping[str, str], fits: Callable[[Any], bool] = bool) -> None:
        self._paths, self._fits = paths, fits

    def __getitem__(self, name: str) -> type:
        """The dataclass of this name."""
        return load_class(self._paths[name])

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007  (an object is no type that | knows)

    def classes(self) -> Iterable[type]:
        return filter(self._fits, map(load_class, self._paths.values()))


def load_class(path: str) -> Any:
    """What `module:Class` names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def members(kind: Any) -> tuple[Any, ...]:
    """The types of a union without null; a type that is no union is its own only member."""
    if isinstance(kind, OneOf):
        return tuple(kind.classes())
    choices = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    found = [members(choice) if isinstance(choice, OneOf) else (choice,) for choice in choices]
    return tuple(choice for choice in itertools.chain(*found) if choice is not NoneType)


def allows_none(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType) and NoneType in get_args(kind)


def classes_of(kind: Any) -> tuple[type, ...]:
    """The dataclasses among the members of a type."""
    return tuple(choice for choice in members(kind) if isinstance(choice, type) and is_dataclass(choice))


@functools.cache
def named(classes: tuple[type, ...]) -> tuple[str, dict[Any, type]]:
    """The key that tells these dataclasses apart, and its value -> dataclass; ("", {}) for less than two."""
    if len(classes) < 2:
        return "", {}
    for key in fields_of(classes[0]):
        kinds = [fields_of(cls)[key].kind for cls in classes if key in fields_of(cls)]
        values = [get_args(kind)[0] for kind in kinds if _is_name(kind)]
        if len(set(values)) == len(classes):
            return key, dict(zip(values, classes, strict=True))
    names = ", ".join(cls.__name__ for cls in classes)
    raise TypeError(f"nothing tells {names} apart: give each a key whose type is a one-value Literal of its own")


def join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix and key else prefix or key


def dotted_keys(kind: Any, prefix: str = "", above: tuple[type, ...] = ()) -> Iterator[str]:
    """All keys under a type, those of all members of a union; a dataclass that holds itself is not entered again."""
    for cls in classes_of(kind):
        if cls not in above:
            for key, field in fields_of(cls).items():
                yield join(prefix, key)
                yield from dotted_keys(field.kind, join(prefix, key), (*above, cls))


def free_keys(kind: Any, prefix: str = "", above: tuple[type, ...] = ()) -> Iterator[str]:
    """The dotted keys under a type that are marked as free to change on resume; all below them is free too."""
    for cls in classes_of(kind):
        if cls not in above:
            for key, field in fields_of(cls).items():
                here = join(prefix, key)
                yield from (join(here, below) for below in field.free)
                yield from free_keys(field.kind, here, (*above, cls))


def is_config(value: Any) -> bool:
    """Whether this is an object of a dataclass, not a dataclass itself."""
    return is_dataclass(value) and not isinstance(value, type)


def plain(value: Any) -> Any:
    """A value with dataclasses as dicts in the order of declaration, and tuples as lists."""
    if is_config(value):
        return {key: plain(getattr(value, field.attribute)) for key, field in fields_of(value.__class__).items()}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def notes(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, doc line) of all keys of a config; items of lists go by their number."""
    if is_config(value):
        docs = doc_lines(value.__class__)
        for name, field in fields_of(value.__class__).items():
            if name in docs:
                yield join(key, name), docs[name]
            yield from notes(getattr(value, field.attribute), join(key, name))
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from notes(item, join(key, str(i)))


def type_name(kind: Any) -> str:
    """A type as it looks in YAML: `int or null`, `adam | sgd`, `[int, ...]`, `{name: vq | ibq, ...}`."""
    if get_origin(kind) is Literal:
        return " | ".join(inline(value) for value in get_args(kind))
    if get_origin(kind) is tuple:
        return f"[{', '.join('...' if item is ... else type_name(item) for item in get_args(kind))}]"
    classes = classes_of(kind)
    if not classes and members(kind) == (kind,):
        return getattr(kind, "__name__", str(kind))
    texts = [type_name(choice) for choice in members(kind) if choice not in classes]
    if classes:
        key, by_name = named(classes)
        texts.append(f"{{{key}: {' | '.join(inline(name) for name in by_name)}, ...}}" if key else "{...}")
    return " or ".join([*texts, "null"] if allows_none(kind) else texts)
