"""What is asked for when images are drawn, and all that can be said against it without a model. Imports no torch.

Not here: whether it suits a prior and its tokenizer (sample.py), and how the ids are drawn (each prior's SampleConfig).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqscale.config import ConfigError
from vqscale.priors.config import SampleConfig
from vqscale.programs.sampling.known import Known
from vqscale.run import processes


@dataclass(frozen=True)
class SampleRequest:
    """All that images follow from, beside the weights of the prior and the tokenizer."""

    num_images: int
    classes: tuple[int, ...]
    how: SampleConfig  # of the prior
    seed: int = 0
    batch: int = 64  # of a step and process
    resize: int | None = None  # pixels of the shorter side of what is written; None: as they are decoded
    known: Known | None = None  # ids that are given; without `classes` their images' classes are
    ids_only: bool = False  # a token cache is written, and nothing is decoded

    def facts(self) -> dict[str, Any]:
        """Everything by name, in one dict."""
        own = {key: getattr(self, key) for key in ("num_images", "seed", "batch", "resize")}
        given: dict[str, Any] = {} if self.known is None else {"known": self.known.facts()}
        given |= {"ids_only": True} if self.ids_only else {}
        return {**own, **given, "classes": list(self.classes), **asdict(self.how)}

    def as_begun(self, settings: Mapping[str, Any] | None) -> SampleRequest:
        """What goes on with samples that were begun with these settings (`facts`), perhaps older than some of today's;
        None: there are none."""
        return self if settings is None else replace(self, how=self.how.as_begun(settings))

    def problems(self) -> list[str]:
        """What cannot be drawn whatever the weights of the prior are."""
        found = []
        for name in ("num_images", "batch"):
            if getattr(self, name) < 1:
                found.append(f"{name} is {getattr(self, name)}: use at least 1")
        if self.resize is not None and self.resize < 1:
            found.append(
                f"resize is {self.resize}: use at least 1 pixel, or leave it out for images as they are decoded"
            )
        if self.ids_only and self.resize is not None:
            found.append("ids alone are asked for, and --resize is for what is decoded: leave out --ids or --resize")
        if not self.classes and self.known is None:
            found.append("the list of classes is empty, so there is nothing to draw: give at least one class")
        twice = sorted({c for c in self.classes if self.classes.count(c) > 1}) if len(self.classes) < 10_000 else []
        if twice:
            found.append(f"class {twice[0]} is in the list of classes twice: images take turns, give each once")
        return [*found, *(text for _, text in self.how.problems())]

    def labels(self, first: int, count: int) -> NDArray[np.int64]:
        """Classes of the images first, first + 1, ..."""
        if self.known is not None and not self.classes:
            return self.known.labels[self.known.turn(first, count)]
        return np.asarray(self.classes, dtype=np.int64)[np.arange(first, first + count) % len(self.classes)]


def combinations(base: SampleRequest, values: Mapping[str, Sequence[Any]]) -> list[SampleRequest]:
    """Every combination of the dials' values, the first dial varying fastest. ValueError for what cannot be drawn."""
    dials = [dial for dial in reversed(base.how.dials()) if dial in values]
    made = [
        replace(base, how=replace(base.how, **dict(zip(dials, chosen, strict=True))))
        for chosen in itertools.product(*(values[dial] for dial in dials))
    ]
    problems = dict.fromkeys(problem for one in made for problem in one.problems())
    if problems:
        raise ValueError("; ".join(problems))
    return list(dict.fromkeys(made))


def parse_classes(text: str) -> tuple[int, ...]:
    """The classes of --classes; ValueError where there are none."""
    found = parse_numbers(text, "--classes")
    if not found:
        raise ValueError("--classes names no class: give numbers and ranges such as 0,5,10-19, or leave it out for all")
    return found


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """`0,5,10-19` -> numbers in this order; ValueError for what is none, with the option that has it."""
    found: list[int] = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        low, dash, high = word.partition("-")
        if not low.isdigit() or (dash and not high.isdigit()) or (dash and int(high) < int(low)):
            raise ValueError(f"{option} has {word!r}: give numbers and ranges such as 0,5,10-19")
        found += range(int(low), int(high) + 1) if dash else [int(low)]
    return tuple(found)


def check_arguments(args: Any, problems: Callable[[tuple[int, ...]], Sequence[str]]) -> tuple[int, int]:
    """(data, codes) of a program that draws. ValueError with everything that is wrong with its options, before any
    process meets another.

    `problems` takes the classes, or class 0 where they are the prior's to say. args: codes, classes, out, timeout_s.
    """
    wrong, grid = list[str](), (1, 1)
    classes: tuple[int, ...] = (0,)
    with noted(wrong):
        grid = processes.divide(args.codes)
    with noted(wrong):
        classes = parse_classes(args.classes) if args.classes is not None else classes
    wrong += problems(classes)
    out = args.out.absolute()
    above = next(path for path in (out, *out.parents) if os.path.lexists(path))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "not writable by this user" if above.is_dir() else "no folder"
        wrong.append(f"OUT {args.out} cannot be written: {above} is {why}; choose another OUT")
    if not args.timeout_s > 0:
        wrong.append(f"--timeout-s is {args.timeout_s}, and processes have to wait for each other: use more than 0")
    if wrong:
        raise ValueError("; ".join(wrong))
    return grid


@contextmanager
def noted(wrong: list[str]) -> Iterator[None]:
    """A ValueError inside is added to the list, to be said with the others."""
    try:
        yield
    except ConfigError as error:
        wrong += error.problems
    except ValueError as error:
        wrong.append(str(error))
