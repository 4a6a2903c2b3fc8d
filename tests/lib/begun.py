"""A call in a process of the pool of parallel/spawn.py finds it as one that has just begun, whatever came before."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def in_a_begun_process(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) with fixed seeds; what it changes of the process (environment, folder, torch's switches) is put
    back after it. Its process group is left by spawn, and a process in which it fails is not used again.
    """
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    environment, folder = dict(os.environ), os.getcwd()
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    precision, grad = torch.get_float32_matmul_precision(), torch.is_grad_enabled()
    exact = torch.are_deterministic_algorithms_enabled()
    try:
        return function(*args)
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.set_grad_enabled(grad)
        torch.use_deterministic_algorithms(exact)
