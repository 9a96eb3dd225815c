"""Standardization: data shifted by a reference mean and scaled, so that squares keep their digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.mixtures.chunks import chunk_size
from lightning_modules.mixtures.passes import moments as compiled_moments

Scaling = Literal["feature", "common"]

# A standard deviation below this many units in the last place of the mean is rounding, not spread.
CONSTANT_FEATURE_ULPS = 10.0


@dataclass
class StreamMoments:
    r"""Count, mean and centered sum of squares of a stream, in float64; parts add by Chan's formula.

    Attributes:
        count: Weight of the samples, `[]`.
        mean: `[D]`.
        squares: Sum of squared differences from the mean, `[D]`.
        rows: Samples that have weight, `[]`.
        invalid: Samples that are not finite and count nowhere else, `[]`.
        invalid_weights: Weights that are negative or not finite, `[]`.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor
    rows: Tensor
    invalid: Tensor
    invalid_weights: Tensor

    @classmethod
    def of(cls, x: Tensor, weight: Tensor | None = None) -> StreamMoments:
        """Moments of weighted samples; those of weight 0 may hold anything.

        Shape:
            - x: `[N, D]`
            - weight: `[N]`
        """
        moments = cls.zeros(x.shape[1], x.device)
        compiled = compiled_moments(x) if weight is None else None
        if compiled is not None:
            none = moments.invalid
            for number, mean, squares in compiled:
                count = none + number
                moments = moments + cls(count, mean, squares, count.clone(), none, none.clone())
            return moments
        step = chunk_size(4 * x.shape[1], x.device)
        for first in range(0, x.shape[0], step):
            part = slice(first, first + step)
            moments = moments + cls._of_chunk(x[part], None if weight is None else weight[part])
        return moments

    @classmethod
    def _of_chunk(cls, x: Tensor, weight: Tensor | None) -> StreamMoments:
        x = x.double()
        if weight is None and x.shape[0]:
            # products with ones: sums over the first dimension are slow
            ones = x.new_ones(x.shape[0])
            if bool(torch.isfinite(ones @ x).all()):
                centered = x - x[0]
                mean = ones @ centered / x.shape[0]
                squares = ones @ centered.sub_(mean).square_()
                count, none = ones.sum(), x.new_zeros(())
                return cls(count, x[0] + mean, squares, count.clone(), none, none.clone())
        _, invalid, invalid_weights = count_samples(x, weight)
        keep = torch.isfinite(x.sum(dim=1))
        if weight is not None:
            weight = weight.double()
            keep &= (weight > 0) & torch.isfinite(weight)
        if not bool(keep.all()):
            x, weight = x[keep], None if weight is None else weight[keep]
        rows = x.new_tensor(float(x.shape[0]))
        if not x.shape[0]:
            zero = x.new_zeros(x.shape[1])
            return cls(rows, zero, zero.clone(), rows.clone(), invalid, invalid_weights)
        # two steps, so that a constant far from zero has variance zero exactly
        shift = x[0]
        centered = x - shift
        if weight is None:
            mean = centered.mean(dim=0)
            squares, count = (centered - mean).square().sum(dim=0), rows.clone()
        else:
            count = weight.sum()
            mean = weight @ centered / count
            squares = weight @ (centered - mean).square()
        return cls(count, shift + mean, squares, rows, invalid, invalid_weights)

    @classmethod
    def zeros(cls, num_features: int, device: torch.device | None = None) -> StreamMoments:
        """Moments of nothing."""
        zero = torch.zeros(num_features, dtype=torch.float64, device=device)
        count, rows, invalid, invalid_weights = zero.new_zeros(4)
        return cls(count, zero, zero.clone(), rows, invalid, invalid_weights)

    def __add__(self, other: StreamMoments) -> StreamMoments:
        count = self.count + other.count
        share = torch.where(count > 0, other.count / count, 0.0)
        delta = torch.where(self.count > 0, other.mean - self.mean, 0.0)
        base = torch.where(self.count > 0, self.mean, other.mean)
        squares = self.squares + other.squares + delta.square() * self.count * share
        sums = (self.flat() + other.flat())[1:4]
        return StreamMoments(count, base + delta * share, squares, *sums)

    def flat(self) -> Tensor:
        """All numbers as one vector, for a gather over processes.

        Shape:
            - output: `[4 + 2D]`
        """
        numbers = torch.stack([self.count, self.rows, self.invalid, self.invalid_weights])
        return torch.cat([numbers, self.mean, self.squares])

    @classmethod
    def from_flat(cls, vector: Tensor) -> StreamMoments:
        """Moments from the vector that `flat` makes of them.

        Shape:
            - vector: `[4 + 2D]`
        """
        mean, squares = vector[4:].chunk(2)
        return cls(vector[0], mean, squares, *vector[1:4])

    def standardizer(self, scaling: Scaling) -> Standardizer:
        """The map that gives data of these moments mean 0 and variance 1: feature by feature, or on average."""
        deviation = torch.where(self.count > 0, self.squares / self.count, 0.0).sqrt()
        rounding = CONSTANT_FEATURE_ULPS * torch.finfo(torch.float64).eps * self.mean.abs()
        deviation = torch.where(deviation > rounding, deviation, torch.zeros_like(deviation))
        if scaling == "common":
            deviation = deviation.square().mean().sqrt().expand_as(deviation)
        return Standardizer(self.mean.clone(), torch.where(deviation > 0, deviation, torch.ones_like(deviation)))


@dataclass
class Standardizer:
    r""":math:`z = (x - \text{offset}) / \text{scale}`, feature by feature.

    Attributes:
        offset: `[D]`.
        scale: `[D]`.
    """

    offset: Tensor
    scale: Tensor

    def transform(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Data to standardized data, in float64; samples of weight 0 become 0, whatever they hold.

        Shape:
            - x: `[…, D]`
            - weight: `[…]`
            - output: `[…, D]`
        """
        z = (x.double() - self.offset).div_(self.scale)
        return z if weight is None else torch.where(weight[..., None] > 0, z, 0.0)

    def inverse_transform(self, z: Tensor) -> Tensor:
        """Standardized data to data.

        Shape:
            - z: `[…, D]`
            - output: `[…, D]`
        """
        return z * self.scale + self.offset

    @property
    def log_volume(self) -> Tensor:
        r""":math:`\log \det` of the map back to data, `[]`: what a log density loses on the way back."""
        return self.scale.log().sum()


def count_samples(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """How many samples have weight, how many of those are not finite, and how many weights are no weights.

    Shape:
        - x: `[N, D]`
        - weight: `[N]`
        - output: float64 `[]`, three times
    """
    # a sample's sum is finite where all of it is
    finite = torch.isfinite(x.sum(dim=1))
    if weight is None:
        count = torch.full((), x.shape[0], dtype=torch.float64, device=x.device)
        return count, (~finite).sum().double(), torch.zeros_like(count)
    impossible = ~((weight >= 0) & torch.isfinite(weight))
    return (weight > 0).sum().double(), (~(finite | (weight == 0))).sum().double(), impossible.sum().double()
