"""Small network for traces in the pixels: full resolution first, then texture, never the scene."""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

_GROUPS = 8


class TraceNetwork(nn.Module):
    """Eight 3×3 convolutions and an average over the image: a fast default for detectors on CPUs.

    The first layer keeps every pixel and the average ends at features that see some 60 pixels: what gives a generated
    image away is in the statistics of neighbouring pixels, and what the scene shows is out of its reach.

    Args:
        in_channels: Channels of the input.
        widths: Channels of the layers, multiples of 8.
        strides: Strides of the layers.
        normalization: `batch` keeps how strong a residual is, which matters, and learns several times as fast;
            `group` takes each image by itself, in 8 groups of channels, by which several processes compute exactly what
            one does. With `batch` on several devices set the Trainer's `sync_batchnorm`, or each keeps statistics of
            its own.

    Raises:
        ValueError: If the widths and strides do not pair up, or a width cannot be normalised in groups of 8.

    Example:
        >>> import torch
        >>> TraceNetwork(in_channels=3)(torch.rand(2, 3, 37, 31)).shape
        torch.Size([2, 96])
    """

    def __init__(
        self,
        in_channels: int = 3,
        widths: tuple[int, ...] = (16, 24, 32, 48, 48, 64, 64, 96),
        strides: tuple[int, ...] = (1, 2, 1, 2, 1, 2, 1, 1),
        normalization: Literal["batch", "group"] = "batch",
    ) -> None:
        super().__init__()
        if len(widths) != len(strides) or not widths:
            raise ValueError(f"widths and strides must be of one length, got {len(widths)} and {len(strides)}")
        if any(width < 1 or width % _GROUPS for width in widths):
            raise ValueError(f"widths must be multiples of {_GROUPS}, got {list(widths)}")
        if normalization not in ("batch", "group"):
            raise ValueError(f"normalization must be 'batch' or 'group', got {normalization!r}")
        self.in_channels = in_channels
        self.widths, self.strides, self.normalization = widths, strides, normalization
        layers: list[nn.Module] = []
        for (before, width), stride in zip(pairwise((in_channels, *widths)), strides, strict=True):
            layers += [
                nn.Conv2d(before, width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width) if normalization == "batch" else nn.GroupNorm(_GROUPS, width),
                nn.ReLU(inplace=True),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Features of each image.

        Shape:
            - x: `[B, C, H, W]`, of any size
            - output: `[B, D]`, D the last of the widths
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"TraceNetwork(in_channels={self.in_channels}) expects [B, {self.in_channels}, H, W], got "
                f"{list(x.shape)}"
            )
        # a third faster on a CPU: few channels, many pixels
        features: Tensor = self.layers(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        return features
