"""Encoding of pictures in the kind of file that they came from, written whole or not at all, and their names."""

import errno
import os
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, PngImagePlugin, TiffImagePlugin
from torch import Tensor

from lightning_modules.imaging.decoding import EXIF_IFD, GPS_IFD, TEXT_TAGS, png_chunks, tiff_text
from lightning_modules.imaging.picture import Picture, opaque

# Formats that are written as they were read, with their suffixes, and what each takes beside the pixels. The others,
# palettes of animations among them, become PNG.
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "BMP": (".bmp",),
    "TGA": (".tga",),
    "PPM": (".ppm", ".pgm", ".pnm"),
}
_METADATA = {
    "JPEG": ("exif", "xmp", "icc_profile", "dpi"),
    "PNG": ("exif", "icc_profile", "dpi"),
    "WEBP": ("exif", "xmp", "icc_profile"),
    "AVIF": ("exif", "xmp", "icc_profile"),
    "BMP": ("dpi",),
}
_OPTIONS = {
    "JPEG": ("qtables", "progressive", "subsampling", "comment", "extra"),
    "WEBP": ("lossless",),
}  # of a source of the same kind
_OPAQUE = ("JPEG", "PPM")
_QUALITY = {"JPEG": 95, "WEBP": 95, "AVIF": 90}  # where the source does not say
_TIFF_COMPRESSION = {1: None, 5: "lzw", 50000: "zstd"}  # others become deflate: lossless, and every reader knows it
_LONGEST_NAME = 255  # bytes, on every file system in use


def kind_of(path: Path | PurePosixPath) -> str | None:
    """Format that a file of this name is written in; None where it is not one that can be written."""
    return next((kind for kind, suffixes in _SUFFIXES.items() if path.suffix.lower() in suffixes), None)


def check_quality(quality: int | None) -> None:
    """Refuses a quality that is not a whole number from 1 to 100, or None."""
    if quality is not None and (isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100):
        raise ValueError(f"quality must be a whole number from 1 to 100, got {quality!r}")


def write_picture(picture: Picture, path: str | Path, quality: int | None = None) -> None:
    """Writes a picture in its own kind, with everything that its file held, whole or not at all.

    JPEG files have the quantization tables and the subsampling of the file that was read; 16 bits stay 16 bits where
    the format has them.

    Args:
        picture: The picture.
        path: The file.
        quality: Quality from 1 to 100 for JPEG, WebP and AVIF, in place of the source's.

    Raises:
        ValueError: If the format cannot hold the picture.
        OSError: If the file cannot be written; a full disk with the space that is needed and left.
    """
    check_quality(quality)
    try:
        content = _encode(picture, quality)
    except Exception as error:
        raise ValueError(f"{path} cannot be written as {picture.kind}: {error}") from error
    write_whole(Path(path), content)


