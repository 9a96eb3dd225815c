"""Noise models of noisy images: of each image, or of all images of a camera together."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from lightning_modules.noise.blocks import Bands, Blocks, frequency_bands, read_blocks
from lightning_modules.noise.camera_level import LEAST_LEVEL, describe_image, trained_camera_level
from lightning_modules.noise.em import (
    LEAST_VARIANCE,
    NoiseParameters,
    class_shares,
    fit_noise,
    limit_slope,
    prior_statistics,
    start_parameters,
)
from lightning_modules.noise.estimate import COLORS, estimate_noise_std
from lightning_modules.noise.model import NoiseModel
from lightning_modules.noise.variance_line import refine_line

_STEPS = 20
# How many blocks as flat as the start has found them count as a prior, against slopes that few brightnesses show.
_PRIOR_BLOCKS = 8.0
# A camera's tone curve leaves less between black and white: lines of variances are no steeper, and this share of
# the blocks holds them level.
_STEEPEST_LINE, _CAMERA_SHARE = 10.0, 0.01
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
# High frequencies, in units of half the sampling rate, where there is little texture.
_FINE = 0.4
# Colors show noise where at least this share of the blocks has no texture, and the flattest of them differ no more than
# by this factor beyond chance; the whole shows a camera's where this share has none, a smaller one where simulated
# cameras are asked as well, and the flattest are as flat.
_ALIKE, _MAX_SPREAD = 0.25, 2.2
_CAMERA_ALIKE, _LEARNED_ALIKE, _MAX_DECLINE, _MAX_CAMERA_SPREAD = 0.18, 0.14, 1.3, 10.0
# Simulated cameras speak for noise where the level that they speak for is above this, by so many standard deviations;
# by themselves where it is above the second, and that of its logarithm is small; against white noise and noise of the
# colors if it is so many times as much; and for a share of the blocks that EM has not found where it is above the last,
# and that of its logarithm no larger than in texture that they take for noise.
_LEAST_LEARNED, _SURE, _LEAST_SURE, _MAX_DOUBT, _MUCH_MORE = 1.0 / 255, 2.0, 2.0 / 255, 0.1, 1.5
_LEAST_ALONE, _MAX_DOUBT_ALONE = 3.0 / 255, 0.16
# Standard deviation of the logarithm of EM's level, beside that of the learned one; and by which factor it is higher
# where it counts no longer.
_EM_DOUBT, _MAX_DISAGREEMENT = 0.2, 3.0
# Level of cameras in units of what both make of it: the median of every second pair of PolyU is 1.1, that of simulated
# cameras 1.03; between the two.
_REAL = 1.06
# What a camera has left at high frequencies, at most, in units of the mean.
_MAX_FINE = 0.17
# Less noise than this is none; more than that in the colors is more than a camera leaves there.
_LEAST_LEVEL, _MAX_CAMERA_COLOR = 0.6 / 255, 2.5 / 255
# White noise is about as strong at low frequencies as at high ones, and in the light as in the dark.
_MAX_WHITE_RATIO, _MIN_VARIANCE_RATIO = 1.8, 1.35
# Shares of the blocks that are darker than the brightnesses between which the second is measured; under which
# level single pixels would take texture of the colors for noise; and over which few of them are never clipped.
_DARK_LIGHT, _LEAST_LINE, _MOST_LINE = (0.05, 0.95), 8 / 255, 32 / 255
_SQUARE = 16  # pixels over which the light is averaged where there are no blocks
# What the estimate of white noise says of it, at least, in units of what the colors show.
_WHITE_SHARE = 0.7
# Power of the frequency with which independent noise falls, at most, where shading begins.
_GENTLEST = 0.5
_POOLED_BLOCKS = 256.0  # of one image, that the noise of all images of its camera counts as
_MAX_FITTED = 1024  # blocks, evenly spread, that EM looks at


class _Evidence(NamedTuple):
    """What an image shows: its blocks, their mean colors, and their energies in rings of frequencies."""

    means: Tensor
    energies: Tensor
    blocks: Blocks
    bands: Bands


def _look(image: Tensor) -> _Evidence | None:
    blocks = read_blocks(image)
    bands = frequency_bands(blocks.coefficients.shape[-1], image.device, torch.float64)
    if len(blocks.means) < _MIN_BLOCKS or not len(bands.width):
        return None
    blocks = Blocks(blocks.means.double(), blocks.coefficients.float())
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
    agreeing = [count for count, agree in zip(counts, agrees.tolist(), strict=True) if agree]
    return order[: max(agreeing, default=counts[0])]


def _start(evidence: _Evidence, steepest: float = 1e6) -> NoiseParameters:
    """Noise of the flattest blocks of each brightness: chosen by half of the frequencies, measured by the others.

    Frequencies of noise are nearly independent, so that the choice leaves what is measured as it is.
    """
    means, _, blocks, bands = evidence
    halves = _halves(bands)
    energies = [blocks.energies(half) for half in halves]
    share = bands.width / bands.width.sum()
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
        ends = _lower_line(torch.stack(lights), torch.stack(floors), steepest)
        variance = ends[0] * (1 - means) + ends[1] * means
        unit = [each / variance[..., None] for each in energies]
        found = []
        for chooser, measured in (unit, unit[::-1]):
            chosen = _flattest((chooser * weight).sum(-1).mean(1), (measured * weight).sum(-1).mean(1))
            found.append(measured[chosen].mean(0))
        spectrum = limit_slope(torch.stack(found).mean(0), bands)
        spectrum = spectrum.clamp_min(1e-4 * spectrum.amax(1, keepdim=True)).clamp_min(1e-12)
        scale = (spectrum * share).sum(1)
        spectrum, ends = spectrum / scale[:, None], ends * scale
    return start_parameters(ends, spectrum, bands)


def _lower_line(light: Tensor, floor: Tensor, steepest: float) -> Tensor:
    """Variances at black and at white of the line under the floors: of those through two of them, and of the level
    ones, the one that floors under it and, less, floors above it are nearest to.

    Shape:
        - light, floor: `[G, C]`
        - output: `[2, C]`
    """
    ends = []
    for x, y in zip(light.T, floor.clamp_min(LEAST_VARIANCE).T, strict=True):
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
        ratio = torch.maximum(black / white, white / black)
        cost = cost.masked_fill(ratio > steepest, torch.inf)
        best = cost.argmin()
        ends.append(torch.stack([black[best], white[best]]))
    return torch.stack(ends, 1)


def _fit(
    evidence: Sequence[_Evidence], start: NoiseParameters, prior: NoiseParameters, num_blocks: float
) -> NoiseParameters:
    pairs = []
    for each in evidence:
        few = torch.linspace(0, len(each.means) - 1, min(len(each.means), _MAX_FITTED)).long()
        pairs.append((each.means[few], each.energies[few]))
    bands = evidence[0].bands
    return fit_noise(pairs, bands, start, prior_statistics(prior, num_blocks), _STEPS)[0]


def _model(evidence: _Evidence, parameters: NoiseParameters, brightness: Tensor, steepest: float = 1.0) -> NoiseModel:
    """The noise model of EM's parameters, with the spectrum of the blocks that have no texture."""
    means, energies, blocks, bands = evidence
    share = class_shares(means, energies, bands, parameters)[:, 0]
    flattest = share.topk(min(len(share), _MAX_FLAT)).indices
    share, means = share[flattest], means[flattest]
    variance = parameters.ends[0] * (1 - means) + parameters.ends[1] * means
    unit = blocks.coefficients[flattest].double() / variance.sqrt()[..., None, None]
    unit = unit * ((share + 1e-9) / (share + 1e-9).sum()).sqrt()[:, None, None, None]
    power = torch.einsum("ncuv,nduv->cduv", unit, unit)
    # each ring has the power that EM has found
    seen = torch.einsum("ccuv,uvf->cf", power, bands.member) / bands.width
    factor = torch.einsum("cf,uvf->cuv", (parameters.spectrum / seen.clamp_min(1e-12)).sqrt(), bands.member)
    power = power * factor[:, None] * factor
    # and what is under them, where there is shading, goes on as they begin
    size = power.shape[-1]
    step = torch.arange(size).to(means)
    frequency = (step.square() + step[:, None].square()).sqrt().clamp_min(0.5) / size
    first = torch.einsum("cduv,uv->cd", power, bands.member[..., 0]) / bands.width[0]
    slope = parameters.spectrum[:, 0].mean().log() - parameters.spectrum[:, 1].mean().log()
    slope = (slope / (bands.frequency[1] / bands.frequency[0]).log()).clamp(0, steepest)
    inner = first[..., None, None] * (bands.frequency[0] / frequency) ** slope
    power = torch.where(bands.member.sum(-1) > 0, power, inner)
    total = torch.einsum("ccuv->c", power) / size**2
    ends = parameters.ends * total
    kernel = _filter(power / (total[:, None] * total).sqrt()[..., None, None])
    slope, intercept = (ends[1] - ends[0])[None].float(), ends[:1].float()
    return NoiseModel(slope, intercept, brightness[None].float(), kernel[None].float())


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


