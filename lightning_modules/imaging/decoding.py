"""Decoding of images, from files of any kind or from memory: one reader for data, detector and users."""

import math
import re
import struct
import warnings
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
import torch
from PIL import Image, ImageCms, JpegImagePlugin, UnidentifiedImageError
from torch import Tensor

from lightning_modules.imaging.discovery import NOT_READ
from lightning_modules.imaging.picture import Picture, color_channels, from_array, opaque

ORIENTATION, EXIF_IFD, GPS_IFD = 0x0112, 0x8769, 0x8825
# What a TIFF file holds about a photograph, rather than about the layout of its numbers: description, make, model,
# software, time, artist, copyright.
TEXT_TAGS = (270, 271, 272, 305, 306, 315, 33432)
_CAMERA_TAGS, _SPEED_TAG = (271, 272), 0x8827
# Kept as they are from one PNG file to the next; profile, EXIF, XMP and resolution have fields of their own.
_PNG_CHUNKS = (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"tEXt", b"zTXt", b"iTXt")
_XMP_KEYWORD = b"XML:com.adobe.xmp\0"
# Values for white that whole numbers in a wider type can have, where no pixel is above an eighth of the type's own.
_WHITES = (255, 1023, 4095, 8191)

_DNG_VERSION = 50706  # a TIFF tag
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# Numbers [H, W, C], upright, and the attributes of `Picture` beside them; `white` only where the file names it.
Found = tuple[np.ndarray, dict[str, Any]]


def read_picture(path: str | Path, white: float | None = None) -> Picture:
    """Reads a file of any kind with all that goes back into it: metadata, color profile, depth, opacity.

    The orientation is applied and reset. Of an animation it takes the first frame; CMYK and palettes become RGB.

    Args:
        path: The file.
        white: Value of its numbers for white; by default found from their type and from all of them together.

    Raises:
        ValueError: If it cannot be read as an image; the message names it.
    """
    array, fields = _decode(Path(path))
    return _picture(array, fields, path, white)


def to_picture(image: Image.Image | np.ndarray, white: float | None = None) -> Picture:
    """A picture from memory; see `read_picture`.

    Args:
        image: `PIL.Image`, or array `[H, W, C]`, C 1 to 4, of any type of number.
        white: Value of its numbers for white.
    """
    array, fields = (image, {}) if isinstance(image, np.ndarray) else _from_pillow(image)
    return _picture(array, fields, "the image", white)


def read_image(path: str | Path) -> Tensor:
    """Decodes a file to eight-bit RGB, upright.

    Of an animation or a multi-page file it takes the first frame. Transparent pixels are laid over white. 16-bit
    values are scaled down, 12-bit ones in 16 bits from their own white; floating-point values may be in [0, 1] or in
    [0, 255].

    Shape:
        - output: `[3, H, W]`, uint8
    """
    return _to_bytes(*_decode(Path(path)), path)


def decode_image(image: Image.Image) -> Tensor:
    """Turns an opened image into eight-bit RGB, upright; see `read_image`.

    Shape:
        - output: `[3, H, W]`, uint8
    """
    return _to_bytes(*_from_pillow(image), "the image")


def camera_of(picture: Picture) -> str:
    """Camera and sensitivity that a picture was taken with, by which pictures share their noise; "" where unknown.

    Example:
        >>> camera_of(Picture(torch.zeros(1, 8, 8)))
        ''
    """
    exif = Image.Exif()
    try:
        exif.load(picture.exif)
        words = [str(exif.get(tag, "")).strip(" \0") for tag in _CAMERA_TAGS]
        speed = exif.get_ifd(EXIF_IFD).get(_SPEED_TAG, "")
    except Exception:  # a decoder raises what it likes at damaged data
        return ""
    speed = speed[0] if isinstance(speed, tuple) and speed else speed
    name = " ".join(word for word in words if word)
    return f"{name}, ISO {speed}" if name and speed else name


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


def _picture(array: np.ndarray, fields: dict[str, Any], name: Path | str, white: float | None) -> Picture:
    told = fields.pop("white", None)
    white, notes = _white(array, told, name) if white is None else (white, ())
    picture = from_array(array, white, **fields)
    return replace(picture, notes=(*picture.notes, *notes))


def _white(array: np.ndarray, told: float | None, name: Path | str) -> tuple[float, tuple[str, ...]]:
    return find_white(array, name) if told is None else (told, ())


