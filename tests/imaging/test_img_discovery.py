"""Image files below a folder: which are found, and what is said of the others."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_modules.imaging import find_images, read_image


@pytest.fixture
def folder(tmp_path):
    """Seven images of different sizes, two of them in a folder below."""
    generator = np.random.default_rng(0)
    for i in range(7):
        path = tmp_path / ("sub" if i > 4 else ".") / f"image_{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20 + i, 30 - 3 * i, 3), dtype=np.uint8)).save(path)
    return tmp_path


def test_sorted_recursive_without_hidden_files(folder):
    for hidden in ("._image_0.png", ".cache/a.png", "notes.txt"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "image_0.png", folder / hidden)
    names = [path.relative_to(folder).as_posix() for path in find_images(folder)]
    assert names == [f"image_{i}.png" for i in range(5)] + ["sub/image_5.png", "sub/image_6.png"]


def test_every_suffix_that_pillow_knows_is_read(folder):
    names = ["a.jfif", "b.JPE", "c.avif", "d.jp2", "e.tga", "f.pbm", "g.qoi"]
    with Image.open(folder / "image_0.png") as image:
        for name in names:
            kind = {"a": "JPEG", "b": "JPEG"}.get(name[0])
            image.convert("1" if name == "f.pbm" else "RGB").save(folder / name, kind)
    assert [path.name for path in find_images(folder)][:7] == names
    assert {tuple(read_image(folder / name).shape) for name in names} == {(3, 20, 30)}


def test_what_looks_like_an_image_and_is_not_read_is_counted(folder):
    for name in ("a.heic", "b.HEIC", "sub/c.cr2", "notes.txt", ".hidden/d.heic"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 \.cr2, 2 \.heic left out, which cannot be read") as caught:
        assert len(find_images(folder)) == 7
    assert len(caught) == 1
    for path in find_images(folder):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no images \(1 \.cr2, 2 \.heic cannot be read\)"):
        find_images(folder)


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_images(folder)]


def test_linked_folders_are_followed(folder, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    shutil.copy(folder / "image_0.png", store / "b.png")
    (folder / "album").symlink_to(store)
    (folder / "sub" / "again").symlink_to(store)
    (folder / "c.png").symlink_to(store / "b.png")
    (folder / "dead.png").symlink_to(store / "nothing.png")
    expected = ["album/b.png", "c.png", *(f"image_{i}.png" for i in range(5))]
    assert names(folder) == [*expected, "sub/again/b.png", "sub/image_5.png", "sub/image_6.png"]


def test_links_that_lead_back_are_not_followed(folder):
    before = names(folder)
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "itself").symlink_to(folder)
    (folder / "sub" / "same").symlink_to(folder / "sub")
    assert names(folder) == before
    (folder / "sub" / "other").mkdir()
    (folder / "sub" / "other" / "back").symlink_to("../../loop")
    (folder / "loop").mkdir()
    (folder / "loop" / "on").symlink_to("../sub/other")
    assert names(folder) == before


def test_a_folder_without_permission_is_left_out_with_a_warning(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "sub":
            raise PermissionError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.warns(UserWarning, match="sub is left out: no permission to read it"):
        assert len(find_images(folder)) == 5
