"""From the patterns of a config to the names of shards: local paths, and URLs or commands that webdataset.gopen can
open.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from urllib.parse import urlparse
from urllib.request import url2pathname

from webdataset.gopen import gopen_schemes, rewrite_url
from webdataset.shardlists import expand_urls

MOST_SHARDS = 1_000_000
_GROUP = re.compile(r"\{([^{}]*)\}")
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*):")


def expand(patterns: Sequence[str], must_exist: bool = True) -> list[str]:
    """The shards in the order of the patterns. ValueError if a pattern gives none, one comes twice, or a local one is
    missing.
    """
    shards: list[str] = []
    for pattern in patterns:
        found = [shard for name in _expand_braces(pattern) for shard in _expand_name(name)]
        if not found:
            raise ValueError(
                f"no shard: the pattern {pattern!r} of `shards` matches no file, looked up from {os.getcwd()}: "
                "change the pattern, or put the shards there"
            )
        shards.extend(found)
    source = f"named by `shards` = {_few(patterns)}, looked up from {os.getcwd()}"
    twice = [shard for shard, count in Counter(shards).items() if count > 1]
    if twice:
        raise ValueError(
            f"{_few(twice)} comes more than once, and so would its samples; {source}: name each shard once"
        )
    missing = [shard for shard in shards if must_exist and is_local(shard) and not os.path.isfile(shard)]
    if missing:
        folders = [shard for shard in missing if os.path.isdir(shard)]
        hint = f"for a folder write {folders[0]}/*.tar" if folders else "change the pattern, or put the shards there"
        raise ValueError(f"{len(missing)} of {len(shards)} shards do not exist: {_few(missing)}; {source}: {hint}")
    return shards


def _expand_braces(pattern: str) -> list[str]:
    """The names of a pattern. ValueError where they are too many, or where one of the environment is missing."""
    count = math.prod(_choices(group) for group in _GROUP.findall(pattern))
    if count > MOST_SHARDS:
        raise ValueError(
            f"the pattern {pattern[:200]!r} of `shards` names {count} shards, and at most {MOST_SHARDS} are read: "
            "change the numbers in its braces"
        )
    try:
        return list(expand_urls(pattern))
    except AssertionError as error:  # of webdataset: ${NAME} is taken from the environment
        raise ValueError(f"the pattern {pattern!r} of `shards` needs {error} in the environment: set it") from None


def _choices(group: str) -> int:
    """How many names a pair of braces gives."""
    ends = re.fullmatch(r"(-?\d{1,30})\.\.(-?\d{1,30})(\.\.-?\d+)?", group)
    return abs(int(ends[2]) - int(ends[1])) + 1 if ends else group.count(",") + 1


def is_local(shard: str) -> bool:
    """Whether this is a path, and not a URL or a command."""
    return _SCHEME.match(shard) is None


def _expand_name(name: str) -> list[str]:
    """A name without braces: a URL or a command as it is; a path with ~ and * patterns resolved and file: taken off."""
    name = rewrite_url(name)
    scheme = _SCHEME.match(name)
    if scheme and scheme[1] == "file":
        path = url2pathname(urlparse(name).path)
    elif scheme:
        if scheme[1] not in gopen_schemes:
            known = ", ".join(sorted(set(gopen_schemes) - {"__default__"}))
            raise ValueError(
                f"nothing opens {scheme[1]}: in `shards` ({name}); the schemes are {known}: copy the shards to a disk, "
                "or name a command that writes one to its output, as in pipe:aws s3 cp s3://bucket/0.tar -"
            )
        return [name]
    else:
        path = os.path.expanduser(name)
    if glob.has_magic(path) and not os.path.exists(path):
        return sorted(glob.glob(path, recursive=True))
    return [path]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
