"""The crops by which a detector sees an image: with a random history, or as it is under a condition."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_modules.imaging import (
    RESAMPLINGS,
    Degradation,
    Encoding,
    History,
    corner,
    cut_crop,
    degrade,
    draw,
    fixed_places,
    mix,
    relive,
)

_STREAM = 0xDE7E_C708  # sets the crops' numbers apart from what else is derived from a key
_BLOCK = 16  # pixels after which the blocks of an encoding recur
# How often a picture is encoded once, and twice; the others are not encoded.
_ONCE, _TWICE = 0.5, 0.3
_KINDS = ("JPEG", "WEBP")
_DRAWS = 17


class View(Protocol):
    """What a detector sees of an image."""

    def __call__(self, image: Tensor, key: int) -> Tensor:
        """Cuts V crops out of an image; all that is random follows from the key.

        Shape:
            - image: `[3, H, W]`, uint8
            - output: `[V, 3, S, S]`, uint8
        """


@dataclass(frozen=True)
class RandomHistory:
    """Rescaling by a random kernel, now and then blur, cropping, JPEG or WebP, none, one or two of them.

    Args:
        rescale: Smallest and largest factor.
        blur_probability: How often it is blurred.
        blur_sigma: Smallest and largest standard deviation, in pixels.
        quality: Lowest and highest quality of an encoding.
    """

    rescale: tuple[float, float]
    blur_probability: float
    blur_sigma: tuple[float, float]
    quality: tuple[int, int]

    def __post_init__(self) -> None:
        if not 0 <= self.blur_probability <= 1:
            raise ValueError(f"blur_probability must lie between 0 and 1, got {self.blur_probability}")
        for name, lower, upper in (("rescale", 0.01, 1), ("blur_sigma", 0, 100), ("quality", 1, 100)):
            least, most = getattr(self, name)
            if not lower <= least <= most <= upper:
                raise ValueError(
                    f"{name} must be the smallest and the largest value, between {lower} and {upper}, got {least} and "
                    f"{most}"
                )

    def draw(self, key: int) -> tuple[History, tuple[float, float]]:
        """Chooses a history, and the place of a crop, by a key."""
        bits = draw(mix(torch.tensor(key + _STREAM)), torch.arange(_DRAWS))
        down, right, factor, kernel, blurred, sigma, times, *rest = ((bits >> 9).double() / 2**53).tolist()
        least, most = self.quality
        cuts = [(math.floor(_BLOCK * rest[i]), math.floor(_BLOCK * rest[i + 1])) for i in (0, 2, 4)]
        encodings = [
            Encoding(_KINDS[int(2 * rest[i])], least + math.floor(rest[i + 1] * (most - least + 1)), cut)
            for i, cut in zip((6, 8), cuts[:2], strict=True)
        ]
        count = 2 if times < _TWICE else int(times < _TWICE + _ONCE)
        history = History(
            rescale=self.rescale[0] + factor * (self.rescale[1] - self.rescale[0]),
            resampling=RESAMPLINGS[int(len(RESAMPLINGS) * kernel)],
            blur=0.0
            if blurred >= self.blur_probability
            else self.blur_sigma[0] + sigma * (self.blur_sigma[1] - self.blur_sigma[0]),
            encodings=tuple(encodings[:count]),
            cut=cuts[2] if count else (0, 0),
        )
        return history, (down, right)


@dataclass(frozen=True)
class RandomCrop:
    """One crop, at a random place of an image with a random history."""

    size: int
    history: RandomHistory

    def __call__(self, image: Tensor, key: int) -> Tensor:
        history, place = self.history.draw(key)
        return relive(image, history, self.size, place)[None]


@dataclass(frozen=True)
class HistoryCrops:
    """Crops at the places of `FixedCrops`, all with one random history."""

    size: int
    count: int
    history: RandomHistory

    def __call__(self, image: Tensor, key: int) -> Tensor:
        history, _ = self.history.draw(key)
        return torch.stack([relive(image, history, self.size, place) for place in fixed_places(self.count)])


@dataclass(frozen=True)
class FixedCrops:
    """Crops at places that depend on the image's size only, the first in its middle.

    An image is thus judged alike wherever it is found.
    """

    size: int
    count: int
    degradation: Degradation

    def __call__(self, image: Tensor, key: int) -> Tensor:
        return torch.stack([self._crop(image, place) for place in fixed_places(self.count)])

    def _crop(self, image: Tensor, place: tuple[float, float]) -> Tensor:
        """Cuts a crop out of the degraded image; a small image is mirrored out."""
        height, width = self.degradation.size(*image.shape[1:])
        top, left = corner(place, height, width, self.size)
        window = (top, min(top + self.size, height)), (left, min(left + self.size, width))
        return cut_crop(degrade(image, self.degradation, window), 0, 0, self.size)
