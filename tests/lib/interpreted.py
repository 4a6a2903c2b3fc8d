"""Triton's kernels on a CPU: import this before any kernel; conftest.py chose the interpreter before any triton.

The interpreter keeps bfloat16 as raw 16-bit integers and its dot multiplies them as such; here they are made numbers.
"""

from __future__ import annotations

import torch

INTERPRETED = not torch.cuda.is_available()

if INTERPRETED:
    from triton import language as tl
    from triton.runtime import interpreter

    _create_dot = interpreter.InterpreterBuilder.create_dot

    def _dot_of_numbers(self, a, b, d, *options):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return _create_dot(self, a, b, d, *options)

    interpreter.InterpreterBuilder.create_dot = _dot_of_numbers
