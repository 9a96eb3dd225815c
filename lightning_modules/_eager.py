"""Functions that a compiled program calls as they are."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def eager(function: Callable[..., Any]) -> Any:
    """`torch.compiler.disable` that loads the compiler, which takes as long as torch, only where one is at work."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call
