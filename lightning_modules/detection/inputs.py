"""What the network of a detector looks at: views of the pixels, side by side as channels."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class DetectorInput(nn.Module, ABC):
    """One view of an image; a view of your own is a subclass and its class path in a configuration.

    Args:
        gain: Factor that brings the view to a standard deviation of order 1, at which networks learn well.
    """

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        if not gain > 0:
            raise ValueError(f"gain must be positive, got {gain}")
        self.gain = gain

    @abstractmethod
    def view(self, images: Tensor) -> Tensor:
        """The view in units of the pixels, where white is 1, `[B, C, H, W]`, of images `[B, 3, H, W]`."""

    def forward(self, images: Tensor) -> Tensor:
        """The view times the gain.

        Shape:
            - images: `[B, 3, H, W]` in [0, 1]
            - output: `[B, C, H, W]`
        """
        return self.view(images) * self.gain


class Colours(DetectorInput):
    """The image itself, centred about grey.

    Example:
        >>> Colours()(torch.ones(1, 3, 2, 2)).unique().tolist()
        [2.0]
    """

    def __init__(self, gain: float = 4.0) -> None:
        super().__init__(gain)

    def view(self, images: Tensor) -> Tensor:
        """The pixels less 0.5; see `DetectorInput.view`."""
        return images - 0.5


class NeighborDifferences(DetectorInput):
    r"""Differences of neighbouring pixels within the cells of a grid (NPR; Tan et al., *Rethinking the up-sampling
    operations in CNN-based generative network for generalizable deepfake detection*, CVPR 2024).

    .. math:: d(y, x) = I(y, x) - I(s \lfloor y/s \rfloor, s \lfloor x/s \rfloor)

    with s the side of a cell: what up-sampling layers leave between pixels that came from one. A cell that the border
    cuts off has the pixels it has.

    Args:
        cell: Side s of a cell in pixels.
        gain: See `DetectorInput`.

    Example:
        >>> NeighborDifferences(gain=1.0)(torch.arange(4.0).view(1, 1, 1, 4)).flatten().tolist()
        [0.0, 1.0, 0.0, 1.0]
    """

    def __init__(self, cell: int = 2, gain: float = 10.0) -> None:
        super().__init__(gain)
        if cell < 2:
            raise ValueError(f"a cell has neighbours from 2 pixels on, got cell={cell}")
        self.cell = cell

    def view(self, images: Tensor) -> Tensor:
        """Differences from the first pixel of the cell; see `DetectorInput.view`."""
        height, width = images.shape[-2:]
        corner = images[..., :: self.cell, :: self.cell]
        corner = corner.repeat_interleave(self.cell, -2).repeat_interleave(self.cell, -1)
        return images - corner[..., :height, :width]


class DetectorInputs(nn.Module):
    """Several views of an image, concatenated as channels.

    Args:
        views: The views.

    Raises:
        ValueError: If there is none.

    Example:
        >>> DetectorInputs([Colours(), NeighborDifferences()])(torch.rand(2, 3, 8, 6)).shape
        torch.Size([2, 6, 8, 6])
    """

    def __init__(self, views: list[DetectorInput]) -> None:
        super().__init__()
        if not views:
            raise ValueError("inputs is empty: give at least one view, such as RestorationResidual()")
        self.views = nn.ModuleList(views)

    def forward(self, images: Tensor) -> Tensor:
        """The views of the images.

        Shape:
            - images: `[B, 3, H, W]` in [0, 1]
            - output: `[B, sum of the views' channels, H, W]`
        """
        return torch.cat([view(images) for view in self.views], dim=1)
