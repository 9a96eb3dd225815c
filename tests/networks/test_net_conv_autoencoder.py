"""ConvAutoencoder: any size in, the same size out, through a bottleneck that learns."""

import pytest
import torch

from lightning_modules.networks import ConvAutoencoder


@pytest.mark.parametrize("size", [(37, 31), (8, 8), (5, 3), (1, 1)])
@pytest.mark.parametrize("downsamplings", [1, 3])
def test_output_has_the_size_of_the_input(size: tuple[int, int], downsamplings: int) -> None:
    network = ConvAutoencoder(in_channels=1, width=4, latent_channels=5, downsamplings=downsamplings)
    image = torch.rand(2, 1, *size)
    assert network(image).shape == image.shape
    code = network.encode(image)
    assert code.shape == (2, 5, -(-size[0] // 2**downsamplings), -(-size[1] // 2**downsamplings))


def test_starts_around_the_middle_of_the_range() -> None:
    torch.manual_seed(0)
    output = ConvAutoencoder()(torch.rand(4, 3, 32, 32))
    assert (output - 0.5).abs().max() < 0.5


def test_learns_smooth_images() -> None:
    torch.manual_seed(0)
    coarse = torch.rand(16, 3, 4, 4)
    image = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear")
    network = ConvAutoencoder(width=8, latent_channels=8)
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (network(image) - image).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.15 * losses[0]


@pytest.mark.parametrize("name", ["in_channels", "width", "latent_channels", "downsamplings"])
def test_bad_arguments_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        ConvAutoencoder(**{name: 0})


def test_wrong_channels_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\], got \[2, 1, 8, 8\]"):
        ConvAutoencoder()(torch.rand(2, 1, 8, 8))
