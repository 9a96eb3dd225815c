"""Standardization: data shifted by a reference mean and scaled, so that squares keep their digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.mixtures.chunks import chunk_size

Scaling = Literal["feature", "common"]

# A standard deviation below this many units in the last place of the mean is rounding, not spread.
CONSTANT_FEATURE_ULPS = 10.0


@dataclass
class StreamMoments:
    r"""Count, mean and centered sum of squares of a stream, in float64; parts add by Chan's formula.

    Attributes:
        count: Samples, `[]`.
        mean: `[D]`.
        squares: Sum of squared differences from the mean, `[D]`.
        invalid: Samples that are not finite and count nowhere else, `[]`.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor
    invalid: Tensor

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> StreamMoments:
        """Moments of the samples for which `mask` is set.

        Shape:
            - x: `[N, D]`
            - mask: `[N]`
        """
        moments = cls.zeros(x.shape[1], x.device)
        step = chunk_size(4 * x.shape[1], x.device)
        for first in range(0, x.shape[0], step):
            part = slice(first, first + step)
            moments = moments + cls._of_chunk(x[part], None if mask is None else mask[part])
        return moments

    @classmethod
    def _of_chunk(cls, x: Tensor, mask: Tensor | None) -> StreamMoments:
        x = x.double()
        # a sample's sum is finite where all of it is
        finite = torch.isfinite(x.sum(dim=1))
        keep = finite if mask is None else finite & mask
        invalid = (~finite if mask is None else ~finite & mask).sum().double()
        x = x if bool(keep.all()) else x[keep]
        count = x.new_tensor(float(x.shape[0]))
        if not x.shape[0]:
            return cls(count, x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1]), invalid)
        # two steps, so that a constant far from zero has variance zero exactly
        shift = x[0]
        centered = x - shift
        mean = centered.mean(dim=0)
        return cls(count, shift + mean, (centered - mean).square().sum(dim=0), invalid)

    @classmethod
    def zeros(cls, num_features: int, device: torch.device | None = None) -> StreamMoments:
        """Moments of nothing."""
        zero = torch.zeros(num_features, dtype=torch.float64, device=device)
        return cls(zero.new_zeros(()), zero, zero.clone(), zero.new_zeros(()))

    def __add__(self, other: StreamMoments) -> StreamMoments:
        count = self.count + other.count
        share = other.count / count.clamp(min=1.0)
        delta = torch.where(self.count > 0, other.mean - self.mean, 0.0)
        base = torch.where(self.count > 0, self.mean, other.mean)
        squares = self.squares + other.squares + delta.square() * self.count * share
        return StreamMoments(count, base + delta * share, squares, self.invalid + other.invalid)

    def flat(self) -> Tensor:
        """All numbers as one vector, for a gather over processes.

        Shape:
            - output: `[2 + 2D]`
        """
        return torch.cat([self.count.view(1), self.invalid.view(1), self.mean, self.squares])

    @classmethod
    def from_flat(cls, vector: Tensor) -> StreamMoments:
        """Moments from the vector that `flat` makes of them.

        Shape:
            - vector: `[2 + 2D]`
        """
        mean, squares = vector[2:].chunk(2)
        return cls(vector[0], mean, squares, vector[1])

    def standardizer(self, scaling: Scaling) -> Standardizer:
        """The map that gives data of these moments mean 0 and variance 1: feature by feature, or on average."""
        deviation = (self.squares / self.count.clamp(min=1.0)).sqrt()
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

    def transform(self, x: Tensor) -> Tensor:
        """Data to standardized data, in float64.

        Shape:
            - x: `[…, D]`
            - output: `[…, D]`
        """
        return (x.double() - self.offset).div_(self.scale)

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
