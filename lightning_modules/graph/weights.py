"""From patch distances to similarities and edge weights."""

import math

import torch
from torch import Tensor

# Weight of a pixel's own patch in a step of the image operator; the other weights of the pixel are relative to it.
SELF_WEIGHT = 1e-3

# exp(−D / 2s²) = 2^(GAUSSIAN_EXPONENT · D / s²). Powers of two, because the exp that torch takes from MKL on x86 is
# fifty times as slow where it underflows, and most pairs of patches are that far apart.
GAUSSIAN_EXPONENT = -0.5 / math.log(2)

# Kernels narrower than the root of this let through what is alike to the last digit, and nothing else.
MIN_SQUARED_WIDTH = 1e-12


def underflow_threshold(dtype: torch.dtype) -> float:
    """Weights at or under this one count for nothing beside a node's own: the product of two is still a normal number.

    Arithmetic on subnormal numbers is a hundred times as slow on a CPU as on others, and the weights of unlike patches
    are full of them.
    """
    return math.sqrt(torch.finfo(dtype).tiny)


def flush_small(matrix: Tensor) -> Tensor:
    """The matrix with 0 for numbers so small that products of two of them are subnormal; see `underflow_threshold`.

    Shape:
        - matrix: any
        - output: as matrix
    """
    return torch.nn.functional.hardshrink(matrix, 1.01 * underflow_threshold(matrix.dtype))


def white_noise_bias(noise_std: Tensor, dimension: int) -> Tensor:
    r"""What white noise is expected to add to the squared distance of two patches, :math:`2 d \sigma_n^2`.

    Args:
        noise_std: Noise standard deviation σ_n in the unit of the pixels.
        dimension: Dimension d of a patch vector.

    Shape:
        - noise_std: any
        - output: as noise_std
    """
    return 2 * dimension * noise_std**2


def debias_distance(distance: Tensor, bias: Tensor) -> Tensor:
    r"""Squared patch distance without the part that noise is expected to add.

    .. math:: D_{ij} = \max(\lVert p_i - p_j \rVert^2 - \mathrm{bias}, 0)

    as in Buades, Coll & Morel, "Non-local means denoising", IPOL 2011, section 3.

    Args:
        distance: Squared L2 distances of noisy patches.
        bias: What noise adds to them; see `white_noise_bias`.

    Shape:
        - distance: any
        - bias: broadcastable to distance
        - output: as distance
    """
    return (distance - bias).clamp_min(0)


def gaussian_exponent(scale: Tensor) -> Tensor:
    """Factor a of a squared distance D in exp(−D / 2s²) = 2^(a·D); finite, as is its gradient, where the width s is 0.

    Shape:
        - scale: any
        - output: as scale
    """
    return GAUSSIAN_EXPONENT / scale.square().clamp_min(MIN_SQUARED_WIDTH)


def gaussian(distance: Tensor, scale: Tensor) -> Tensor:
    r"""Gaussian kernel :math:`\exp(-D / 2 s^2)` of a squared distance, not below `underflow_threshold`.

    Args:
        distance: Squared distances D.
        scale: Kernel width s in the unit of √D, positive.

    Shape:
        - distance, scale: broadcastable to each other
        - output: their broadcast shape
    """
    exponent = (distance * gaussian_exponent(scale)).clamp_min(math.log2(underflow_threshold(distance.dtype)))
    return exponent.exp2_()


def cosine_cutoff(length: Tensor, radius: Tensor) -> Tensor:
    r"""Smooth cut-off :math:`\tfrac12 (1 + \cos(\pi r / \rho))` for r < ρ, 0 beyond.

    Its derivative with respect to ρ lets a radius be learned inside a fixed topology (Behler, J. Chem. Phys. 134,
    074106, 2011, equation 4).

    Args:
        length: Edge lengths r in pixels.
        radius: Cut-off radius ρ in pixels, positive.

    Shape:
        - length, radius: broadcastable to each other
        - output: their broadcast shape
    """
    ratio = (length / radius).clamp_max(1)
    return 0.5 * (1 + torch.cos(math.pi * ratio))


def spatial_weight(length: Tensor, sigma_s: Tensor, radius: Tensor) -> Tensor:
    r"""The factor of an edge weight that depends on the edge's length only.

    .. math:: \exp(-r^2 / 2\sigma_s^2) \, \mathrm{cutoff}(r / \rho)

    Args:
        length: Edge lengths r in pixels.
        sigma_s: Spatial width in pixels.
        radius: Cut-off radius ρ in pixels.

    Shape:
        - all arguments: broadcastable to each other
        - output: their broadcast shape
    """
    return gaussian(length**2, sigma_s) * cosine_cutoff(length, radius)


def edge_weight(distance: Tensor, length: Tensor, sigma_s: Tensor, sigma_f: Tensor, radius: Tensor) -> Tensor:
    r"""Bilateral edge weight with a smooth cut-off.

    .. math:: W_{ij} = \exp(-\lVert c_i - c_j\rVert^2 / 2\sigma_s^2) \exp(-D_{ij} / 2\sigma_f^2)\,
              \mathrm{cutoff}(\lVert c_i - c_j\rVert / \rho)

    Args:
        distance: Squared patch distances D.
        length: Edge lengths ‖c_i − c_j‖ in pixels.
        sigma_s: Spatial width in pixels.
        sigma_f: Patch-distance width.
        radius: Cut-off radius ρ in pixels.

    Shape:
        - all arguments: broadcastable to each other
        - output: their broadcast shape
    """
    return gaussian(distance, sigma_f) * spatial_weight(length, sigma_s, radius)
