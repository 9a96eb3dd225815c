"""PNG files: their pixels and their names."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_modules.imaging import find_images, output_names, read_image, read_picture, write_picture, write_png


@pytest.mark.parametrize(
    ("names", "outputs"),
    [
        (["a.jpg", "b.png"], ["a.png", "b.png"]),
        (["a.jpg", "a.png"], ["a.jpg.png", "a.png.png"]),
        (["x/a.jpg", "y/a.png"], ["x/a.png", "y/a.png"]),
        (["A.jpg", "a.png"], ["A.jpg.png", "a.png.png"]),
        (["a.jpg", "a.gif", "a.jpg.tif"], ["a.jpg.png", "a.gif.png", "a.jpg.tif.png"]),
        (["a", "a.b.c"], ["a.png", "a.b.png"]),
    ],
)
def test_output_names(names: list[str], outputs: list[str]) -> None:
    assert list(output_names(names).values()) == outputs


def test_values_are_rounded_not_cut(tmp_path: Path) -> None:
    image = torch.tensor([-0.1, 0.0, 0.49 / 255, 0.51 / 255, 1.0, 1.1]).view(1, 2, 3)
    write_png(image, tmp_path / "a.png")
    assert np.asarray(Image.open(tmp_path / "a.png")).tolist() == [[0, 0, 0], [1, 255, 255]]
    with pytest.raises(ValueError, match=r"got \[2, 4, 4\]"):
        write_png(torch.rand(2, 4, 4), tmp_path / "b.png")


def test_files_may_be_named_by_strings(tmp_path: Path) -> None:
    image = torch.rand(3, 4, 5).mul(255).round() / 255
    write_png(image, str(tmp_path / "a.png"))
    (found,) = find_images(str(tmp_path))
    assert torch.equal(read_image(str(found)), (255 * image).byte())
    write_picture(read_picture(str(found)), str(tmp_path / "b.png"))
    assert torch.equal(read_image(tmp_path / "b.png"), read_image(found))
