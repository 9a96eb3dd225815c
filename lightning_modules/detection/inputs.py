"""Inputs of a detector's network, side by side as channels."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class DetectorInput(nn.Module, ABC):
    """One input of the network; one of your own is a subclass and its class path in a configuration.

    Args:
        scale: Factor that brings the input to a standard deviation of order 1, at which networks learn well.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.scale = scale

    @abstractmethod
    def featurize(self, images: Tensor) -> Tensor:
        """The input in units of the pixels, where white is 1.

        Shape:
            - images: `[B, 3, H, W]` in [0, 1]
            - output: `[B, C, H, W]`
        """

    def forward(self, images: Tensor) -> Tensor:
        """The input times its scale.

        Shape:
            - images: `[B, 3, H, W]` in [0, 1]
            - output: `[B, C, H, W]`
        """
        return self.featurize(images) * self.scale


class RawPixels(DetectorInput):
    """The image itself, centred about grey.

    Example:
        >>> RawPixels()(torch.ones(1, 3, 2, 2)).unique().tolist()
        [2.0]
    """

    def __init__(self, scale: float = 4.0) -> None:
        super().__init__(scale)

    def featurize(self, images: Tensor) -> Tensor:
        """The pixels less 0.5; see `DetectorInput.featurize`."""
        return images - 0.5


class NeighborDifferences(DetectorInput):
    r"""Differences of neighbouring pixels within the cells of a grid (NPR; Tan et al., *Rethinking the up-sampling
    operations in CNN-based generative network for generalizable deepfake detection*, CVPR 2024).

    .. math:: d(y, x) = I(y, x) - I(s \lfloor y/s \rfloor, s \lfloor x/s \rfloor)

    with s the side of a cell: what up-sampling layers leave between pixels that came from one. A cell that the border
    cuts off has the pixels it has.

    Args:
        cell: Side s of a cell in pixels.
        scale: See `DetectorInput`.

    Example:
        >>> NeighborDifferences(scale=1.0)(torch.arange(4.0).view(1, 1, 1, 4)).flatten().tolist()
        [0.0, 1.0, 0.0, 1.0]
    """

    def __init__(self, cell: int = 2, scale: float = 10.0) -> None:
        super().__init__(scale)
        if cell < 2:
            raise ValueError(f"a cell has neighbours from 2 pixels on, got cell={cell}")
        self.cell = cell

    def featurize(self, images: Tensor) -> Tensor:
        """Differences from the first pixel of the cell; see `DetectorInput.featurize`."""
        height, width = images.shape[-2:]
        corner = images[..., :: self.cell, :: self.cell]
        corner = corner.repeat_interleave(self.cell, -2).repeat_interleave(self.cell, -1)
        return images - corner[..., :height, :width]


class DetectorInputs(nn.ModuleList):
    """Several inputs, concatenated as channels.

    Args:
        inputs: The inputs.

    Raises:
        ValueError: If there is none.

    Example:
        >>> DetectorInputs([RawPixels(), NeighborDifferences()])(torch.rand(2, 3, 8, 6)).shape
        torch.Size([2, 6, 8, 6])
    """

    def __init__(self, inputs: list[DetectorInput]) -> None:
        super().__init__(inputs)
        if not inputs:
            raise ValueError("inputs is empty: give at least one, such as RestorationResidual()")

    def forward(self, images: Tensor) -> Tensor:
        """All inputs of the images.

        Shape:
            - images: `[B, 3, H, W]` in [0, 1]
            - output: `[B, C, H, W]`, C the sum of the inputs' channels
        """
        return torch.cat([part(images) for part in self], dim=1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # checkpoints of the version before have the inputs under `views`
        for name in [name for name in state_dict if name.startswith(f"{prefix}views.")]:
            state_dict[prefix + name.removeprefix(f"{prefix}views.")] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)
