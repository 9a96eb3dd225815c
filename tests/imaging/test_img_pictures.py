"""Pictures read and written again: pixels, depth, scale, opacity and everything that a file holds beside them."""

import errno
import io
import os
import re
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, ImageOps, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from lightning_modules.imaging import (
    Picture,
    decode_image,
    encoding,
    read_image,
    read_picture,
    restored_name,
    to_picture,
    write_picture,
    write_whole,
)

GENERATOR = np.random.default_rng(0)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6" dc:title="dunes"/></x:xmpmeta>'
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif(orientation: int = 1) -> Image.Exif:
    data = Image.Exif()
    data[0x0112], data[271], data[33432] = orientation, "Maker", "somebody"
    data.get_ifd(0x8769).update(
        {
            0x829A: TiffImagePlugin.IFDRational(1, 250),
            0x9286: b"ASCII\0\0\0hello",
            0xA002: 7,
            0xA003: 5,
            0x927C: b"notes",
        }
    )
    data.get_ifd(0x8825).update({1: "N", 2: (48.0, 8.0, 1.5)})
    return data


def round_trip(path: Path) -> tuple[Picture, Path]:
    picture = read_picture(path)
    copy = path.with_name(f"copy-{path.name}")
    write_picture(picture, copy)
    return picture, copy


def numbers(shape: tuple[int, ...], dtype: Any, most: float = 0) -> np.ndarray:
    if np.dtype(dtype).kind == "f":
        return GENERATOR.random(shape).astype(dtype)
    array = GENERATOR.integers(0, int(most or np.iinfo(dtype).max) + 1, shape).astype(dtype)
    array.flat[0] = most or np.iinfo(dtype).max
    return array


def write_png(path: Path, array: np.ndarray) -> None:
    path.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(array)))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_depth_gray_and_opacity_come_back_number_for_number(
    tmp_path: Path, suffix: str, dtype: type, channels: int
) -> None:
    array = numbers((37, 31, channels), dtype)
    path = tmp_path / f"a{suffix}"
    if suffix == ".png":
        write_png(path, array.squeeze(-1) if channels == 1 else array)
    else:
        tifffile.imwrite(
            path,
            array.squeeze(-1) if channels == 1 else array,
            photometric="rgb" if channels > 2 else "minisblack",
            planarconfig="contig" if channels > 1 else None,
            extrasamples=["unassalpha"] if channels in (2, 4) else None,
        )
    picture, copy = round_trip(path)
    assert picture.pixels.shape == (1 if channels < 3 else 3, 37, 31)
    assert (picture.alpha is None) == (channels in (1, 3))
    assert picture.notes == ()
    again = imagecodecs.png_decode(copy.read_bytes()) if suffix == ".png" else tifffile.imread(copy)
    assert again.dtype == dtype
    assert np.array_equal(again, array.squeeze())
    restored = replace(picture, pixels=1 - picture.pixels)
    write_picture(restored, copy)
    inverted = read_picture(copy)
    assert torch.equal((inverted.pixels * picture.white).round(), ((1 - picture.pixels) * picture.white).round())
    if picture.alpha is not None:
        assert np.array_equal(inverted.alpha, array[..., -1])


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jp2", "a.ppm"])
def test_sixteen_bits_of_color_are_not_read_as_eight(tmp_path: Path, name: str) -> None:
    array = numbers((20, 30, 3), np.uint16)
    if name == "a.png":
        write_png(tmp_path / name, array)
    elif name == "a.tif":
        tifffile.imwrite(tmp_path / name, array, photometric="rgb", compression="lzw", predictor=True)
    elif name == "a.jp2":
        (tmp_path / name).write_bytes(imagecodecs.jpeg2k_encode(array, level=0, codecformat="jp2"))
    else:
        (tmp_path / name).write_bytes(b"P6\n30 20\n65535\n" + array.astype(">u2").tobytes())
    picture, copy = round_trip(tmp_path / name)
    assert np.array_equal(picture.array(), array)
    assert np.array_equal(read_picture(copy).array(), array)


