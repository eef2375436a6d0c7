"""Launches go to the current device's stream; an op may be asked for tensors of another one."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(op: Callable[P, R]) -> Callable[P, R]:
    """The op, run with the device of its first argument (a tensor) as the current one, as in a model spread over several."""

    @wraps(op)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.is_cuda and x.get_device() != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return op(*args, **kwargs)
        return op(*args, **kwargs)

    return run
