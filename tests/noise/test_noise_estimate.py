"""The estimate of the noise level."""

import pytest
import torch
from skimage.restoration import estimate_sigma

from lightning_modules.noise import estimate_noise_std


@pytest.mark.parametrize("level", [5, 15, 25, 50])
def test_estimate_on_real_photographs(level: float) -> None:
    from skimage.data import astronaut

    clean = torch.from_numpy(astronaut()).permute(2, 0, 1)[None, :, 50:306, 100:356].float() / 255
    noisy = clean + level / 255 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    estimate = estimate_noise_std(noisy).item() * 255
    assert abs(estimate - level) < 0.08 * level
    # the peer looks at the channels, whose texture it takes for noise
    peer = estimate_sigma(noisy[0].numpy(), channel_axis=0, average_sigmas=True) * 255
    assert abs(estimate - level) < abs(peer - level) + 0.05 * level
    one_channel = estimate_noise_std(noisy[:, 1:2]).item() * 255
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