def _to_bytes(array: np.ndarray, fields: dict[str, Any], name: Path | str) -> Tensor:
    """Turns numbers [H, W, C] of any type into eight-bit RGB, laid over white."""
    told = fields.get("white")
    white, notes = _white(array, told, name)
    for note in notes:
        warnings.warn(f"{name}: {note}", stacklevel=3)
    count = color_channels(array)
    pixels = array[..., :count]
    if array.dtype != np.uint8 or white != 255:
        pixels = (pixels.astype(np.float64) * (255 / white)).clip(0, 255)
    if array.shape[-1] > count:
        opacity = array[..., count:].astype(np.float64) / (told or opaque(array.dtype))
        pixels = pixels * opacity + 255 * (1 - opacity)
    if pixels.dtype != np.uint8:
        pixels = np.rint(pixels).astype(np.uint8)
    return torch.from_numpy(np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))).permute(2, 0, 1)


def find_white(array: np.ndarray, name: Path | str = "the image") -> tuple[float, tuple[str, ...]]:
    """Value for white in the numbers of an image, and what the user should know of it.

    Bytes have 255, other whole numbers 65535, unless all are below an eighth of that: 12 and fewer bits have a white
    of their own. Floating point has 1 where the numbers lie about [0, 1], as noise and sharpening leave them, and 255
    where they lie about [0, 255] and are whole or mostly above 1: no single pixel decides.

    Args:
        array: Numbers `[..., C]`; a last channel of two or four is opacity and does not count.
        name: What to call the image in messages.

    Raises:
        ValueError: If the numbers are not finite, or on none of these scales.
    """
    pixels, kind = array[..., : color_channels(array)], array.dtype
    if kind == np.uint8:
        return 255, ()
    if kind == np.bool_:
        return 1, ()
    if kind.kind == "f" and not (finite := np.isfinite(array)).all():
        raise ValueError(
            f"{name} has the pixel value {array[~finite][0]}; pixels must be finite. Replace such "
            "values, for instance with numpy.nan_to_num, or move the file elsewhere"
        )
    least, most = (float(pixels.min()), float(pixels.max())) if pixels.size else (0.0, 0.0)
    if kind.kind in "iu" and least >= 0 and most <= 65535:
        if most > 65535 // 8 or most == 0:
            return 65535, ()
        white = next(white for white in _WHITES if most <= white)
        bits = int(white).bit_length()
        return white, (f"its numbers are at most {most:g} of 65535 and taken for {bits} bits: white is {white}",)
    if kind.kind == "f":
        middle = float(np.median(pixels))
        for white in (1, 255):
            beyond = np.mean((pixels < -0.5 * white) | (pixels > 1.5 * white))
            if not 0 <= middle <= white or beyond > 0.001:
                continue
            if white == 255 and middle <= 1.5 and not (pixels == np.rint(pixels)).all():
                continue
            clipped = least < 0 or most > white
            return white, (f"its numbers from {least:.4g} to {most:.4g} are clipped to [0, {white}]",) * clipped
    accepted = "[0, 1] or [0, 255]" if kind.kind == "f" else "[0, 65535]"
    raise ValueError(
        f"{name} has pixel values from {least:g} to {most:g} ({kind}); expected a range within {accepted}. "
        "Rescale the image and save it again"
    )


def _decode(path: Path) -> Found:
    try:
        if path.suffix.lower() in NOT_READ:
            raise _OtherKindError(path.suffix.lower())
        with path.open("rb") as file:
            try:
                image = Image.open(file)
            except UnidentifiedImageError:
                file.seek(0)
                if not (start := file.read(12)):
                    raise ValueError("it is empty") from None
                if start[4:8] == b"ftyp" and start[8:] in _HEIF_BRANDS:
                    raise _OtherKindError("HEIC") from None
                if path.suffix.lower() not in (".tif", ".tiff"):
                    raise
                return _from_tiff(file)  # color with 16 bits or floating point, which Pillow does not know
            if image.format == "TIFF" and _DNG_VERSION in image.getexif():
                raise _OtherKindError("a raw photograph (DNG)")
            if image.format == "TIFF" and np.max(image.getexif().get(258, 8)) > 8:
                return _from_tiff(file)  # of color with 16 bits Pillow gives the upper eight
            return _from_pillow(image)
    except Exception as error:  # a decoder raises what it likes at a damaged file: RuntimeError, KeyError, struct.error
        remedy = "" if isinstance(error, _OtherKindError) else ". Repair the file or move it elsewhere"
        raise ValueError(f"{path} cannot be read as an image: {error}{remedy}") from error


