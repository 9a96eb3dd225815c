"""Every kind of image file, decoded to eight-bit RGB."""

import re

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from lightning_modules.imaging import read_image

RED, HALF = (255, 0, 0), (128, 128, 128)


def pixel(path) -> tuple[int, ...]:
    image = read_image(path)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 7, 5)
    return tuple(image[:, 3, 2].tolist())


@pytest.mark.parametrize(
    ("name", "mode", "colour", "expected"),
    [
        ("a.png", "RGB", RED, RED),
        ("a.BMP", "RGB", RED, RED),
        ("a.webp", "L", 128, HALF),
        ("a.jpg", "L", 128, HALF),
        ("a.jpeg", "CMYK", (0, 255, 255, 0), (254, 0, 0)),
        ("a.tiff", "CMYK", (0, 255, 255, 0), RED),
        ("a.png", "1", 1, (255, 255, 255)),
        ("a.gif", "P", 0, (0, 0, 0)),
        ("a.tif", "L", 128, HALF),
        ("a.ppm", "RGB", RED, RED),
        ("a.png", "RGBA", (255, 0, 0, 255), RED),
        ("a.png", "RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("a.png", "RGBA", (0, 0, 0, 127), (128, 128, 128)),
        ("a.png", "LA", (0, 0), (255, 255, 255)),
        ("a.tif", "F", 0.5, HALF),
        ("a.tif", "F", 128.0, HALF),
        ("a.tif", "I", 128 * 257, HALF),
        ("a.tif", "I;16", 128 * 257, HALF),
        ("a.png", "I;16", 128 * 257, HALF),
    ],
)
def test_modes_and_formats(tmp_path, name, mode, colour, expected):
    Image.new(mode, (5, 7), colour).save(tmp_path / name)
    assert np.abs(np.subtract(pixel(tmp_path / name), expected)).max() <= 1


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((7, 5, 3), (65535, 0, 0), np.uint16), RED),
        (np.full((7, 5, 3), (1, 0, 0), np.float32), RED),
        (np.full((7, 5, 4), (0, 0, 0, 0.5), np.float32), HALF),
        (np.full((2, 7, 5), 0.5, np.float64), HALF),
        (np.full((7, 5), True), (255, 255, 255)),
    ],
)
def test_scientific_tiff(tmp_path, array, expected):
    photometric = "rgb" if array.shape[-1] in (3, 4) else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", array, photometric=photometric)
    assert np.abs(np.subtract(pixel(tmp_path / "a.tif"), expected)).max() <= 1


def test_planes_apart(tmp_path):
    planes = np.stack([np.full((7, 5), value, np.uint16) for value in (65535, 0, 0)])
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="rgb", planarconfig="separate")
    assert pixel(tmp_path / "a.tif") == RED


def test_transparent_palette(tmp_path):
    image = Image.new("P", (5, 7), 0)
    image.putpalette([255, 0, 0])
    image.save(tmp_path / "a.png", transparency=0)
    image.save(tmp_path / "b.png")
    assert pixel(tmp_path / "a.png") == (255, 255, 255)
    assert pixel(tmp_path / "b.png") == RED


def test_first_frame(tmp_path):
    frames = [Image.new("RGB", (5, 7), colour) for colour in (RED, (0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixel(tmp_path / "a.gif") == RED


def test_orientation(tmp_path):
    image = Image.new("RGB", (7, 5), RED)
    image.paste((0, 0, 255), (0, 0, 1, 5))  # the left edge, which is at the top of the picture
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    assert pixel(tmp_path / "a.png") == RED
    assert read_image(tmp_path / "a.png")[:, 0, 2].tolist() == [0, 0, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("channels", [1, 3])
def test_not_finite(tmp_path, value, channels):
    array = np.zeros((7, 5, channels), np.float32)
    array[2, 3] = value
    tifffile.imwrite(tmp_path / "a.tif", array.squeeze(), photometric="rgb" if channels == 3 else "minisblack")
    with pytest.raises(ValueError, match=rf"a\.tif has the pixel value {value}; pixels must be finite"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize(
    "array",
    [np.full((7, 5), -0.1, np.float32), np.full((7, 5), 300.0, np.float32), np.full((7, 5), 70000, np.int32)],
)
def test_range_without_meaning(tmp_path, array):
    tifffile.imwrite(tmp_path / "a.tif", array)
    with pytest.raises(ValueError, match=r"a\.tif has pixel values from .* expected a range within"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.gif", "a.webp", "a.bmp"])
@pytest.mark.parametrize("kept", [0, 20, 0.5])
def test_damaged(tmp_path, name, kept):
    array = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        read_image(tmp_path / name)


def test_text_called_png(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
        read_image(tmp_path / "a.png")


def test_a_damaged_avif_is_named(tmp_path, monkeypatch):
    Image.new("RGB", (5, 7)).save(tmp_path / "a.png")

    def fail(path):
        raise RuntimeError("Failed to decode image: Missing or empty image item")

    monkeypatch.setattr(Image, "open", fail)  # what Pillow's AVIF plugin raises at 22 of 334 damaged files
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image: Failed to decode"):
        read_image(tmp_path / "a.png")
