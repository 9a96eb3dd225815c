"""The line of variances over the brightness: clipped or not, dark or bright, beside edges and the flat."""

import numpy as np
import pytest
import torch
from scipy import stats
from skimage import data
from torch import Tensor

from lightning_modules.noise import NoiseModel, estimate_noise_model
from lightning_modules.noise.variance_line import _clipped, refine_line

LINES = ((0.01, 0.0002), (0.02, 0.001), (0.0, 0.002), (0.003, 0.0004))


def scene(size: int = 320) -> Tensor:
    """Shades from black to white, each color in its own direction."""
    step = torch.linspace(0, 1, size)
    return torch.stack([step.expand(size, -1), step[:, None].expand(-1, size), (step + step[:, None]) / 2])[None]


def noisy(clean: Tensor, slope: float, intercept: float, key: int = 7) -> Tensor:
    each, kernel = torch.ones(1, clean.shape[1]), NoiseModel.white(torch.ones(1), clean.shape[1]).kernel
    shown = NoiseModel(slope * each, intercept * each, each / 2, kernel).sample(clean, torch.tensor([key]), clip=True)
    return (255 * shown).round() / 255


@pytest.mark.parametrize(("slope", "intercept"), LINES)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_line_is_found_though_clipped(slope: float, intercept: float, channels: int) -> None:
    clean = scene()[:, :channels]
    guess = torch.full((2,), slope / 2 + intercept)
    found = torch.stack([refine_line(noisy(clean, slope, intercept, key)[0], guess) for key in range(4)]).mean(0)
    true = torch.tensor([intercept, intercept + slope])
    # a gray image has half of the energies
    torch.testing.assert_close(found, true, rtol=0.1 if channels == 3 else 0.15, atol=1e-5)


def test_moments_of_a_clipped_normal_are_those_of_scipy() -> None:
    mean = torch.linspace(-0.05, 1.05, 12, dtype=torch.float64)
    variance = torch.linspace(1e-4, 0.02, 12, dtype=torch.float64)
    first, second = _clipped(mean, variance)
    draws = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    clipped = (mean[:, None].numpy() + variance[:, None].sqrt().numpy() * draws).clip(0, 1)
    np.testing.assert_allclose(first, clipped.mean(1), atol=2e-6)
    np.testing.assert_allclose(second, clipped.var(1), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("image", [torch.rand(3, 8, 40), torch.full((3, 60, 60), 1.0), torch.rand(1, 20, 20)])
def test_of_too_few_pixels_the_guess_stays(image: Tensor) -> None:
    guess = torch.tensor([0.001, 0.002])
    assert torch.equal(refine_line(image, guess), guess)


def test_large_images_are_looked_at_in_part() -> None:
    clean = scene(600)
    guess = torch.tensor([0.003, 0.003])
    found = torch.stack([refine_line(noisy(clean, 0.01, 0.0004, key)[0], guess) for key in range(4)]).mean(0)
    torch.testing.assert_close(found, torch.tensor([0.0004, 0.0104]), rtol=0.12, atol=3e-5)


def test_photons_are_seen_where_hardly_a_block_is_flat() -> None:
    clean = torch.from_numpy(data.coffee()[:256, :256].copy()).permute(2, 0, 1)[None].float() / 255
    texture = 0.1 * torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    texture = torch.nn.functional.interpolate(texture, scale_factor=4, mode="bicubic")
    found = estimate_noise_model(noisy((clean + texture).clamp(0, 1), 0.03, 0.0005))
    assert not found.is_white.any()
    assert float(found.slope.mean()) == pytest.approx(0.03, rel=0.12)
