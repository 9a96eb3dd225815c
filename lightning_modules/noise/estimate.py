"""Noise level of an image, from its flattest patches."""

import math

import torch
from torch import Tensor

from lightning_modules._cached import cached_tensors

_PATCH_SIZE = 5
# Larger images have enough patches in so many, spread evenly.
_MAX_PATCHES = 8192
# The flattest patches are averaged in shares of 1, 1/2, ... 1/256 of all, but no fewer than so many.
_NUM_SHARES = 9
_MIN_PATCHES = 32
# Standard errors within which two means agree.
_AGREEMENT = 2.0
# A patch is left out with more of its pixels at black or white; with fewer than a tenth of the patches then left, as
# in drawings on white paper, only with more than the second share.
_MAX_CLIPPED, _MAX_CLIPPED_BUT_FEW, _ENOUGH = 0.35, 0.65, 0.1
# The same with more of its neighbors exactly equal. In gray 8-bit images they often are under little noise, in all of
# three channels hardly ever.
_MAX_EQUAL_GRAY, _MAX_EQUAL = 0.7, 0.22
# White noise is as strong in low frequencies as in high ones: with a larger ratio of the variances it is texture.
_MAX_WHITE_RATIO = 1.25
# In texture the energy of the high frequencies grows with that of the low ones, hardly faster than this.
_MAX_SLOPE = 0.12
# What texture alone makes the channels show, at most, where the opponent colors show nothing.
_MAX_TEXTURE = 3 / 255
# Orthonormal: gray, red against blue, green against both.
COLORS = ((3**-0.5, 3**-0.5, 3**-0.5), (0.5**0.5, 0.0, -(0.5**0.5)), (6**-0.5, -2 * 6**-0.5, 6**-0.5))


