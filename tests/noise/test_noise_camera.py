"""Noise models from noisy images alone: what was sampled is found, and white noise stays white."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data
from torch import Tensor

from lightning_modules import restore
from lightning_modules.imaging import read_image
from lightning_modules.noise import NoiseModel, estimate_noise_model, estimate_noise_models, estimate_noise_std
from lightning_modules.operators import TotalVariation


def photograph(name: str) -> Tensor:
    pixels = torch.from_numpy(getattr(data, name)()[:320, :320].copy()).float() / 255
    return pixels[None, None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)[None]


def through_8_bits(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round() / 255


def model(slope: float, intercept: float, width: float = 0.0, channels: int = 3) -> NoiseModel:
    each = torch.ones(1, channels)
    kernel = NoiseModel.white(torch.ones(1), channels).kernel
    if width:
        step = torch.arange(-3, 4.0)
        line = torch.exp(-step.square() / (2 * width**2))
        kernel = kernel * (line[:, None] * line / line.square().sum())
    return NoiseModel(slope * each, intercept * each, each / 2, kernel)


@settings(max_examples=6)
@given(st.floats(0.003, 0.02), st.floats(1e-4, 1e-3), st.integers(0, 2**16), st.booleans())
def test_slope_and_intercept_are_found(slope: float, intercept: float, seed: int, clip: bool) -> None:
    clean = photograph("chelsea")
    noisy = model(slope, intercept).sample(clean, torch.tensor([seed]), clip)
    found = estimate_noise_model(through_8_bits(noisy) if clip else noisy)
    assert found.is_uncorrelated.all()
    assert not found.is_white.any()
    true = (slope * clean.mean() + intercept).sqrt()
    torch.testing.assert_close(found.level[0], true, rtol=0.05, atol=0)
    torch.testing.assert_close(found.slope, torch.full((1, 3), slope), rtol=0.12, atol=0.0005)
    torch.testing.assert_close(found.intercept, torch.full((1, 3), intercept), rtol=0.12, atol=0.0004)


@settings(max_examples=6)
@given(st.floats(0.6, 1.1), st.floats(5, 20), st.integers(0, 2**16))
def test_the_filter_is_found(width: float, level: float, seed: int) -> None:
    true = model(0.0, (level / 255) ** 2, width)
    found = estimate_noise_model(through_8_bits(true.sample(photograph("chelsea"), torch.tensor([seed]))))
    assert found.level[0] * 255 == pytest.approx(level, rel=0.12)
    assert found.neighbor_correlation[0] == pytest.approx(float(true.neighbor_correlation[0]), abs=0.08)
    assert found.low_frequency_gain[0] == pytest.approx(float(true.low_frequency_gain[0]), rel=0.08)


@pytest.mark.parametrize("name", ["chelsea", "astronaut", "coffee"])
@pytest.mark.parametrize("level", [0, 2, 5, 25])
def test_white_noise_is_read_as_before(name: str, level: float) -> None:
    noisy = through_8_bits(model(0.0, (level / 255) ** 2).sample(photograph(name), torch.tensor([3])))
    found = estimate_noise_model(noisy)
    assert found.is_white.all()
    assert torch.equal(found.level, estimate_noise_std(noisy))


def test_images_of_a_batch_have_models_of_their_own() -> None:
    clean = photograph("chelsea")
    noisy = torch.cat(
        [
            each.sample(clean, torch.tensor([1]))
            for each in (model(0.0, 0.01), model(0.0, 0.002, 0.8), model(0.01, 0.0002))
        ]
    )
    found = estimate_noise_model(noisy)
    assert found.is_white.tolist() == [True, False, False]
    assert found.is_uncorrelated.tolist() == [True, False, True]
    for index in range(3):
        alone = estimate_noise_model(noisy[index : index + 1])
        torch.testing.assert_close(found.of(index).level, alone.level)
        torch.testing.assert_close(found.of(index).neighbor_correlation, alone.neighbor_correlation)


def hard_cases() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = photograph("chelsea")
    file = BytesIO()
    pixels = through_8_bits(clean + 0.05 * torch.randn(clean.shape, generator=generator))
    Image.fromarray((255 * pixels[0].permute(1, 2, 0)).round().byte().numpy()).save(file, "JPEG", quality=30)
    decoded = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None].float() / 255
    return {
        "small": clean[..., 100:132, 100:132] + 0.1 * torch.randn(1, 3, 32, 32, generator=generator),
        "tiny": torch.rand(1, 3, 3, 5, generator=generator),
        "constant": torch.full((1, 3, 200, 200), 0.3),
        "black": torch.zeros(1, 3, 200, 200),
        "white": torch.ones(1, 1, 200, 200),
        "smooth": torch.linspace(0, 1, 200).expand(1, 3, 200, -1),
        "JPEG": decoded,
        "gray": photograph("camera"),
        "two channels": clean[:, :2] + 0.05 * torch.randn(1, 2, 300, 320, generator=generator),
    }


@pytest.mark.parametrize("name", hard_cases())
@pytest.mark.parametrize("kind", ["auto", "camera"])
def test_every_image_has_an_answer(name: str, kind: str) -> None:
    found = estimate_noise_model(hard_cases()[name], kind)
    assert all(value.isfinite().all() for value in vars(found).values())
    assert 0 <= found.level[0] < 0.5
    if name in ("constant", "black", "white"):
        assert found.level[0] == 0


def test_what_cannot_be_read_is_named() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        estimate_noise_model(torch.full((1, 3, 50, 50), float("nan")))
    with pytest.raises(ValueError, match="'auto', 'white' or 'camera', got 'pink'"):
        estimate_noise_model(torch.rand(1, 3, 50, 50), "pink")
    with pytest.raises(ValueError, match="1×8 pixels"):
        estimate_noise_model(torch.rand(1, 3, 1, 8))


@pytest.mark.parametrize("true", [model(0.02, 0.0002), model(0.0, 0.002, 0.8)], ids=["photons", "filtered"])
def test_restore_takes_what_it_finds_and_what_it_is_given(true: NoiseModel) -> None:
    clean = photograph("chelsea")
    noisy = true.sample(clean, torch.tensor([5]), clip=True)

    def error(restored: Tensor) -> float:
        return float((restored - clean[0]).square().mean())

    found, told, white = (error(restore(noisy[0], noise=n, model=TotalVariation(20))) for n in ("auto", true, "white"))
    assert found < 0.8 * error(noisy[0])
    assert found < 1.1 * told
    assert found < white


def cameras_noise(level: float) -> NoiseModel:
    """Noise that the channels have in common, but for a little, and that is correlated far."""
    filtered = model(0.0, (level / 255) ** 2, 1.0)
    mixed = 0.9 * torch.ones(3, 3) / 3**0.5 + 0.1 * torch.eye(3)
    kernel = mixed[None, :, :, None, None] * filtered.kernel[:, 0, 0]
    kernel = kernel / kernel.square().sum((2, 3, 4), keepdim=True).sqrt()
    return NoiseModel(filtered.slope, filtered.intercept, filtered.brightness, kernel)


def test_images_of_a_camera_share_their_noise() -> None:
    true = cameras_noise(6)
    clean = [
        torch.full((1, 3, 160, 160), 0.4),
        torch.full((1, 3, 160, 160), 0.6),
        photograph("coffee")[..., :160, :160],
    ]
    noisy = [through_8_bits(true.sample(image, torch.tensor([key])))[0] for key, image in enumerate(clean)]
    alone = estimate_noise_models(noisy, ["", "", ""])
    for image, own in zip(noisy, alone, strict=True):
        torch.testing.assert_close(own.level, estimate_noise_model(image[None]).level)
    together = estimate_noise_models(noisy, ["A, ISO 800"] * 3)
    errors = [[abs(float(each.level) * 255 / 6 - 1) for each in models] for models in (alone, together)]
    assert max(errors[1]) < max(*errors[0], 0.15) + 1e-6
    assert errors[1][2] < 0.2
    mixed = estimate_noise_models(noisy, ["A", "B", "C"])  # nothing to share
    for own, other in zip(alone, mixed, strict=True):
        torch.testing.assert_close(own.level, other.level)
    with pytest.raises(ValueError, match="got 1 for 3 images"):
        estimate_noise_models(noisy, ["A"])


@pytest.mark.parametrize("name", ["5dmark3_iso3200_3", "d600_iso3200_3", "d800_iso6400_2"])
def test_noise_of_cameras_is_seen_where_few_blocks_are_flat(name: str, shared_data: Path) -> None:
    noisy_file = next((shared_data / "real_noise" / "CC15").glob(f"{name}_real*"), None)
    if noisy_file is None:
        pytest.skip("CC15 is not there")
    noisy, clean = (
        read_image(path).float() / 255
        for path in (noisy_file, noisy_file.with_name(noisy_file.name.replace("_real", "_mean")))
    )
    true = float((noisy - clean).var((1, 2)).mean().sqrt())
    assert 0.6 * true < float(estimate_noise_model(noisy[None]).level) < 1.4 * true


@pytest.mark.parametrize("name", ["130034", "108004", "326038"])
def test_texture_all_over_is_no_noise_of_cameras(name: str, shared_data: Path) -> None:
    file = shared_data / "denoise" / "CBSD432" / f"{name}.jpg"
    if not file.is_file():
        pytest.skip("CBSD432 is not there")
    assert bool(estimate_noise_model(read_image(file)[None].float() / 255).is_white)
