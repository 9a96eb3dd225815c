"""Degradation of pictures on their way through the world: rescaled, blurred, cropped, re-encoded; whole or in part."""

import io
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_modules.imaging.crops import corner, cut_crop

Span = tuple[int, int]  # first and one after the last, along one axis

_BLUR_REACH = 4  # standard deviations after which the Gaussian is cut off
_REACH = 4  # pixels of the coarser grid, of which the widest kernel, that of Lanczos, covers 3
# Chroma is coded in blocks of 16×16 pixels, and the decoder's interpolation looks at the neighbouring block.
_CODED_BLOCK = 16

_CLEAN = "clean"
# Kernels that pictures are scaled down by: each leaves the traces of a generator in its own way.
RESAMPLINGS = (
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
    Image.Resampling.BILINEAR,
    Image.Resampling.BOX,
)
_KINDS = {"jpeg": "quality", "rescale": "rescale", "blur": "blur"}


@dataclass(frozen=True)
class Degradation:
    """A chain of rescaling, blur and JPEG, in this order.

    Args:
        rescale: Factor of either side, antialiased bicubic.
        blur: Standard deviation of a Gaussian blur, in pixels after rescaling.
        quality: Quality of a JPEG encoding with halved chroma, as most programs write it; None for no encoding.
    """

    rescale: float = 1.0
    blur: float = 0.0
    quality: int | None = None

    def __post_init__(self) -> None:
        if not 0.01 <= self.rescale <= 100:
            raise ValueError(f"rescale must lie between 0.01 and 100, got {self.rescale}")
        if not 0 <= self.blur <= 100:
            raise ValueError(f"blur must be a standard deviation between 0 and 100 pixels, got {self.blur}")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality must lie between 1 and 100, got {self.quality}")

    @classmethod
    def parse(cls, condition: str) -> "Degradation":
        """Reads a condition: `clean`, `jpeg 75`, `rescale 0.5` or `blur 1`.

        Example:
            >>> Degradation.parse("jpeg 75")
            Degradation(rescale=1.0, blur=0.0, quality=75)
        """
        kind, _, number = condition.partition(" ")
        if condition == _CLEAN:
            return cls()
        try:
            return cls(**{_KINDS[kind]: int(number) if kind == "jpeg" else float(number)})  # type: ignore[arg-type]
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{condition!r} is not a condition: {error}. Write clean, or jpeg, rescale or blur and a number, such "
                "as 'jpeg 75', 'rescale 0.5' (a factor) or 'blur 1' (a standard deviation in pixels)"
            ) from error

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Returns height and width of what becomes of an image of the given size."""
        return max(1, round(height * self.rescale)), max(1, round(width * self.rescale))


class Encoding(NamedTuple):
    """An encoding of a picture that has been cropped before it, so that its blocks lie elsewhere than earlier ones.

    Attributes:
        kind: `JPEG` or `WEBP`.
        quality: From 1 to 100.
        cut: Rows and columns that are cropped off at top and left.
    """

    kind: str
    quality: int
    cut: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class History:
    """What a picture has been through: rescaled, blurred, and cropped and encoded, at most so many times.

    Args:
        rescale: Factor of either side, 1 at most.
        resampling: Kernel of the rescaling.
        blur: Standard deviation of a Gaussian blur, in pixels after rescaling.
        encodings: Encodings, the first first.
        cut: Rows and columns that are cropped off at top and left in the end.
    """

    rescale: float = 1.0
    resampling: Image.Resampling = Image.Resampling.BICUBIC
    blur: float = 0.0
    encodings: tuple[Encoding, ...] = ()
    cut: tuple[int, int] = (0, 0)

    @property
    def cuts(self) -> list[tuple[int, int]]:
        """All that is cropped off, in order."""
        return [*(encoding.cut for encoding in self.encodings), self.cut]


def relive(image: Tensor, history: History, size: int | None = None, place: tuple[float, float] = (0, 0)) -> Tensor:
    """Passes an image, or no more of it than a crop and what is cropped off on the way, through a history.

    An image that would come out smaller than the crop is rescaled less; one that is smaller is continued by its mirror
    image.

    Args:
        image: The image.
        history: What it goes through.
        size: Side of the crop; None for the whole image.
        place: Of the crop, as parts of the way down and to the right.

    Shape:
        - image: `[3, H, W]`, uint8
        - output: `[3, size, size]`, or `[3, H', W']` of the whole; uint8
    """
    lengths = tuple(image.shape[1:])
    needed = [(size or 1) + sum(cut) for cut in zip(*history.cuts, strict=True)]
    least = max(need / length for need, length in zip(needed, lengths, strict=True))
    factor = min(max(history.rescale, least), 1.0)
    height, width = (math.ceil(length * factor - 1e-9) for length in lengths)
    if size is None:
        window = (0, height), (0, width)
    else:
        starts = (corner(place, height, width, need)[axis] for axis, need in enumerate(needed))
        top, left = ((start, start + need) for start, need in zip(starts, needed, strict=True))
        window = (top[0], min(top[1], height)), (left[0], min(left[1], width))
    pixels = _rescale(image.permute(1, 2, 0).numpy(), (height, width), window, history.resampling)
    if history.blur > 0:
        pixels = _blur(pixels, history.blur)
    for encoding in history.encodings:
        pixels = _encode(_crop_off(pixels, encoding.cut, size or 1), encoding.kind, encoding.quality)
    pixels = _crop_off(pixels, history.cut, size or 1)
    result = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    return result if size is None else cut_crop(result, 0, 0, size)


def _crop_off(pixels: np.ndarray, cut: tuple[int, int], size: int) -> np.ndarray:
    down, right = (min(c, max(length - size, 0)) for c, length in zip(cut, pixels.shape[:2], strict=True))
    return pixels[down:, right:]


def degrade(image: Tensor, degradation: Degradation, window: tuple[Span, Span] | None = None) -> Tensor:
    """Degrades an image, or no more of it than a window of the result needs.

    The window shows what the degraded whole image shows there, the blocks of the JPEG encoding included.

    Args:
        image: The image.
        degradation: What to do to it.
        window: Rows and columns of the degraded image; None for all.

    Shape:
        - image: `[3, H, W]`, uint8
        - output: `[3, H', W']`, uint8
    """
    pixels = image.permute(1, 2, 0).numpy()
    sizes = degradation.size(*pixels.shape[:2])
    window = window or ((0, sizes[0]), (0, sizes[1]))
    reach = math.ceil(_BLUR_REACH * degradation.blur)
    coded = window if degradation.quality is None else _grow(window, sizes, _CODED_BLOCK, _CODED_BLOCK)
    blurred = _grow(coded, sizes, reach)
    pixels = _rescale(pixels, sizes, blurred)
    if degradation.blur > 0:
        pixels = _cut(_blur(pixels, degradation.blur), blurred, coded)
    if degradation.quality is not None:
        pixels = _cut(_encode(pixels, "JPEG", degradation.quality), coded, window)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def _grow(window: tuple[Span, Span], sizes: tuple[int, int], margin: int, multiple: int = 1) -> tuple[Span, Span]:
    """Widens a window by a margin and then up to multiples of a block, as far as the image goes."""
    (top, bottom), (left, right) = (
        (max((begin - margin) // multiple * multiple, 0), min(-(-(end + margin) // multiple) * multiple, size))
        for (begin, end), size in zip(window, sizes, strict=True)
    )
    return (top, bottom), (left, right)


def _cut(pixels: np.ndarray, outer: tuple[Span, Span], inner: tuple[Span, Span]) -> np.ndarray:
    rows, columns = (slice(i[0] - o[0], i[1] - o[0]) for o, i in zip(outer, inner, strict=True))
    return pixels[rows, columns]


def _rescale(
    pixels: np.ndarray,
    sizes: tuple[int, int],
    window: tuple[Span, Span],
    resampling: Image.Resampling = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """Returns a window of the image as it is after rescaling to the given size."""
    if sizes == pixels.shape[:2]:
        return _cut(pixels, ((0, sizes[0]), (0, sizes[1])), window)
    sources, boxes = [], []
    for (begin, end), size, source in zip(window, sizes, pixels.shape[:2], strict=True):
        step = source / size
        reach = _REACH * max(step, 1)
        first, last = max(math.floor(begin * step - reach), 0), min(math.ceil(end * step + reach), source)
        sources.append(slice(first, last))
        boxes.append((begin * step - first, min(end * step - first, last - first)))
    (top, bottom), (left, right) = boxes
    height, width = (end - begin for begin, end in window)
    part = Image.fromarray(np.ascontiguousarray(pixels[sources[0], sources[1]]))
    return np.asarray(part.resize((width, height), resampling, (left, top, right, bottom)))


def _blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    from scipy import ndimage  # takes a while, and few blur

    blurred = ndimage.gaussian_filter(
        pixels.astype(np.float32), (sigma, sigma, 0), mode="reflect", radius=math.ceil(_BLUR_REACH * sigma)
    )
    return np.rint(blurred).astype(np.uint8)


def _encode(pixels: np.ndarray, kind: str, quality: int) -> np.ndarray:
    options: dict[str, Any] = (
        {"subsampling": "4:2:0"} if kind == "JPEG" else {"method": 1}
    )  # its default, 4, takes twice as long
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, kind, quality=quality, **options)
    with Image.open(file) as image:
        return np.asarray(image)