@torch.no_grad()
def estimate_noise_models(images: Sequence[Tensor], cameras: Sequence[str]) -> list[NoiseModel]:
    """The noise of each image, where images of one camera share what they show of it.

    Of a camera most of whose images have a camera's noise, EM first finds the noise of all blocks together, and then
    that of each image, for which the first counts as `_POOLED_BLOCKS` blocks of its own: an image of few flat blocks
    borrows from the others. Images of no camera have a model of their own, as in `estimate_noise_model`.

    Args:
        images: Noisy images, of any size.
        cameras: Camera and sensitivity of each, such as `imaging.camera_of` names them; "" where unknown.

    Shape:
        - images: `[C, H, W]` each
        - output: a model of one image each

    Raises:
        ValueError: If there are not as many names as images, or as `estimate_noise_model`.
    """
    if len(images) != len(cameras):
        raise ValueError(f"each image needs the name of its camera, or '', got {len(cameras)} for {len(images)} images")
    models = [estimate_noise_model(image[None]) for image in images]
    for camera in sorted({name for name in cameras if name}):
        members = [index for index, name in enumerate(cameras) if name == camera]
        correlated = [index for index in members if not _has_independent_channels(models[index])]
        if 2 * len(correlated) <= len(members) or len(members) < 2:
            continue
        seen = {index: evidence for index in members if (evidence := _look(images[index])) is not None}
        for key in {(len(each.bands.width), each.means.shape[1]) for each in seen.values()}:
            alike = {i: each for i, each in seen.items() if (len(each.bands.width), each.means.shape[1]) == key}
            models_of = _pooled(alike, {i: images[i].mean((1, 2)).double() for i in alike})
            for index, model in models_of.items():
                models[index] = model
    return models


