"""Functions that stay out of the graphs of `torch.compile`."""

from functools import wraps
from typing import Any

import torch


def eager(function: Any) -> Any:
    """The function, run as it stands where a compiler would trace it.

    `torch.compiler.disable`, applied only where something is compiled: it loads the compiler, which takes more memory
    than all else that a restoration loads.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call
