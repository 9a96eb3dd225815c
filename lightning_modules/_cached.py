"""Tensors that are made once and kept."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def cached_tensors(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """`functools.lru_cache` for functions that make tensors.

    What a validation makes in inference mode is used in training steps too. What is made while a program is compiled or
    exported is a tensor in name only and not kept.

    Args:
        maxsize: How many results are kept.
    """

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        kept = lru_cache(maxsize)(torch.inference_mode(False)(make))

        @wraps(make)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if torch.compiler.is_compiling():
                return make(*args, **kwargs)
            return kept(*args, **kwargs)  # type: ignore[arg-type]

        return call

    return decorate
