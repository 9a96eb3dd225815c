"""Sufficient statistics, and how the processes of a run put them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

# scikit-learn's floor: a component without samples keeps a weight and divides by no zero.
EMPTY_COUNT = 10 * torch.finfo(torch.float64).eps


def _identity(vector: Tensor) -> Tensor:
    return vector


def _alone(tensor: Tensor) -> Tensor:
    return tensor[None]


@dataclass
class Collectives:
    """How processes talk: `reduce` sums a vector over them, `gather` stacks equal shapes to `[world, …]`."""

    reduce: Callable[[Tensor], Tensor] = _identity
    gather: Callable[[Tensor], Tensor] = _alone
    rank: int = 0
    world: int = 1

    def gather_samples(self, samples: Tensor) -> Tensor:
        """Samples of all processes, which may have different numbers of them, one after the other.

        Shape:
            - samples: `[N, …]`
            - output: `[M, …]`
        """
        counts = self.gather(samples.new_tensor([samples.shape[0]], dtype=torch.long)).flatten()
        padded = samples.new_zeros(int(counts.max()), *samples.shape[1:])
        padded[: samples.shape[0]] = samples
        parts = self.gather(padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


class SufficientStatistics:
    """Base of what an E-step hands to the M-step: a dataclass of sums over samples, which add over batches and ranks.

    Every family has `weight` `[S, K]`, how many samples each component of each restart has, and `count` `[]`; a
    mixture also has `log_likelihood` `[S]`.
    """

    #: names of the fields that are sums
    SUMS: ClassVar[tuple[str, ...]]
    weight: Tensor
    count: Tensor

    def add(self, other: Self) -> None:
        """Add the sums of more samples, in place."""
        for name in self.SUMS:
            getattr(self, name).add_(getattr(other, name))

    def about_origin(self) -> Self:
        """The same sums in a form that can be added to those under other parameters; here they are in it."""
        return self

    def flat(self) -> Tensor:
        """Every sum in one vector.

        Shape:
            - output: `[M]`
        """
        return torch.cat([getattr(self, name).reshape(-1) for name in self.SUMS])

    def with_flat(self, vector: Tensor) -> Self:
        """Statistics like these with the sums of `vector`.

        Shape:
            - vector: `[M]`, as `flat` gives it
        """
        parts: dict[str, Tensor] = {}
        position = 0
        for name in self.SUMS:
            like: Tensor = getattr(self, name)
            parts[name] = vector[position : position + like.numel()].view_as(like)
            position += like.numel()
        statistics: Any = self  # a dataclass, as its subclasses are
        return replace(statistics, **parts)

    def pack(self, collectives: Collectives) -> Tensor:
        """The vector that travels; its sum over the processes is what `unpack` reads.

        Shape:
            - output: `[M]`
        """
        return self.flat()

    def unpack(self, vector: Tensor, collectives: Collectives) -> Self:
        """Statistics of all processes from the sum of their packed vectors.

        Shape:
            - vector: `[M]`
        """
        return self.with_flat(vector)
