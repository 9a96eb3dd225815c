"""Line of the variances of white noise over the brightness, pixel by pixel, where black and white are clipped."""

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from lightning_modules.noise.estimate import COLORS

_NUM_PIXELS, _STRIP = 2**17, 64  # of larger images, so many are looked at, in strips of so many rows
_NUM_GROUPS, _MIN_PIXELS = 48, 2048
_NUM_ROUNDS, _NUM_STEPS = 3, 100
# Pixels are left out that are fewer standard deviations from black or white, or around which the brightness varies by
# so many times what noise makes it vary.
_FROM_END, _MAX_TEXTURE = 1.5, 1.0
_NEAR, _AROUND = 3, 9  # sides of the squares over which the brightness is averaged
_GRID = 512


def refine_line(image: Tensor, ends: Tensor) -> Tensor:
    r"""Variances at black and at white of noise that is white and each channel's own, from a first guess of them.

    The energy e of details of 3×3 pixels has the expectation :math:`a \bar x + b` at their mean brightness, where there
    is no texture: in the opponent colors, where their mean is about that of the larger square around. Pixels are
    grouped by the mean of that larger square without the small one, whose noise is independent of both e and
    :math:`\bar x`, so that the means over the groups are on the line but for clipping. What clipping takes from the
    variance, and what it adds to the mean, is given back under the line of the round before. The line through the
    groups is the most likely one where energies are gamma distributed.

    Args:
        image: The noisy image.
        ends: First guess.

    Shape:
        - image: `[C, H, W]`
        - ends: `[2]`
        - output: `[2]`; `ends` where too few pixels are left
    """
    height, width = image.shape[1:]
    if min(height, width) < _AROUND:
        return ends
    rows = _STRIP if height * width > _NUM_PIXELS and height > _STRIP else height
    count = max(_NUM_PIXELS // (rows * width), 1) if rows < height else 1
    starts = torch.linspace(0, height - rows, count).long().tolist()
    pixels = torch.stack([image[:, start : start + rows] for start in starts]).float()
    axes = (torch.tensor(COLORS)[1:] if len(image) == 3 else torch.eye(len(image))).to(pixels)
    mixed = torch.einsum("kc,bchw->bkhw", axes, pixels)
    border = (_AROUND - _NEAR) // 2
    inner = mixed[..., border : rows - border, border : width - border]
    details = conv2d(inner.flatten(0, 1)[:, None], _details(pixels)).square().mean(1)
    details = details.unflatten(0, inner.shape[:2]).movedim(0, 1).flatten(1)

    def averages(images: Tensor) -> tuple[Tensor, Tensor]:
        near = avg_pool2d(images[..., border : rows - border, border : width - border], _NEAR, 1)
        return near.movedim(0, 1).flatten(1), avg_pool2d(images, _AROUND, 1).movedim(0, 1).flatten(1)

    near, around = averages(pixels)
    small, large = (side**2 for side in (_NEAR, _AROUND))
    outer = (large * around - small * near) / (large - small)
    contrast = torch.sub(*averages(mixed)).square().mean(0)
    shares = axes.square()
    found = ends.to(pixels)
    for _ in range(_NUM_ROUNDS):
        grid = torch.linspace(-0.1, 1.1, _GRID).to(pixels)
        mean, variance = _clipped(grid, _on_line(found, grid))
        light = _interpolate(outer, mean, grid)
        true, seen = _on_line(found, light), _interpolate(outer, mean, variance)
        kept = (torch.minimum(light, 1 - light) > _FROM_END * true.sqrt()).all(0)
        kept &= contrast < _MAX_TEXTURE * (shares @ true).mean(0) * (1 / small - 1 / large)
        if int(kept.sum()) < _MIN_PIXELS:
            return ends
        energies = (details * (shares @ true) / (shares @ seen))[:, kept].flatten()
        brightness = (shares @ (near + light - outer))[:, kept].flatten()
        order = (shares @ light)[:, kept].flatten().argsort(stable=True)
        groups = order.tensor_split(_NUM_GROUPS)
        x = torch.stack([brightness[group].mean() for group in groups])
        found = _gamma_line(x, torch.stack([energies[group].mean() for group in groups]), found)
    return found.to(ends)


def _details(like: Tensor) -> Tensor:
    """Orthonormal filters of 3×3 pixels whose mean square is the same at all of them, `[4, 1, 3, 3]`."""
    lines = torch.tensor([[1.0, 0, -1], [1, -2, 1]]).to(like)
    lines = lines / lines.norm(dim=1, keepdim=True)
    return torch.einsum("ih,jw->ijhw", lines, lines).reshape(4, 1, 3, 3)


def _on_line(ends: Tensor, light: Tensor) -> Tensor:
    return (ends[0] * (1 - light) + ends[1] * light).clamp_min(1e-8)


def _clipped(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a normal variable that is clipped to [0, 1]."""
    deviation = variance.sqrt()
    low, high = -mean / deviation, (1 - mean) / deviation
    density = [(-z.square() / 2).exp() / math.sqrt(2 * math.pi) for z in (low, high)]
    inside, above = torch.special.ndtr(high) - torch.special.ndtr(low), torch.special.ndtr(-high)
    first = mean * inside + deviation * (density[0] - density[1]) + above
    second = (mean.square() + variance) * inside + above
    second = second + deviation * (mean * density[0] - (mean + 1) * density[1])
    return first, (second - first.square()).clamp_min(1e-10)


def _interpolate(at: Tensor, places: Tensor, values: Tensor) -> Tensor:
    right = torch.searchsorted(places, at).clamp(1, len(places) - 1)
    left = right - 1
    share = ((at - places[left]) / (places[right] - places[left]).clamp_min(1e-12)).clamp(0, 1)
    return values[left] + share * (values[right] - values[left])


def _gamma_line(light: Tensor, energy: Tensor, start: Tensor) -> Tensor:
    """The line under which energies that are spread around it by the gamma distribution are most likely, by the
    multiplicative rule of `em.m_step`.
    """
    ramps = torch.stack([1 - light, light])
    ends = start.clamp_min(1e-8)
    for _ in range(_NUM_STEPS):
        line = ends @ ramps
        ends = (ends * ((ramps @ (energy / line.square())) / (ramps @ (1 / line))).sqrt()).clamp_min(1e-8)
    return ends
