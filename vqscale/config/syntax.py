"""YAML by PyYAML: text to nodes, a value to a line. The only import of it.

PyYAML takes `1e-3` for text, `on` for true, `1:30` for 90, and the last of two equal keys without a word; so it only
scans and parses here, and text.py says what a scalar means. Aliases and tags are refused.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import yaml

from vqscale.config.text import COMMAND_LINE, FLOAT, Node, scalar

_TAGS = [f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")]


class _Loader(yaml.SafeLoader):
    """Leaves scalars as text, and refuses aliases."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read", mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {}


def read(text: str, name: str, problems: list[str]) -> Node | None:
    """The nodes of a YAML text, None if it is empty or no YAML. `name` is its file, or COMMAND_LINE, without lines."""
    try:
        root = yaml.compose(text, Loader=_Loader)
        return None if root is None else _node(root, _place(name, root.start_mark), name, "", problems)
    except RecursionError:
        problems.append(f"{name}: this is nested too deep to be read; no config is")
        return None
    except yaml.MarkedYAMLError as error:
        place = _place(name, error.problem_mark or error.context_mark)
        reason = " ".join(filter(None, [error.context, error.problem]))
        given = repr(text) if name == COMMAND_LINE else "this"
        problems.append(f"{place}: {given} is not YAML: {reason}; correct it, or put the text in quotes")
        return None
    except yaml.YAMLError as error:
        problems.append(f"{name}: this is not YAML: {' '.join(str(error).split())}; save it as plain text in UTF-8")
        return None


def _place(name: str, mark: yaml.Mark | None) -> str:
    return name if name == COMMAND_LINE or mark is None else f"{name}:{mark.line + 1}"


def _node(given: yaml.Node, source: str, name: str, key: str, problems: list[str]) -> Node:
    """A YAML node as ours; `source` is the place of the key that holds it, `key` its dotted name."""
    if given.tag not in _TAGS:
        problems.append(f"{source}: {key}: the tag {given.tag!r} is not read; write the value without it")
    if isinstance(given, yaml.ScalarNode):
        return Node(scalar(given.value) if given.style is None else given.value, source)
    prefix = f"{key}." if key else ""
    if isinstance(given, yaml.SequenceNode):
        places = [_place(name, item.start_mark) for item in given.value]
        items = enumerate(zip(given.value, places, strict=True))
        return Node([_node(item, place, name, f"{prefix}{i}", problems) for i, (item, place) in items], source)
    children: dict[str, Node] = {}
    for key_node, value_node in given.value:
        place = _place(name, key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(
                f"{place}: {key or 'top level'}: a key is one word, found a list or a mapping; put it in quotes"
            )
            continue
        child = _node(value_node, place, name, prefix + key_node.value, problems)
        first = children.setdefault(key_node.value, child)
        if first is not child:
            problems.append(
                f"{place}: {prefix}{key_node.value}: this key was already given, at {first.source}; keep one"
            )
    return Node(children, source)


class _Dumper(yaml.SafeDumper):
    """Quotes text that PyYAML, or this file, would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    breaks = any(sign in text for sign in "\n\x85\u2028\u2029")
    return dumper.represent_scalar(_TAGS[0], text, style='"' if breaks else None)


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{FLOAT.pattern})$"), list("-+.0123456789"))
_Dumper.add_representer(str, _represent_text)


def inline(value: Any) -> str:
    """A value as YAML on one line, as 1.0e-05, null, [1, 2] or {a: 1}; reading it gives the value back."""
    style: dict[str, Any] = {
        "default_flow_style": True,
        "width": sys.maxsize,
        "allow_unicode": True,
        "sort_keys": False,
    }
    return yaml.dump([value], Dumper=_Dumper, **style).strip()[1:-1]
