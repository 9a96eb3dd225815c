"""Noise models of noisy images: of each image, or of all images of a camera together."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.noise.blocks import Bands, Blocks, frequency_bands, read_blocks
from lightning_modules.noise.em import (
    NoiseParameters,
    class_shares,
    fit_noise,
    limit_slope,
    prior_statistics,
    start_parameters,
)
from lightning_modules.noise.estimate import estimate_noise_std
from lightning_modules.noise.model import NoiseModel

_STEPS = 30
# How many blocks as flat as the start has found them count as a prior, against slopes that few brightnesses show.
_PRIOR_BLOCKS = 8.0
# Of a group's blocks, the flattest shares of 1, 1/2, ... 1/64 are averaged, but no fewer than so many.
_NUM_SHARES, _MIN_BLOCKS = 7, 24
# Brightnesses are grouped by so many blocks.
_GROUP_SIZE, _MAX_GROUPS = 256, 8
# Blocks overlap: the standard error of their mean is so many times what it would be.
_OVERLAP = 3.0
_AGREEMENT = 2.0
# What texture adds to the floor of a group counts less than what a line of variances would have to take off it.
_ABOVE = 0.25
_MAX_FLAT = 1024  # blocks without texture that the spectrum is taken from
_FILTER_RADIUS = 5


class _Evidence(NamedTuple):
    """What an image shows: mean colors and energies of its blocks in rings of frequencies, and the blocks themselves."""

    means: Tensor
    energies: Tensor
    blocks: Blocks
    bands: Bands


def _look(image: Tensor) -> _Evidence | None:
    blocks = read_blocks(image)
    bands = frequency_bands(blocks.coefficients.shape[-1], image.device, torch.float64)
    if len(blocks.means) < _MIN_BLOCKS or not len(bands.count):
        return None
    blocks = Blocks(blocks.means.double(), blocks.coefficients.double())
    return _Evidence(blocks.means, blocks.energies(bands), blocks, bands)


def _flattest(chooser: Tensor, measured: Tensor) -> Tensor:
    """Blocks that are as flat as the flattest, by Lepski's rule as in `estimate_noise_std`.

    Shape:
        - chooser, measured: `[N]`
        - output: `[M]`
    """
    order = chooser.argsort(stable=True)
    values = measured[order]
    counts = sorted({min(max(len(order) >> share, _MIN_BLOCKS), len(order)) for share in range(_NUM_SHARES)})
    means = torch.stack([values[:count].mean() for count in counts])
    errors = _OVERLAP * torch.stack([values[:count].std() / count**0.5 for count in counts])
    agrees = means - _AGREEMENT * errors <= (means + _AGREEMENT * errors).min()
    return order[: max(count for count, agree in zip(counts, agrees.tolist(), strict=True) if agree)]


def _start(evidence: _Evidence) -> NoiseParameters:
    """Noise of the flattest blocks of each brightness: chosen by half of the frequencies, measured by the others.

    Frequencies of noise are nearly independent, so that the choice leaves what is measured as it is.
    """
    means, _, blocks, bands = evidence
    step = torch.arange(blocks.coefficients.shape[-1], device=means.device)
    even = ((step[:, None] + step) % 2 == 0).to(means)
    halves = [
        bands._replace(member=bands.member * part[..., None], count=torch.einsum("uvf,uv->f", bands.member, part))
        for part in (even, 1 - even)
    ]
    energies = [blocks.energies(half) for half in halves]
    share = bands.count / bands.count.sum()
    light = means.mean(1)
    num_groups = min(max(len(light) // _GROUP_SIZE, 1), _MAX_GROUPS)
    groups = light.argsort(stable=True).tensor_split(num_groups)
    spectrum = torch.ones_like(energies[0][0])
    for _ in range(2):
        weight = share / spectrum
        floors, lights, sizes = [], [], []
        for group in groups:
            for chooser, measured in (energies, energies[::-1]):
                key = (chooser[group] * weight).sum(-1).mean(1)
                chosen = group[_flattest(key, (measured[group] * weight).sum(-1).mean(1))]
                floors.append((measured[chosen] * share).sum(-1).mean(0))
                lights.append(means[chosen].mean(0))
                sizes.append(len(chosen))
        ends = _lower_line(torch.stack(lights), torch.stack(floors))
        variance = ends[0] * (1 - means) + ends[1] * means
        unit = [each / variance[..., None] for each in energies]
        found = []
        for chooser, measured in (unit, unit[::-1]):
            chosen = _flattest((chooser * weight).sum(-1).mean(1), (measured * weight).sum(-1).mean(1))
            found.append(measured[chosen].mean(0))
        spectrum = limit_slope(torch.stack(found).mean(0), bands)
        scale = (spectrum * share).sum(1)
        spectrum, ends = spectrum / scale[:, None], ends * scale
    return start_parameters(ends, spectrum, bands)


def _lower_line(light: Tensor, floor: Tensor) -> Tensor:
    """Variances at black and at white of the line under the floors: of those through two of them, and of the level
    ones, the one that floors under it and, less, floors above it are nearest to.

    Shape:
        - light, floor: `[G, C]`
        - output: `[2, C]`
    """
    ends = []
    for x, y in zip(light.T, floor.clamp_min(1e-12).T, strict=True):
        first, second = (
            torch.combinations(torch.arange(len(x)), 2).T if len(x) > 1 else (torch.tensor([], dtype=torch.long),) * 2
        )
        apart = (x[first] - x[second]).abs() > 0.02
        first, second = first[apart], second[apart]
        slope = (y[first] - y[second]) / (x[first] - x[second])
        black = torch.cat([y[first] - slope * x[first], y])
        white = torch.cat([y[first] + slope * (1 - x[first]), y])
        least = 0.02 * y.min()
        black, white = black.clamp_min(least), white.clamp_min(least)
        line = black[:, None] * (1 - x) + white[:, None] * x
        distance = (y / line).log()
        cost = torch.where(distance > 0, _ABOVE * distance, -distance).sum(1)
        best = cost.argmin()
        ends.append(torch.stack([black[best], white[best]]))
    return torch.stack(ends, 1)


def _fit(
    evidence: Sequence[_Evidence], start: NoiseParameters, prior: NoiseParameters, num_blocks: float
) -> NoiseParameters:
    pairs = [(each.means, each.energies) for each in evidence]
    bands = evidence[0].bands
    return fit_noise(pairs, bands, start, prior_statistics(prior, num_blocks), _STEPS)[0]


def _model(evidence: _Evidence, parameters: NoiseParameters, brightness: Tensor) -> NoiseModel:
    """The noise model of EM's parameters, with the spectrum of the blocks that have no texture."""
    means, energies, blocks, bands = evidence
    share = class_shares(means, energies, bands, parameters)[:, 0]
    flattest = share.topk(min(len(share), _MAX_FLAT)).indices
    share, means = share[flattest], means[flattest]
    variance = parameters.ends[0] * (1 - means) + parameters.ends[1] * means
    unit = blocks.coefficients[flattest] / variance.sqrt()[..., None, None]
    unit = unit * ((share + 1e-9) / (share + 1e-9).sum()).sqrt()[:, None, None, None]
    power = torch.einsum("ncuv,nduv->cduv", unit, unit)
    # each ring has the power that EM has found
    seen = torch.einsum("ccuv,uvf->cf", power, bands.member) / bands.count
    factor = torch.einsum("cf,uvf->cuv", (parameters.spectrum / seen.clamp_min(1e-12)).sqrt(), bands.member)
    power = power * factor[:, None] * factor
    # and what is under them, where there is shading, goes on as they begin
    size = power.shape[-1]
    step = torch.arange(size).to(means)
    frequency = (step.square() + step[:, None].square()).sqrt().clamp_min(0.5) / size
    first = torch.einsum("cduv,uv->cd", power, bands.member[..., 0]) / bands.count[0]
    slope = parameters.spectrum[:, 0].mean().log() - parameters.spectrum[:, 1].mean().log()
    slope = (slope / (bands.frequency[1] / bands.frequency[0]).log()).clamp(0, 1)
    inner = first[..., None, None] * (bands.frequency[0] / frequency) ** slope
    power = torch.where(bands.member.sum(-1) > 0, power, inner)
    total = torch.einsum("ccuv->c", power) / size**2
    ends = parameters.ends * total
    kernel = _filter(power / (total[:, None] * total).sqrt()[..., None, None])
    numbers = (ends[1] - ends[0], ends[0], brightness)
    return NoiseModel(*(number[None].float() for number in numbers), kernel[None].float())


