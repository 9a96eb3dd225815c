"""Whatever the noise, and where there is none: `restore` by itself makes no picture worse."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from lightning_modules import restore
from lightning_modules.noise import CameraNoise, NoiseModel

Pair = tuple[Tensor, Tensor]  # noisy, clean: [C, H, W]


def photograph(name: str, size: int = 160) -> Tensor:
    pixels = getattr(data, name)()[100 : 100 + size, 60 : 60 + size].copy()
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def stored(image: Tensor) -> Tensor:
    return (255 * image.clamp(0, 1)).round() / 255


def model(slope: float, intercept: float, width: float = 0.0) -> NoiseModel:
    each, kernel = torch.ones(1, 3), NoiseModel.white(torch.ones(1), 3).kernel
    if width:
        line = torch.exp(-torch.arange(-3, 4.0).square() / (2 * width**2))
        kernel = kernel * (line[:, None] * line / line.square().sum())
    return NoiseModel(slope * each, intercept * each, each / 2, kernel)


def noisy_by(slope: float, intercept: float, width: float = 0.0, size: int = 160) -> Callable[[str], Pair]:
    def make(name: str) -> Pair:
        clean = photograph(name, size)
        return stored(model(slope, intercept, width).sample(clean[None], torch.tensor([3]))[0]), clean

    return make


def compressed(name: str) -> Pair:
    clean, file = photograph(name), BytesIO()
    noisy = stored(clean + 0.05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)))
    Image.fromarray((255 * noisy).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=30)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255, clean


def overexposed(name: str) -> Pair:
    clean = (2.5 * photograph(name)).clamp(0, 1)
    return stored(model(0.01, 0.0005).sample(clean[None], torch.tensor([3]))[0]), clean


def camera(name: str) -> Pair:
    shown = CameraNoise(level=(3 / 255, 15 / 255), shot=(1e-3, 4e-3))(photograph(name)[None], torch.tensor([5]))
    return stored(shown.noisy[0]), shown.clean[0]


KINDS: dict[str, Callable[[str], Pair]] = {
    "white": noisy_by(0, 0.005),
    "photons": noisy_by(0.01, 0.0003),
    "filtered": noisy_by(0, (10.3 / 255) ** 2, 0.7),
    "filtered far": noisy_by(0, (8 / 255) ** 2, 1.2),
    "little": noisy_by(0, (1 / 255) ** 2),
    "small": noisy_by(0, 0.005, size=32),
    "small and filtered": noisy_by(0, 0.002, 0.8, size=32),
    "JPEG": compressed,
    "overexposed": overexposed,
    "camera": camera,
    "constant": lambda name: (torch.full((3, 120, 120), 0.4), torch.full((3, 120, 120), 0.4)),
    "white paper": lambda name: (torch.ones(3, 90, 90), torch.ones(3, 90, 90)),
}


def psnr(image: Tensor, clean: Tensor) -> float:
    return float(-10 * (image - clean).square().mean().clamp_min(1e-10).log10())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["chelsea", "coffee"])
def test_no_picture_is_worse(kind: str, name: str) -> None:
    noisy, clean = KINDS[kind](name)
    assert psnr(restore(noisy), clean) > psnr(noisy, clean) - 0.1
