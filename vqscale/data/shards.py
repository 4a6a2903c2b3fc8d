"""From patterns to shards, and from a shard to a local file: what the names in a config stand for.

Local shards are read where they lie. What comes from a command or a URL (`pipe:` and the other schemes of webdataset.gopen), or is compressed, has no
random access: it is streamed whole into a bounded cache folder that the processes of a machine share.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from urllib.parse import urlparse
from urllib.request import url2pathname

from webdataset.gopen import rewrite_url
from webdataset.shardlists import expand_urls


def expand(patterns: Sequence[str]) -> list[str]:
    """The shards that the patterns name, in their order: local paths and URLs. Raises ValueError if there is none, or a local one is missing."""
    shards: list[str] = []
    for pattern in patterns:
        found = [shard for url in expand_urls(pattern) for shard in _expand_local(url)]
        if not found:
            raise ValueError(
                f"no shard: {pattern!r} in `shards` matches no file: change the pattern, or put the shards there"
            )
        shards.extend(found)
    doubled = sorted({shard for shard in shards if shards.count(shard) > 1}) if len(set(shards)) < len(shards) else []
    if doubled:
        raise ValueError(
            f"{_few(doubled)} named twice by `shards` = {_few(list(patterns))}: an epoch would repeat samples; name each once"
        )
    missing = [shard for shard in shards if is_local(shard) and not os.path.isfile(shard)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(shards)} shards do not exist: {_few(missing)}; named by `shards` = {_few(list(patterns))}, "
            f"looked up from {os.getcwd()}: change the pattern, or put the shards there"
        )
    return shards


def _expand_local(url: str) -> list[str]:
    """One name without braces: a URL or a command as it is, a local path with * patterns matched and file: taken off."""
    url = rewrite_url(url)
    if not is_local(url):
        return [url]
    path = url2pathname(urlparse(url).path) if url.startswith("file:") else os.path.expanduser(url)
    if glob.has_magic(path) and not os.path.exists(path):
        return sorted(glob.glob(path, recursive=True))
    return [path]


def is_local(url: str) -> bool:
    """Whether this is a path, and not a URL or a command."""
    return url.startswith("file:") or re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", url) is None


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
