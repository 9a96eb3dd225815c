"""Blocks of an image: their mean colors and the energies of their frequencies."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules._cached import cached_tensors
from lightning_modules.noise.estimate import distinct_patches, equal_neighbors

# Side of the blocks: several times as far as a camera's noise is correlated. Small images have smaller ones.
_SIZE, _SMALL_SIZE, _SMALL = 16, 8, 96
_MAX_BLOCKS = 3072
# A block is left out with more of its pixels at black or white, or of its neighbors exactly equal.
_MAX_CLIPPED, _MAX_EQUAL = 0.02, 0.25
# Rings of frequencies by their edges, in units of half the sampling rate. Under the first there is shading.
_EDGES = (2.5 / 16, 3.5 / 16, 4.5 / 16, 6 / 16, 8 / 16, 10 / 16, 12 / 16, 14 / 16, 17 / 16, 1.5)


class Bands(NamedTuple):
    """Rings of frequencies, the first one left out, in which there is shading.

    Attributes:
        member: Which frequencies belong to which ring, `[n, n, F]`, 0 or 1.
        width: How many there are in each, `[F]`.
        frequency: Their mean frequency, in units of half the sampling rate, `[F]`.
    """

    member: Tensor
    width: Tensor
    frequency: Tensor


class Blocks(NamedTuple):
    """Blocks of one image.

    Attributes:
        means: Mean color, `[N, C]`.
        coefficients: Orthonormal cosine transform, `[N, C, n, n]`.
    """

    means: Tensor
    coefficients: Tensor

    def energies(self, bands: Bands) -> Tensor:
        """Mean energy in each ring of frequencies.

        Shape:
            - output: `[N, C, F]`
        """
        member = bands.member.flatten(0, 1).to(self.coefficients)
        return (self.coefficients.square().flatten(2) @ member).to(bands.width) / bands.width


def read_blocks(image: Tensor, size: int | None = None, max_count: int = _MAX_BLOCKS) -> Blocks:
    """Blocks spread evenly over an image, without those that hold no noise of it.

    Left out are frames, enlarged pixels and blocks that are largely flat or clipped, as `estimate_noise_std` does.

    Args:
        image: One image.
        size: Side of the blocks; smaller in small images by default.
        max_count: Of larger images, so many blocks are looked at.

    Shape:
        - image: `[C, H, W]`
    """
    size = size or min(_SMALL_SIZE if min(image.shape[-2:]) < _SMALL else _SIZE, *image.shape[-2:])
    patches, kept, _ = distinct_patches(image[None], size, max_count)
    clipped = ((patches <= 0) | (patches >= 1)).to(image.dtype).mean(-1).amax(1)
    kept = kept & (clipped <= _MAX_CLIPPED) & (equal_neighbors(patches, size) <= _MAX_EQUAL)
    chosen = patches[0].movedim(1, 0)[kept[0]]
    grid = chosen.unflatten(-1, (size, size))
    cosines = _cosines(size, image.device, image.dtype)
    return Blocks(chosen.mean(-1), cosines @ grid @ cosines.mT)


@cached_tensors(maxsize=8)
def _cosines(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Orthonormal cosine transform."""
    position = torch.arange(size, dtype=torch.float64)
    cosines = torch.cos(math.pi * (position + 0.5) * position[:, None] / size)
    return (cosines / cosines.norm(dim=1, keepdim=True)).to(device, dtype)


@cached_tensors(maxsize=8)
def frequency_bands(size: int, device: torch.device, dtype: torch.dtype) -> Bands:
    """Rings of frequencies of the cosine transform of blocks of this side, equally wide in octaves and in steps.

    Shape:
        - output: two tensors
    """
    step = torch.arange(size, dtype=torch.float64)
    distance = (step.square() + step[:, None].square()).sqrt() / size
    ring = torch.bucketize(distance, torch.tensor(_EDGES, dtype=torch.float64))  # 0: shading
    member = torch.nn.functional.one_hot(ring, len(_EDGES) + 1)[..., 1:].to(device, dtype)
    member = member[..., member.sum((0, 1)) > 0]
    count = member.sum((0, 1))
    return Bands(member, count, (distance.to(device, dtype)[..., None] * member).sum((0, 1)) / count)