def write_png(image: Tensor, path: str | Path) -> None:
    """Writes an image as an 8-bit PNG.

    Shape:
        - image: `[C, H, W]` in [0, 1], C 1 (gray) or 3 (color)
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"{path}: an image of shape [1 or 3, H, W] can be written as PNG, got {list(image.shape)}.")
    write_picture(Picture(image), path)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes a file that is there whole or not at all, even where the machine stops on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name for each file, of a length that fits: what a run leaves that was killed is replaced by the next.
    part = path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.part")
    try:
        part.unlink(missing_ok=True)
        with part.open("xb") as file:  # x: a link that somebody has put there is not followed
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            message = f"the disk is full: {path} needs {len(content) / 1e6:.1f} MB, and {free / 1e6:.1f} MB are left"
            raise OSError(error.errno, message) from error
        if isinstance(error, OSError) and error.strerror:  # by its name rather than by the part's
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def output_names(names: list[str], rename: Callable[[str], str] | None = None, suffix: str = ".png") -> dict[str, str]:
    """Returns the file for each sample: its name with a suffix, which is appended where two would collide.

    Names count as equal where they differ in case only: some file systems cannot keep them apart.

    Args:
        names: Names of the samples.
        rename: Name of a file for one of a sample, that with the suffix by default; `restored_name` keeps formats.
        suffix: The suffix.

    Example:
        >>> output_names(["a.jpg", "a.png", "b/c.tif"])
        {'a.jpg': 'a.jpg.png', 'a.png': 'a.png.png', 'b/c.tif': 'b/c.png'}
    """
    outputs = {name: rename(name) if rename else str(_below_root(name).with_suffix(suffix)) for name in names}
    while True:
        count = Counter(output.casefold() for output in outputs.values())
        colliding = [n for n, output in outputs.items() if count[output.casefold()] > 1 and output != n + suffix]
        if not colliding:
            return outputs
        outputs.update({name: name + suffix for name in colliding})


def _below_root(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ValueError(f"the name of a sample must be a path below the input's root, got {name!r}")
    return path


def restored_name(name: str, tag: str = "") -> str:
    """Name of a restored file: that of its source, which `.png` is added to where its format is not written.

    A name that leads out of the folder that it is written to is refused.

    Args:
        name: Name of the source, or its path below a root.
        tag: What to put before the suffix.

    Example:
        >>> restored_name("a/photo.jpg", ".restored"), restored_name("a/moving.gif")
        ('a/photo.restored.jpg', 'a/moving.gif.png')
    """
    path = _below_root(name)
    stem, suffix = (path.stem, path.suffix) if kind_of(path) else (path.name, ".png")
    ending = tag + suffix
    excess = len(os.fsencode(stem + ending)) - _LONGEST_NAME
    if excess > 0:  # told apart by a number that the whole name gives
        ending = f"~{zlib.crc32(os.fsencode(name)):08x}{ending}"
        stem = os.fsdecode(os.fsencode(stem)[: _LONGEST_NAME - len(os.fsencode(ending))])
    return str(path.with_name(stem + ending))


def _encode(picture: Picture, quality: int | None) -> bytes:
    kind = picture.kind if picture.kind in _SUFFIXES else "PNG"
    picture = _as_held_by(picture, kind)
    array = picture.array()
    if kind == "TIFF":
        return _encode_tiff(picture, array)
    array = array[..., 0] if array.shape[-1] == 1 else array
    if kind == "PNG":
        return _encode_png(picture, array)
    if kind == "JPEG2000" and (array.dtype == np.uint16 or picture.white != 255):
        bits = int(picture.white).bit_length()
        return bytes(imagecodecs.jpeg2k_encode(array, level=0, codecformat="jp2", bitspersample=bits))
    if kind == "BMP" and picture.alpha is not None:
        return _encode_transparent_bmp(picture)
    if kind == "PPM":
        header = f"P{6 if array.ndim == 3 else 5}\n{array.shape[1]} {array.shape[0]}\n{picture.white:.0f}\n"
        return header.encode() + array.astype(array.dtype.newbyteorder(">")).tobytes()
    encoding = {name: value for name, value in picture.encoding.items() if name in _OPTIONS.get(kind, ())}
    if kind in _QUALITY and (quality is not None or not (encoding.get("qtables") or encoding.get("lossless"))):
        encoding.pop("qtables", None)
        encoding |= {"quality": quality or _QUALITY[kind], "lossless": False}
    if kind == "AVIF" and picture.alpha is not None:
        encoding["advanced"] = {"a:lossless": "1"}  # opacity comes back number for number, as from the others
    return _save(array, kind, **_metadata_of(picture, kind), **encoding)


def _as_held_by(picture: Picture, kind: str) -> Picture:
    """The picture with the numbers that a format can hold."""
    if picture.alpha is not None and kind in _OPAQUE:
        raise ValueError("it holds no transparency; choose PNG, for instance")
    deep = kind in ("PNG", "TIFF", "JPEG2000", "PPM")
    picture = _on_full_scale(picture, kind)
    if picture.dtype == np.uint8 or (kind == "TIFF" and picture.dtype != np.bool_):
        return picture
    if picture.dtype == np.uint16 and deep:
        return picture
    dtype = np.dtype(np.uint16 if deep and picture.white != 255 and picture.dtype != np.bool_ else np.uint8)
    alpha, white = picture.alpha, opaque(dtype)
    if alpha is not None:
        share = alpha.astype(np.float64) / opaque(picture.dtype)
        alpha = np.rint(share.clip(0, 1) * white).astype(dtype)
    return replace(picture, dtype=dtype, white=white, alpha=alpha)


def _on_full_scale(picture: Picture, kind: str) -> Picture:
    """The picture with the white of its type, where its file names another one and files of this kind name none."""
    told, full = picture.encoding.get("white"), opaque(picture.dtype)
    names_it = kind == "PPM" or (kind == "JPEG2000" and (picture.white + 1) == 2 ** int(picture.white).bit_length())
    if names_it or told in (None, full):
        return picture
    alpha = picture.alpha
    if alpha is not None:
        alpha = np.rint(alpha.astype(np.float64) * (full / picture.white)).astype(picture.dtype)
    return replace(picture, white=full, alpha=alpha)


def _metadata_of(picture: Picture, kind: str) -> dict[str, Any]:
    return {name: value for name in _METADATA.get(kind, ()) if (value := getattr(picture, name))}


def _save(array: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def _encode_transparent_bmp(picture: Picture) -> bytes:
    """Four bytes a pixel under a header of version 4, which says that one of them is opacity; Pillow's does not."""
    array = picture.array()
    color, alpha = array[..., :-1], array[..., -1:]
    height, width = array.shape[:2]
    blue_first = np.broadcast_to(color[..., ::-1], (height, width, 3))
    pixels = np.concatenate([blue_first, alpha], axis=-1)[::-1].tobytes()  # the lowest row first
    density = [round(value / 0.0254) for value in picture.dpi or (0, 0)]
    header = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, len(pixels), *density, 0, 0)
    header += struct.pack("<IIII4s48x", 0xFF0000, 0xFF00, 0xFF, 0xFF000000, b"BGRs")
    start = 14 + len(header)
    return struct.pack("<2sIII", b"BM", start + len(pixels), 0, start) + header + pixels


