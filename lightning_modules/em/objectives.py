"""Objectives of a restoration, for each image: against the clean image, or without one."""

import torch
from torch import Tensor

from lightning_modules.imaging import seeded_uniform
from lightning_modules.operators.operator import image_level

# Length of the probe in units of the noise: long beside rounding, and short beside what the restoration reacts to.
_PROBE_LENGTH = 0.01
# The same where a gradient is wanted. What is smooth only in pieces, as total variation is, changes its divergence at
# kinks, of which a short probe meets few: at 0.01 the gradients of the images' risks vary nine times as much as those
# of their errors, at 0.1 twice as much. That overestimates the risk by 2 to 4 %, under near parameters by the same.
_LEARNING_PROBE_LENGTH = 0.1
# An image of one colour has an estimated noise of 0; a step of 0 has no quotient.
_LEAST_STEP = 1e-4
# Pixels from one that is hidden to the next, in both directions.
_HIDDEN_STRIDE = 3
# How many strides away the noise of a hidden pixel comes from, at most, and how much of it is added: three fifths of
# the variance would complete that of a mean of four, were there no texture in it.
_FURTHEST, _ADDED = 4, 0.6
# What the squared error of an image without any is counted as by its logarithm: 60 dB.
_LEAST_ERROR = 1e-6


def squared_error(restored: Tensor, clean: Tensor) -> Tensor:
    """Mean squared error of each image.

    Shape:
        - restored, clean: `[B, C, H, W]`
        - output: `[B]`
    """
    return (restored - clean).square().mean((1, 2, 3))


def log_squared_error(restored: Tensor, clean: Tensor) -> Tensor:
    """Logarithm of each image's mean squared error, by which images of little and of much noise count alike.

    Shape:
        - restored, clean: `[B, C, H, W]`
        - output: `[B]`
    """
    return (squared_error(restored, clean) + _LEAST_ERROR).log()


def probe_step(noise_std: Tensor, learning: bool = False) -> Tensor:
    """Length of the step along the probe in `stein_risk`.

    Args:
        noise_std: Noise standard deviation of each image, or of each pixel.
        learning: Whether the gradient of the risk is wanted, and not its value.

    Shape:
        - noise_std: `[B]` or a map `[B, 1 or C, H, W]`
        - output: `[B]`
    """
    noise_std = image_level(noise_std)
    length = _LEARNING_PROBE_LENGTH if learning else _PROBE_LENGTH
    length = max(length, torch.finfo(noise_std.dtype).eps ** 0.5)  # longer where numbers have few digits
    return (length * noise_std).clamp_min(_LEAST_STEP)


def stein_risk(
    noisy: Tensor, restored: Tensor, perturbed: Tensor, probe: Tensor, noise_std: Tensor, learning: bool = False
) -> Tensor:
    r"""Stein's unbiased estimate of the squared error, from the noisy image alone.

    .. math:: \frac1n \lVert f(y) - y \rVert^2 - \sigma^2
        + \frac{2\sigma^2}{n\varepsilon}\, b^\top \bigl(f(y + \varepsilon b) - f(y)\bigr)

    with a standard normal probe b (Stein, Annals of Statistics 9, 1981; Ramani, Blu & Unser, "Monte-Carlo SURE", IEEE
    TIP 17, 2008). Its expectation over noise and probe is the mean squared error, up to O(ε); a single image's value
    may be negative.

    Args:
        noisy: Noisy images y.
        restored: f(y).
        perturbed: f(y + εb), by the same f, with ε of `probe_step`.
        probe: Standard normal draws b.
        noise_std: Noise standard deviation σ of each image, or of each pixel, whose σ² then weighs the pixel's part.
        learning: As in `probe_step`.

    Shape:
        - noisy, restored, perturbed, probe: `[B, C, H, W]`
        - noise_std: `[B]` or a map `[B, 1 or C, H, W]`
        - output: `[B]`
    """
    variance = (noise_std.view(-1, 1, 1, 1) if noise_std.ndim == 1 else noise_std).square()
    divergence = (variance * probe * (perturbed - restored)).mean((1, 2, 3)) / probe_step(noise_std, learning)
    return squared_error(restored, noisy) - variance.mean((1, 2, 3)) + 2 * divergence