class _OtherKindError(ValueError):
    """A file of a kind that is not read, and not a damaged one."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"{kind} is not read; convert it, for instance to PNG")


def _from_pillow(image: Image.Image) -> Found:
    """The first frame of an opened image."""
    # A PNG file is decoded, and its list of tiles emptied, where it is asked for EXIF data.
    content, tiles, notes = _content(image), list(getattr(image, "tile", ())), []
    turned = image.getexif().get(ORIENTATION, 1) >= 5
    if (frames := getattr(image, "n_frames", 1)) > 1:
        notes.append(f"the first of its {frames} frames")
    if image.format == "AVIF" and _is_deep_avif(content):
        notes.append("of its 10 or 12 bits 8 are read")
    array, white = _deep(image, content, tiles)
    if array is None and image.mode == "CMYK":
        array = np.asarray(_from_cmyk(image))
        notes.append("converted from CMYK to RGB")
    elif array is None:
        if image.mode in ("LAB", "HSV"):
            notes.append(f"converted from {image.mode} to RGB")
        array = np.asarray(image if image.mode[0] in "IF" else image.convert(_plain_mode(image)))
    array = array[..., None] if array.ndim == 2 else array
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    # Asked for once more: Pillow turns TIFF files as it decodes them.
    array = _upright(array, image.getexif().get(ORIENTATION, 1))
    fields = _metadata(image, content, turned, array.shape[1::-1])
    fields["icc_profile"] = _fitting_profile(fields["icc_profile"], array)
    if image.mode == "CMYK":
        fields["encoding"] = {}
    if white is not None:
        fields |= {"white": white, "encoding": {"white": white}}
    return array, fields | {"notes": tuple(notes)}


def _fitting_profile(profile: bytes, array: np.ndarray) -> bytes:
    """A color profile, unless it is one of other colors than the numbers are: of CMYK that has become RGB."""
    space = profile[16:20]
    return profile if space == b"RGB " or (space == b"GRAY" and color_channels(array) == 1) else b""


def _plain_mode(image: Image.Image) -> str:
    """The mode among L, LA, RGB and RGBA that loses nothing."""
    gray = image.mode in ("1", "L", "LA", "La")
    transparent = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    return ("L" if gray else "RGB") + "A" * transparent


def _deep(image: Image.Image, content: bytes, tiles: list[Any]) -> tuple[np.ndarray | None, float | None]:
    """The numbers that Pillow would round to eight bits, or stretch, without a word; their white where it is told."""
    if content and image.format == "PNG" and str(tiles[0][3]).endswith(";16B"):
        return imagecodecs.png_decode(content), None
    if content and image.format == "JPEG2000":
        array = imagecodecs.jpeg2k_decode(content)
        place = content.find(b"\xff\x4f\xff\x51") + 42  # start of the code stream, and its size
        bits = content[place] + 1  # above 128 they have a sign
        return array, 2.0**bits - 1 if array.dtype.kind == "u" and bits <= 16 else None
    if content and image.format == "PPM" and tiles[0][0] in ("ppm", "ppm_plain") and image.mode != "1":
        return _netpbm(image, content, *tiles[0])
    if content and image.format == "PPM" and image.mode[0] == "I":
        return np.asarray(image).astype(np.uint16), 65535
    return None, None


def _netpbm(
    image: Image.Image, content: bytes, coding: str, _: Any, start: int, arguments: Any
) -> tuple[np.ndarray, float]:
    """The numbers of a PGM or PPM file and its header's white, which Pillow stretches to that of their type."""
    white, channels = int(arguments[-1]), 3 if image.mode == "RGB" else 1
    dtype = np.dtype(">u1" if white < 256 else ">u2")
    count = channels * image.width * image.height
    if coding == "ppm":
        numbers = np.frombuffer(content, dtype, offset=start, count=count)
    else:
        words = re.sub(rb"#[^\r\n]*", b"", content[start:]).split()
        numbers = np.array(words[:count], np.int64)
        if len(numbers) < count:
            raise ValueError("it is cut off")
        numbers = numbers.clip(0, white).astype(dtype)
    return numbers.reshape(image.height, image.width, channels), white


def _is_deep_avif(content: bytes) -> bool:
    place = content.find(b"av1C")
    return 0 <= place < len(content) - 6 and bool(content[place + 6] & 0x40)


def _is_lossless_webp(content: bytes) -> bool:
    """Whether the first frame is, which other chunks, such as a color profile, may precede."""
    place = 12
    while place + 8 <= len(content):
        kind, length = struct.unpack_from("<4sI", content, place)
        if kind in (b"VP8 ", b"VP8L"):
            return bool(kind == b"VP8L")
        place += 8 + (16 if kind == b"ANMF" else length + length % 2)  # a frame of an animation holds chunks
    return False


