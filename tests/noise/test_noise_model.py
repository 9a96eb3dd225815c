"""The noise of a camera: what it does to pixels, distances and neighbors, and back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_modules.graph import GraphDiffusion
from lightning_modules.noise import NoiseModel
from lightning_modules.operators.operator import NoiseDescription


def blurred(slope: float, intercept: float, width: float = 0.7, common: float = 0.5, size: int = 1) -> NoiseModel:
    """Noise of three channels, of which the first has a slope of its own, blurred and partly common to them."""
    step = torch.arange(-2, 3.0)
    line = torch.exp(-step.square() / (2 * width**2))
    mixed = (1 - common) * torch.eye(3) + common / 3
    kernel = mixed[..., None, None] * (line[:, None] * line)
    kernel = kernel / kernel.square().sum((1, 2, 3), keepdim=True).sqrt()
    each = torch.tensor([[1.0, 0.5, 0.0]]).expand(size, -1)
    ones = torch.ones(size, 3)
    return NoiseModel(slope * each, intercept * ones, 0.4 * ones, kernel.expand(size, -1, -1, -1, -1))


def test_it_is_a_description_that_operators_take() -> None:
    noise = blurred(0.01, 0.001)
    assert isinstance(noise, NoiseDescription)
    images = torch.rand(2, 3, 13, 11, generator=torch.Generator().manual_seed(0))
    values = {"sigma": 0.8, "tau": 0.15, "radius": 3.0, "sigma_s": 1.0, "sigma_f": 1.4, "smooth_steps": 2}
    diffusion = GraphDiffusion(widths="noise")
    restored = diffusion(images, noise=noise, **values)
    assert restored.shape == images.shape
    white = NoiseModel.white(torch.tensor([0.1, 0.2]), 3)
    torch.testing.assert_close(
        diffusion(images, noise=white, **values), diffusion(images, noise=torch.tensor([0.1, 0.2]), **values)
    )


@settings(max_examples=15)
@given(st.floats(0, 0.02), st.floats(1e-4, 1e-3), st.floats(0.3, 1.2), st.floats(0, 0.9), st.integers(0, 2**16))
def test_samples_have_the_variance_and_correlation_that_it_says(
    slope: float, intercept: float, width: float, common: float, seed: int
) -> None:
    noise = blurred(slope, intercept, width, common)
    clean = torch.full((1, 3, 256, 256), 0.4)
    drawn = noise.sample(clean, torch.tensor([seed])) - clean
    torch.testing.assert_close(drawn.var((2, 3)), noise.variance(clean)[..., 0, 0], rtol=0.08, atol=0)
    torch.testing.assert_close(drawn.square().mean().sqrt(), noise.level[0], rtol=0.05, atol=0)
    unit = (drawn / noise.variance(clean).sqrt())[0]
    correlation = noise.correlation()[0]
    middle = correlation.shape[-1] // 2
    for row, column in ((0, 0), (0, 1), (1, 0), (2, 1), (1, -2)):
        here = unit[:, 2:-2, 2:-2]
        there = unit[:, 2 + row : 254 + row, 2 + column : 254 + column]
        seen = torch.einsum("chw,dhw->cd", here, there) / here[0].numel()
        torch.testing.assert_close(seen, correlation[..., middle + row, middle + column], rtol=0, atol=0.07)
        difference = drawn[0, :, 2:-2, 2:-2] - drawn[0, :, 2 + row : 254 + row, 2 + column : 254 + column]
        torch.testing.assert_close(
            difference.square().mean(), noise.distance_bias((row, column))[0], rtol=0.08, atol=1e-8
        )
    assert noise.distance_bias((0, 9))[0] == pytest.approx(2 * float(noise.level[0]) ** 2, rel=1e-5)


def test_a_sample_is_a_function_of_its_key() -> None:
    noise, clean = blurred(0.01, 0.001), torch.rand(4, 3, 9, 12)
    key = torch.tensor([7, 3, 9, 1])
    together = noise.sample(clean, key)
    torch.testing.assert_close(noise.sample(clean[1:3], key[1:3]), together[1:3])
    rows = NoiseModel(
        *(torch.cat([value, 2 * value]) for value in (noise.slope, noise.intercept)),
        noise.brightness.expand(2, -1),
        noise.kernel.expand(2, -1, -1, -1, -1),
    )
    torch.testing.assert_close(rows.sample(clean[:2], key[:2])[1] - clean[1], 2**0.5 * (together[1] - clean[1]))
    clipped = noise.sample(clean, key, clip=True)
    assert (clipped == together.clamp(0, 1)).all()


def dense(noise: NoiseModel, clean: Tensor) -> Tensor:
    """Covariance of all numbers of an image on a torus, entry by entry."""
    channels, height, width = clean.shape
    correlation = noise.correlation()[0].to(clean)
    around = correlation.shape[-1] // 2
    matrix = torch.zeros(channels, height, width, channels, height, width, dtype=clean.dtype)
    for row in range(-around, around + 1):
        for column in range(-around, around + 1):
            for y in range(height):
                for x in range(width):
                    matrix[:, y, x, :, (y + row) % height, (x + column) % width] += correlation[
                        ..., around + row, around + column
                    ]
    std = noise.variance(clean[None])[0].sqrt().flatten()
    return matrix.reshape(len(std), -1) * std * std[:, None]


@pytest.mark.parametrize("size", [(6, 5), (4, 7)])  # the filter is 5 wide, the correlation 9
def test_its_likelihood_is_that_of_a_dense_covariance(size: tuple[int, int]) -> None:
    noise = blurred(0.02, 0.001, 0.5)
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(1, 3, *size, dtype=torch.float64, generator=generator)
    noisy = clean + 0.05 * torch.randn(clean.shape, dtype=torch.float64, generator=generator)
    covariance = dense(noise, clean[0])
    oracle = torch.distributions.MultivariateNormal(clean.flatten(), covariance).log_prob(noisy.flatten())
    assert noise.log_likelihood(noisy, clean).item() == pytest.approx(oracle.item() / clean.numel(), rel=1e-6)
    square = noise.whiten(noisy - clean, clean).square().sum().item()
    residual = (noisy - clean).flatten()
    assert square == pytest.approx(float(residual @ torch.linalg.solve(covariance, residual)), rel=1e-6)


def poisson_gaussian(gain: float, reading: float, light: float) -> tuple[float, float]:
    """Mean and variance of the stabilized value, by the sum over photons and Gauss-Hermite quadrature."""
    noise = NoiseModel(
        *(torch.tensor([[value]], dtype=torch.float64) for value in (gain, reading**2, light)),
        torch.ones(1, 1, 1, 1, 1, dtype=torch.float64),
    )
    photons = torch.arange(0, 2000, dtype=torch.float64)
    weight = torch.distributions.Poisson(torch.tensor(light / gain, dtype=torch.float64)).log_prob(photons).exp()
    nodes = torch.linspace(-6, 6, 241, dtype=torch.float64)
    density = torch.exp(-nodes.square() / 2)
    seen = noise.stabilize((gain * photons[:, None] + reading * nodes)[None, None])[0, 0]
    joint = weight[:, None] * density / density.sum()
    mean = (joint * seen).sum()
    return float(mean), float((joint * (seen - mean).square()).sum())


@pytest.mark.parametrize("gain", [0.001, 0.01, 0.05])
@pytest.mark.parametrize("photons", [8.0, 40.0, 300.0])
def test_stabilized_photons_have_variance_one_and_come_back_without_bias(gain: float, photons: float) -> None:
    light = gain * photons
    mean, variance = poisson_gaussian(gain, gain, light)
    assert variance == pytest.approx(1, abs=0.03)
    noise = NoiseModel(
        *(torch.tensor([[value]], dtype=torch.float64) for value in (gain, gain**2, light)),
        torch.ones(1, 1, 1, 1, 1, dtype=torch.float64),
    )
    back = noise.unstabilize(torch.full((1, 1, 1, 1), mean, dtype=torch.float64)).item()
    assert back == pytest.approx(light, rel=0.005)


@settings(max_examples=30)
@given(st.floats(-0.01, 0.01), st.floats(0.011, 0.05), st.floats(0.05, 0.95))
def test_a_slope_of_any_sign_is_stabilized(slope: float, intercept: float, light: float) -> None:
    """Little noise goes to variance 1, and back to where it was but for the quarter of a photon."""
    noise = NoiseModel(
        *(torch.tensor([[value]]).double() for value in (slope, intercept, 0.5)), torch.ones(1, 1, 1, 1, 1).double()
    )
    image = torch.full((1, 1, 1, 1), light, dtype=torch.float64, requires_grad=True)
    stable = noise.stabilize(image)
    (derivative,) = torch.autograd.grad(stable.sum(), image)
    root = math.sqrt(slope * light + intercept + 0.375 * slope**2)
    assert derivative.item() == pytest.approx(1 / root, rel=1e-6)
    assert noise.unstabilize(stable.detach()).item() == pytest.approx(light + slope / 4, abs=0.2 * abs(slope) + 1e-9)


def test_white_noise_is_white_and_other_noise_is_not() -> None:
    white = NoiseModel.white(torch.tensor([0.0, 0.1]), 3)
    assert white.is_white.all()
    assert white.neighbor_correlation.tolist() == [0, 0]
    torch.testing.assert_close(white.level, torch.tensor([0.0, 0.1]))
    other = blurred(0.01, 0.001)
    assert not other.is_white.any()
    assert not other.is_uncorrelated.any()
    photons = NoiseModel(white.slope + 0.01, white.intercept, white.brightness, white.kernel)
    assert photons.is_uncorrelated.all()
    assert not photons.is_white.any()
    assert other.of(0).to(torch.zeros(1, dtype=torch.float64)).slope.dtype == torch.float64