@torch.no_grad()
def estimate_noise_std(images: Tensor) -> Tensor:
    """Standard deviation of white Gaussian noise in each image.

    The mean energy of the high frequencies in the patches that have the least energy in the low ones (Colom & Buades,
    Image Processing On Line 3, 2013). Frequencies of white noise are independent, so choosing patches by the low ones
    leaves the energy of the high ones as it is. Which share of the patches, and from which frequency on, follows from
    Lepski's rule: of all means `m` with standard errors `s` that agree with the lowest, `m - 2 s <= min(m' + 2 s')`,
    the one with the smallest `s / m`. In small images that is most of the image, in large ones its flattest part.
    Where the low frequencies of the patches chosen still show texture, its part of the high ones is subtracted, in the
    proportion that the other patches show.

    Of color images the two opponent colors are looked at, in which there is hardly any texture. Noise that the channels
    have in common, as in gray images stored as color, or color that a JPEG file or a camera has smoothed, leaves little
    there: where that is less than a third of what the channels show, and what they show is white, or more than texture
    makes them show, the channels decide. Three equal channels are one.

    Left out by rule: rows and columns of one value (frames), those that repeat the one before (enlarged pixels), and
    patches that are largely flat or clipped. What clipping at 0 and 1 takes from the noise of the other patches is
    given back, and what rounding to 8 bits adds is subtracted. An image of which nothing remains reads 0. The estimate
    has no gradient.

    Args:
        images: Noisy images, at least 2×2 pixels.

    Shape:
        - images: `[B, C, H, W]`
        - output: `[B]`, in the unit of the pixels

    Raises:
        ValueError: If the images are smaller than 2×2 pixels.
    """
    height, width = images.shape[-2:]
    if min(height, width) < 2:
        raise ValueError(f"a noise level cannot be read off images of {height}×{width} pixels")
    pixels = images if images.dtype == torch.float64 else images.float()
    size = min(_PATCH_SIZE, height, width)
    patches, kept, overlap = distinct_patches(pixels, size)
    clipped = ((patches == 0) | (patches == 1)).to(pixels.dtype).mean(-1)
    gray = (pixels == pixels[:, :1]).flatten(1).all(1)
    most_equal = torch.where(gray, _MAX_EQUAL_GRAY, _MAX_EQUAL)[:, None]
    kept = kept & (clipped.mean(1) <= _MAX_CLIPPED_BUT_FEW) & (equal_neighbors(patches, size) <= most_equal)
    mildly = kept & (clipped.mean(1) <= _MAX_CLIPPED)
    kept = torch.where(mildly.sum(1, keepdim=True) >= _ENOUGH * kept.sum(1, keepdim=True), mildly, kept)
    scaled = patches * 255
    rounded = ((scaled - scaled.round()).abs() < 1e-3).all(-1).all(1).logical_or(~kept).all(1)

    colors, frequencies, bands, num_frequencies = _constants(size, pixels.device, pixels.dtype)
    unclipped = _clipped_variance(clipped).mean(1)
    num_channels = images.shape[1]
    if num_channels == 3:
        patches = torch.einsum("kc,bcnd->bknd", colors, patches)
    energies = (patches @ frequencies).square() @ bands  # [B, C, N, 1 + F]: the low frequencies, the high ones F times

    by_channels = energies.mean(1)
    # by the root: the share of a single patch is uncertain, and dividing by all of it would choose by that error
    order = (by_channels[..., 0] / unclipped.sqrt()).masked_fill(~kept, torch.inf).argsort(dim=1, stable=True)
    num_kept = kept.sum(1, keepdim=True)
    shares = 2.0 ** -torch.arange(_NUM_SHARES, device=pixels.device)
    counts = (num_kept * shares).long().clamp_min(_MIN_PATCHES).minimum(num_kept).clamp_min(1)

    def cumulative(values: Tensor) -> Tensor:
        flattest = (values * kept[..., None]).gather(1, order[..., None].expand_as(values)).cumsum(1)
        return flattest.gather(1, (counts - 1)[..., None].expand(-1, -1, values.shape[2]))

    num_unclipped = cumulative(unclipped[..., None]).clamp_min(1e-12)

    def means(values: Tensor) -> Tensor:
        return cumulative(values) / num_unclipped

    def agreed(averages: Tensor, num_values: Tensor) -> tuple[Tensor, Tensor]:
        """Variance of the noise from averages at all shares, and whether its patches hold no more than white noise."""
        low, high = averages[..., :1], averages[..., 1:]
        error = (2 * overlap / (counts[..., None] * num_values)).sqrt()
        upper = (high * (1 + _AGREEMENT * error)).amin((1, 2), keepdim=True)
        disagrees = high * (1 - _AGREEMENT * error) > upper
        best = error.masked_fill(disagrees, torch.inf).flatten(1).argmin(1, keepdim=True)
        # what is left of the texture, where the low frequencies show some: in proportion to theirs
        slope = ((high[:, :1] - high) / (low[:, :1] - low).clamp_min(1e-12)).clamp(0, _MAX_SLOPE)
        texture = slope / (1 - slope) * (low - high).clamp_min(0)
        white = low < _MAX_WHITE_RATIO * high
        return (high - texture).flatten(1).gather(1, best)[:, 0], white.flatten(1).gather(1, best)[:, 0]

    if num_channels == 3:
        # noise that the channels have in common counts once
        in_channels, white = agreed(means(by_channels), num_frequencies)
        opponent, _ = agreed(means(energies[:, 1:].mean(1)), 2 * num_frequencies)
        common = (white | (in_channels > _MAX_TEXTURE**2)) & (9 * opponent < in_channels)
        variance = torch.where(gray | common, in_channels, opponent)
    else:
        variance, _ = agreed(means(by_channels), num_channels * num_frequencies)
    variance = variance - rounded / (12 * 255**2)
    return (variance.clamp_min(0).sqrt() * (num_kept[:, 0] > 0)).to(images.dtype)


