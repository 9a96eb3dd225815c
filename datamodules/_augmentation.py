"""Augmentation of a whole batch by one gather, drawn from the samples' keys."""

import torch
from torch import Tensor

from datamodules._random import mix

_STREAM = 0x5EED_F11B  # sets these bits apart from those that others derive from the same key


def flip_and_shift(images: Tensor, key: Tensor, max_shift: int = 0) -> Tensor:
    """Mirrors each image left to right with probability one half and moves it by up to ``max_shift`` pixels.

    What a shift brings in from outside is the mirror image, so that no black borders are learned.

    Shape:
        - images: [B, C, H, W], any type.
        - key: [B], int64.
        - result: as ``images``.
    """
    height, width = images.shape[-2:]
    bits = mix(key + _STREAM)
    flip = (bits & 1).bool()[:, None]
    down, right = (((bits >> start) & 0xFFFFFF) % (2 * max_shift + 1) - max_shift for start in (1, 25))
    rows = mirror(torch.arange(height, device=key.device) + down[:, None], height)
    columns = mirror(torch.arange(width, device=key.device) + right[:, None], width)
    columns = torch.where(flip, width - 1 - columns, columns)
    batch, channel = (torch.arange(size, device=key.device) for size in images.shape[:2])
    return images[batch[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def mirror(position: Tensor, size: int) -> Tensor:
    """Folds positions outside ``range(size)`` back inside, as between two mirrors at the outer pixels' edges."""
    position = position % (2 * size)
    return torch.minimum(position, 2 * size - 1 - position)
