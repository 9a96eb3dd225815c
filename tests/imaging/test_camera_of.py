"""Camera and sensitivity from EXIF data."""

import numpy as np
import pytest
from PIL import Image

from lightning_modules.imaging import camera_of, to_picture


def with_exif(make: str, model: str, speed: int | None) -> Image.Image:
    exif = Image.Exif()
    exif[271], exif[272] = make, model
    if speed is not None:
        exif.get_ifd(0x8769)[0x8827] = speed
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    image.info["exif"] = exif.tobytes()
    return image


@pytest.mark.parametrize(
    ("make", "model", "speed", "name"),
    [
        ("NIKON CORPORATION", "NIKON D800", 3200, "NIKON CORPORATION NIKON D800, ISO 3200"),
        ("", "X100", None, "X100"),
        ("", "", 100, ""),
    ],
)
def test_camera_and_speed_are_read(make: str, model: str, speed: int | None, name: str) -> None:
    assert camera_of(to_picture(with_exif(make, model, speed))) == name


def test_no_or_damaged_data_name_no_camera() -> None:
    image = with_exif("A", "B", 1)
    image.info["exif"] = image.info["exif"][:20]
    assert camera_of(to_picture(image)) == ""
    assert camera_of(to_picture(np.zeros((8, 8, 3), np.uint8))) == ""
