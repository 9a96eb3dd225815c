"""How the processes of a run put their numbers together, and how such numbers become one vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor


def _identity(vector: Tensor) -> Tensor:
    return vector


def _alone(tensor: Tensor) -> Tensor:
    return tensor[None]


@dataclass
class Collectives:
    """How the processes of a run talk: ``reduce`` sums a vector over them, ``gather`` stacks equal shapes to ``[world,
    …]``.
    """

    reduce: Callable[[Tensor], Tensor] = _identity
    gather: Callable[[Tensor], Tensor] = _alone
    rank: int = 0
    world: int = 1

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows ``[N, …]`` of all processes, which may have different N, one after the other."""
        counts = self.gather(rows.new_tensor([rows.shape[0]], dtype=torch.long)).flatten()
        padded = rows.new_zeros(int(counts.max()), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        parts = self.gather(padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


class FlatSums:
    """Base of dataclasses of sufficient statistics: their sums as one vector, the one thing that travels."""

    #: names of the fields that are sums
    SUMS: ClassVar[tuple[str, ...]]

    def flat(self) -> Tensor:
        """Every sum in one vector."""
        return torch.cat([getattr(self, name).reshape(-1) for name in self.SUMS])

    def with_flat(self, vector: Tensor) -> Self:
        """Statistics of this shape with the sums of ``vector``."""
        parts: dict[str, Tensor] = {}
        position = 0
        for name in self.SUMS:
            like: Tensor = getattr(self, name)
            parts[name] = vector[position : position + like.numel()].view_as(like)
            position += like.numel()
        statistics: Any = self  # a dataclass, as its subclasses are
        return replace(statistics, **parts)