def hide_pixels(noisy: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Images in which some pixels are hidden: a grid of every third pixel in both directions, at a place drawn from
    each image's key, each replaced by the mean of its four neighbors, or fewer at the border, and noise.

    The mean has a quarter of the noise's variance, and parameters that suit it smooth too little for the image as it
    is. So what some other pixel, a few rows and columns away, differs by from the mean of its neighbors is added, in
    part because texture is in it: neither it nor these neighbors are hidden.

    Args:
        noisy: The images.
        key: One integer for each image.

    Returns:
        The images without these pixels, and which they are.

    Shape:
        - noisy: `[B, C, H, W]`
        - key: `[B]`, int64
        - output: `[B, C, H, W]` and boolean `[B, 1, H, W]`
    """
    draws = seeded_uniform(key, 4)
    place = (draws[:, :2] * _HIDDEN_STRIDE).long()
    # Not a multiple of the stride, in neither direction: from hidden pixels to others.
    apart = (draws[:, 2:] * _FURTHEST).long() * _HIDDEN_STRIDE + 1
    positions = [torch.arange(size, device=noisy.device) for size in noisy.shape[2:]]
    rows, columns = (
        (position - start[:, None]) % _HIDDEN_STRIDE == 0 for position, start in zip(positions, place.T, strict=True)
    )
    hidden = (rows[:, :, None] & columns[:, None, :])[:, None]
    others = [
        (position + shift[:, None]) % max(len(position) // _HIDDEN_STRIDE * _HIDDEN_STRIDE, 1)
        for position, shift in zip(positions, apart.T, strict=True)
    ]
    total, count = (
        sum(torch.roll(padded, shift, axis)[..., 1:-1, 1:-1] for shift in (1, -1) for axis in (2, 3))
        for padded in (torch.nn.functional.pad(part, (1, 1, 1, 1)) for part in (noisy, torch.ones_like(noisy[:, :1])))
    )
    mean = total / torch.as_tensor(count).clamp_min(1)
    image = torch.arange(len(noisy), device=noisy.device).view(-1, 1, 1)
    noise = (noisy - mean)[image, :, others[0][:, :, None], others[1][:, None, :]].movedim(-1, 1)
    return torch.where(hidden, mean + _ADDED * noise, noisy), hidden


def j_invariant_error(restored: Tensor, noisy: Tensor, hidden: Tensor) -> Tensor:
    r"""Mean squared difference from the noisy image at the pixels that were hidden from the restoration.

    .. math:: \frac{1}{|J|} \sum_{q \in J} \bigl(f(y_{J^c})(q) - y(q)\bigr)^2

    Noise of mean 0 that is independent from pixel to pixel, of whatever distribution, cannot be guessed from the other
    pixels: the expectation is the squared error of :math:`f(y_{J^c})` plus the noise's variance, on which parameters
    have no influence (Batson & Royer, "Noise2Self", ICML 2019, proposition 1).

    Args:
        restored: f(y_{J^c}), from what `hide_pixels` returned.
        noisy: The noisy images y.
        hidden: Which pixels J were hidden.

    Shape:
        - restored, noisy: `[B, C, H, W]`
        - hidden: boolean `[B, 1, H, W]`
        - output: `[B]`
    """
    square = torch.where(hidden, (restored - noisy).square(), 0.0)
    return square.sum((1, 2, 3)) / (hidden.sum((1, 2, 3)) * noisy.shape[1]).clamp_min(1)


__all__ = ["hide_pixels", "j_invariant_error", "log_squared_error", "probe_step", "squared_error", "stein_risk"]
