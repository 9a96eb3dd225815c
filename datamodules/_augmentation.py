"""Augmentation of a whole batch at once, drawn from the samples' keys."""

import torch
from torch import Tensor

from lightning_modules.imaging import mirror, mix

# Set these bits apart from those that others derive from the same key.
_STREAM = 0x5EED_F11B
_TURN_STREAM = 0x7A2B_94D1


def flip_and_shift(images: Tensor, key: Tensor, max_shift: int = 0) -> Tensor:
    """Mirrors each image left to right with probability one half and moves it by up to `max_shift` pixels.

    What a shift brings in from outside is the mirror image, so that no black borders are learned.

    Shape:
        - images: `[B, C, H, W]`, any type
        - key: `[B]`, int64
        - output: as `images`
    """
    bits = mix(key + _STREAM)
    # Both versions, of which whole images are taken: copies of memory, where a choice pixel by pixel is slow.
    chosen = torch.arange(len(images), device=key.device) + len(images) * (bits & 1)
    images = torch.cat([images, images.flip(-1)]).index_select(0, chosen)
    if max_shift == 0:
        return images
    # One axis after the other: twice H·W·C single steps, but several times as fast as indexing by four tensors at once.
    for axis, start in ((2, 1), (3, 25)):
        size = images.shape[axis]
        shift = ((bits >> start) & 0xFFFFFF) % (2 * max_shift + 1) - max_shift
        source = mirror(torch.arange(size, device=key.device) + shift[:, None], size)
        images = images.gather(axis, source.unflatten(1, (1, -1, 1) if axis == 2 else (1, 1, -1)).expand_as(images))
    return images


def turn(images: Tensor, key: Tensor) -> Tensor:
    """Turns each image by none, one, two or three quarters.

    Shape:
        - images: `[B, C, S, S]`, any type
        - key: `[B]`, int64
        - output: as `images`
    """
    chosen = torch.arange(len(images), device=key.device) + len(images) * (mix(key + _TURN_STREAM) & 3)
    return torch.cat([images.rot90(quarters, (-2, -1)) for quarters in range(4)]).index_select(0, chosen)
