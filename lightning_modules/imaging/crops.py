"""Square crops, cut one way for data, detector and whoever holds an image of their own."""

import math

import torch
from torch import Tensor

# Steps of the R2 sequence (Roberts, 2018): any number of its first points covers the square evenly.
_STEPS = (0.7548776662466927, 0.5698402909980532)


def fixed_places(count: int) -> list[tuple[float, float]]:
    """Places of crops as parts of the way down and to the right; the first is the middle, the others cover the image.

    Example:
        >>> fixed_places(2)[0]
        (0.5, 0.5)
    """
    down, right = _STEPS
    return [((0.5 + index * down) % 1, (0.5 + index * right) % 1) for index in range(count)]


def corner(place: tuple[float, float], height: int, width: int, size: int) -> tuple[int, int]:
    """Top and left pixel of a crop whose place is given as parts of the way; 0 where the image is smaller."""
    down, right = (
        math.floor(p * (max(length - size, 0) + 1)) for p, length in zip(place, (height, width), strict=True)
    )
    return down, right


def cut_crop(image: Tensor, top: int, left: int, size: int) -> Tensor:
    """Cuts a crop out of an image, which is continued by its mirror image where it is smaller.

    Shape:
        - image: `[C, H, W]`
        - output: `[C, size, size]`
    """
    rows, columns = (
        mirror(torch.arange(start, start + size, device=image.device), length)
        for start, length in zip((top, left), image.shape[1:], strict=True)
    )
    return image[:, rows[:, None], columns]


def fixed_crops(image: Tensor, size: int, count: int) -> Tensor:
    """Crops at places that depend on the image's size only, the first in its middle: those that evaluation looks at.

    Args:
        image: The image; one smaller than a crop is continued by its mirror image.
        size: Side of a crop in pixels.
        count: Number of crops.

    Shape:
        - image: `[C, H, W]`
        - output: `[count, C, size, size]`
    """
    height, width = image.shape[1:]
    corners = [corner(place, height, width, size) for place in fixed_places(count)]
    return torch.stack([cut_crop(image, *start, size) for start in corners])


def mirror(position: Tensor, size: int) -> Tensor:
    """Folds positions outside `range(size)` back inside, as between two mirrors at the outer pixels' edges.

    Shape:
        - position: `[...]`, int64
        - output: `[...]`, int64
    """
    position = position % (2 * size)
    return torch.minimum(position, 2 * size - 1 - position)
