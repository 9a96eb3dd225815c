"""EM of a camera's noise: the clean blocks of the images are the latent variable."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules._cached import cached_tensors
from lightning_modules.noise.blocks import Bands

# Brightnesses at which blocks are counted, evenly from black to white.
_NUM_BINS = 64
# Variance of the texture in the classes of blocks, in units of the noise's, where EM starts.
_TEXTURES = (0.5, 2.0, 8.0, 32.0)
# Under this frequency, in units of half the sampling rate, the spectrum falls with this power of it at most.
_LOW_FREQUENCY, _STEEPEST = 0.36, 1.2
# Steps on the variances in an M-step, each of which improves the objective.
_VARIANCE_STEPS = 10
# Under this variance, that of a fiftieth of what 8 bits count, nothing divides by it.
LEAST_VARIANCE = (0.02 / 255) ** 2


class NoiseParameters(NamedTuple):
    """Parameters of noise and texture, float64.

    Attributes:
        ends: Noise variance at black and at white, linear between, `[2, C]`.
        spectrum: Power of the noise in each ring of frequencies, of mean 1, `[C, F]`.
        texture: Power of the texture in each class of blocks, `[K, C, F]`, 0 in the first.
        weight: Share of the blocks in each class, `[K]`.
    """

    ends: Tensor
    spectrum: Tensor
    texture: Tensor
    weight: Tensor


class NoiseStatistics(NamedTuple):
    """Sums over blocks, which add over images and processes.

    Attributes:
        objective: Log-likelihood, `[]`.
        weight: How many blocks are in each class, `[K]`.
        texture: Energy of the texture, `[K, C, F]`.
        noise: Energy of the noise by brightness, `[C, J, F]`.
        num_blocks: How many blocks have each brightness, `[C, J]`.
    """

    objective: Tensor
    weight: Tensor
    texture: Tensor
    noise: Tensor
    num_blocks: Tensor

    def add(self, other: "NoiseStatistics") -> "NoiseStatistics":
        """The sums over both.

        Shape:
            - output: five tensors
        """
        return NoiseStatistics(*(own + theirs for own, theirs in zip(self, other, strict=True)))


def start_parameters(ends: Tensor, spectrum: Tensor, bands: Bands) -> NoiseParameters:
    """Where EM starts: this noise, and texture that falls with the square of the frequency.

    Args:
        ends: Variance of the noise at black and at white.
        spectrum: Its power in each ring of frequencies, of mean 1.
        bands: The rings.

    Shape:
        - ends: `[2, C]`
        - spectrum: `[C, F]`
        - output: four tensors
    """
    step = torch.arange(bands.member.shape[0]).to(ends)
    square = (step.square() + step[:, None].square()).clamp_min(1)
    falling = torch.einsum("uvf,uv->f", bands.member, 1 / square) / bands.width
    falling = falling * bands.width.sum() / (falling * bands.width).sum()
    factors = ends.mean() * torch.tensor((0.0, *_TEXTURES)).to(ends)
    texture = factors.view(-1, 1, 1) * falling.expand(ends.shape[1], -1)
    return NoiseParameters(ends, spectrum, texture, torch.full_like(factors, 1 / len(factors)))


def e_step(means: Tensor, energies: Tensor, bands: Bands, parameters: NoiseParameters) -> NoiseStatistics:
    r"""Expected energies of noise and texture under the current parameters.

    A frequency z of block i is the sum of noise and, in class k, of texture, Gaussian both:

    .. math:: z_i \mid k \sim \mathcal N(0,\; v(m_i) P + C_k), \qquad
        E[n_i^2 \mid z_i, k] = w^2 z_i^2 + (1 - w)\, v(m_i) P, \quad w = \frac{v(m_i) P}{v(m_i) P + C_k}

    The restored block is the Wiener filter's, :math:`(1 - w) z`, and :math:`w z` its residual; the second term is the
    divergence of that restoration times the variance of the noise, by which texture that is left in the residual is not
    taken for noise. Channels share the class, and count together as one, for they show the same texture.

    Args:
        means: Mean colors of the blocks.
        energies: Their energies in each ring of frequencies.
        bands: The rings.
        parameters: Current parameters.

    Shape:
        - means: `[N, C]`
        - energies: `[N, C, F]`
        - output: `[]`, `[K]`, `[K, C, F]`, `[C, J, F]`, `[C, J]`
    """
    bins = _bins(means)
    noise, total, log_joint = _densities(means, energies, bands, parameters)
    ratio = energies[:, None] / total
    log_likelihood = log_joint.logsumexp(1)
    responsibility = (log_joint - log_likelihood[:, None]).exp()
    # E[n²] = vP + w² (z² − s) and E[x²] = C + (1 − w)² (z² − s), with s = vP + C and w = vP / s
    excess = (ratio - 1) / total * responsibility[..., None, None]
    expected_noise = noise + noise.square() * excess.sum(1)
    weight = responsibility.sum(0)
    texture = parameters.texture * weight[:, None, None] + parameters.texture.square() * excess.sum(0)
    place = bins + _NUM_BINS * torch.arange(means.shape[1], device=means.device)
    by_brightness = energies.new_zeros(means.shape[1] * _NUM_BINS, energies.shape[2])
    by_brightness.index_add_(0, place.flatten(), expected_noise.flatten(0, 1))
    count = torch.bincount(place.flatten(), minlength=len(by_brightness)).to(means)
    return NoiseStatistics(
        log_likelihood.sum(),
        weight,
        texture,
        by_brightness.unflatten(0, (-1, _NUM_BINS)),
        count.unflatten(0, (-1, _NUM_BINS)),
    )


def class_shares(means: Tensor, energies: Tensor, bands: Bands, parameters: NoiseParameters) -> Tensor:
    """Posterior probability of each class of texture, the first of none.

    Shape:
        - means: `[N, C]`
        - energies: `[N, C, F]`
        - output: `[N, K]`
    """
    return _densities(means, energies, bands, parameters)[2].softmax(1)


def m_step(statistics: NoiseStatistics, bands: Bands, parameters: NoiseParameters) -> NoiseParameters:
    r"""The parameters that improve the expected log-likelihood, all in closed form but the variances.

    Those are a line over the brightness, positive from black to white, moved by the multiplicative rule of the
    Itakura-Saito divergence, which never makes it worse (Févotte & Idier, Neural Computation 23, 2011).

    Args:
        statistics: Sums of `e_step` over all blocks, and of `prior_statistics`.
        bands: The rings of frequencies.
        parameters: Current parameters.

    Shape:
        - output: four tensors
    """
    noise, count = statistics.noise, statistics.num_blocks
    num_frequencies = bands.width.sum()
    variances = _variances(parameters.ends)
    spectrum = limit_slope((noise / variances[..., None]).sum(1) / count.sum(1)[:, None], bands)
    spectrum = spectrum.clamp_min(1e-6 * spectrum.amax(1, keepdim=True))
    scale = (spectrum * bands.width).sum(1, keepdim=True) / num_frequencies
    spectrum, ends = spectrum / scale, parameters.ends * scale.T
    energy = torch.einsum("cjf,cf->cj", noise, bands.width / spectrum) / num_frequencies
    ramps = _ramps(ends.device, ends.dtype)
    for _ in range(_VARIANCE_STEPS):
        variances = _variances(ends)
        up, down = (energy / variances.square()) @ ramps.T, (count / variances) @ ramps.T
        ends = (ends * (up / down.clamp_min(1e-300)).sqrt().T).clamp_min(LEAST_VARIANCE)
    # a class that has lost its blocks stays where it is
    texture = statistics.texture / statistics.weight.clamp_min(1e-12)[:, None, None]
    texture = torch.where((statistics.weight > 1e-6)[:, None, None], texture, parameters.texture)
    weight = statistics.weight.clamp_min(1e-12)
    return NoiseParameters(ends, spectrum, texture, weight / weight.sum())


def limit_slope(spectrum: Tensor, bands: Bands) -> Tensor:
    """The most likely spectrum that falls no faster than `_STEEPEST` at low frequencies, given the free one.

    Images fall with the square of the frequency, noise before it is filtered not at all. Neighbors that fall faster
    share the mean of their power, in units of the steepest fall: the pool of adjacent violators.

    Shape:
        - spectrum: `[C, F]`
        - output: `[C, F]`
    """
    number = int((bands.frequency < _LOW_FREQUENCY).sum())
    steepest = bands.frequency[:number] ** -_STEEPEST
    rows = []
    for row in spectrum:
        pools: list[tuple[float, float, int]] = []
        for value, weight in zip((row[:number] / steepest).tolist(), bands.width.tolist(), strict=False):
            pool = (value, weight, 1)
            while pools and pools[-1][0] > pool[0]:
                mean, mass, length = pools.pop()
                total = mass + pool[1]
                pool = ((mean * mass + pool[0] * pool[1]) / total, total, length + pool[2])
            pools.append(pool)
        level = [mean for mean, _, length in pools for _ in range(length)]
        rows.append(torch.cat([steepest * row.new_tensor(level), row[number:]]))
    return torch.stack(rows)


def prior_statistics(parameters: NoiseParameters, num_blocks: float) -> NoiseStatistics:
    """So many blocks of noise, spread over all brightnesses, as the parameters expect it: a prior for other images.

    Shape:
        - output: `[]`, `[K]`, `[K, C, F]`, `[C, J, F]`, `[C, J]`
    """
    variances = _variances(parameters.ends)
    count = torch.full_like(variances, num_blocks / _NUM_BINS)
    noise = (count * variances)[..., None] * parameters.spectrum[:, None]
    return NoiseStatistics(
        noise.new_zeros(()), torch.zeros_like(parameters.weight), torch.zeros_like(parameters.texture), noise, count
    )


def log_prior(prior: NoiseStatistics, bands: Bands, parameters: NoiseParameters) -> Tensor:
    """Logarithm of the prior density that the statistics of a prior amount to, but for a constant.

    Shape:
        - output: `[]`
    """
    total = _variances(parameters.ends)[..., None] * parameters.spectrum[:, None]
    each = prior.num_blocks[..., None] * total.log() + prior.noise / total
    return -0.5 * (each @ bands.width).sum() / len(each)


def fit_noise(
    images: Sequence[tuple[Tensor, Tensor]],
    bands: Bands,
    start: NoiseParameters,
    prior: NoiseStatistics,
    num_steps: int,
) -> tuple[NoiseParameters, list[float]]:
    """EM over the blocks of images that share their noise.

    Args:
        images: Mean colors and energies of the blocks of each.
        bands: The rings of frequencies.
        start: Where it starts.
        prior: What `prior_statistics` says of other images.
        num_steps: How many E- and M-steps.

    Returns:
        The parameters, and the objective for each block before every step, which never falls.

    Shape:
        - output: four tensors
    """
    parameters, objectives = start, []
    count = sum(len(means) for means, _ in images)
    for _ in range(num_steps):
        statistics = prior
        for means, energies in images:
            statistics = statistics.add(e_step(means, energies, bands, parameters))
        objectives.append(float(statistics.objective + log_prior(prior, bands, parameters)) / count)
        parameters = m_step(statistics, bands, parameters)
    return parameters, objectives


@cached_tensors(maxsize=8)
def _ramps(device: torch.device, dtype: torch.dtype) -> Tensor:
    """What black and white contribute at each brightness, `[2, J]`."""
    light = (torch.arange(_NUM_BINS, device=device, dtype=dtype) + 0.5) / _NUM_BINS
    return torch.stack([1 - light, light])


def _variances(ends: Tensor) -> Tensor:
    """Noise variance of each channel at each brightness, `[C, J]`."""
    return ends.T @ _ramps(ends.device, ends.dtype)


def _bins(means: Tensor) -> Tensor:
    return (means * _NUM_BINS).long().clamp(0, _NUM_BINS - 1)


def _densities(
    means: Tensor, energies: Tensor, bands: Bands, parameters: NoiseParameters
) -> tuple[Tensor, Tensor, Tensor]:
    """Power of the noise `[N, C, F]` and of all `[N, K, C, F]`, and log density of each block and class `[N, K]`."""
    noise = _variances(parameters.ends).gather(1, _bins(means).T).T[..., None] * parameters.spectrum
    total = noise[:, None] + parameters.texture
    each = (total.log() + energies[:, None] / total) @ bands.width
    return noise, total, parameters.weight.log() - 0.5 * each.mean(2)
