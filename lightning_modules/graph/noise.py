"""Noise: its level in an image, and reproducible draws that depend on a sample's key alone."""

import math

import torch
from torch import Tensor

# Multipliers of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) and its increment, as signed 64-bit integers.
_GAMMA = -7046029254386353131
_MIX = ((30, -4658895280553007687), (27, -7723592293110705685))


def estimate_noise_std(images: Tensor) -> Tensor:
    r"""Standard deviation of white Gaussian noise in each image.

    The median absolute value of the finest diagonal Haar coefficients over 0.6745 (Donoho & Johnstone, Biometrika 81,
    1994, section 6): edges fill few of the coefficients, so the median sees the noise.

    Args:
        images: Noisy images, at least 2×2 pixels.

    Shape:
        - images: `[B, C, H, W]`
        - output: `[B]`, in the unit of the pixels

    Raises:
        ValueError: If the images are smaller than 2×2 pixels.
    """
    height, width = images.shape[-2] // 2 * 2, images.shape[-1] // 2 * 2
    if min(height, width) == 0:
        raise ValueError(f"a noise level cannot be read off images of {images.shape[-2]}×{images.shape[-1]} pixels")
    even, odd = images[..., 0:height:2, :width], images[..., 1:height:2, :width]
    rows = even - odd
    diagonal = (rows[..., 0::2] - rows[..., 1::2]) / 2
    return diagonal.abs().flatten(1).median(dim=1).values / 0.6745


@torch.compiler.disable  # inductor cannot hold the 64-bit constants of the hash (OverflowError while generating code)
def seeded_uniform(key: Tensor, count: int) -> Tensor:
    """Uniform draws in [0, 1) that are a function of each sample's key alone: a counter, not a generator with a state.

    The same key gives the same draws in any batch, process and order, which is what makes two processes equal one and
    a resumed run equal an uninterrupted one.

    Args:
        key: One integer for each sample.
        count: Number of draws for each sample.

    Shape:
        - key: int64 `[B]`
        - output: float64 `[B, count]`
    """
    counter = torch.arange(1, count + 1, device=key.device)
    bits = _mix(_mix(key)[:, None] + counter * _GAMMA)
    return _shift_right(bits, 11).double() * 2.0**-53


def seeded_normal(key: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """Standard normal draws that are a function of each sample's key alone (Box-Muller on `seeded_uniform`).

    Args:
        key: One integer for each sample.
        size: Shape of one sample's draws.

    Shape:
        - key: int64 `[B]`
        - output: float32 `[B, *size]`
    """
    count = math.prod(size)
    half = (count + 1) // 2
    uniform = seeded_uniform(key, 2 * half)
    length = (-2 * torch.log1p(-uniform[:, :half])).sqrt()
    angle = (2 * math.pi) * uniform[:, half:]
    normal = torch.cat([length * torch.cos(angle), length * torch.sin(angle)], dim=1)
    return normal[:, :count].float().view(-1, *size)


def _mix(bits: Tensor) -> Tensor:
    for shift, multiplier in _MIX:
        bits = (bits ^ _shift_right(bits, shift)) * multiplier
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, shift: int) -> Tensor:
    # torch has no unsigned 64-bit arithmetic: clear the bits that the arithmetic shift copied from the sign.
    return (bits >> shift) & ((1 << (64 - shift)) - 1)
