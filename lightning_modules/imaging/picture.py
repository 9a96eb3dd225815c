"""A picture as its file holds it: pixels, opacity, scale, and all that goes back into the file with them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Picture:
    """Pixels between 0 and 1, and what it takes to write them as the picture that they came from.

    Change it with `dataclasses.replace`; `white` and `dtype` say on which scale the file counts.

    Attributes:
        pixels: The pixels, upright, `[C, H, W]` in [0, 1], C 1 (gray) or 3 (color).
        kind: Format of the file, by Pillow's name.
        dtype: Type of the file's numbers.
        white: Their value for white: 255, 65535, 4095 for 12 bits in 16, 1 for floating point.
        alpha: Opacity as the file has it, `[H, W]` of `dtype`.
        exif: EXIF data, its orientation reset.
        xmp: XMP packet, its orientation reset.
        icc_profile: Color profile.
        dpi: Resolution in x and y.
        encoding: How the file is compressed, in the words of the writer: quantization tables of a JPEG file and such.
        notes: What the user should know of how the file was read.
    """

    pixels: Tensor
    kind: str = "PNG"
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.uint8))
    white: float = 255
    alpha: np.ndarray | None = None
    exif: bytes = b""
    xmp: bytes = b""
    icc_profile: bytes = b""
    dpi: tuple[float, float] | None = None
    encoding: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def array(self) -> np.ndarray:
        """The numbers of the file: `[H, W, C]`, with a channel more where there is transparency."""
        count, height, width = self.pixels.shape
        array = np.empty((height, width, count + (self.alpha is not None)), self.dtype)
        for index, channel in enumerate(self.pixels.detach()):  # one by one: copies of a large picture are large
            numbers = channel.cpu().float().clamp(0, 1).mul_(self.white)
            array[..., index] = numbers if self.dtype.kind == "f" else numbers.round_()
        if self.alpha is not None:
            array[..., count] = self.alpha
        return array


def from_array(array: np.ndarray, white: float, **fields: Any) -> Picture:
    """A picture from the numbers of its file.

    Args:
        array: Numbers `[H, W, C]`, C 1 to 4; the second of two and the fourth of four is opacity.
        white: Their value for white.
        fields: What else the file holds, by the attributes of `Picture`.
    """
    count = color_channels(array)
    pixels = torch.empty(count, *array.shape[:2])
    for index in range(count):
        pixels[index] = torch.from_numpy(array[..., index].astype(np.float32)).div_(white).clamp_(0, 1)
    alpha = np.ascontiguousarray(array[..., count]) if array.shape[-1] > count else None
    return Picture(pixels, dtype=array.dtype, white=white, alpha=alpha, **fields)


def color_channels(array: np.ndarray) -> int:
    """How many channels of `[H, W, C]` hold color or gray; one more would be opacity."""
    return 1 if array.shape[-1] <= 2 else 3


def opaque(dtype: np.dtype[Any]) -> float:
    """Value for full opacity, which is white too where nothing else is known."""
    return float(np.iinfo(dtype).max) if dtype.kind in "iu" else 1.0
