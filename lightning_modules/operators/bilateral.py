"""The bilateral filter, with differences freed of what noise adds to them."""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.operators.operator import (
    Noise,
    ParameterSpec,
    RestorationOperator,
    check_images,
    noise_level,
    per_image,
    pixel_level,
)

# Under this level, far below a step of 8 bits, widths in units of the noise count as 0: the filter is the identity.
_LEAST_LEVEL = 1e-6


class BilateralFilter(RestorationOperator):
    r"""Means of near and similar pixels (Tomasi & Manduchi, ICCV 1998).

    .. math:: x(q) = \frac{\sum_\delta w_\delta(q)\, y(q+\delta)}{\sum_\delta w_\delta(q)}, \qquad
        w_\delta(q) = \exp\Bigl(-\frac{|\delta|^2}{2\sigma_{space}^2} - \frac{D_\delta(q)}{2\sigma_r^2}\Bigr), \qquad
        D_\delta(q) = \max\bigl(\lVert y(q) - y(q+\delta) \rVert^2 - 2 C \sigma_n^2, 0\bigr)

    The range width is in units of what noise does to the debiased squared difference of C channels, whose standard
    deviation is :math:`\sigma_n^2 \sqrt{8C}`: :math:`\sigma_r = \text{sigma\_range} \cdot (2C)^{1/4} \sigma_n`.

    Args:
        window: Neighbours up to this many pixels away in each direction count.

    Raises:
        ValueError: If the window is empty.

    Example:
        >>> restored = BilateralFilter()(torch.rand(2, 3, 16, 12), noise=0.1, sigma_space=2.0, sigma_range=2.0)
        >>> restored.shape
        torch.Size([2, 3, 16, 12])
    """

    def __init__(self, window: int = 4) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window must be at least 1 pixel, got {window}")
        self.window = window

    @property
    def parameter_specs(self) -> tuple[ParameterSpec, ...]:
        """Widths in space and in range."""
        return (
            ParameterSpec("sigma_space", start=1.5, bounds=(0.2, 20.0), unit="pixels"),
            ParameterSpec("sigma_range", start=2.0, bounds=(0.1, 20.0), unit="noise", relative_step=0.01),
        )

    def unit_factor(self, name: str, channels: int) -> float:
        """Absolute range width over its number and the noise level; see `RestorationOperator.unit_factor`."""
        return float((2 * channels) ** 0.25) if name == "sigma_range" else 1.0

    def forward(self, noisy: Tensor, *, noise: Noise, guide: Tensor | None = None, **parameters: Any) -> Tensor:
        """Restored images; see `RestorationOperator.forward`. A guide is an image with the same noise.

        Shape:
            - noisy: `[B, C, H, W]`
            - noise: scalar, `[1]`, `[B]` or `[B, 1 or C, H, W]`
            - guide: `[B, F, H, W]`
            - output: `[B, C, H, W]`
        """
        check_images(noisy, guide)
        guide = noisy if guide is None else guide
        level = noise_level(noise, noisy)
        is_map = level.ndim == 4
        variance = pixel_level(level).square()
        space, spread = (
            per_image(name, parameters[name], noisy).view(-1, 1, 1, 1) for name in ("sigma_space", "sigma_range")
        )
        channels = guide.shape[1]
        # Of σ_r², without the noise's part: the variance of a pair is the mean of its two pixels'.
        scale = 2 * spread.square() * (2 * channels) ** 0.5
        total, norm = noisy, torch.ones_like(noisy[:, :1])
        for row in range(self.window + 1):
            for column in range(-self.window if row else 1, self.window + 1):
                here, there = _pair(row, column, *noisy.shape[-2:])
                if here is None or there is None:
                    continue
                pair = (variance[here] + variance[there]) / 2 if is_map else variance
                distance = (guide[here] - guide[there]).square().sum(1, keepdim=True) - 2 * channels * pair
                exponent = distance.clamp_min(0) / (scale * pair.clamp_min(_LEAST_LEVEL**2))
                weight = torch.exp(-exponent - (row**2 + column**2) / (2 * space.square()))
                total = _added(_added(total, here, weight * noisy[there]), there, weight * noisy[here])
                norm = _added(_added(norm, here, weight), there, weight)
        restored = total / norm
        return torch.where(variance > 0, restored, noisy)


def _pair(row: int, column: int, height: int, width: int) -> tuple[Any, Any]:
    """Index of the pixels q and q + (row, column) that are both in the image; None where there are none."""
    if row >= height or abs(column) >= width:
        return None, None
    left, right = (slice(0, width - column), slice(column, width))
    if column < 0:
        left, right = slice(-column, width), slice(0, width + column)
    return (..., slice(0, height - row), left), (..., slice(row, height), right)


def _added(image: Tensor, place: Any, values: Tensor) -> Tensor:
    _, rows, columns = place
    top, left = rows.start, columns.start
    bottom, right = image.shape[-2] - rows.stop, image.shape[-1] - columns.stop
    return image + torch.nn.functional.pad(values, (left, right, top, bottom))
