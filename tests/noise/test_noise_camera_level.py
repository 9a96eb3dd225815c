"""The learned level of a camera's noise: simulated cameras that it was not trained on, and clean photographs."""

import torch
from skimage import data
from torch import Tensor

from lightning_modules.noise import CameraNoise, estimate_noise_model
from lightning_modules.noise.blocks import read_blocks
from lightning_modules.noise.camera_level import NUM_FEATURES, describe_blocks, trained_camera_level


def photograph(name: str) -> Tensor:
    pixels = torch.from_numpy(getattr(data, name)()[:256, :256].copy()).permute(2, 0, 1)[None]
    return pixels.float() / 255


def read(image: Tensor) -> tuple[float, float]:
    features = describe_blocks(read_blocks(image))
    assert features.shape == (NUM_FEATURES,)
    mean, doubt = trained_camera_level()(features[None])
    return float(mean.exp()), float(doubt)


def test_levels_of_simulated_cameras_are_told_apart() -> None:
    levels = torch.tensor([read(image)[0] for image in shown().noisy.clamp(0, 1)])
    true = (shown().noisy - shown().clean).square().mean((1, 2, 3)).sqrt()
    assert (levels / true).log().abs().median() < 0.6
    assert torch.corrcoef(torch.stack([levels.log(), true.log()]))[0, 1] > 0.7


def shown() -> tuple[Tensor, Tensor, Tensor]:
    clean = torch.cat([photograph(name) for name in ("chelsea", "coffee", "astronaut", "rocket")]).repeat(3, 1, 1, 1)
    return CameraNoise(level=(2 / 255, 20 / 255), shot=(5e-4, 5e-3))(clean, torch.arange(len(clean)) + 10**6)


def test_a_clean_photograph_is_read_as_clean() -> None:
    for name in ("astronaut", "rocket"):
        small = torch.nn.functional.interpolate(photograph(name), scale_factor=0.75, mode="area")
        assert float(estimate_noise_model(small).level) < 2 / 255
