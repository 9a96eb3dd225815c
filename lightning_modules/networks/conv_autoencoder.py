"""Convolutional autoencoder: the image rebuilt from a small code."""

from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

Upsampling = Literal["nearest", "bilinear", "transposed", "pixel_shuffle"]


class ConvAutoencoder(nn.Module):
    """Rebuilds an image from a bottleneck of `latent_channels` at `2**downsamplings` times fewer pixels a side.

    What the bottleneck cannot hold, noise before anything else, is lost on the way. Sizes that do not divide are padded
    by repeating the border, and cropped back. No batch normalisation, for the reason given in `ResidualDenoiser`.

    Args:
        in_channels: Channels of the image: 3 for colour, 1 for grey.
        width: Channels of the first hidden layer; doubled at each downsampling.
        latent_channels: Channels of the code.
        downsamplings: How many times the resolution is halved, at least 1.
        upsampling: How the decoder doubles it again: `nearest` and `bilinear` resize and convolve; `transposed` and
            `pixel_shuffle` fill in, and leave a grid in the image, by which a detector knows them.

    Example:
        >>> import torch
        >>> ConvAutoencoder(width=8)(torch.rand(2, 3, 37, 31)).shape
        torch.Size([2, 3, 37, 31])
    """

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 32,
        latent_channels: int = 32,
        downsamplings: int = 2,
        upsampling: Upsampling = "nearest",
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "width": width, "latent_channels": latent_channels}
        for name, value in (sizes | {"downsamplings": downsamplings}).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if upsampling not in get_args(Upsampling):
            raise ValueError(f"upsampling must be one of {', '.join(get_args(Upsampling))}, got {upsampling!r}.")
        self.in_channels = in_channels
        self.stride = 2**downsamplings
        widths = [width * 2**level for level in range(downsamplings + 1)]
        levels = list(pairwise(widths))
        encoder: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU()]
        decoder: list[nn.Module] = [nn.Conv2d(latent_channels, widths[-1], 3, padding=1), nn.ReLU()]
        for narrow, wide in levels:
            encoder += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.ReLU()]
        for narrow, wide in reversed(levels):
            decoder += [*_doubling(wide, narrow, upsampling), nn.ReLU()]
        encoder.append(nn.Conv2d(widths[-1], latent_channels, 3, padding=1))
        output = nn.Conv2d(width, in_channels, 3, padding=1)
        nn.init.constant_(output.bias, 0.5)  # type: ignore[arg-type]  # the middle of the image's range
        decoder.append(output)
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*decoder)

    def encode(self, image: Tensor) -> Tensor:
        """Computes the code of a batch of images.

        Shape:
            - image: `[B, C, H, W]`, in [0, 1]
            - output: `[B, latent_channels, ceil(H / 2**downsamplings), ceil(W / 2**downsamplings)]`
        """
        if image.ndim != 4 or image.shape[1] != self.in_channels:
            raise ValueError(
                f"ConvAutoencoder(in_channels={self.in_channels}) expects images of shape "
                f"[B, {self.in_channels}, H, W], got {list(image.shape)}."
            )
        height, width = image.shape[-2:]
        padded = F.pad(image, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")
        return self.encoder(padded)

    def decode(self, code: Tensor) -> Tensor:
        """Computes a batch of images from their codes.

        Shape:
            - code: `[B, latent_channels, H, W]`
            - output: `[B, C, H * 2**downsamplings, W * 2**downsamplings]`
        """
        return self.decoder(code)

    def forward(self, noisy: Tensor) -> Tensor:
        """Rebuilds a batch of images from their codes.

        Shape:
            - noisy: `[B, C, H, W]`, in [0, 1] but for the noise
            - output: `[B, C, H, W]`
        """
        return self.decode(self.encode(noisy))[..., : noisy.shape[-2], : noisy.shape[-1]]


def _doubling(in_channels: int, out_channels: int, upsampling: Upsampling) -> list[nn.Module]:
    """Layers that double the resolution."""
    if upsampling == "transposed":  # covers its pixels unevenly, which shows as a checkerboard
        return [nn.ConvTranspose2d(in_channels, out_channels, 3, 2, 1, output_padding=1)]
    if upsampling == "pixel_shuffle":
        return [nn.Conv2d(in_channels, 4 * out_channels, 3, padding=1), nn.PixelShuffle(2)]
    return [nn.Upsample(scale_factor=2, mode=upsampling), nn.Conv2d(in_channels, out_channels, 3, padding=1)]