def distinct_patches(images: Tensor, size: int, most: int = _MAX_PATCHES) -> tuple[Tensor, Tensor, Tensor]:
    """Patches between rows and columns that hold something new: `[B, C, N, D]`, which exist, how many share a pixel."""
    height, width = images.shape[-2:]
    rows, num_rows = _distinct_lines(images)
    columns, num_columns = _distinct_lines(images.mT)
    num_rows, num_columns = num_rows - size + 1, num_columns - size + 1
    available = num_rows.clamp_min(0) * num_columns.clamp_min(0)
    num_patches = min(most, (height - size + 1) * (width - size + 1))

    # all of them in order, or points of a two-dimensional low-discrepancy sequence: not a function of the frame around
    index = torch.arange(num_patches, device=images.device)
    spread = _even_spread(num_patches, images.device, images.dtype)
    everything = available <= num_patches
    per_row = num_columns.clamp_min(1)
    row = torch.where(everything, index // per_row, (spread[0] * num_rows).long())
    column = torch.where(everything, index % per_row, (spread[1] * num_columns).long())

    offsets = torch.arange(size, device=images.device)
    row_pixels = rows.gather(1, (row[..., None] + offsets).clamp(0, height - 1).flatten(1))
    column_pixels = columns.gather(1, (column[..., None] + offsets).clamp(0, width - 1).flatten(1))
    pixel = row_pixels.view(-1, num_patches, size, 1) * width + column_pixels.view(-1, num_patches, 1, size)
    patches = images.flatten(2).gather(2, pixel.flatten(1)[:, None].expand(-1, images.shape[1], -1))
    overlap = available.clamp_max(num_patches) * (size**2 / 2) / available.clamp_min(1) + 0.5
    return (
        patches.view(*images.shape[:2], num_patches, size**2),
        index < available,
        overlap.clamp(1, size**2 / 2)[..., None],
    )


def _distinct_lines(images: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the rows that neither repeat the one before nor hold a single color, then the others; their number."""
    distinct = (images != images[..., :1]).any(-1).any(1)
    distinct[:, 1:] &= (images[..., 1:, :] != images[..., :-1, :]).any(-1).any(1)
    return (~distinct).to(torch.uint8).argsort(dim=1, stable=True), distinct.sum(1, keepdim=True)


def equal_neighbors(patches: Tensor, size: int) -> Tensor:
    """Share of each patch's neighbors, by rows or by columns, that have exactly the same color."""
    grid = patches.unflatten(-1, (size, size))
    down = (grid[..., 1:, :] == grid[..., :-1, :]).all(1).flatten(2)
    right = (grid[..., 1:] == grid[..., :-1]).all(1).flatten(2)
    return torch.maximum(down.to(patches.dtype).mean(-1), right.to(patches.dtype).mean(-1))


def _clipped_variance(share: Tensor) -> Tensor:
    """Variance of `max(z, -a)`, `z` standard normal, where `P(z < -a)` is the share that was clipped."""
    share = share.clamp(1e-6, 1 - 1e-6)
    a = -torch.special.ndtri(share)
    density = (-a.square() / 2).exp() / math.sqrt(2 * math.pi)
    mean = density - a * share
    return (1 - share - a * density + a.square() * share - mean.square()).clamp_min(1e-6)


@cached_tensors(maxsize=8)  # copied to a device once: a copy in every step would wait for it
def _constants(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Color axes, cosine transform `[D, D - 1]`, means over bands `[D - 1, 1 + F]`, sizes of the high bands `[F]`."""
    position = torch.arange(size, dtype=torch.float64)
    cosines = torch.cos(math.pi * (position + 0.5) * position[:, None] / size)
    cosines = cosines / cosines.norm(dim=1, keepdim=True)
    frequencies = torch.einsum("ai,bj->ijab", cosines, cosines).reshape(size**2, size**2)[:, 1:]
    total = (position[:, None] + position).flatten()[1:]
    # the high frequencies from the antidiagonal on, or from one or two further on
    members = torch.stack([total < size, *(total >= first for first in range(size, min(size + 3, 2 * size - 1)))], 1)
    bands = members / members.sum(0, dtype=torch.float64)
    colors = torch.tensor(COLORS)
    return (
        colors.to(device, dtype),
        frequencies.to(device, dtype),
        bands.to(device, dtype),
        members.sum(0)[1:].to(device, dtype),
    )


@cached_tensors(maxsize=8)
def _even_spread(count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Points in the unit square, `[2, N]`: multiples of the powers of the plastic number's inverse (Roberts, 2018)."""
    step = torch.tensor([0.7548776662466927, 0.5698402909980532], dtype=torch.float64)
    points = (torch.arange(1, count + 1) * step[:, None]) % 1
    return points.clamp_max(1 - 1e-6).to(device, dtype)
