"""Decoding and crops are those of the DataModule: an image is evaluated alike wherever it comes from."""

import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from datamodules._detector_crops import FixedCrops
from lightning_modules.imaging import Degradation, fixed_crops, mirror, read_image, to_pixels


def picture(height: int = 37, width: int = 51, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("size", [(37, 51), (16, 16), (5, 40), (1, 1)], ids=str)
def test_crops_are_those_that_evaluation_looks_at(size: tuple[int, int]) -> None:
    image = torch.from_numpy(picture(*size)).permute(2, 0, 1)
    expected = FixedCrops(16, 7, Degradation())(image, 0)
    assert torch.equal(fixed_crops(image, 16, 7), expected)


def save(kind: str, path: Path) -> Path:
    colour = Image.fromarray(picture())
    image = {
        "colour.png": lambda: colour,
        "photo.jpg": lambda: colour,
        "grey.png": lambda: colour.convert("L"),
        "palette.gif": lambda: colour.convert("P"),
        "ink.jpg": lambda: colour.convert("CMYK"),
        "glass.png": lambda: Image.fromarray(picture(channels=4)),
        "deep.png": lambda: Image.fromarray(np.random.default_rng(0).integers(0, 65536, (37, 51)).astype(np.uint16)),
        "turned.jpg": lambda: colour,
        "bits.png": lambda: colour.convert("1"),
    }[kind]()
    exif = Image.Exif()
    exif[0x0112] = 6 if kind == "turned.jpg" else 1
    image.save(path / kind, exif=exif)
    return path / kind


KINDS = [
    "colour.png",
    "photo.jpg",
    "grey.png",
    "palette.gif",
    "ink.jpg",
    "glass.png",
    "deep.png",
    "turned.jpg",
    "bits.png",
]


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_decoded_as_the_data_are(kind: str, tmp_path: Path) -> None:
    path = save(kind, tmp_path)
    expected = read_image(path).float() / 255
    assert torch.equal(to_pixels(path), expected)
    assert torch.equal(to_pixels(str(path)), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_files_that_pillow_does_not_know_are_decoded_as_the_data_are(dtype: type, tmp_path: Path) -> None:
    pixels = picture() / 255 if dtype is np.float32 else picture().astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "a.tif", pixels.astype(dtype), photometric="rgb", compression="zlib")
    expected = torch.from_numpy(picture()).permute(2, 0, 1) / 255
    torch.testing.assert_close(to_pixels(tmp_path / "a.tif"), expected, rtol=0, atol=1e-6)


def test_images_in_memory() -> None:
    pixels = picture()
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    for image in (pixels, Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1), expected.double()):
        torch.testing.assert_close(to_pixels(image), expected, rtol=0, atol=1e-7)
    grey = to_pixels(pixels[..., 0])
    assert torch.equal(grey, expected[:1].expand(3, -1, -1))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 8, 8), r"got a tensor \[1, 8, 8\]"),
        (torch.zeros(3, 0, 8), r"got a tensor \[3, 0, 8\]"),
        (torch.full((3, 8, 8), 255.0), "in \\[0, 1\\], got torch.float32"),
        (torch.full((3, 8, 8), torch.nan), "in \\[0, 1\\]"),
        (np.zeros((8, 8, 3)), "an array must be bytes"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_image_is_refused(image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_pixels(image)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png is not a file"):
        to_pixels(tmp_path / "nowhere.png")
    for name, content in (("text.jpg", b"no image"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{re.escape(name)} cannot be read as an image"):
            to_pixels(tmp_path / name)
    whole = save("photo.jpg", tmp_path).read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.jpg cannot be read as an image"):
        to_pixels(tmp_path / "half.jpg")


def test_mirror_reaches_any_distance():
    assert mirror(torch.arange(-3, 7), 2).tolist() == [1, 1, 0, 0, 1, 1, 0, 0, 1, 1]
    assert mirror(torch.arange(3), 1).tolist() == [0, 0, 0]
