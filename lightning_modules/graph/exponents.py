"""The parameters of the image operator as exponents of its kernels, and the way back for their gradients."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.graph.stencil import (
    FAR,
    StencilGeometry,
    Workspace,
    box_sum_,
    incident_sum,
    pair_sum,
    window_sum,
)
from lightning_modules.graph.topology import half_offsets
from lightning_modules.graph.weights import (
    GAUSSIAN_EXPONENT,
    MIN_SQUARED_WIDTH,
    cosine_cutoff,
    gaussian_exponent,
    white_noise_bias,
)

_TINY = torch.finfo(torch.float32).tiny  # beside a radius of 0, which joins nothing


class Exponents(NamedTuple):
    """The parameters as they enter the kernels, which are powers of two; or gradients of them.

    Attributes:
        bias: What noise is expected to add to a distance, `[B, M, 1]`, or `[B, M, n]` where noise is a map.
        similarity: a in S = 2^(a·D + within), `[B, 1, 1]`, or `[B, M, n]` where σ is a map.
        weight: b in W = 2^(b·D + spatial), `[B, 1, 1]`, or `[B, M, n]` where σ_f is a map.
        within: 0 for half offsets within reach, no similarity beyond, `[M]`.
        spatial: Of each half offset, `[B, M]`.
        tau: Step of each iteration, 0 after an image's own number of steps, `[B, k]`.
    """

    bias: Tensor
    similarity: Tensor
    weight: Tensor
    within: Tensor
    spatial: Tensor
    tau: Tensor

    @property
    def are_numbers(self) -> bool:
        """Whether none of them varies over the image."""
        return self.bias.shape[2] == 1 and self.similarity.shape[1:] == self.weight.shape[1:] == (1, 1)

    def of(self, part: slice) -> "Exponents":
        """Those of some images of the batch."""
        own = (value if name == "within" else value[part] for name, value in self._asdict().items())
        return Exponents(*own)


class Values(NamedTuple):
    """What the exponents are made of, in the precision and on the device of the images; or gradients of it.

    Attributes:
        noise: As `image_operator.diffuse_image` takes it, `[B]`, `[B, 1 or F, H, W]` or `[B, M]`.
        sigma: Width σ, `[B]` or `[B, 1, H, W]`.
        tau: Step τ, `[B]`.
        radius: Cut-off radius ρ, `[B]`.
        sigma_s: Spatial width σ_s, `[B]`.
        sigma_f: Width σ_f, `[B]` or `[B, 1, H, W]`.
    """

    noise: Tensor
    sigma: Tensor
    tau: Tensor
    radius: Tensor
    sigma_s: Tensor
    sigma_f: Tensor


def exponents_of(
    values: Values,
    counts: Tensor | None,
    num_steps: int,
    channels: int,
    reach: float,
    radius: float,
    geometry: StencilGeometry,
) -> Exponents:
    """Exponents of the kernels.

    Args:
        values: The parameters and the noise.
        counts: Number of steps of each image; None where all take `num_steps`.
        num_steps: The largest number of steps.
        channels: Number F of channels of the guide.
        reach: Largest distance of similar pixels.
        radius: Largest distance of joined pixels, by which a bias `[B, M]` is ordered.
        geometry: Of the guide.

    Shape:
        - counts: `[B]`
    """
    tau = values.tau[:, None].expand(-1, num_steps)
    if counts is not None:
        tau = tau * _is_taken(counts, tau)
    cutoff = cosine_cutoff(geometry.length, values.radius[:, None])
    # Beyond the radius no weight at all, exactly: a logarithm that has no derivative there, nor an infinity.
    log_cutoff = torch.where(cutoff > torch.finfo(cutoff.dtype).tiny, cutoff.log2(), -FAR)
    spatial = gaussian_exponent(values.sigma_s)[:, None] * geometry.squared_length + log_cutoff
    similarity, weight = (_width_exponent(width, geometry) for width in (values.sigma, values.sigma_f))
    bias = _bias(values.noise, channels, radius, geometry)
    return Exponents(bias, similarity, weight, geometry.within(reach), spatial, tau)


def exponents_backward(
    grads: Exponents,
    exponents: Exponents,
    values: Values,
    counts: Tensor | None,
    channels: int,
    radius: float,
    geometry: StencilGeometry,
) -> Values:
    """Gradients of what the exponents are made of, given those of the exponents; see `exponents_of`."""
    tau = grads.tau if counts is None else grads.tau * _is_taken(counts, grads.tau)
    radius_of = values.radius[:, None]
    joined = exponents.spatial > -FAR / 2
    # The cut-off is the square of a cosine, whose logarithm has a tangent for its derivative.
    slope = torch.where(joined, (geometry.length / radius_of * (math.pi / 2)).tan() * geometry.length, 0.0)
    through_radius = (grads.spatial * slope).sum(1) * (math.pi / math.log(2)) / values.radius.square().clamp_min(_TINY)
    through_spread = (grads.spatial * geometry.squared_length).sum(1)
    return Values(
        _bias_backward(grads.bias, values.noise, channels, radius, geometry),
        _width_backward(grads.similarity, values.sigma, geometry),
        tau.sum(1),
        through_radius,
        through_spread * _gaussian_slope(values.sigma_s),
        _width_backward(grads.weight, values.sigma_f, geometry),
    )


def bias_of(noise: Tensor, channels: int, geometry: StencilGeometry) -> Tensor:
    """What white noise of the levels `[B]` adds to the squared distances, `[B, M, 1]`."""
    bias = white_noise_bias(noise, channels * geometry.patch_size**2)
    return bias[:, None, None].expand(-1, len(geometry.offsets), 1)


def _is_taken(counts: Tensor, tau: Tensor) -> Tensor:
    return torch.arange(tau.shape[1], device=tau.device) < counts[:, None]


def _gaussian_slope(scale: Tensor) -> Tensor:
    """Derivative of `gaussian_exponent`."""
    square = scale.square()
    return torch.where(square >= MIN_SQUARED_WIDTH, -2 * GAUSSIAN_EXPONENT * scale / square.square(), 0.0)


def _mean_square(width: Tensor, geometry: StencilGeometry) -> Tensor:
    # Pairs that are not valid have no width; any will do.
    return pair_sum(width.square(), geometry) / 2 + (1 - geometry.valid)


def _width_exponent(width: Tensor, geometry: StencilGeometry) -> Tensor:
    """`gaussian_exponent` of numbers `[B]` as `[B, 1, 1]`, of maps `[B, 1, H, W]` as `[B, M, n]`."""
    if width.ndim == 1:
        return gaussian_exponent(width)[:, None, None]
    return GAUSSIAN_EXPONENT / _mean_square(width, geometry).clamp_min(MIN_SQUARED_WIDTH)


def _width_backward(grad: Tensor, width: Tensor, geometry: StencilGeometry) -> Tensor:
    if width.ndim == 1:
        return grad[:, 0, 0] * _gaussian_slope(width)
    square = _mean_square(width, geometry)
    slope = torch.where(square >= MIN_SQUARED_WIDTH, -GAUSSIAN_EXPONENT / square.square(), 0.0)
    return width * _pair_sum_backward(grad * slope, geometry)


def _pair_sum_backward(grad: Tensor, geometry: StencilGeometry) -> Tensor:
    through = grad * geometry.valid
    return geometry.unflatten(incident_sum(through, through, geometry)[:, None])


def _bias(noise: Tensor, channels: int, radius: float, geometry: StencilGeometry) -> Tensor:
    """What noise adds to the squared distances, `[B, M, 1 or n]`."""
    if noise.ndim == 1:
        return bias_of(noise, channels, geometry)
    if noise.ndim == 2:
        return noise[:, _kept(noise, radius, geometry), None]
    variance = noise.square()
    total = variance.sum(1, keepdim=True) if noise.shape[1] == channels else channels * variance
    return window_sum(pair_sum(total, geometry), geometry)


def _bias_backward(grad: Tensor, noise: Tensor, channels: int, radius: float, geometry: StencilGeometry) -> Tensor:
    if noise.ndim == 1:
        return grad.sum((1, 2)) * 4 * channels * geometry.patch_size**2 * noise
    if noise.ndim == 2:
        kept = torch.tensor(_kept(noise, radius, geometry), dtype=torch.long, device=noise.device)
        return torch.zeros_like(noise).index_copy_(1, kept, grad[:, :, 0])
    through = box_sum_((grad * geometry.scale).contiguous(), geometry.patch_size, geometry.pitch, Workspace())
    total = _pair_sum_backward(through, geometry)
    return 2 * noise * (total if noise.shape[1] == channels else channels * total)


def _kept(noise: Tensor, radius: float, geometry: StencilGeometry) -> list[int]:
    """Which of the offsets within the radius there are: small images have no pixels as far apart as some of them."""
    offsets = half_offsets(radius)
    if noise.shape[1] != len(offsets):
        raise ValueError(
            f"the bias of the distances must be [{len(noise)}, {len(offsets)}], one number for each image and each "
            f"offset within {radius:g} pixels, got {list(noise.shape)}"
        )
    return [index for index, offset in enumerate(offsets) if offset in geometry.offsets]
