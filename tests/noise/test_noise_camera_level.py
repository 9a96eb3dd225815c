"""The learned level of a camera's noise: simulated cameras that it was not trained on, and clean photographs."""

import pytest
import torch
from skimage import data
from torch import Tensor

from lightning_modules.imaging import Degradation, degrade
from lightning_modules.noise import CameraNoise, estimate_noise_model
from lightning_modules.noise.camera_level import NUM_FEATURES, describe_image, trained_camera_level


def photograph(name: str) -> Tensor:
    pixels = torch.from_numpy(getattr(data, name)()[:256, :256].copy()).permute(2, 0, 1)[None]
    return pixels.float() / 255


def read(image: Tensor) -> float | None:
    features = describe_image(image)
    if features is None:  # a few blocks, such as of a night sky, are not enough
        return None
    assert features.shape == (NUM_FEATURES,)
    return float(trained_camera_level()(features[None])[0].exp())


def test_levels_of_simulated_cameras_are_told_apart() -> None:
    found = [read(image) for image in shown().noisy.clamp(0, 1)]
    known = torch.tensor([level is not None for level in found])
    assert known.sum() >= len(found) - 1
    levels = torch.tensor([level for level in found if level is not None])
    true = (shown().noisy - shown().clean).square().mean((1, 2, 3)).sqrt()[known]
    assert (levels / true).log().abs().median() < 0.3
    assert torch.corrcoef(torch.stack([levels.log(), true.log()]))[0, 1] > 0.7


def shown() -> tuple[Tensor, Tensor, Tensor]:
    clean = torch.cat([photograph(name) for name in ("chelsea", "coffee", "astronaut", "rocket")]).repeat(3, 1, 1, 1)
    return CameraNoise(level=(2 / 255, 20 / 255), shot=(5e-4, 5e-3))(clean, torch.arange(len(clean)) + 10**6)


def test_a_clean_photograph_is_read_as_clean() -> None:
    for name in ("astronaut", "rocket"):
        small = torch.nn.functional.interpolate(photograph(name), scale_factor=0.75, mode="area")
        assert float(estimate_noise_model(small).level) < 2 / 255


def smoothed(clean: Tensor, level: float) -> Tensor:
    """Noise that a camera has smoothed, in blots of color, encoded as most programs do."""
    generator = torch.Generator().manual_seed(1)

    def grain(width: int, passes: int, channels: int) -> Tensor:
        noise = torch.randn(1, channels, *clean.shape[-2:], generator=generator)
        for _ in range(passes):
            noise = torch.nn.functional.avg_pool2d(noise, width, 1, width // 2, count_include_pad=False)
        return noise / noise.std()

    colors = 0.3 * grain(5, 3, 3)
    noisy = clean + level * (grain(3, 1, 1) + colors - colors.mean(1, keepdim=True))
    return degrade((255 * noisy.clamp(0, 1)).round().byte()[0], Degradation(quality=75))[None].float() / 255


@pytest.mark.parametrize("name", ["chelsea", "coffee"])
def test_noise_that_a_camera_has_smoothed_is_found(name: str) -> None:
    noisy, clean = (estimate_noise_model(smoothed(photograph(name), level / 255)) for level in (5, 0))
    assert clean.is_white.all()
    assert 255 * float(clean.level) < 0.6
    assert not noisy.is_white.any()
    assert 2.5 < 255 * float(noisy.level) < 8


def test_of_too_few_blocks_nothing_is_said() -> None:
    assert describe_image(photograph("coffee")[0, :, :30, :200]) is None
    assert describe_image(torch.full((3, 200, 200), 0.5)) is None
