"""Total-variation denoising by a fixed number of primal-dual iterations."""

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

# Squared norm of the gradient by forward differences (Chambolle, JMIV 20, 2004, theorem 3.1).
_GRADIENT_NORM = 8.0


class TotalVariation(RestorationOperator):
    r"""The model of Rudin, Osher & Fatemi (Physica D 60, 1992), with channels that share their edges.

    .. math:: \arg\min_x \tfrac12 \lVert x - y \rVert^2 + \lambda \sum_q \Bigl(\sum_c |\nabla x_c(q)|^2\Bigr)^{1/2},
        \qquad \lambda = w\,\sigma_n

    for the weight w in units of the noise level (vectorial total variation; Bresson & Chan, Inverse Problems and
    Imaging 2, 2008). A fixed number of iterations of algorithm 2 of Chambolle & Pock (JMIV 40, 2011), through which
    autograd differentiates.

    Args:
        iterations: Number of primal-dual iterations.

    Raises:
        ValueError: If there is no iteration.

    Example:
        >>> restored = TotalVariation()(torch.rand(2, 3, 16, 12), noise=0.1, weight=0.8)
        >>> restored.shape
        torch.Size([2, 3, 16, 12])
    """

    def __init__(self, iterations: int = 30) -> None:
        super().__init__()
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        self.iterations = iterations

    @property
    def parameter_specs(self) -> tuple[ParameterSpec, ...]:
        """The weight."""
        return (ParameterSpec("weight", start=1.0, bounds=(0.02, 20.0), unit="noise"),)

    def forward(self, noisy: Tensor, *, noise: Noise, guide: Tensor | None = None, **parameters: Any) -> Tensor:
        """Restored images; see `RestorationOperator.forward`. A guide is refused: nothing is compared here.

        Shape:
            - noisy: `[B, C, H, W]`
            - noise: scalar, `[1]`, `[B]` or `[B, 1 or C, H, W]`
            - output: `[B, C, H, W]`
        """
        check_images(noisy)
        if guide is not None:
            raise ValueError("TotalVariation compares no pixels and takes no guide: leave it out")
        level = pixel_level(noise_level(noise, noisy))
        bound = per_image("weight", parameters["weight"], noisy).view(-1, 1, 1, 1) * level
        image = extrapolated = noisy
        rows, columns = torch.zeros_like(noisy), torch.zeros_like(noisy)  # the dual variable, by direction
        step = dual_step = _GRADIENT_NORM**-0.5
        for _ in range(self.iterations):
            rows = rows + dual_step * _difference(extrapolated, 2)
            columns = columns + dual_step * _difference(extrapolated, 3)
            # The floor keeps the root's derivative finite where a gradient, or the weight, is 0.
            length = (rows.square() + columns.square()).sum(1, keepdim=True).clamp_min(1e-24).sqrt()
            shrink = bound / torch.maximum(length, bound)
            rows, columns = rows * shrink, columns * shrink
            previous = image
            divergence = _adjoint_difference(rows, 2) + _adjoint_difference(columns, 3)
            image = (image + step * (noisy - divergence)) / (1 + step)
            inertia = (1 + 2 * step) ** -0.5
            step, dual_step = step * inertia, dual_step / inertia
            extrapolated = image + inertia * (image - previous)
        # Once more from the dual variable, from which the image follows exactly: a weight of 0 is the identity.
        return noisy - (_adjoint_difference(rows, 2) + _adjoint_difference(columns, 3))


def _difference(image: Tensor, axis: int) -> Tensor:
    """Forward differences along an axis, 0 at its end."""
    padding = (0, 0, 0, 1) if axis == 2 else (0, 1, 0, 0)
    return torch.nn.functional.pad(image.diff(dim=axis), padding)


def _adjoint_difference(field: Tensor, axis: int) -> Tensor:
    """Adjoint of `_difference`: minus the divergence's part along the axis."""
    inner = field.narrow(axis, 0, field.shape[axis] - 1)
    before, after = ((0, 0, 0, 1), (0, 0, 1, 0)) if axis == 2 else ((0, 1, 0, 0), (1, 0, 0, 0))
    return torch.nn.functional.pad(inner, after) - torch.nn.functional.pad(inner, before)
