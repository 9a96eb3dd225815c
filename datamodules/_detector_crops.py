"""The crops by which a detector sees an image: at random and degraded at random, or always the same ones."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from datamodules._degradation import Degradation, degrade
from lightning_modules.imaging import corner, cut_crop, draw, fixed_places, mix

_STREAM = 0xDE7E_C708  # sets the crops' numbers apart from what else is derived from a key
_DRAWS = 8


class View(Protocol):
    """What a detector sees of an image."""

    def __call__(self, image: Tensor, key: int) -> Tensor:
        """Cuts V crops out of an image; all that is random follows from the key.

        Shape:
            - image: `[3, H, W]`, uint8
            - output: `[V, 3, S, S]`, uint8
        """


@dataclass(frozen=True)
class RandomDegradation:
    """Rescaling, blur and JPEG, each with a probability and a range from which its strength is drawn evenly.

    Args:
        rescale_probability: How often the image is rescaled.
        rescale: Smallest and largest factor.
        blur_probability: How often it is blurred.
        blur_sigma: Smallest and largest standard deviation, in pixels.
        jpeg_probability: How often it is encoded.
        jpeg_quality: Lowest and highest quality.
    """

    rescale_probability: float
    rescale: tuple[float, float]
    blur_probability: float
    blur_sigma: tuple[float, float]
    jpeg_probability: float
    jpeg_quality: tuple[int, int]

    def __post_init__(self) -> None:
        for name in ("rescale_probability", "blur_probability", "jpeg_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        for name, argument in (("rescale", "rescale"), ("blur_sigma", "blur"), ("jpeg_quality", "quality")):
            least, most = getattr(self, name)
            if least > most:
                raise ValueError(f"{name} must be the smallest and the largest value, got {least} and {most}")
            for value in (least, most):
                try:
                    Degradation(**{argument: value})
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error

    def draw(self, numbers: list[float]) -> Degradation:
        """Chooses by six numbers in [0, 1)."""
        values = {}
        if numbers[0] < self.rescale_probability:
            values["rescale"] = self.rescale[0] + numbers[1] * (self.rescale[1] - self.rescale[0])
        if numbers[2] < self.blur_probability:
            values["blur"] = self.blur_sigma[0] + numbers[3] * (self.blur_sigma[1] - self.blur_sigma[0])
        if numbers[4] < self.jpeg_probability:
            least, most = self.jpeg_quality
            values["quality"] = least + math.floor(numbers[5] * (most - least + 1))
        return Degradation(**values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class RandomCrop:
    """One crop, at a random place of the randomly degraded image."""

    size: int
    degradation: RandomDegradation

    def __call__(self, image: Tensor, key: int) -> Tensor:
        bits = draw(mix(torch.tensor(key + _STREAM)), torch.arange(_DRAWS))
        numbers = ((bits >> 9).double() / 2**53).tolist()
        return _crop(image, self.size, self.degradation.draw(numbers[2:]), (numbers[0], numbers[1]))[None]


@dataclass(frozen=True)
class FixedCrops:
    """Crops at places that depend on the image's size only, the first in its middle.

    An image is thus judged alike wherever it is found.
    """

    size: int
    count: int
    degradation: Degradation

    def __call__(self, image: Tensor, key: int) -> Tensor:
        return torch.stack([_crop(image, self.size, self.degradation, place) for place in fixed_places(self.count)])


def _crop(image: Tensor, size: int, degradation: Degradation, place: tuple[float, float]) -> Tensor:
    """Cuts a crop out of the degraded image, its place given as a part of the way; a small image is mirrored out."""
    height, width = degradation.size(*image.shape[1:])
    top, left = corner(place, height, width, size)
    window = (top, min(top + size, height)), (left, min(left + size, width))
    return cut_crop(degrade(image, degradation, window), 0, 0, size)
