"""Errors that explain themselves: a program that ends with one prints its message and no traceback. Imports no torch.

So are ValueError (the user's input), OSError (a disk, a network) and FloatingPointError (what the weights did), see
run/processes.py. A traceback is for what nobody foresaw.
"""

from __future__ import annotations


class ExplainedError(RuntimeError):
    """Something failed while running, and the message says all: the rule, where it was broken, what to change."""
