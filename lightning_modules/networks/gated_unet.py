"""A small multi-scale network of gated depthwise blocks at half resolution."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Added to the variance over the channels before it divides.
_EPSILON = 1e-6


class GatedUNet(nn.Module):
    """Maps images and a noise level for each to images, by a U-shaped network of gated blocks.

    The blocks are those of NAFNet without channel attention (Chen et al., "Simple baselines for image restoration",
    ECCV 2022): a gate, the product of two halves of the channels, takes the place of an activation. All of it works at
    half resolution or less: the input is folded 2×2 into channels, and the noise level is one channel more. There is no
    batch normalization, and images of any size are continued at their lower and right border as far as needed.

    Args:
        in_channels: Channels of the input images.
        out_channels: Channels of the output images.
        widths: Channels of the hidden layers at each scale, finest first.
        depths: Number of blocks at each scale on the way down; the last is that of the coarsest scale.
        up_depths: Number of blocks at each but the coarsest scale on the way up.

    Raises:
        ValueError: If the lists are not of lengths that fit, or a number is not positive.

    Example:
        >>> network = GatedUNet(3, 3, widths=(8, 16), depths=(1, 1), up_depths=(1,))
        >>> network(torch.rand(2, 3, 37, 31), torch.full((2,), 0.1)).shape
        torch.Size([2, 3, 37, 31])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int] = (24, 48, 96),
        depths: Sequence[int] = (2, 2, 3),
        up_depths: Sequence[int] = (2, 2),
    ) -> None:
        super().__init__()
        if not len(widths) == len(depths) == len(up_depths) + 1:
            raise ValueError(
                "widths and depths need one number for each scale and up_depths one less, got "
                f"{list(widths)}, {list(depths)} and {list(up_depths)}"
            )
        if min(in_channels, out_channels, *widths, *depths, *up_depths) < 1:
            raise ValueError("channels, widths and depths must be at least 1")
        # Each scale halves the sides once more; the first halving is that of the input.
        self.multiple = 2 ** len(widths)
        self.stem = nn.Conv2d(4 * in_channels + 1, widths[0], 3, padding=1)
        self.encoders = nn.ModuleList(
            _blocks(width, depth) for width, depth in zip(widths[:-1], depths[:-1], strict=True)
        )
        self.downs = nn.ModuleList(nn.Conv2d(fine, coarse, 2, 2) for fine, coarse in pairwise(widths))
        self.middle = _blocks(widths[-1], depths[-1])
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Conv2d(coarse, 4 * fine, 1), nn.PixelShuffle(2)) for fine, coarse in pairwise(widths)
        )
        self.decoders = nn.ModuleList(
            _blocks(width, depth) for width, depth in zip(widths[:-1], up_depths, strict=True)
        )
        self.output = nn.Conv2d(widths[0], 4 * out_channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, level: Tensor) -> Tensor:
        """The network's output.

        Args:
            images: Input images.
            level: Noise level of each image, or of each pixel, where white is 1.

        Shape:
            - images: `[B, in_channels, H, W]`
            - level: `[B]` or `[B, 1, H, W]`
            - output: `[B, out_channels, H, W]`
        """
        height, width = images.shape[-2:]
        padding = (0, -width % self.multiple, 0, -height % self.multiple)
        level = level.view(-1, 1, 1, 1).expand(-1, 1, height, width) if level.ndim == 1 else level
        images, level = (F.pad(part, padding, mode="replicate") if any(padding) else part for part in (images, level))
        folded = torch.cat([F.pixel_unshuffle(images, 2), F.avg_pool2d(level, 2)], dim=1)
        # With the channels of a pixel side by side its normalization is one pass, and so is a pointwise convolution.
        hidden = self.stem(folded.contiguous(memory_format=torch.channels_last))
        skipped = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            hidden = encoder(hidden)
            skipped.append(hidden)
            hidden = down(hidden)
        hidden = self.middle(hidden)
        for up, decoder in zip(reversed(self.ups), reversed(self.decoders), strict=True):
            hidden = decoder(skipped.pop() + up(hidden))
        return F.pixel_shuffle(self.output(hidden), 2)[..., :height, :width]


class _ChannelNorm(nn.Module):
    """Normalization over the channels of each pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.layer_norm(hidden.movedim(1, -1), self.weight.shape, self.weight, self.bias, _EPSILON).movedim(-1, 1)


class _GatedBlock(nn.Module):
    """A depthwise and a pointwise step, each gated, each added to its input at a scale that starts at 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial_norm = _ChannelNorm(width)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.project = nn.Conv2d(width, width, 1)
        self.channel_norm = _ChannelNorm(width)
        self.mix_in = nn.Conv2d(width, 2 * width, 1)
        self.mix_out = nn.Conv2d(width, width, 1)
        self.spatial_scale = nn.Parameter(torch.zeros(width))
        self.channel_scale = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor) -> Tensor:
        spatial = self.project(_gate(self.depthwise(self.expand(self.spatial_norm(hidden)))))
        hidden = hidden + self.spatial_scale[:, None, None] * spatial
        mixed = self.mix_out(_gate(self.mix_in(self.channel_norm(hidden))))
        return hidden + self.channel_scale[:, None, None] * mixed


def _gate(hidden: Tensor) -> Tensor:
    first, second = hidden.chunk(2, dim=1)
    return first * second


def _blocks(width: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(_GatedBlock(width) for _ in range(depth)))
