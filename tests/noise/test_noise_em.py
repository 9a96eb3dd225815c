"""EM of the noise: the objective never falls, processes add up, what was sampled is found."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.noise.blocks import frequency_bands
from lightning_modules.noise.em import (
    NoiseParameters,
    e_step,
    fit_noise,
    limit_slope,
    log_prior,
    m_step,
    prior_statistics,
    start_parameters,
)

CPU = torch.device("cpu")
BANDS = frequency_bands(8, CPU, torch.float64)


def sampled(seed: int, count: int = 300, textured: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, NoiseParameters]:
    """Blocks of noise, of which a part has texture; their means, energies and the parameters of the noise."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    num_rings = len(BANDS.width)
    ends = 1e-4 + 1e-3 * uniform(2, 2)
    spectrum = limit_slope(0.2 + uniform(2, num_rings), BANDS)
    spectrum = spectrum / ((spectrum * BANDS.width).sum(1, keepdim=True) / BANDS.width.sum())
    start = start_parameters(ends, spectrum, BANDS)
    means = uniform(count, 2)
    light = means[..., None]
    power = (ends[0][:, None] * (1 - light) + ends[1][:, None] * light) * spectrum
    classes = (uniform(count) < textured).long() * 3
    power = power + start.texture[classes]
    chi = torch.distributions.Gamma(BANDS.width / 2, BANDS.width / 2)
    torch.manual_seed(seed)
    return means, power * chi.sample((count, 2)), start


@settings(max_examples=10)
@given(st.integers(0, 2**16), st.floats(0.3, 3), st.floats(0, 100))
def test_the_objective_never_falls(seed: int, factor: float, num_blocks: float) -> None:
    means, energies, truth = sampled(seed)
    start = start_parameters(factor * truth.ends.mean(0).expand(2, -1), torch.ones_like(truth.spectrum), BANDS)
    prior = prior_statistics(start, num_blocks)
    found, objectives = fit_noise([(means, energies)], BANDS, start, prior, 25)
    assert all(after >= before - 1e-9 for before, after in pairwise(objectives))
    assert objectives[-1] > objectives[0]
    assert all(value.isfinite().all() for value in found)


def test_statistics_add_over_processes() -> None:
    means, energies, truth = sampled(1)
    whole = e_step(means, energies, BANDS, truth)
    parts = e_step(means[:100], energies[:100], BANDS, truth).add(e_step(means[100:], energies[100:], BANDS, truth))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    prior = prior_statistics(truth, 0.0)
    together = fit_noise([(means, energies)], BANDS, truth, prior, 5)
    apart = fit_noise([(means[100:], energies[100:]), (means[:100], energies[:100])], BANDS, truth, prior, 5)
    for one, other in zip(together[0], apart[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_expected_energies_are_those_of_a_numerical_integral() -> None:
    """One block of one frequency: the posterior of noise n = z - x under both classes, on a grid of x."""
    bands = BANDS._replace(width=torch.ones_like(BANDS.width))
    _, _, truth = sampled(0)
    num_rings = len(bands.width)
    parameters = NoiseParameters(
        truth.ends[:, :1], truth.spectrum[:1], truth.texture[:2, :1], torch.tensor([0.3, 0.7]).double()
    )
    light = 0.3984375  # in the middle of a bin
    z = torch.linspace(0.01, 0.09, num_rings, dtype=torch.float64)
    statistics = e_step(torch.full((1, 1), light, dtype=torch.float64), z.square().view(1, 1, -1), bands, parameters)
    noise = (parameters.ends[0] * (1 - light) + parameters.ends[1] * light) * parameters.spectrum[0]
    x = torch.linspace(-0.6, 0.6, 40001, dtype=torch.float64)[:, None]
    weights, energies, textures = [], [], []
    for weight, texture in zip(parameters.weight, parameters.texture[:, 0], strict=True):
        prior = (
            torch.distributions.Normal(0.0, texture.sqrt().clamp_min(1e-6)).log_prob(x).exp() if texture.sum() else None
        )
        likelihood = torch.distributions.Normal(0.0, noise.sqrt()).log_prob(z - x).exp()
        if prior is None:
            weights.append(weight * torch.distributions.Normal(0.0, noise.sqrt()).log_prob(z).exp().prod())
            energies.append(z.square())
            textures.append(torch.zeros_like(z))
            continue
        joint = prior * likelihood
        evidence = joint.sum(0)
        weights.append(weight * (evidence * (x[1] - x[0])).prod())
        energies.append((joint * (z - x).square()).sum(0) / evidence)
        textures.append((joint * x.square()).sum(0) / evidence)
    responsibility = torch.stack(weights) / sum(weights)
    expected = sum(r * energy for r, energy in zip(responsibility, energies, strict=True))
    torch.testing.assert_close(statistics.weight, responsibility, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(statistics.noise.sum((0, 1)), expected, rtol=1e-4, atol=1e-10)
    torch.testing.assert_close(statistics.texture[1, 0], responsibility[1] * textures[1], rtol=1e-4, atol=1e-10)
    constant = num_rings * math.log(2 * math.pi) / 2
    assert float(statistics.objective) == pytest.approx(float(sum(weights).log()) + constant, rel=1e-4)


def test_em_finds_the_noise_among_texture() -> None:
    means, energies, truth = sampled(3, count=1500)
    start = start_parameters(1.4 * truth.ends.mean(0).expand(2, -1), torch.ones_like(truth.spectrum), BANDS)
    found, _ = fit_noise([(means, energies)], BANDS, start, prior_statistics(start, 0.0), 120)
    torch.testing.assert_close(found.ends.mean(0), truth.ends.mean(0), rtol=0.1, atol=0)
    torch.testing.assert_close(found.spectrum, truth.spectrum, rtol=0.1, atol=0)


def test_a_prior_of_many_blocks_is_what_is_found() -> None:
    means, energies, truth = sampled(4)
    start = start_parameters(5 * truth.ends.mean(0).expand(2, -1), torch.ones_like(truth.spectrum), BANDS)
    found, _ = fit_noise([(means, energies)], BANDS, truth, prior_statistics(start, 1e7), 60)
    torch.testing.assert_close(found.spectrum, start.spectrum, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.ends, start.ends, rtol=0.02, atol=0)


def test_an_m_step_is_best_where_the_sums_are_those_of_the_parameters() -> None:
    """The sums that parameters expect leave them as they are, and the prior is best there."""
    _, _, truth = sampled(5)
    prior = prior_statistics(truth, 1000.0)
    moved = m_step(prior, BANDS, truth)
    torch.testing.assert_close(moved.ends, truth.ends, rtol=1e-9, atol=0)
    torch.testing.assert_close(moved.spectrum, truth.spectrum, rtol=1e-9, atol=0)
    best = log_prior(prior, BANDS, truth)
    for other in (truth._replace(ends=1.05 * truth.ends), truth._replace(spectrum=truth.spectrum.flip(1))):
        assert log_prior(prior, BANDS, other) < best