def _filter(power: Tensor) -> Tensor:
    """The symmetric filter that makes noise of this power of white noise, its rows of norm 1.

    Shape:
        - power: by frequencies of the cosine transform, `[C, C, n, n]`
        - output: `[C, C, K, K]`
    """
    size = power.shape[-1]
    frequency = torch.arange(-size, size, device=power.device).abs().clamp_max(size - 1)
    whole = power[..., frequency[:, None], frequency].movedim((0, 1), (2, 3))
    values, vectors = torch.linalg.eigh(whole)
    least = 1e-4 * values.amax(dim=(0, 1, 2))
    root = vectors @ torch.diag_embed(values.clamp_min(least).sqrt()) @ vectors.mT
    response = torch.fft.ifftshift(root, dim=(0, 1))
    kernel = torch.fft.fftshift(torch.fft.ifft2(response, dim=(0, 1)).real, dim=(0, 1)).movedim((2, 3), (0, 1))
    radius = min(_FILTER_RADIUS, size - 1)
    near = slice(size - radius, size + radius + 1)
    kernel = kernel[..., near, near]
    return kernel / kernel.square().sum((1, 2, 3), keepdim=True).sqrt()


@torch.no_grad()
def estimate_noise_model(images: Tensor, kind: str = "auto") -> NoiseModel:
    """The noise of each image, from the image alone.

    Args:
        images: Noisy images.
        kind: `"white"`, as `estimate_noise_std`; `"camera"`, whose variance is a line over the brightness and which is
            correlated; or `"auto"`, whichever it is.

    Shape:
        - images: `[B, C, H, W]`
        - output: a model of B images

    Raises:
        ValueError: If the images are smaller than 2×2 pixels or not finite, or the kind is none of these.
    """
    if kind not in ("auto", "white", "camera"):
        raise ValueError(f"the kind of noise must be 'auto', 'white' or 'camera', got {kind!r}")
    if not bool(images.isfinite().all()):
        raise ValueError("the images have NaN or infinite pixels, of which no noise can be read: replace them")
    white = NoiseModel.white(estimate_noise_std(images), images.shape[1])
    if kind == "white":
        return white
    return _stack([_of_image(image, white.of(index), kind) for index, image in enumerate(images)])


def _of_image(image: Tensor, white: NoiseModel, kind: str) -> NoiseModel:
    evidence = _look(image)
    if evidence is None:
        return white
    start = _start(evidence)
    found = _fit([evidence], start, start, _PRIOR_BLOCKS)
    model = _model(evidence, found, image.mean((1, 2)).double())
    return model if kind == "camera" or _is_camera(model, white) else white


def _is_camera(model: NoiseModel, white: NoiseModel) -> bool:
    return bool(model.level > 1.3 * white.level)


def _stack(models: list[NoiseModel]) -> NoiseModel:
    """Models of single images as one, their filters as large as the largest."""
    side = max(model.kernel.shape[-1] for model in models)
    kernels = []
    for model in models:
        around = (side - model.kernel.shape[-1]) // 2
        kernels.append(torch.nn.functional.pad(model.kernel, (around,) * 4))
    numbers = zip(*((model.slope, model.intercept, model.brightness) for model in models), strict=True)
    return NoiseModel(*(torch.cat(number) for number in numbers), torch.cat(kernels))
