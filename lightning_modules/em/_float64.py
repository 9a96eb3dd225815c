"""State that keeps its digits whatever precision the module around it is cast to."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Float64Buffers(nn.Module):
    """A module whose own float64 buffers follow it to a device, but not to another precision.

    `module.half()` and Lightning's "bf16-true" cast every floating-point buffer; an M-step needs its digits.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = getattr(self, name)
            if buffer.dtype != after.dtype:
                setattr(self, name, buffer.to(after.device))
        return self
