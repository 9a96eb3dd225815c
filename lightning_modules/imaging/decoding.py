"""Decoding of images, from files of any kind or from memory: one reader for data, detector and users."""

import lzma
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# what Pillow and tifffile raise at damaged files
_READ_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    OverflowError,
    RuntimeError,  # AVIF, and the codecs of imagecodecs
    struct.error,
    zlib.error,
    lzma.LZMAError,
    Image.DecompressionBombError,
)


def read_image(path: Path) -> Tensor:
    """Decodes a file to eight-bit RGB, upright.

    Of an animation or a multi-page file it takes the first frame. Transparent pixels are laid over white. 16-bit
    values are scaled down; floating-point values may be in [0, 1] or in [0, 255].

    Shape:
        - output: `[3, H, W]`, uint8
    """
    try:
        pixels = _decode(path)
    except _READ_ERRORS as error:
        raise ValueError(f"{path} cannot be read as an image: {error}. Repair the file or move it elsewhere") from error
    return _to_tensor(pixels, path)


def decode_image(image: Image.Image) -> Tensor:
    """Turns an opened image into eight-bit RGB, upright; see `read_image`.

    Shape:
        - output: `[3, H, W]`, uint8
    """
    return _to_tensor(_pixels(image), "the image")


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
    if isinstance(image, str | Path):
        if not (path := Path(image).expanduser()).is_file():
            raise FileNotFoundError(f"{image} is not a file: give the path of an image")
        image = read_image(path)
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


def _to_tensor(pixels: np.ndarray, name: Path | str) -> Tensor:
    return torch.from_numpy(np.array(_to_bytes(pixels, name))).permute(2, 0, 1)


def _decode(path: Path) -> np.ndarray:
    """Returns [H, W, C] with one, three or four channels, of any type of number."""
    try:
        opened = Image.open(path)
    except UnidentifiedImageError:
        if path.suffix.lower() not in (".tif", ".tiff"):
            raise
        return _decode_tiff(path)  # colour with 16 bits or floating point, which Pillow does not know
    with opened:
        return _pixels(opened)


def _pixels(image: Image.Image) -> np.ndarray:
    """Returns the first frame as [H, W, C], upright."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 and 32 bits, floating point: one channel
        return np.asarray(image)[..., None]
    if image.mode in ("LA", "La", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image if image.mode == "RGBA" else image.convert("RGB"))


def _decode_tiff(path: Path) -> np.ndarray:
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        count = page.imagewidth * page.imagelength
        if Image.MAX_IMAGE_PIXELS is not None and count > 2 * Image.MAX_IMAGE_PIXELS:  # where Pillow refuses, too
            raise Image.DecompressionBombError(f"{count} pixels are more than {2 * Image.MAX_IMAGE_PIXELS}")
        pixels, axes = page.asarray(), page.axes
    if axes in ("SYX", "CYX"):
        pixels, axes = np.moveaxis(pixels, 0, -1), "YXS"
    if axes not in ("YX", "YXS"):
        raise ValueError(f"the axes {axes} are not those of an image")
    if axes == "YX":
        pixels = pixels[..., None]
    if pixels.shape[-1] not in (1, 3, 4):
        raise ValueError(f"an image has 1, 3 or 4 channels, not {pixels.shape[-1]}")
    return pixels


def _to_bytes(pixels: np.ndarray, name: Path | str) -> np.ndarray:
    """Turns pixels [H, W, C] of any type into eight-bit RGB."""
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise ValueError(
                f"{name} has the pixel value {pixels[~np.isfinite(pixels)][0]}; pixels must be finite. Replace such "
                "values, for instance with numpy.nan_to_num, or move the file elsewhere"
            )
        pixels = pixels.astype(np.float64) * (255 / _white(pixels, name))
    if pixels.shape[-1] == 4:
        opacity = pixels[..., 3:].astype(np.float64) / 255
        pixels = pixels[..., :3] * opacity + 255 * (1 - opacity)
    if pixels.dtype != np.uint8:
        pixels = np.rint(pixels).astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def _white(pixels: np.ndarray, name: Path | str) -> float:
    """Returns the value that stands for white in pixels that are not eight-bit."""
    if pixels.dtype == np.bool_:
        return 1
    least, most = float(pixels.min()), float(pixels.max())
    whites = (1, 255) if pixels.dtype.kind == "f" else (65535,)
    for white in whites:
        if least >= 0 and most <= white:
            return white
    accepted = "[0, 1] or [0, 255]" if pixels.dtype.kind == "f" else "[0, 65535]"
    raise ValueError(
        f"{name} has pixel values from {least:g} to {most:g} ({pixels.dtype}); expected a range within {accepted}. "
        "Rescale the image and save it again"
    )
