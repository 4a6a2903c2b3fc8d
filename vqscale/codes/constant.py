"""Tell torch.compile that a function's result is a constant of the graph, without the compiler.

`torch.compiler.assume_constant_result` is the public way, and it imports the compiler: two seconds at the start of
every program, most of which compile nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def constant_result(function: Function) -> Function:
    """The same function with the mark that torch.compiler.assume_constant_result gives it; a test compares them."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
