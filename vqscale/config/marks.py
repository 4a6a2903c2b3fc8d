"""Marks on the fields of a config: what a key means beyond its type, said where the key is declared.

    folder: Free[str]                                     may have another value when a run goes on
    val: Free[ImagesConfig | None] = None                 and so may all that is below it
    engine: Annotated[EngineConfig, FreeToChange("accumulation",)]    of what is below, this key too, in this schema
    fit: Annotated[str, Before("none")] = "whiten"        what files without the key mean, which are older than it

Free is what changes where a run computes, how fast, or how often it speaks, and never what it computes. `free_keys` of
schema.py collects them.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

T = TypeVar("T")


class FreeToChange:
    """The field may change on resume; with keys, the keys below the field that have these names."""

    def __init__(self, *keys: str) -> None:
        self.keys = keys or ("",)


Free = Annotated[T, FreeToChange()]


class Before:
    """What the key was before it was a key, or before its default changed: what older files of ours mean that lack it,
    and what a fingerprint leaves out, so that neither changes what was made before."""

    def __init__(self, value: Any) -> None:
        self.value = value