def _has_independent_channels(model: NoiseModel) -> bool:
    channels = model.kernel.shape[1]
    others = model.kernel * (1 - torch.eye(channels)).to(model.kernel)[None, :, :, None, None]
    return channels > 1 and not bool(others.any())


def _pooled(evidence: dict[int, _Evidence], brightness: dict[int, Tensor]) -> dict[int, NoiseModel]:
    """Models of images with as many rings of frequencies and channels."""
    starts = [_start(each, _STEEPEST_LINE) for each in evidence.values()]
    bands = next(iter(evidence.values())).bands
    ends, spectrum = (torch.stack([getattr(s, name) for s in starts]).median(0).values for name in ("ends", "spectrum"))
    start = start_parameters(ends, spectrum, bands)
    together = _fit(list(evidence.values()), start, start, _PRIOR_BLOCKS)
    return {
        index: _model(each, _fit([each], together, together, _POOLED_BLOCKS), brightness[index])
        for index, each in evidence.items()
    }


def _of_image(image: Tensor, white: NoiseModel, kind: str) -> NoiseModel:
    """White noise, noise of its own in each channel, or a camera's, by what the colors and the whole show.

    Opponent colors hold little texture: noise that is alike in all flat blocks there, and no weaker than in the whole,
    is independent from channel to channel, and they show what it is. A camera smooths colors away, and its noise is
    seen in the whole only.
    """
    evidence = _look(image)
    if evidence is None:
        squares = avg_pool2d(image.mean(0, keepdim=True)[None], min(_SQUARE, *image.shape[1:]))
        return _by_brightness(image, squares.flatten(), white)
    brightness = image.mean((1, 2)).double()
    colors, whole = _views(evidence)
    start = _start(colors)
    seen = _fit([colors], start, start, _PRIOR_BLOCKS)
    level = _mean_level(colors, seen)
    is_alike = float(seen.weight[0]) > _ALIKE and level > _LEAST_LEVEL
    is_alike = is_alike and _unevenness(colors, seen)[0] < _MAX_SPREAD
    learned = _learned_level(image)
    sure = learned[0] if learned is not None and learned[1] < _MAX_DOUBT else 0.0
    if is_alike and (_is_flat(colors, seen) or level > _MAX_CAMERA_COLOR):
        own = _independent(image, colors, seen, white)
        if sure < _MUCH_MORE * float(own.level):
            return own
    start = _start(whole)
    common = _fit([whole], start, start, _PRIOR_BLOCKS)
    least = max(1.3 * float(white.level), 2 * _LEAST_LEVEL, 2 * level * is_alike)
    spread, decline = _unevenness(whole, common)
    fine = float(common.spectrum[:, whole.bands.frequency > 0.7].mean())
    is_camera = spread < _MAX_CAMERA_SPREAD and decline < _MAX_DECLINE and fine < _MAX_FINE
    at_least = 0.0 if learned is None else learned[0] * math.exp(-_SURE * learned[1])
    if learned is None:
        is_camera = is_camera and float(common.weight[0]) > _CAMERA_ALIKE
    elif at_least < _LEAST_ALONE or learned[1] > _MAX_DOUBT_ALONE:
        is_camera = is_camera and float(common.weight[0]) > _LEARNED_ALIKE and at_least > _LEAST_LEARNED
    is_sure = sure > max(_LEAST_SURE, _MUCH_MORE * float(white.level))
    is_camera = (is_camera or is_sure) and _mean_level(whole, common) > least
    if is_alike and not is_camera:
        return _independent(image, colors, seen, white)
    if is_camera or kind == "camera":
        start = _start(evidence, _STEEPEST_LINE)
        few = _CAMERA_SHARE * len(evidence.means)
        found = _model(evidence, _fit([evidence], start, _level_line(evidence, start), few), brightness)
        return _calibrated(found, learned) if is_camera and learned is not None else found
    return _by_brightness(image, colors.means.mean(1), white) if _is_flat(colors, seen) else white


