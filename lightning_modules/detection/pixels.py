"""From whatever holds an image to its pixels, and from the pixels to the crops that are looked at."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Steps of the R2 sequence (Roberts, 2018): any number of its first points covers the square evenly.
_STEPS = (0.7548776662466927, 0.5698402909980532)


def to_pixels(image: Any) -> Tensor:
    """Pixels of an image, in [0, 1].

    Args:
        image: Path of a file, `PIL.Image`, array `[H, W]` or `[H, W, 3]` of bytes, or tensor `[3, H, W]` of bytes or of
            floating point in [0, 1].

    Shape:
        - output: `[3, H, W]`, float32

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is none of these, or a file that cannot be read; the message names it.
    """
    if isinstance(image, str | Path | Image.Image):
        # here: whoever has a package `datamodules` of their own can still import everything else
        from datamodules.image_reader import decode_image, read_image
    if isinstance(image, str | Path):
        if not Path(image).is_file():
            raise FileNotFoundError(f"{image} is not a file: give the path of an image")
        image = read_image(Path(image))
    if isinstance(image, Image.Image):
        image = decode_image(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise ValueError(f"an array must be bytes [H, W] or [H, W, 3], got {image.dtype} {list(image.shape)}")
        stacked = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
        image = torch.from_numpy(np.array(stacked)).permute(2, 0, 1)
    if not torch.is_tensor(image) or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        got = f"a tensor {list(image.shape)}" if torch.is_tensor(image) else type(image).__name__
        raise ValueError(f"expected the path of an image, a PIL image, an array or a tensor [3, H, W], got {got}")
    if image.dtype == torch.uint8:
        return image.float() / 255
    if not image.is_floating_point() or not bool(((image >= 0) & (image <= 1)).all()):
        raise ValueError(f"a tensor must hold bytes, or floating-point numbers in [0, 1], got {image.dtype}")
    return image.float()


def fixed_crops(image: Tensor, size: int, count: int) -> Tensor:
    """Crops at places that depend on the image's size alone, the first in its middle: those that evaluation looks at.

    An image smaller than a crop is continued by its mirror image.

    Args:
        image: The image.
        size: Side of a crop in pixels.
        count: Number of crops.

    Shape:
        - image: `[3, H, W]`
        - output: `[count, 3, size, size]`
    """
    places = [[(0.5 + index * step) % 1 for step in _STEPS] for index in range(count)]
    return torch.stack([_crop(image, size, *place) for place in places])


def _crop(image: Tensor, size: int, down: float, right: float) -> Tensor:
    lengths = image.shape[1:]
    starts = [math.floor(p * (max(n - size, 0) + 1)) for p, n in zip((down, right), lengths, strict=True)]
    rows, columns = (
        _mirrored(torch.arange(start, start + size, device=image.device), length)
        for start, length in zip(starts, lengths, strict=True)
    )
    return image[:, rows[:, None], columns]


def _mirrored(position: Tensor, length: int) -> Tensor:
    """Positions folded back into the image, as between two mirrors at the outer pixels' edges."""
    position = position % (2 * length)
    return torch.minimum(position, 2 * length - 1 - position)
