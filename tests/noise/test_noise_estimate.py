"""The estimate of the noise level."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data
from skimage.restoration import estimate_sigma
from torch import Tensor
from torch.nn.functional import pad

from lightning_modules.noise import estimate_noise_std


def photograph(name: str) -> Tensor:
    pixels = torch.from_numpy(getattr(data, name)().copy()).float() / 255
    return pixels[None, None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)[None]


def add_noise(images: Tensor, level: float, seed: int = 0) -> Tensor:
    return images + level / 255 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def through_8_bits(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round() / 255


def enlarged(images: Tensor, factor: int) -> Tensor:
    return images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def read(images: Tensor) -> float:
    return estimate_noise_std(images).item() * 255


@pytest.mark.parametrize("level", [5, 15, 25, 50])
def test_estimate_on_real_photographs(level: float) -> None:
    noisy = add_noise(photograph("astronaut")[..., 50:306, 100:356], level)
    estimate = read(noisy)
    assert abs(estimate - level) < 0.08 * level
    # the peer looks at the channels, whose texture it takes for noise
    peer = estimate_sigma(noisy[0].numpy(), channel_axis=0, average_sigmas=True) * 255
    assert abs(estimate - level) < abs(peer - level) + 0.05 * level
    one_channel = read(noisy[:, 1:2])
    assert abs(one_channel - level) < 0.15 * level + 1
    assert abs(one_channel - estimate_sigma(noisy[0, 1].numpy()) * 255) < 0.1 * level + 1


@pytest.mark.parametrize("how", ["grey stored as colour", "smoothed colour"])
def test_estimate_where_colours_do_not_show_the_noise(how: str) -> None:
    generator = torch.Generator().manual_seed(0)
    luma = 0.5 + 0.1 * torch.randn(1, 1, 64, 64, generator=generator)
    images = luma.expand(-1, 3, -1, -1)
    if how == "smoothed colour":
        images = images + torch.nn.functional.interpolate(
            0.05 * torch.randn(1, 3, 8, 8, generator=generator), scale_factor=8
        )
    assert abs(estimate_noise_std(images).item() - 0.1) < 0.01


def test_estimate_is_per_image_and_refuses_a_single_pixel() -> None:
    images = torch.rand(3, 3, 37, 31)
    each = torch.cat([estimate_noise_std(image[None]) for image in images])
    torch.testing.assert_close(estimate_noise_std(images), each)
    with pytest.raises(ValueError, match="1×8 pixels"):
        estimate_noise_std(torch.rand(1, 3, 1, 8))


def test_estimate_of_framed_cut_out_and_enlarged_photographs() -> None:
    noisy = through_8_bits(add_noise(photograph("astronaut")[..., :256, :256], 25))
    estimate = read(noisy)
    assert 23 < estimate < 25.5
    for framed in (
        pad(noisy, (60, 60, 60, 60)),
        pad(noisy, (0, 0, 90, 200), value=1.0),
        pad(noisy, (5, 90, 3, 0), value=0.4),
    ):
        assert read(framed) == pytest.approx(estimate, rel=1e-6)
    for factor in (2, 3):
        assert read(enlarged(noisy, factor)) == pytest.approx(estimate, rel=1e-6)
    assert read(pad(enlarged(noisy, 2), (100, 100, 90, 90), value=0.3)) == pytest.approx(estimate, rel=1e-6)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 256), torch.linspace(-1, 1, 256), indexing="ij")
    for background in (0.0, 127 / 255, 1.0):  # a third of the image is left
        cut_out = torch.where(y.square() + x.square() < 0.4, noisy, torch.tensor(background))
        assert read(cut_out) == pytest.approx(25, rel=0.1)
    # images of one batch do not share their frames
    batch = torch.cat(
        [pad(noisy, (60, 60, 60, 60)), pad(noisy, (0, 120, 120, 0), value=1.0), torch.zeros(1, 3, 376, 376)]
    )
    torch.testing.assert_close(
        estimate_noise_std(batch) * 255, torch.tensor([estimate, estimate, 0.0]), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("stored", [True, False], ids=["8 bit", "float"])
@pytest.mark.parametrize("level", [1, 2, 5, 10, 15, 25, 50])
@pytest.mark.parametrize("name", ["chelsea", "coffee", "rocket", "moon"])
def test_estimate_is_within_a_tenth_or_0_3(name: str, level: int, stored: bool) -> None:
    noisy = add_noise(photograph(name)[..., :300, :320], level)
    assert abs(read(through_8_bits(noisy) if stored else noisy) - level) < max(0.3, 0.1 * level)


@pytest.mark.parametrize(
    ("name", "most"), [("chelsea", 0.3), ("coffee", 1.0), ("rocket", 0.5), ("camera", 1.0), ("moon", 1.0)]
)
def test_clean_photographs_read_about_0(name: str, most: float) -> None:
    clean = photograph(name)
    assert read(clean) <= most
    assert read(pad(clean, (200, 200, 200, 200))) <= most
    file = BytesIO()
    pixels = (clean[0].permute(1, 2, 0) * 255).round().byte().numpy().squeeze()
    Image.fromarray(pixels).save(file, "JPEG", quality=80)
    decoded = torch.from_numpy(np.asarray(Image.open(file)).copy()).float() / 255
    assert read(decoded[None, None] if decoded.ndim == 2 else decoded.permute(2, 0, 1)[None]) <= 1.5


def test_clean_photographs_scaled_down(shared_data: Path) -> None:
    files = sorted((shared_data / "photos").glob("*.jpg"))[::16]
    if not files:
        pytest.skip(f"no photographs in {shared_data / 'photos'}")
    for file in files:
        with Image.open(file) as image:
            small = image.convert("RGB").resize((image.width * 2 // 5, image.height * 2 // 5), Image.Resampling.LANCZOS)
        clean = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)[None].float() / 255
        drawing = "cartoon" in file.name  # on white paper, whose noise is cut in half
        assert read(clean) <= (1.1 if drawing else 1), file.name
        assert read(through_8_bits(add_noise(clean, 2))) == pytest.approx(2, abs=0.3), file.name
        assert read(through_8_bits(add_noise(clean, 50))) == pytest.approx(50, rel=0.12 if drawing else 0.1), file.name


@pytest.mark.parametrize(("level", "most"), [(5, 0.5), (25, 0.9), (50, 1.8)])
def test_small_images_no_worse_than_by_the_median_haar_coefficient(cifar_root: Path, level: int, most: float) -> None:
    from datamodules import CIFAR10DataModule

    module = CIFAR10DataModule(cifar_root, batch_size=96)
    module.setup("test")
    noisy = add_noise(module.on_after_batch_transfer(next(iter(module.test_dataloader())), 0)["image"], level)
    diagonal = noisy.diff(dim=2).diff(dim=3) / 2
    red, green, blue = diagonal.unbind(1)
    opponent = torch.stack([(red - blue) / 2**0.5, (red - 2 * green + blue) / 6**0.5], 1)
    haar = opponent.abs().flatten(1).median(1).values / 0.6745

    def error(estimate: Tensor) -> float:
        return (estimate * 255 - level).square().mean().sqrt().item()

    ours = error(estimate_noise_std(noisy))
    assert ours < most
    assert ours <= error(haar)
    assert error(estimate_noise_std(through_8_bits(noisy))) < most


def test_rounding_to_8_bits_is_subtracted() -> None:
    flat = torch.linspace(0.3, 0.7, 128).expand(1, 3, 128, 128)
    for level in (0.5, 1.0, 3.0):
        noisy = add_noise(flat, level)
        assert read(through_8_bits(noisy)) == pytest.approx(read(noisy), abs=0.03)


@pytest.mark.parametrize("share", [0.05, 0.15, 0.5])
def test_clipping_gives_back_what_it_took(share: float) -> None:
    mean = torch.special.ndtri(torch.tensor(1 - share)).item() * 25 / 255
    noisy = through_8_bits(add_noise(torch.full((1, 3, 128, 128), mean), 25))
    assert noisy.std() * 255 < 25 * (1 - share / 2)
    assert read(noisy) == pytest.approx(25, rel=0.11 if share == 0.5 else 0.04)


@settings(max_examples=25)
@given(
    st.tuples(*[st.integers(0, 12)] * 4),
    st.floats(0, 1, width=32),
    st.sampled_from([1, 3]),
    st.floats(1, 50),
    st.integers(0, 2**16),
)
def test_a_frame_does_not_matter(
    widths: tuple[int, int, int, int], value: float, channels: int, level: float, seed: int
) -> None:
    noisy = add_noise(photograph("chelsea")[:, :channels, 100:137, 120:151], level, seed)
    framed = pad(noisy, widths, value=value)  # up to 69 % of the area
    torch.testing.assert_close(estimate_noise_std(framed), estimate_noise_std(noisy), rtol=1e-6, atol=0)


@settings(max_examples=8)
@given(st.sampled_from([(37, 31), (131, 113)]), st.floats(1, 50), st.integers(0, 2**16), st.floats(0.01, 0.9))
def test_mirrored_transposed_and_scaled(size: tuple[int, int], level: float, seed: int, scale: float) -> None:
    noisy = add_noise(photograph("chelsea")[..., 100 : 100 + size[0], 120 : 120 + size[1]], level, seed)
    estimate = estimate_noise_std(noisy)
    for other in (noisy.flip(2), noisy.flip(3), noisy.mT):
        torch.testing.assert_close(estimate_noise_std(other), estimate, rtol=0.05, atol=0.1 / 255)
    torch.testing.assert_close(estimate_noise_std(scale * noisy), scale * estimate, rtol=1e-4, atol=0)
    torch.testing.assert_close(estimate_noise_std(noisy.double()).float(), estimate, rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [(2, 2), (2, 9), (3, 4), (4, 40), (5, 5)])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_tiny_images_and_any_number_of_channels(size: tuple[int, int], channels: int) -> None:
    images = 0.5 + 0.1 * torch.randn(400, channels, *size, generator=torch.Generator().manual_seed(0))
    estimate = estimate_noise_std(images)
    assert estimate.shape == (400,)
    assert estimate.square().mean().sqrt().item() == pytest.approx(0.1, rel=0.15)
    assert (estimate_noise_std(torch.full((2, channels, *size), 0.3)) == 0).all()


def test_estimate_keeps_the_type_and_has_no_gradient() -> None:
    images = torch.rand(2, 3, 12, 13, dtype=torch.float64, requires_grad=True)
    estimate = estimate_noise_std(images)
    assert estimate.dtype == torch.float64
    assert not estimate.requires_grad
    assert estimate_noise_std(images.detach().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("level", [0, 5, 15, 25, 40])
@pytest.mark.parametrize("name", ["chelsea", "astronaut"])
def test_gray_stored_as_color_reads_what_gray_reads(name: str, level: int) -> None:
    gray = through_8_bits(add_noise(photograph(name)[..., :200, :200].mean(1, keepdim=True), level))
    color = estimate_noise_std(gray.expand(1, 3, -1, -1))
    assert color.item() == pytest.approx(estimate_noise_std(gray).item(), abs=1e-5)


@pytest.mark.parametrize("quality", [92, 95])
@pytest.mark.parametrize("level", [20, 40])
@pytest.mark.parametrize("name", ["chelsea", "astronaut"])
def test_noise_in_a_jpeg_file_that_halves_its_colors_is_seen(name: str, level: int, quality: int) -> None:
    clean, buffer = photograph(name)[..., :256, :256], BytesIO()
    noisy = (through_8_bits(add_noise(clean, level)) * 255).round().byte()[0].permute(1, 2, 0).numpy()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    stored = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)[None].float() / 255
    luma = (stored - clean).mean(1).std().item()
    assert 0.55 * luma < estimate_noise_std(stored).item() < 1.3 * luma
