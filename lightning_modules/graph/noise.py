"""Noise: its level in an image, and reproducible draws that depend on a sample's key alone."""

import math
from functools import lru_cache

import torch
from torch import Tensor

# Multipliers of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) and its increment, as signed 64-bit integers.
_GAMMA = -7046029254386353131
_MIX = ((30, -4658895280553007687), (27, -7723592293110705685))

# Two orthonormal directions across grey: red against blue, green against both.
_OPPONENT = ((0.5**0.5, 0.0, -(0.5**0.5)), (6**-0.5, -2 * 6**-0.5, 6**-0.5))
# In images of up to this many pixels every position counts; larger ones have enough of them on every second one.
_ALL_POSITIONS = 2**16


def estimate_noise_std(images: Tensor) -> Tensor:
    r"""Standard deviation of white Gaussian noise in each image.

    The median absolute value of the finest diagonal Haar coefficients over 0.6745 (Donoho & Johnstone, Biometrika 81,
    1994, section 6): edges fill few of the coefficients, so the median sees the noise. Of colour images the two
    opponent colours are looked at, in which there is hardly any texture: on CIFAR-10 with noise of 5/255 the estimate
    is 5.3 ± 0.4, and 8.0 ± 1.6 on the three channels themselves. Noise that the channels have in common, as in grey
    images stored as colour, or colour that a JPEG file or a camera has smoothed, leaves little there: where that is
    less than a third of what the channels show, the channels decide.

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
    step = 1 if height * width <= _ALL_POSITIONS else 2
    diagonal = images.diff(dim=-2)[..., ::step, :].diff(dim=-1)[..., ::step] / 2
    level = _median_deviation(diagonal)
    if images.shape[1] != 3:
        return level
    opponent = torch.einsum("kc,bchw->bkhw", _opponent(images.device, images.dtype), diagonal)
    colour = _median_deviation(opponent)
    return torch.where(3 * colour < level, level, colour)


@lru_cache(maxsize=8)  # copied to a device once: a copy in every step would wait for it
@torch.inference_mode(False)
def _opponent(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(_OPPONENT, dtype=dtype, device=device)


def _median_deviation(coefficients: Tensor) -> Tensor:
    return coefficients.abs().flatten(1).median(dim=1).values / 0.6745


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
