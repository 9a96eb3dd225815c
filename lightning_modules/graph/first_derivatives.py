"""Backward passes written by hand, which are not differentiable themselves."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[[Any, Tensor], tuple[Tensor | None, ...]]


def first_derivatives(backward: Backward) -> Backward:
    """A backward pass whose second derivatives are an error.

    `torch.autograd.function.once_differentiable` raises only where the gradient that comes in depends on a parameter,
    and loses in silence what depends on the saved inputs.
    """

    @wraps(backward)
    def wrapped(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = backward(ctx, grad_output)
        if not torch.is_grad_enabled():
            return grads
        inputs = (grad_output, *ctx.saved_tensors)
        return tuple(None if grad is None else _Refuse.apply(grad, *inputs) for grad in grads)

    return wrapped


class _Refuse(torch.autograd.Function):
    """The gradient itself; going back through it is an error, wherever the way leads."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "the fast image operator has first derivatives only: for second ones use "
            "GraphDiffusion(implementation='message_passing')"
        )