@pytest.mark.parametrize("options", [{"bigtiff": True}, {"byteorder": ">"}, {"tile": (16, 16), "compression": "zlib"}])
def test_layouts_of_tiff_files(tmp_path: Path, options: dict[str, Any]) -> None:
    array = numbers((20, 30, 3), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb", iccprofile=PROFILE, **options)
    picture, copy = round_trip(tmp_path / "a.tif")
    assert picture.icc_profile == PROFILE
    assert np.array_equal(read_picture(copy).array(), array)


def test_twelve_bits_of_color_in_netpbm(tmp_path: Path) -> None:
    array = numbers((20, 30, 3), np.uint16, most=4095)
    (tmp_path / "a.ppm").write_bytes(b"P6\n30 20\n4095\n" + array.astype(">u2").tobytes())
    picture, copy = round_trip(tmp_path / "a.ppm")
    assert picture.white == 4095
    assert np.array_equal(read_picture(copy).array(), array)


def test_compression_of_tiff_files_is_kept(tmp_path: Path) -> None:
    for compression in ("lzw", "zlib", None):
        tifffile.imwrite(tmp_path / "a.tif", numbers((20, 30, 3), np.uint16), compression=compression)
        _, copy = round_trip(tmp_path / "a.tif")
        with tifffile.TiffFile(tmp_path / "a.tif") as first, tifffile.TiffFile(copy) as second:
            assert first.pages[0].compression == second.pages[0].compression


def save(path: Path, image: Image.Image, orientation: int = 1) -> None:
    data: dict[str, Any] = {"exif": exif(orientation), "icc_profile": PROFILE, "dpi": (300, 240)}
    if path.suffix == ".png":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", XMP.decode())
        text.add_text("Title", "kept")
        text.add(b"gAMA", struct.pack(">I", 45455))
        data["pnginfo"] = text
    elif path.suffix != ".tif":
        data["xmp"] = XMP
    else:
        data["exif"][700] = XMP
        for tag in (0x8769, 0x8825):  # which Pillow writes into a TIFF file from here
            data["exif"][tag] = data["exif"].get_ifd(tag)
    image.save(path, **data)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp", ".avif"])
def test_metadata_profile_and_resolution_are_kept(tmp_path: Path, suffix: str, depth: int) -> None:
    if depth == 16 and suffix not in (".png", ".tif"):
        pytest.skip("eight bits only")
    path = tmp_path / f"a{suffix}"
    save(path, Image.fromarray(numbers((20, 30, 3), np.uint8)))
    if depth == 16:
        picture = read_picture(path)
        write_picture(replace(picture, dtype=np.dtype(np.uint16), white=65535), path)
        assert read_picture(path).dtype == np.uint16
    _, copy = round_trip(path)
    with Image.open(copy) as image:
        data = image.getexif()
        assert data[271] == "Maker"
        assert data[33432] == "somebody"
        below = data.get_ifd(0x8769)
        assert below[0x829A] == pytest.approx(0.004)
        assert below[0x9286] == b"ASCII\0\0\0hello"
        assert below[0x927C] == b"notes"
        assert tuple(map(float, data.get_ifd(0x8825)[2])) == (48, 8, 1.5)
        assert image.info["icc_profile"] == PROFILE
        if suffix in (".jpg", ".png", ".tif"):
            assert image.info["dpi"] == pytest.approx((300, 240), abs=0.01)
        xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or data.get(700)
        assert b"dunes" in (xmp.encode() if isinstance(xmp, str) else xmp)
        if suffix == ".png":
            assert image.info["Title"] == "kept"
            assert image.info["gamma"] == pytest.approx(0.45455)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_the_orientation_is_applied_once(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"a{suffix}"
    save(path, Image.fromarray(numbers((5, 7, 3), np.uint8)), orientation)
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
    picture, copy = round_trip(path)
    assert np.array_equal(picture.array(), np.asarray(upright))
    with Image.open(copy) as image:
        assert image.getexif().get(0x0112, 1) == 1
        assert image.size == upright.size
        assert image.getexif().get_ifd(0x8769)[0xA002] == upright.width
        xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or image.getexif().get(700)
        assert not re.search(rb'tiff:Orientation="[^1]"', xmp.encode() if isinstance(xmp, str) else xmp)
        assert image.info["dpi"][0] == pytest.approx(300 if orientation < 5 else 240, abs=0.01)
    again = read_picture(copy)
    assert torch.equal(again.pixels, picture.pixels) or suffix == ".jpg"
    assert again.pixels.shape == picture.pixels.shape


def test_opacity_turns_with_the_picture(tmp_path: Path) -> None:
    array = numbers((5, 7, 4), np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif(6))
    picture = read_picture(tmp_path / "a.png")
    assert np.array_equal(picture.alpha, np.rot90(array[..., 3], -1))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_has_the_tables_of_its_source(tmp_path: Path, subsampling: int, mode: str) -> None:
    image = Image.effect_noise((56, 40), 40).convert(mode)
    image.save(tmp_path / "a.jpg", quality=83, subsampling=subsampling, progressive=True)
    picture, copy = round_trip(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as first, Image.open(copy) as second:
        assert second.quantization == first.quantization
        assert second.mode == mode
        assert second.info.get("progressive")
        assert JpegImagePlugin.get_sampling(second) == JpegImagePlugin.get_sampling(first)
        source = np.asarray(first).astype(int)
        assert np.abs(np.asarray(second) - source).mean() < 6  # the same tables again lose next to nothing
    write_picture(picture, copy, quality=10)
    with Image.open(copy) as image:
        assert image.quantization[0][0] > first.quantization[0][0]


def test_webp_stays_lossless_where_it_was(tmp_path: Path) -> None:
    array = numbers((20, 30, 3), np.uint8)
    Image.fromarray(array).save(tmp_path / "a.webp", lossless=True)
    _, copy = round_trip(tmp_path / "a.webp")
    assert np.array_equal(np.asarray(Image.open(copy)), array)
    Image.fromarray(array).save(tmp_path / "a.webp", quality=80)
    assert read_picture(tmp_path / "a.webp").encoding == {"lossless": False}


@pytest.mark.parametrize(("bits", "white"), [(8, 255), (10, 1023), (12, 4095)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_fewer_bits_in_sixteen_have_their_own_scale(
    tmp_path: Path, bits: int, white: int, channels: int, suffix: str
) -> None:
    array = numbers((64, 64, channels), np.uint16, most=white).squeeze()
    path = tmp_path / f"a{suffix}"
    write_png(path, array) if suffix == ".png" else tifffile.imwrite(path, array)
    picture, copy = round_trip(path)
    assert picture.white == white
    assert float(picture.pixels.max()) == 1
    (note,) = picture.notes
    assert f"taken for {bits} bits: white is {white}" in note
    assert np.array_equal(read_picture(copy).array().squeeze(), array)
    with pytest.warns(UserWarning, match=rf"a\{suffix}: .* white is {white}"):
        assert len(read_image(path).unique()) == 256
    assert read_picture(path, white=65535).white == 65535


def test_eight_bits_in_thirty_two(tmp_path: Path) -> None:
    Image.fromarray((np.arange(4096).reshape(64, 64) // 16).astype("i4")).save(tmp_path / "a.tif")
    with pytest.warns(UserWarning, match="white is 255"):
        assert len(read_image(tmp_path / "a.tif").unique()) == 256
    _, copy = round_trip(tmp_path / "a.tif")
    assert tifffile.imread(copy).dtype == np.int32


def test_dark_sixteen_bits_and_black_are_no_trap(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.zeros((5, 7), np.uint16))
    with warnings.catch_warnings(action="error"):
        assert read_image(tmp_path / "a.png").max() == 0
    write_png(tmp_path / "a.png", numbers((5, 7), np.uint16, most=8192))
    assert read_picture(tmp_path / "a.png").white == 65535


def floats(kind: str) -> np.ndarray:
    ramp = np.linspace(0, 1, 64 * 64, dtype="f4").reshape(64, 64)
    noise = GENERATOR.normal(0, 0.1, (64, 64)).astype("f4")
    hot = ramp.copy()
    hot[3, 4] = 9.5
    return {
        "exact": ramp,
        "a hair": np.linspace(0, 1.02, 64 * 64, dtype="f4").reshape(64, 64),
        "noise": ramp + noise,
        "one hot pixel": hot,
        "bytes": ramp * 255,
        "bytes and a hair": ramp * 256,
        "dark bytes": np.rint(ramp * 3),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "white"),
    [
        ("exact", 1),
        ("a hair", 1),
        ("noise", 1),
        ("one hot pixel", 1),
        ("bytes", 255),
        ("bytes and a hair", 255),
        ("dark bytes", 255),
    ],
)
def test_the_scale_of_floating_point_is_not_one_pixel_s_decision(tmp_path: Path, kind: str, white: float) -> None:
    array = floats(kind)
    tifffile.imwrite(tmp_path / "a.tif", array)
    picture, copy = round_trip(tmp_path / "a.tif")
    assert picture.white == white
    beyond = array.min() < 0 or array.max() > white
    assert any("clipped to" in note for note in picture.notes) == beyond
    expected = (array.clip(0, white) * np.float32(1 / white)).clip(0, 1)
    assert np.abs(picture.pixels[0].numpy() - expected).max() < 1e-6
    again = tifffile.imread(copy)
    assert again.dtype == np.float32
    assert np.abs(again - array.clip(0, white)).max() <= 1e-6 * white
    if kind == "a hair":
        with pytest.warns(UserWarning, match="clipped"):
            assert len(read_image(tmp_path / "a.tif").unique()) == 256


@pytest.mark.parametrize("array", [np.geomspace(1e-3, 200, 4096), np.geomspace(1e-3, 5e4, 4096), np.full(4096, -0.1)])
def test_floating_point_on_no_known_scale_is_refused_by_name(tmp_path: Path, array: np.ndarray) -> None:
    tifffile.imwrite(tmp_path / "a.tif", array.reshape(64, 64).astype("f4"))
    with pytest.raises(ValueError, match=r"a\.tif has pixel values from .* expected a range within"):
        read_picture(tmp_path / "a.tif")


def test_palettes_become_color(tmp_path: Path) -> None:
    colors = Image.fromarray(numbers((20, 30, 3), np.uint8))
    colors.quantize(16).save(tmp_path / "a.png")
    colors.quantize(16).save(tmp_path / "b.png", transparency=3)
    colors.quantize(16).save(tmp_path / "c.gif")
    assert read_picture(tmp_path / "a.png").pixels.shape[0] == 3
    assert read_picture(tmp_path / "a.png").alpha is None
    transparent, copy = round_trip(tmp_path / "b.png")
    assert set(np.unique(transparent.alpha)) == {0, 255}
    assert Image.open(copy).mode == "RGBA"
    picture = read_picture(tmp_path / "c.gif")
    write_picture(picture, tmp_path / "c.gif.png")
    assert Image.open(tmp_path / "c.gif.png").format == "PNG"


def test_gray_with_a_transparent_value_stays_gray(tmp_path: Path) -> None:
    Image.fromarray(numbers((20, 30), np.uint8)).save(tmp_path / "a.png", transparency=7)
    picture, copy = round_trip(tmp_path / "a.png")
    assert picture.pixels.shape[0] == 1
    assert Image.open(copy).mode == "LA"


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_of_an_animation_the_first_frame_is_taken_with_a_note(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (30, 20), color) for color in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    picture = read_picture(tmp_path / name)
    assert picture.pixels[:, 0, 0].tolist() == pytest.approx([1, 0, 0], abs=0.02)
    assert "the first of its 3 frames" in picture.notes


def test_pages_of_tiff_are_counted(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", numbers((3, 20, 30), np.uint16), photometric="minisblack")
    assert "the first of its 3 pages" in read_picture(tmp_path / "a.tif").notes


@pytest.mark.parametrize("profile", [b"", b"no profile"])
def test_cmyk_becomes_rgb_with_a_note(tmp_path: Path, profile: bytes) -> None:
    Image.new("CMYK", (30, 20), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95, icc_profile=profile or None)
    picture, copy = round_trip(tmp_path / "a.jpg")
    assert "converted from CMYK to RGB" in picture.notes
    assert picture.pixels[:, 3, 3].tolist() == pytest.approx([1, 0, 0], abs=0.02)
    with Image.open(copy) as image:
        assert image.mode == "RGB"
        assert "icc_profile" not in image.info


def test_sixteen_bits_of_cmyk_are_refused_by_name(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", numbers((20, 30, 4), np.uint16), photometric="separated")
    with pytest.raises(
        ValueError, match=r"a\.tif cannot be read as an image: .*SEPARATED of 16 bits: convert it to RGB"
    ):
        read_picture(tmp_path / "a.tif")


def test_white_may_be_zero(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.full((5, 7), 65535 - 9000, np.uint16), photometric="miniswhite")
    assert np.all(read_picture(tmp_path / "a.tif").array() == 9000)


def test_damaged_metadata_does_not_end_a_picture(tmp_path: Path) -> None:
    image = Image.fromarray(numbers((20, 30, 3), np.uint8))
    for content in (b"Exif\0\0II*\0\xff\xff\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x09", b"Exif\0\0"):
        image.save(tmp_path / "a.jpg", exif=content)
        with warnings.catch_warnings(action="ignore"):
            picture, copy = round_trip(tmp_path / "a.jpg")
            assert picture.pixels.shape == read_picture(copy).pixels.shape == (3, 20, 30)


def complaint(path: Path) -> str:
    """The message about a file that cannot be read; its name where it can."""
    try:
        read_picture(path)
    except ValueError as error:
        return str(error)
    return path.name


def test_whatever_a_decoder_raises_names_the_file(tmp_path: Path) -> None:
    image = Image.fromarray(numbers((20, 30, 3), np.uint8))
    image.save(tmp_path / "a.avif")
    content = bytearray((tmp_path / "a.avif").read_bytes())
    for place in range(40, 300, 7):
        damaged = bytes(content[:place]) + b"\xff\0\xff" + bytes(content[place + 3 :])
        (tmp_path / "b.avif").write_bytes(damaged)
        assert "b.avif" in complaint(tmp_path / "b.avif")
    tifffile.imwrite(tmp_path / "b.tif", numbers((20, 30), np.float32))
    content = bytearray((tmp_path / "b.tif").read_bytes())
    for place in range(4, 200):
        damaged = bytes(content[:place]) + b"\0\0" + bytes(content[place + 2 :])
        (tmp_path / "c.tif").write_bytes(damaged)
        with warnings.catch_warnings(action="ignore"):
            assert "c.tif" in complaint(tmp_path / "c.tif")


def test_pictures_from_memory_keep_their_mode() -> None:
    for mode in ("1", "L", "LA", "RGB", "RGBA"):
        image = Image.fromarray(numbers((20, 30, 3), np.uint8)).convert(mode)
        plain = image.convert("L") if mode == "1" else image
        assert np.array_equal(to_picture(image).array().squeeze(), np.asarray(plain))
        assert decode_image(image).shape == (3, 20, 30)


@pytest.mark.parametrize(
    ("name", "tag", "expected"),
    [
        ("photo.jpg", ".restored", "photo.restored.jpg"),
        ("a/photo.JPEG", "", "a/photo.JPEG"),
        ("a/b.gif", "", "a/b.gif.png"),
        ("a/b.gif", ".restored", "a/b.gif.restored.png"),
        ("noname", "", "noname.png"),
        ("x" * 251 + ".jpg", "", "x" * 251 + ".jpg"),
    ],
)
def test_restored_names(name: str, tag: str, expected: str) -> None:
    assert restored_name(name, tag) == expected


def test_long_names_are_cut_and_told_apart(tmp_path: Path) -> None:
    first, second = "ä" * 124 + "1.gif", "ä" * 124 + "2.gif"
    outputs = [restored_name(name, tag) for name in (first, second) for tag in ("", ".restored")]
    assert len(set(outputs)) == 4
    for output in outputs:
        assert len(os.fsencode(output)) <= 255
        write_picture(Picture(torch.rand(1, 5, 7)), tmp_path / output)
        assert read_picture(tmp_path / output).pixels.shape == (1, 5, 7)


def test_a_format_without_transparency_refuses_it(tmp_path: Path) -> None:
    picture = to_picture(numbers((5, 7, 4), np.uint8))
    with pytest.raises(ValueError, match=r"a\.jpg cannot be written as JPEG: it holds no transparency; choose PNG"):
        write_picture(replace(picture, kind="JPEG"), tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quality", [None, 30])
@pytest.mark.parametrize("name", ["a.avif", "a.webp", "a.jp2", "a.tga"])
def test_opacity_is_kept_by_all_formats(tmp_path: Path, name: str, quality: int | None) -> None:
    array = numbers((20, 30, 4), np.uint8)
    Image.fromarray(array).save(tmp_path / name, **({"quality": 100} if name == "a.avif" else {}))
    picture = read_picture(tmp_path / name)
    write_picture(picture, tmp_path / f"b-{name}", quality)
    assert np.array_equal(read_picture(tmp_path / f"b-{name}").alpha, picture.alpha)


def test_depth_follows_the_format(tmp_path: Path) -> None:
    deep = to_picture(numbers((5, 7, 4), np.uint16))
    write_picture(replace(deep, kind="WEBP"), tmp_path / "a.webp")
    assert read_picture(tmp_path / "a.webp").dtype == np.uint8
    opacity = read_picture(tmp_path / "a.webp").alpha
    assert np.array_equal(opacity, np.rint(deep.alpha / 257).astype(np.uint8))
    write_picture(replace(to_picture(numbers((5, 7, 1), np.float32)), kind="PNG"), tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").dtype == np.uint16


def test_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a.bin", b"first")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(encoding.os, "fsync", full)
    with pytest.raises(OSError, match=r"the disk is full: .*a\.bin needs 0\.0 MB, and [\d.]+ MB are left"):
        write_whole(tmp_path / "a.bin", b"second")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"first"


def test_what_a_killed_run_left_is_replaced_and_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"kept")
    write_whole(tmp_path / "a.bin", b"1")
    part = tmp_path / f".{zlib.crc32(b'a.bin'):08x}.part"
    part.symlink_to(outside)
    write_whole(tmp_path / "a.bin", b"2")
    assert outside.read_bytes() == b"kept"
    assert (tmp_path / "a.bin").read_bytes() == b"2"
    assert not part.is_symlink()


def test_pillow_reads_what_is_written_by_others(tmp_path: Path) -> None:
    picture = to_picture(numbers((20, 30, 3), np.uint16))
    write_picture(picture, tmp_path / "a.png")
    with Image.open(io.BytesIO((tmp_path / "a.png").read_bytes())) as image:
        image.verify()
        assert (image.format, image.size) == ("PNG", (30, 20))


@pytest.mark.parametrize("white", [100, 255, 1000, 4095, 65535])
@pytest.mark.parametrize("magic", ["P2", "P3", "P5", "P6"])
def test_the_header_of_netpbm_names_white(tmp_path: Path, magic: str, white: int) -> None:
    array = numbers((20, 30, 3 if magic in ("P3", "P6") else 1), np.uint8 if white < 256 else np.uint16, most=white)
    array //= 12  # nothing is nearly as bright as white
    plain = b"# a comment\n" + " ".join(map(str, array.ravel())).encode()
    content = plain if magic in ("P2", "P3") else array.astype(array.dtype.newbyteorder(">")).tobytes()
    path = tmp_path / ("a.ppm" if magic in ("P3", "P6") else "a.pgm")
    path.write_bytes(f"{magic}\n30 20\n{white}\n".encode() + content)
    picture, copy = round_trip(path)
    assert (picture.white, picture.notes) == (white, ())
    assert np.array_equal(picture.array(), array)
    assert copy.read_bytes().split(b"\n")[2] == str(white).encode()
    assert np.array_equal(read_picture(copy).array(), array)
    assert np.abs(read_image(path).permute(1, 2, 0).numpy() - array * (255 / white)).max() <= 0.51
    for name in ("b.png", "b.tif"):  # which name no white: as bright as it was
        write_picture(replace(picture, kind={"b.png": "PNG", "b.tif": "TIFF"}[name]), tmp_path / name)
        full = np.iinfo(array.dtype).max
        again = imagecodecs.imread(tmp_path / name).reshape(array.shape)
        assert np.abs(again - array * (full / white)).max() <= 0.51
    write_picture(replace(picture, kind="JPEG2000"), tmp_path / "b.jp2")
    assert torch.allclose(read_picture(tmp_path / "b.jp2").pixels, picture.pixels, atol=0.6 / white)


@pytest.mark.parametrize("bits", [4, 8, 10, 12, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_jpeg_2000_has_the_precision_of_its_source(tmp_path: Path, bits: int, channels: int) -> None:
    array = numbers((20, 30, channels), np.uint8 if bits <= 8 else np.uint16, most=2**bits - 1) // 2
    content = imagecodecs.jpeg2k_encode(array.squeeze(), level=0, codecformat="jp2", bitspersample=bits)
    (tmp_path / "a.jp2").write_bytes(content)
    picture, copy = round_trip(tmp_path / "a.jp2")
    assert (picture.white, picture.notes) == (2**bits - 1, ())
    written = copy.read_bytes()
    assert written[written.find(b"\xff\x4f\xff\x51") + 42] == bits - 1
    assert np.array_equal(imagecodecs.jpeg2k_decode(written), array.squeeze())


@pytest.mark.parametrize("name", ["a.dng", "a.HEIC", "a.svg", "a.ico"])
def test_files_of_kinds_that_are_not_read_are_refused_by_name(tmp_path: Path, name: str) -> None:
    Image.fromarray(numbers((20, 30, 3), np.uint8)).save(tmp_path / name, "TIFF")
    with pytest.raises(
        ValueError, match=rf"{name} cannot be read .*\.{name[2:].lower()} is not read; convert it, for instance to PNG$"
    ):
        read_picture(tmp_path / name)


def test_a_raw_photograph_and_heic_under_other_names_and_an_empty_file(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", numbers((20, 30), np.uint8), extratags=[(50706, 1, 4, (1, 4, 0, 0), True)])
    (tmp_path / "b.jpg").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 99)
    (tmp_path / "c.png").touch()
    (tmp_path / "d.tif").touch()
    for name, message in (
        ("a.tif", "DNG.* is not read"),
        ("b.jpg", "HEIC is not read; convert it"),
        ("c.png", "it is empty"),
        ("d.tif", "it is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            read_picture(tmp_path / name)


@pytest.mark.parametrize("frames", [1, 2])
def test_lossless_webp_with_a_profile_stays_lossless(tmp_path: Path, frames: int) -> None:
    images = [Image.fromarray(numbers((20, 30, 3), np.uint8)) for _ in range(frames)]
    others: dict[str, Any] = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    images[0].save(tmp_path / "a.webp", lossless=True, icc_profile=PROFILE, **others)
    picture, copy = round_trip(tmp_path / "a.webp")
    assert picture.icc_profile == PROFILE
    assert np.array_equal(np.asarray(Image.open(copy).convert("RGB")), np.asarray(images[0]))


def test_other_than_lossless_webp_and_jpeg_get_their_quality(tmp_path: Path) -> None:
    image = Image.effect_noise((64, 64), 40).convert("RGB")
    sizes = {}
    for quality in (80, 95):
        image.save(tmp_path / "a.webp", quality=quality)
        sizes[quality] = (tmp_path / "a.webp").stat().st_size
    _, copy = round_trip(tmp_path / "a.webp")
    assert copy.stat().st_size > (sizes[80] + sizes[95]) / 2
    image.save(tmp_path / "a.jpg", quality=95, subsampling=0)
    for kind in ("WEBP", "AVIF"):
        write_picture(replace(read_picture(tmp_path / "a.jpg"), kind=kind), tmp_path / f"b.{kind.lower()}")
    assert (tmp_path / "b.webp").stat().st_size > (sizes[80] + sizes[95]) / 2


@pytest.mark.parametrize("channels", [2, 4])
def test_bmp_keeps_its_opacity(tmp_path: Path, channels: int) -> None:
    array = numbers((5, 7, channels), np.uint8)
    write_picture(replace(to_picture(array), kind="BMP", dpi=(300, 240)), tmp_path / "a.bmp")
    picture, copy = round_trip(tmp_path / "a.bmp")
    for path in (tmp_path / "a.bmp", copy):
        with Image.open(path) as image:
            assert (image.mode, image.info["dpi"]) == ("RGBA", pytest.approx((300, 240), abs=0.1))
            assert np.array_equal(np.asarray(image)[..., 3], array[..., -1])
            assert np.array_equal(np.asarray(image)[..., :3], np.broadcast_to(array[..., :-1], (5, 7, 3)))
    assert np.array_equal(picture.alpha, array[..., -1])


def test_what_cannot_be_written_is_named_by_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", ".hidden.part")

    monkeypatch.setattr(encoding.os, "replace", refused)
    with pytest.raises(PermissionError, match=r"Permission denied: .*a\.bin") as caught:
        write_whole(tmp_path / "a.bin", b"1")
    assert caught.value.filename == str(tmp_path / "a.bin")
    assert not list(tmp_path.iterdir())


def profile_of(space: bytes) -> bytes:
    return PROFILE[:16] + space + PROFILE[20:]


@pytest.mark.parametrize(
    ("mode", "space", "is_kept"),
    [
        ("RGB", b"RGB ", True),
        ("RGB", b"CMYK", False),
        ("RGB", b"Lab ", False),
        ("RGB", b"GRAY", False),
        ("L", b"GRAY", True),
        ("L", b"RGB ", True),
        ("LAB", b"Lab ", False),
        ("CMYK", b"CMYK", False),
    ],
)
def test_a_profile_of_other_colors_than_the_pixels_is_dropped(
    tmp_path: Path, mode: str, space: bytes, is_kept: bool
) -> None:
    Image.new(mode, (7, 5)).save(tmp_path / "a.tif", icc_profile=profile_of(space))
    picture, copy = round_trip(tmp_path / "a.tif")
    expected = profile_of(space) if is_kept else b""
    assert picture.icc_profile == expected
    assert Image.open(copy).info.get("icc_profile", b"") == expected
    assert any("converted from" in note for note in picture.notes) == (mode in ("LAB", "CMYK"))


@pytest.mark.parametrize(("dtype", "white"), [(np.float32, 1), (np.float32, 255), (np.uint16, 65535), (np.float64, 1)])
def test_white_may_be_zero_in_any_type(tmp_path: Path, dtype: type, white: float) -> None:
    array = numbers((20, 30), np.float64) * white
    array.flat[:2] = 0, white
    tifffile.imwrite(tmp_path / "a.tif", (white - array).astype(dtype), photometric="miniswhite")
    picture, copy = round_trip(tmp_path / "a.tif")
    assert picture.white == white
    assert np.abs(picture.pixels[0].numpy() - array / white).max() < 2e-5
    assert np.abs(tifffile.imread(copy) - array).max() < 2e-5 * white


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_colors_multiplied_by_opacity_come_back_as_colors(tmp_path: Path, dtype: type, channels: int) -> None:
    most = 1.0 if dtype == np.float32 else np.iinfo(dtype).max
    colors, share = GENERATOR.random((20, 30, channels)), 0.5 + 0.5 * GENERATOR.random((20, 30, 1))
    colors.flat[0] = 1
    share[0, 0] = 1
    stored = np.concatenate([colors * share, share], axis=-1) * most
    tifffile.imwrite(
        tmp_path / "a.tif",
        stored.astype(dtype),
        photometric="rgb" if channels == 3 else "minisblack",
        planarconfig="contig",
        extrasamples=["assocalpha"],
    )
    picture, copy = round_trip(tmp_path / "a.tif")
    tolerance = 5 / 255 if dtype == np.uint8 else 1e-4
    assert np.abs(picture.pixels.permute(1, 2, 0).numpy() - colors).max() < tolerance
    assert np.abs(picture.alpha / most - share[..., 0]).max() < tolerance
    again = read_picture(copy)
    assert np.array_equal(again.array(), picture.array())
    with tifffile.TiffFile(copy) as file:
        assert file.pages.first.extrasamples == (tifffile.EXTRASAMPLE.UNASSALPHA,)


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("text", ["Jörg Müller".encode(), "Jörg".encode("latin-1"), "日本 © 2024".encode(), b"plain"])
def test_text_of_tiff_files_is_kept_byte_for_byte(tmp_path: Path, text: bytes, dtype: type, bigtiff: bool) -> None:
    tags = [(tag, 2, 0, text, True) for tag in (315, 33432)]
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, numbers((5, 7, 3), dtype), photometric="rgb", bigtiff=bigtiff, extratags=tags)
    _, copy = round_trip(path)
    assert copy.read_bytes().count(text) >= 2


def test_comment_and_iptc_of_jpeg_files_are_kept(tmp_path: Path) -> None:
    iptc = b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\0\0\0\x0d\x1c\x02\x78\0\x08captions\0"
    marker = b"\xff\xed" + struct.pack(">H", len(iptc) + 2) + iptc
    image = Image.fromarray(numbers((20, 30, 3), np.uint8))
    image.save(tmp_path / "a.jpg", comment=b"a comment", extra=marker, icc_profile=PROFILE, exif=exif(6), xmp=XMP)
    picture, copy = round_trip(tmp_path / "a.jpg")
    for each in (copy, tmp_path / "b.jpg"):
        write_picture(picture, each, quality=None if each == copy else 50)
        with Image.open(each) as again:
            assert again.info["comment"] == b"a comment"
            assert ("APP13", iptc) in again.applist
            assert again.info["icc_profile"] == PROFILE
            assert again.getexif()[271] == "Maker"