def _content(image: Any) -> bytes:
    """The file of an opened image, where more than Pillow reads is needed of it."""
    file = getattr(image, "fp", None)
    if file is None or image.format not in ("PNG", "WEBP", "AVIF", "JPEG2000", "PPM") or file.closed:
        return b""
    place = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(place)
    return content


def _from_cmyk(image: Image.Image) -> Image.Image:
    if profile := image.info.get("icc_profile"):
        try:
            converted = ImageCms.profileToProfile(
                image, BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            if converted is not None:
                return converted
        except ImageCms.PyCMSError:
            pass  # a profile that is not one
    return image.convert("RGB")


def _metadata(image: Image.Image, content: bytes, turned: bool, size: tuple[int, ...]) -> dict[str, Any]:
    """What a file holds beside its pixels, by the attributes of `Picture`."""
    info, exif = image.info, image.getexif()
    encoding: dict[str, Any] = {}
    if isinstance(image, JpegImagePlugin.JpegImageFile):  # MPO, of which the first frame is a JPEG file, is one too
        encoding = {"qtables": image.quantization, "progressive": bool(info.get("progressive"))}
        if (sampling := JpegImagePlugin.get_sampling(image)) >= 0:
            encoding["subsampling"] = sampling
        if comment := info.get("comment"):
            encoding["comment"] = comment
        if iptc := [data for name, data in image.applist if name == "APP13"]:
            encoding["extra"] = b"".join(struct.pack(">HH", 0xFFED, len(data) + 2) + data for data in iptc)
    elif image.format == "PNG":
        encoding = {"chunks": _kept_chunks(content)}
    elif image.format == "TIFF":
        encoding = {"compression": exif.get(259, 1)}
    elif image.format == "WEBP":
        encoding = {"lossless": _is_lossless_webp(content)}
    xmp = info.get("xmp") or info.get("XML:com.adobe.xmp") or exif.get(700)
    return {
        "kind": {"MPO": "JPEG", None: "PNG"}.get(image.format, image.format),
        "icc_profile": info.get("icc_profile") or b"",
        "encoding": encoding,
        **_upright_metadata(
            _tiff_exif(exif) if image.format == "TIFF" else info.get("exif", b""), xmp, info.get("dpi"), turned, size
        ),
    }


def _upright_metadata(exif: bytes, xmp: Any, dpi: Any, turned: bool, size: tuple[int, ...]) -> dict[str, Any]:
    """EXIF, XMP and resolution of a picture that was turned upright, to this width and height."""
    if exif and not exif.startswith(b"Exif\0\0"):
        exif = b"Exif\0\0" + exif
    xmp = xmp.encode() if isinstance(xmp, str) else bytes(xmp or b"")
    if not dpi or not all(math.isfinite(value) and value > 0 for value in dpi):
        dpi = None
    return {
        "exif": _reset_orientation(exif, size),
        "xmp": re.sub(rb"(tiff:Orientation(?:=[\"']|>))\d", rb"\g<1>1", xmp),
        "dpi": dpi and (float(dpi[turned]), float(dpi[not turned])),
    }


def png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """The chunks of a PNG file: their types and their data."""
    chunks, place = [], 8
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    return chunks


def _kept_chunks(content: bytes) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((kind, data) for kind, data in png_chunks(content) if kind in _PNG_CHUNKS and _XMP_KEYWORD not in data)


def tiff_text(value: Any) -> bytes:
    """The bytes of a text in a TIFF file or EXIF data, which Pillow reads as Latin-1 whatever they are."""
    if isinstance(value, bytes):
        return value
    try:
        return str(value).encode("latin-1")
    except UnicodeEncodeError:
        return str(value).encode()


def _tiff_exif(exif: Image.Exif) -> bytes:
    """EXIF data of a TIFF file, which holds them among the tags that describe its numbers."""
    kept = Image.Exif()
    for tag in (tag for tag in (*TEXT_TAGS, ORIENTATION) if tag in exif):
        kept[tag] = exif[tag] if tag == ORIENTATION else tiff_text(exif[tag])
    for tag in (EXIF_IFD, GPS_IFD):
        kept.get_ifd(tag).update(exif.get_ifd(tag))
    return kept.tobytes() if len(kept) or kept.get_ifd(EXIF_IFD) or kept.get_ifd(GPS_IFD) else b""


def _reset_orientation(exif: bytes, size: tuple[int, ...]) -> bytes:
    """EXIF data of an upright picture. Only the values change: makers' notes point to places in the data."""
    data = bytearray(exif)
    order = "<" if data[6:8] == b"II" else ">"
    values = {ORIENTATION: 1, 0xA002: size[0], 0xA003: size[1]}

    def visit(place: int) -> None:
        (count,) = struct.unpack_from(order + "H", data, place)
        for entry in range(place + 2, place + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", data, entry)
            if tag == EXIF_IFD:
                visit(6 + struct.unpack_from(order + "I", data, entry + 8)[0])
            elif tag in values and kind in (3, 4):
                struct.pack_into(order + ("H" if kind == 3 else "I"), data, entry + 8, values[tag])

    try:
        visit(6 + struct.unpack_from(order + "I", data, 10)[0])
    except (struct.error, RecursionError):
        return b""  # damaged: of no use to any reader
    return bytes(data)


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Numbers [H, W, C] as the camera's orientation (EXIF, 1 to 8) means them to be seen."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def _from_tiff(file: Any) -> Found:
    """The first page of a TIFF file with numbers that Pillow does not read as they are."""
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        page, count = tiff.pages.first, len(tiff.pages)
        photometric = tifffile.PHOTOMETRIC(page.photometric)
        size = page.imagewidth * page.imagelength
        if Image.MAX_IMAGE_PIXELS is not None and size > 2 * Image.MAX_IMAGE_PIXELS:  # where Pillow refuses, too
            raise Image.DecompressionBombError(f"{size} pixels are more than {2 * Image.MAX_IMAGE_PIXELS}")
        if photometric > 2:
            raise ValueError(f"its colors are {photometric.name} of {page.bitspersample} bits: convert it to RGB")
        array, axes, bits = page.asarray(), page.axes, page.bitspersample
    if axes in ("SYX", "CYX"):
        array, axes = np.moveaxis(array, 0, -1), "YXS"
    if axes not in ("YX", "YXS"):
        raise ValueError(f"the axes {axes} are not those of an image")
    array = array[..., None] if axes == "YX" else array
    if array.shape[-1] not in (1, 2, 3, 4) or (array.shape[-1] == 2 and not page.extrasamples):
        raise ValueError(f"an image has 1, 3 or 4 channels, not {array.shape[-1]}")
    if photometric == 0 and array.dtype.kind == "u":  # white is 0
        array = 2**bits - 1 - array
    elif photometric == 0:
        white, _ = find_white(array)
        array = (white - array.astype(np.float64)).astype(array.dtype)
    notes = (f"the first of its {count} pages",) * (count > 1)
    if array.shape[-1] in (2, 4) and tifffile.EXTRASAMPLE.ASSOCALPHA in page.extrasamples:
        array, notes = _unassociated(array), (*notes, "its colors are no longer multiplied by its opacity")
    exif = Image.Exif()
    if tiff.is_bigtiff:  # which Pillow's EXIF does not read
        for tag in (tag for tag in (*TEXT_TAGS, ORIENTATION, 700, 34675) if tag in page.tags):
            entry = page.tags[tag]
            exif[tag] = entry.value
            if isinstance(entry.value, str):  # as it is, whatever its characters are
                file.seek(entry.valueoffset)
                exif[tag] = file.read(entry.count).rstrip(b"\0")
    else:
        file.seek(0)
        exif.load_from_fp(file)
    orientation = exif.get(ORIENTATION, 1)
    array = _upright(array.astype(array.dtype.newbyteorder("="), copy=False), orientation)
    unit = {2: 1.0, 3: 2.54}.get(exif.get(296, 2), 0.0)
    dpi = tuple(float(exif.get(tag, 0)) * unit for tag in (282, 283))
    return array, {
        "kind": "TIFF",
        "icc_profile": _fitting_profile(bytes(exif.get(34675, b"")), array),
        "encoding": {"compression": int(page.compression)},
        "notes": notes,
        **_upright_metadata(_tiff_exif(exif), exif.get(700), dpi, orientation >= 5, array.shape[1::-1]),
    }


def _unassociated(array: np.ndarray) -> np.ndarray:
    """Numbers of which the colors were multiplied by the opacity, without that."""
    most = opaque(array.dtype)
    share = array[..., -1:].astype(np.float64) / most
    colors = np.divide(array[..., :-1], share, out=array[..., :-1].astype(np.float64), where=share > 0)
    if array.dtype.kind in "iu":
        colors = np.rint(colors).clip(0, most)
    return np.concatenate([colors.astype(array.dtype), array[..., -1:]], axis=-1)
