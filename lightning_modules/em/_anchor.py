"""A loss that holds on to a parameter without depending on it."""

from typing import Any

import torch
from torch import Tensor


class Anchored(torch.autograd.Function):
    """The value as it is, with the anchor in its graph at weight 0.

    A plain `value + 0 * anchor` would hand a NaN on for ever once a single bad batch had reached the anchor through its
    optimiser. The anchor's gradient is 0, and NaN where the value's is not finite, by which a gradient scaler knows.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, (0 * grad).sum()
