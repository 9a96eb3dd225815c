"""The user's own images: every kind of file, whole for predict, cropped otherwise."""

import re
import shutil

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from datamodules import ImageFolderDataModule
from datamodules._image_files import find_images
from datamodules.image_reader import read_image

RED, HALF = (255, 0, 0), (128, 128, 128)


def pixel(path) -> tuple[int, ...]:
    image = read_image(path)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 7, 5)
    return tuple(image[:, 3, 2].tolist())


@pytest.fixture
def folder(tmp_path):
    """Seven images of different sizes, two of them in a folder below."""
    generator = np.random.default_rng(0)
    for i in range(7):
        path = tmp_path / ("sub" if i > 4 else ".") / f"image_{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20 + i, 30 - 3 * i, 3), dtype=np.uint8)).save(path)
    return tmp_path


class TestDecoding:
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
    def test_modes_and_formats(self, tmp_path, name, mode, colour, expected):
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
    def test_scientific_tiff(self, tmp_path, array, expected):
        photometric = "rgb" if array.shape[-1] in (3, 4) else "minisblack"
        tifffile.imwrite(tmp_path / "a.tif", array, photometric=photometric)
        assert np.abs(np.subtract(pixel(tmp_path / "a.tif"), expected)).max() <= 1

    def test_planes_apart(self, tmp_path):
        planes = np.stack([np.full((7, 5), value, np.uint16) for value in (65535, 0, 0)])
        tifffile.imwrite(tmp_path / "a.tif", planes, photometric="rgb", planarconfig="separate")
        assert pixel(tmp_path / "a.tif") == RED

    def test_transparent_palette(self, tmp_path):
        image = Image.new("P", (5, 7), 0)
        image.putpalette([255, 0, 0])
        image.save(tmp_path / "a.png", transparency=0)
        image.save(tmp_path / "b.png")
        assert pixel(tmp_path / "a.png") == (255, 255, 255)
        assert pixel(tmp_path / "b.png") == RED

    def test_first_frame(self, tmp_path):
        frames = [Image.new("RGB", (5, 7), colour) for colour in (RED, (0, 0, 255))]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        assert pixel(tmp_path / "a.gif") == RED

    def test_orientation(self, tmp_path):
        image = Image.new("RGB", (7, 5), RED)
        image.paste((0, 0, 255), (0, 0, 1, 5))  # the left edge, which is at the top of the picture
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(tmp_path / "a.png", exif=exif)
        assert pixel(tmp_path / "a.png") == RED
        assert read_image(tmp_path / "a.png")[:, 0, 2].tolist() == [0, 0, 255]

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_not_finite(self, tmp_path, value, channels):
        array = np.zeros((7, 5, channels), np.float32)
        array[2, 3] = value
        tifffile.imwrite(tmp_path / "a.tif", array.squeeze(), photometric="rgb" if channels == 3 else "minisblack")
        with pytest.raises(ValueError, match=rf"a\.tif has the pixel value {value}; pixels must be finite"):
            read_image(tmp_path / "a.tif")

    @pytest.mark.parametrize(
        "array",
        [np.full((7, 5), -0.1, np.float32), np.full((7, 5), 300.0, np.float32), np.full((7, 5), 70000, np.int32)],
    )
    def test_range_without_meaning(self, tmp_path, array):
        tifffile.imwrite(tmp_path / "a.tif", array)
        with pytest.raises(ValueError, match=r"a\.tif has pixel values from .* expected a range within"):
            read_image(tmp_path / "a.tif")

    @pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.gif", "a.webp", "a.bmp"])
    @pytest.mark.parametrize("kept", [0, 20, 0.5])
    def test_damaged(self, tmp_path, name, kept):
        array = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
            read_image(tmp_path / name)

    def test_text_called_png(self, tmp_path):
        (tmp_path / "a.png").write_text("hello")
        with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
            read_image(tmp_path / "a.png")


