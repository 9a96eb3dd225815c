"""Features of an image, the ground on which regimes are told apart."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Energies below this are rounding of 8-bit pixels (a step of 1/255 has variance 1/255² / 12 ≈ 1.3e-6).
_FLOOR = 1e-6


class ImageFeature(nn.Module, ABC):
    """One number, or a few, for each image; a feature of your own is a subclass and its class path in a configuration.

    Features enter a Gaussian mixture, so quantities that differ by factors are best given as logarithms.
    """

    @abstractmethod
    def forward(self, images: Tensor, noise_std: Tensor) -> Tensor:
        """Values of the feature.

        Args:
            images: Noisy images.
            noise_std: Their noise standard deviation, known or estimated.

        Shape:
            - images: `[B, C, H, W]`
            - noise_std: `[B]`
            - output: `[B]` or `[B, F]`
        """


class NoiseLevel(ImageFeature):
    """Logarithm of the noise level that the restoration is told: in blind restoration, the estimate.

    Example:
        >>> NoiseLevel()(torch.rand(2, 3, 8, 8), torch.tensor([0.1, 0.2])).exp()
        tensor([0.1000, 0.2000])
    """

    def forward(self, images: Tensor, noise_std: Tensor) -> Tensor:
        """Log level; see `ImageFeature.forward`."""
        return noise_std.clamp_min(_FLOOR**0.5).log()


class Texture(ImageFeature):
    """Logarithm of the mean variance within windows, less that of the noise: detail of the scale of a window.

    Args:
        window: Side of the windows in pixels.
    """

    def __init__(self, window: int = 5) -> None:
        super().__init__()
        if window < 2:
            raise ValueError(f"a window has a variance from 2 pixels on, got window={window}")
        self.window = window

    def forward(self, images: Tensor, noise_std: Tensor) -> Tensor:
        """Log energy; see `ImageFeature.forward`."""
        size = min(self.window, *images.shape[-2:])
        mean = F.avg_pool2d(images, size, 1)
        variance = F.avg_pool2d(images.square(), size, 1) - mean.square()
        # the mean of n pixels keeps 1/n of the noise, the variance the rest
        return _log_energy(variance.mean((1, 2, 3)) - noise_std.square() * (1 - 1 / size**2))


class GradientEnergy(ImageFeature):
    """Logarithm of the mean squared difference of neighbours, less that of the noise: edges and fine detail."""

    def forward(self, images: Tensor, noise_std: Tensor) -> Tensor:
        """Log energy; see `ImageFeature.forward`."""
        rows, columns = (images.diff(dim=dim).square().mean((1, 2, 3)) for dim in (-2, -1))
        return _log_energy(rows + columns - 4 * noise_std.square())


class ColourSpread(ImageFeature):
    """Logarithm of the mean variance over the channels, less that of the noise: 0 chroma is grey."""

    def forward(self, images: Tensor, noise_std: Tensor) -> Tensor:
        """Log energy; see `ImageFeature.forward`."""
        channels = images.shape[1]
        variance = images.var(1, correction=0).mean((1, 2))
        return _log_energy(variance - noise_std.square() * (1 - 1 / channels))


def _log_energy(energy: Tensor) -> Tensor:
    return energy.clamp_min(_FLOOR).log()


class ImageFeatures(nn.Module):
    """Several features side by side.

    Args:
        features: The features; the noise level alone by default.

    Example:
        >>> features = ImageFeatures([NoiseLevel(), Texture()])
        >>> features(torch.rand(2, 3, 8, 8), torch.tensor([0.1, 0.2])).shape
        torch.Size([2, 2])
    """

    def __init__(self, features: list[ImageFeature]) -> None:
        super().__init__()
        if not features:
            raise ValueError("features is empty: give at least one, such as NoiseLevel()")
        self.features = nn.ModuleList(features).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "ImageFeatures":
        """As `nn.Module.train`, but the features stay in evaluation: they are measures, which must not drift."""
        super().train(mode)
        self.features.eval()
        return self

    def width(self, channels: int) -> int:
        """How many numbers the features give for an image, by one look at some of random pixels.

        Args:
            channels: Channels of the images.

        Raises:
            ValueError: If a feature cannot be worked out on them.
        """
        images = torch.rand(2, channels, 16, 16, generator=torch.Generator().manual_seed(0))
        try:
            return self(images, torch.full((2,), 0.1)).shape[1]
        except RuntimeError as error:
            raise ValueError(
                f"the features cannot be worked out on images of {channels} channels and 16×16 pixels, which was tried "
                f"to learn how many numbers they give: {error}. Set `channels` to that of your images, and let "
                "features take images of any size"
            ) from error

    @torch.no_grad()
    def forward(self, images: Tensor, noise_std: Tensor) -> Tensor:
        """Features of the images, float64 `[B, F]`; see `ImageFeature.forward`.

        Raises:
            ValueError: If a feature returns anything but one row of finite numbers for each image. On an accelerator a
                look would stall every step: there the M-step is skipped and counted, and the loss is not finite.
        """
        columns = []
        for feature in self.features:
            values = feature(images, noise_std)
            if values.ndim not in (1, 2) or len(values) != len(images):
                raise ValueError(
                    f"{type(feature).__name__} returned {list(values.shape)} for {len(images)} images; expected "
                    f"[{len(images)}] or [{len(images)}, F]: give one row of numbers for each image"
                )
            if values.device.type == "cpu" and not bool(values.isfinite().all()):
                raise ValueError(
                    f"{type(feature).__name__} is not finite for image(s) "
                    f"{sorted({int(i) for i in (~values.isfinite()).nonzero()[:, 0]})} of the batch: look for NaN or "
                    "infinite pixels, or bound the feature, as with clamp_min before a logarithm"
                )
            columns.append(values.double().view(len(images), -1))
        return torch.cat(columns, dim=1)