def _by_brightness(image: Tensor, light: Tensor, white: NoiseModel, guess: Tensor | None = None) -> NoiseModel:
    """White noise, or such whose variance is a line over the light of the blocks, where that differs enough."""
    ends = white.level.square().expand(2) if guess is None else guess
    if _LEAST_LINE < float(white.level) < _MOST_LINE:
        ends = refine_line(image, ends)
    light = torch.quantile(light, light.new_tensor(_DARK_LIGHT)).to(ends)
    variance = ends[0] * (1 - light) + ends[1] * light
    if bool(variance.amax() <= _MIN_VARIANCE_RATIO * variance.amin()):
        return white
    each = torch.ones(1, len(image)).to(image)
    slope, intercept = (ends[1] - ends[0]) * each, ends[0] * each
    return NoiseModel(slope, intercept, image.mean((1, 2))[None], white.kernel)


def _learned_level(image: Tensor) -> tuple[float, float] | None:
    """Level that the simulated cameras speak for and the standard deviation of its logarithm; None where they do not
    know images of this kind.
    """
    features = describe_image(image.float()) if len(image) == 3 else None
    if features is None:
        return None
    mean, doubt = trained_camera_level()(features[None].cpu())
    return float(mean.exp()), float(doubt)


def _calibrated(found: NoiseModel, learned: tuple[float, float]) -> NoiseModel:
    """EM's model at a level between its own and the learned one, by how sure that is: they err independently. Where
    EM's is several times as high, it has taken soft texture for noise. Real cameras have a little more than both say.
    """
    level, doubt = learned
    own = max(float(found.level), LEAST_LEVEL)
    weight = 0.5 / (1 + (doubt / _EM_DOUBT) ** 2) if own < _MAX_DISAGREEMENT * level else 1.0
    factor = _REAL**2 * (level / own) ** (2 * weight)
    return replace(found, slope=found.slope * factor, intercept=found.intercept * factor)


def _level_line(evidence: _Evidence, start: NoiseParameters) -> NoiseParameters:
    """The same noise, as strong everywhere."""
    variance = start.ends[0] * (1 - evidence.means) + start.ends[1] * evidence.means
    return start._replace(ends=variance.mean(0).expand(2, -1))


def _views(evidence: _Evidence) -> tuple[_Evidence, _Evidence]:
    """The opponent colors, and their sum; of gray images the high frequencies, and all."""
    means, energies, blocks, bands = evidence
    if means.shape[1] != 3:
        fine = bands.frequency > _FINE
        part = Bands(bands.member[..., fine], bands.width[fine], bands.frequency[fine])
        return _Evidence(means, energies[..., fine], blocks, part), evidence
    axes = torch.tensor(COLORS).to(means)
    views = []
    for rows in (axes[1:], axes[:1]):
        mixed = Blocks(
            means @ rows.square().T, torch.einsum("kc,ncuv->nkuv", rows.to(blocks.coefficients), blocks.coefficients)
        )
        views.append(_Evidence(mixed.means, mixed.energies(bands), mixed, bands))
    return views[0], views[1]