class TestFolder:
    def test_sorted_recursive_without_hidden_files(self, folder):
        for hidden in ("._image_0.png", ".cache/a.png", "notes.txt"):
            (folder / hidden).parent.mkdir(exist_ok=True)
            shutil.copy(folder / "image_0.png", folder / hidden)
        names = [path.relative_to(folder).as_posix() for path in find_images(folder)]
        assert names == [f"image_{i}.png" for i in range(5)] + ["sub/image_5.png", "sub/image_6.png"]

    def test_every_suffix_that_pillow_knows_is_read(self, folder):
        names = ["a.jfif", "b.JPE", "c.avif", "d.jp2", "e.tga", "f.pbm", "g.qoi"]
        with Image.open(folder / "image_0.png") as image:
            for name in names:
                kind = {"a": "JPEG", "b": "JPEG"}.get(name[0])
                image.convert("1" if name == "f.pbm" else "RGB").save(folder / name, kind)
        assert [path.name for path in find_images(folder)][:7] == names
        assert {tuple(read_image(folder / name).shape) for name in names} == {(3, 20, 30)}

    def test_what_looks_like_an_image_and_is_not_read_is_counted(self, folder):
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

    def test_absent(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
            ImageFolderDataModule(str(tmp_path / "nowhere")).setup("predict")

    def test_empty(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"{tmp_path} holds no images.*\.png, .*\.webp"):
            ImageFolderDataModule(str(tmp_path)).setup("fit")


class TestPredict:
    def test_whole_images_with_names_and_without_keys(self, folder):
        data = ImageFolderDataModule(str(folder), noise_std=0.1)
        batches = [data.on_after_batch_transfer(batch, 0) for batch in data.predict_dataloader()]
        assert [batch["name"] for batch in batches][-2:] == [["sub/image_5.png"], ["sub/image_6.png"]]
        assert [tuple(batch["image"].shape) for batch in batches] == [(1, 3, 20 + i, 30 - 3 * i) for i in range(7)]
        assert set(batches[0]) == {"image", "label", "index", "weight", "name", "noise_std"}
        assert batches[0]["noise_std"].tolist() == pytest.approx([0.1])
        assert batches[0]["label"].tolist() == [-1]
        with Image.open(folder / "image_3.png") as image:
            assert np.array_equal((batches[3]["image"][0] * 255).round().permute(1, 2, 0), np.asarray(image))

    def test_unknown_noise_is_not_claimed(self, folder):
        assert "noise_std" not in next(iter(ImageFolderDataModule(str(folder)).predict_dataloader()))

    def test_an_unreadable_file_is_named_by_the_worker(self, folder):
        (folder / "image_1.png").write_bytes(b"")
        data = ImageFolderDataModule(str(folder), num_workers=1)
        with pytest.raises(ValueError, match=r"image_1\.png cannot be read"):
            list(data.predict_dataloader())


class TestCrops:
    def test_a_batch_has_the_agreed_form(self, folder):
        data = ImageFolderDataModule(str(folder), crop_size=8, batch_size=3, val_fraction=0.3)
        sizes = []
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
            batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
            sizes.append([tuple(batch["image"].shape) for batch in batches])
            assert set(batches[0]) == {"image", "label", "index", "weight", "key"}
            assert batches[0]["image"].dtype == torch.float32
        assert sizes == [[(3, 3, 8, 8), (2, 3, 8, 8)], [(2, 3, 8, 8)], [(2, 3, 8, 8)]]

    def test_training_crops_move_and_evaluation_crops_stay(self, folder):
        data = ImageFolderDataModule(str(folder), crop_size=8, batch_size=7, val_fraction=0.5, augment=False)

        def images(loader, epoch):
            loader.sampler.set_epoch(epoch)
            batch = next(iter(loader))
            return batch["image"][batch["index"].argsort()]

        train, val = data.train_dataloader(), data.val_dataloader()
        assert torch.equal(images(train, 1), images(train, 1))
        assert not torch.equal(images(train, 1), images(train, 2))
        assert torch.equal(images(val, 1), images(val, 2))

    def test_crops_reach_every_place_of_the_image(self, tmp_path):
        array = np.arange(35, dtype=np.uint8).reshape(5, 7)
        Image.fromarray(array).save(tmp_path / "a.png")
        data = ImageFolderDataModule(str(tmp_path), crop_size=4, val_fraction=0, augment=False)
        loader, corners = data.train_dataloader(), set()
        for epoch in range(100):
            loader.sampler.set_epoch(epoch)
            crop = next(iter(loader))["image"][0, 0]
            top, left = divmod(int(crop[0, 0]), 7)
            assert np.array_equal(crop, array[top : top + 4, left : left + 4])
            corners.add((top, left))
        assert corners == {(top, left) for top in range(2) for left in range(4)}

    def test_small_images_are_continued_by_their_mirror_image(self, tmp_path):
        Image.fromarray(np.array([[1, 2, 3]], np.uint8)).save(tmp_path / "a.png")
        data = ImageFolderDataModule(str(tmp_path), crop_size=5, val_fraction=1)
        crop = next(iter(data.test_dataloader()))["image"][0, 0]
        assert crop.tolist() == [[1, 2, 3, 3, 2]] * 5

    def test_the_split_is_disjoint_and_drawn_by_seed(self, folder):
        def paths(seed: int, split: str) -> set:
            data = ImageFolderDataModule(str(folder), val_fraction=0.4, seed=seed)
            data.setup("fit")
            return set(data._data[split].paths)

        assert len(paths(0, "train") | paths(0, "val")) == 7
        assert len(paths(0, "val")) == 3
        assert len({frozenset(paths(seed, "val")) for seed in range(5)}) > 1

    def test_two_images_are_one_on_either_side(self, folder):
        for path in find_images(folder)[2:]:
            path.unlink()
        data = ImageFolderDataModule(str(folder), val_fraction=0.01)
        data.setup("fit")
        assert [len(data._data[split]) for split in ("train", "val")] == [1, 1]

    def test_everything_on_one_side(self, folder):
        trained_on = ImageFolderDataModule(str(folder), val_fraction=0)
        trained_on.setup("fit")
        assert trained_on.val_dataloader() == []
        with pytest.raises(ValueError, match=r"leaves none to test on. Give a larger one"):
            trained_on.setup("test")
        tested_on = ImageFolderDataModule(str(folder), val_fraction=1)
        tested_on.setup("test")
        with pytest.raises(ValueError, match=r"leaves none to train on. Give a smaller one"):
            tested_on.setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": 0}, "crop_size must be at least 1, got 0"),
        ({"val_fraction": 1.5}, "val_fraction must lie between 0 and 1, got 1.5"),
        ({"noise_std": 25.0}, "noise_std must lie between 0 and 1, where white is 1, got 25.0; 25 of 255 is 0.0980"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ImageFolderDataModule("images", **options)
