"""Restoration under a prior of filters, all of which are parameters."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.operators.operator import (
    Noise,
    ParameterSpec,
    RestorationOperator,
    check_images,
    noise_level,
    per_image,
    pixel_level,
)

# Width and responses of the penalty under which their quotient would have no digits.
_LEAST = 1e-12


class FieldOfExperts(RestorationOperator):
    r"""A field of experts (Roth & Black, IJCV 82, 2009): images whose filter responses are few and large.

    .. math:: E(x) = \tfrac12 \lVert x - y \rVert^2 + \sum_k w_k \sum_q \rho_k\bigl((f_k * x)(q)\bigr), \qquad
        \rho_k(r) = \tfrac12 a_k^2 \sigma_n^2 \log\Bigl(1 + \frac{r^2}{a_k^2 \sigma_n^2}\Bigr)

    with the penalty of Student's t distribution, the widths a in units of the noise level, and filters f without mean,
    which each channel is filtered by. A fixed number of steps down the gradient, from the noisy image and each of a
    length of its own, through which autograd differentiates (Chen, Ranftl & Pock, IEEE TIP 23, 2014, learn such a prior
    by bilevel optimization; Chen & Pock, IEEE TPAMI 39, 2017, unroll it).

    Its banks hold some thousand numbers: `callbacks.GradientRule`, or `NewtonRule`, which takes them in blocks.

    Args:
        num_filters: Number of filters.
        filter_size: Side of a filter, in pixels, odd.
        iterations: Number of steps.

    Raises:
        ValueError: If a number is not positive, the side is even, or there are more filters than a basis has.

    Example:
        >>> operator = FieldOfExperts(num_filters=8, filter_size=3, iterations=2)
        >>> theta = {spec.name: list(spec.starts) for spec in operator.parameter_specs}
        >>> operator(torch.rand(2, 3, 16, 12), noise=0.1, **theta).shape
        torch.Size([2, 3, 16, 12])
    """

    def __init__(self, num_filters: int = 24, filter_size: int = 7, iterations: int = 8) -> None:
        super().__init__()
        if filter_size < 3 or filter_size % 2 == 0:
            raise ValueError(f"filter_size must be odd and at least 3, got {filter_size}")
        if not 1 <= num_filters < filter_size**2:
            raise ValueError(f"num_filters must be between 1 and {filter_size**2 - 1}, got {num_filters}")
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        self.num_filters = num_filters
        self.filter_size = filter_size
        self.iterations = iterations
        #: how far a restored pixel looks
        self.halo = iterations * (filter_size - 1)

    @property
    def parameter_specs(self) -> tuple[ParameterSpec, ...]:
        """Filters, one after the other, their weights and widths, and the length of each step."""
        size, count = self.filter_size**2, self.num_filters
        filters = _cosines(self.filter_size)[1 : count + 1].flatten().tolist()
        # A step of 1 is the longest that is stable for all experts of weight 1/size, each a filter of norm 1.
        return (
            ParameterSpec("filters", filters, (-1.0, 1.0), (count * size,), scale=0.1, picture=(self.filter_size,) * 2),
            ParameterSpec("weights", 1.0 / size, (1e-3 / size, 100.0 / size), (count,)),
            ParameterSpec("widths", 2.0, (0.05, 50.0), (count,), unit="noise"),
            ParameterSpec("lengths", 0.5, (0.01, 2.0), (self.iterations,)),
        )

    def forward(self, noisy: Tensor, *, noise: Noise, guide: Tensor | None = None, **parameters: Any) -> Tensor:
        """Restored images; see `RestorationOperator.forward`. A guide is refused: nothing is compared here.

        Shape:
            - noisy: `[B, C, H, W]`
            - noise: scalar, `[1]`, `[B]` or `[B, 1 or C, H, W]`
            - output: `[B, C, H, W]`
        """
        check_images(noisy)
        if guide is not None:
            raise ValueError("FieldOfExperts compares no pixels and takes no guide: leave it out")
        filters, weights, widths, lengths = (
            per_image(spec.name, parameters[spec.name], noisy, spec.size) for spec in self.parameter_specs
        )
        side, margin = self.filter_size, self.filter_size // 2
        filters = filters.unflatten(1, (self.num_filters, side**2))
        filters = filters - filters.mean(2, keepdim=True)
        level = pixel_level(noise_level(noise, noisy)).flatten(2)  # [B, 1, 1], or of a map [B, 1, H·W]
        square = (widths[:, :, None] * level).square()[:, None].clamp_min(_LEAST)
        strength = weights[:, None, :, None]
        size, (height, width) = noisy.shape[:2], noisy.shape[2:]
        restored = noisy
        for step in range(self.iterations):
            # Each channel's patches as columns [B, C, side², H·W]: one product with the filters, and one back.
            padded = F.pad(restored.flatten(0, 1)[:, None], (margin,) * 4, mode="replicate")
            patches = F.unfold(padded, side).unflatten(0, size)
            response = filters[:, None] @ patches
            force = strength * response * square / (square + response.square())
            back = (filters.mT[:, None] @ force).flatten(0, 1)
            pull = F.fold(back, (height + 2 * margin, width + 2 * margin), side)
            pull = pull[:, 0, margin : margin + height, margin : margin + width].unflatten(0, size)
            restored = restored - lengths[:, step].view(-1, 1, 1, 1) * (pull + restored - noisy)
        return restored


def _cosines(side: int) -> Tensor:
    """The two-dimensional cosine transform's basis, `[side², side²]`, each of norm 1, low frequencies first."""
    place = torch.arange(side, dtype=torch.float64)
    waves = torch.cos(math.pi * (place + 0.5) * place[:, None] / side)
    waves = waves / waves.norm(dim=1, keepdim=True)
    basis = torch.einsum("ai,bj->abij", waves, waves).reshape(side**2, side**2)
    order = (place[:, None] ** 2 + place**2).flatten().argsort(stable=True)
    return basis[order]