def _encode_png(picture: Picture, array: np.ndarray) -> bytes:
    """Pixels by a library that knows 16 bits, and the chunks around them as Pillow writes them."""
    text = PngImagePlugin.PngInfo()
    if picture.xmp:
        text.add_itxt("XML:com.adobe.xmp", picture.xmp.decode("utf-8", "replace"))
    described = _save(array[:1, :1].astype(np.uint8), "PNG", pnginfo=text, **_metadata_of(picture, "PNG"))
    chunks = [(kind, data) for kind, data in png_chunks(described) if kind not in (b"IHDR", b"IDAT", b"IEND")]
    chunks += picture.encoding.get("chunks", ())
    pixels = memoryview(imagecodecs.png_encode(array, level=6))
    start = 8 + 25  # signature and header
    return b"".join([pixels[:start], *(_chunk(*chunk) for chunk in chunks), pixels[start:]])


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _encode_tiff(picture: Picture, array: np.ndarray) -> bytes:
    exif = Image.Exif()
    exif.load(picture.exif)
    tags: list[tuple[int, int, int, Any, bool]] = [
        (tag, 2, 0, tiff_text(exif[tag]), True) for tag in TEXT_TAGS if tag in exif
    ]
    if picture.xmp:
        tags.append((700, 1, len(picture.xmp), picture.xmp, True))
    below = {tag: values for tag in (EXIF_IFD, GPS_IFD) if (values := exif.get_ifd(tag))}
    # Placeholders: tifffile writes no EXIF, and where it will be is known when the rest is written.
    tags += [(tag - 1, 4, 1, 0, True) for tag in below]
    compression = _TIFF_COMPRESSION.get(picture.encoding.get("compression", 8), "zlib")
    buffer = BytesIO()
    tifffile.imwrite(
        buffer,
        array[..., 0] if array.shape[-1] == 1 else array,
        photometric="rgb" if array.shape[-1] >= 3 else "minisblack",
        extrasamples=["unassalpha"] if picture.alpha is not None else None,
        planarconfig="contig" if array.shape[-1] > 1 else None,
        compression=compression,
        predictor=compression is not None,
        iccprofile=picture.icc_profile or None,
        resolution=picture.dpi,
        resolutionunit="inch" if picture.dpi else None,
        metadata=None,
        software=False,
        byteorder="<",
        extratags=sorted(tags),
    )
    for tag, values in below.items():
        directory = TiffImagePlugin.ImageFileDirectory_v2(b"II\x2a\0\0\0\0\0", group=tag)
        directory.update(values)
        place = buffer.seek(0, 2)
        buffer.write(b"\0" * (place % 2))
        place += place % 2
        buffer.write(directory.tobytes(place))
        buffer.seek(0)
        with tifffile.TiffFile(buffer) as file:
            entry = file.pages.first.tags[tag - 1].offset
        buffer.seek(entry)
        buffer.write(struct.pack("<HHII", tag, 4, 1, place))
    return buffer.getvalue()