def _mean_level(evidence: _Evidence, found: NoiseParameters) -> float:
    variance = found.ends[0] * (1 - evidence.means) + found.ends[1] * evidence.means
    return float(variance.mean().sqrt())


def _unevenness(evidence: _Evidence, found: NoiseParameters) -> tuple[float, float]:
    """How much more the flattest blocks differ than noise of this model does, the least of three shares; and by which
    factor their energy falls from an eighth of the blocks to a sixteenth.

    Flattest by half of the frequencies, compared by the others, as in `_start`.
    """
    means, _, blocks, bands = evidence
    first, second = _halves(bands)
    variance = found.ends[0] * (1 - means) + found.ends[1] * means
    chooser, measured = (
        ((blocks.energies(half) / variance[..., None] / found.spectrum) @ half.width).sum(1) for half in (first, second)
    )
    degrees = float(second.width.sum()) * means.shape[1]
    order = chooser.argsort(stable=True)
    values = [measured[order[: max(len(order) // part, _MIN_BLOCKS)]] for part in (4, 8, 16)]
    spread = min(float((each.std() / each.mean()) ** 2) * degrees / 2 for each in values)
    return spread, float(values[1].mean() / values[2].mean())


def _halves(bands: Bands) -> tuple[Bands, Bands]:
    """Every second frequency of each ring, and the others."""
    step = torch.arange(bands.member.shape[0], device=bands.member.device)
    even = ((step[:, None] + step) % 2 == 0).to(bands.member)
    first, second = (
        bands._replace(
            member=bands.member * part[..., None], width=torch.einsum("uvf,uv->f", bands.member, part).clamp_min(1)
        )
        for part in (even, 1 - even)
    )
    return first, second


def _is_flat(evidence: _Evidence, found: NoiseParameters) -> bool:
    """Whether noise is about as strong at middling frequencies as at high ones."""
    frequency = evidence.bands.frequency
    middling, high = (found.spectrum[:, part] for part in ((frequency > 0.3) & (frequency < 0.45), frequency > 0.75))
    return not middling.numel() or bool(middling.mean() < _MAX_WHITE_RATIO * high.mean())


def _independent(image: Tensor, colors: _Evidence, seen: NoiseParameters, white: NoiseModel) -> NoiseModel:
    """Noise that each channel has of its own: white, as strong everywhere or not, or correlated from pixel to pixel."""
    bands, channels = colors.bands, len(image)
    if float(white.level) > _WHITE_SHARE * _mean_level(colors, seen) or _is_flat(colors, seen):
        fine = bands.frequency > _FINE
        power = (seen.spectrum * bands.width * fine).sum(1) / (bands.width * fine).sum()
        return _by_brightness(image, colors.means.mean(1), white, (seen.ends * power).mean(1).to(image))
    spectrum = seen.spectrum.clone()
    gentle = (bands.frequency[1] / bands.frequency[0]) ** _GENTLEST
    spectrum[:, 0] = torch.minimum(spectrum[:, 0], gentle * spectrum[:, 1])
    model = _model(colors, seen._replace(spectrum=spectrum), colors.means.mean(0), steepest=0.0)
    ends = torch.stack([model.intercept, model.intercept + model.slope]).mean((1, 2)).double()
    shape = model.kernel.diagonal(dim1=1, dim2=2).mean(-1)
    shape = shape / shape.square().sum((1, 2), keepdim=True).sqrt()
    kernel = torch.eye(channels)[None, ..., None, None].to(shape) * shape[:, None, None]
    each = torch.ones(1, channels, device=ends.device)
    slope, intercept = ((ends[1] - ends[0]) * each).float(), (ends[0] * each).float()
    return NoiseModel(slope, intercept, image.mean((1, 2))[None].float(), kernel)


def _stack(models: list[NoiseModel]) -> NoiseModel:
    """Models of single images as one, their filters as large as the largest."""
    side = max(model.kernel.shape[-1] for model in models)
    kernels = []
    for model in models:
        around = (side - model.kernel.shape[-1]) // 2
        kernels.append(torch.nn.functional.pad(model.kernel, (around,) * 4))
    slope, intercept, brightness = (
        torch.cat([getattr(model, name) for model in models]) for name in ("slope", "intercept", "brightness")
    )
    return NoiseModel(slope, intercept, brightness, torch.cat(kernels))
