"""Photographs and generated images: where they come from, how they are degraded, what of them is seen."""

import csv
import io
import re
import struct
import warnings
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from scipy.ndimage import gaussian_filter

from datamodules import GeneratedImagesDataModule, generated_images
from datamodules._detector_crops import FixedCrops, HistoryCrops, RandomCrop, RandomHistory
from datamodules._sampler import FixedBatches
from lightning_modules.imaging import (
    Degradation,
    Encoding,
    History,
    corner,
    degrade,
    mirror,
    read_image,
    relive,
)

CLASSES = ("photographic", "generated")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture with structure, which survives a JPEG encoding."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (37, 51)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(noise(size[0] + i, size[1] - i, seed + i)).save(folder / f"{i}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of which only the training part exists: 10 photographs and 5 generated images."""
    folder = tmp_path / "the data of Zoë"
    write(folder / "train" / "photographic", 10)
    write(folder / "train" / "generated", 5, seed=100)
    return folder


def module(root: Path | str, **options) -> GeneratedImagesDataModule:
    return GeneratedImagesDataModule(str(root), **({"crop_size": 16, "batch_size": 4} | options))


def names(data: GeneratedImagesDataModule, split: str) -> list[str]:
    return data.files(split).names  # type: ignore[arg-type]


def served(data: GeneratedImagesDataModule, loader) -> list[dict]:
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def table(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


class TestDegradation:
    IMAGE = torch.from_numpy(noise(75, 93).copy()).permute(2, 0, 1)
    CHAINS = (
        Degradation(),
        Degradation(quality=60),
        Degradation(blur=1.3),
        Degradation(rescale=0.5),
        Degradation(rescale=0.73),
        Degradation(rescale=1.6),
        Degradation(blur=0.8, quality=80),
    )

    @pytest.mark.parametrize("degradation", CHAINS, ids=str)
    def test_a_window_shows_what_the_whole_shows_there(self, degradation):
        whole = degrade(self.IMAGE, degradation)
        height, width = whole.shape[1:]
        assert (height, width) == degradation.size(75, 93)
        for top, left in ((0, 0), (3, 11), (height - 17, width - 19), (height // 3, width // 2)):
            window = degrade(self.IMAGE, degradation, ((top, top + 17), (left, left + 19)))
            difference = (window.int() - whole[:, top : top + 17, left : left + 19].int()).abs()
            # rescaling may round the other way where it comes out at one half
            assert difference.max() <= (degradation.rescale != 1)
            assert (difference > 0).float().mean() < 0.01

    def test_jpeg_is_that_of_pillow(self):
        file = io.BytesIO()
        Image.fromarray(self.IMAGE.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=60)
        expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
        assert torch.equal(degrade(self.IMAGE, Degradation(quality=60)), expected)

    def test_rescaling_is_antialiased_bicubic(self):
        image = self.IMAGE // 2 + 64  # no value is cut off between the two passes
        expected = torch.nn.functional.interpolate(image[None].double(), (38, 46), mode="bicubic", antialias=True)[0]
        # half a level for each pass, the first of which the second weighs by up to 1.3
        assert (degrade(image, Degradation(rescale=0.5)) - expected).abs().max() <= 1.2

    def test_blur_is_gaussian_and_mirrors_the_border(self):
        image = self.IMAGE.permute(1, 2, 0).numpy().astype(np.float64)
        expected = gaussian_filter(image, 1.5, mode="reflect", radius=6, axes=(0, 1))
        result = degrade(self.IMAGE, Degradation(blur=1.5)).permute(1, 2, 0).numpy()
        assert np.abs(result - expected).max() <= 0.51

    @pytest.mark.parametrize("degradation", [*CHAINS, Degradation(rescale=0.01, blur=3, quality=1)], ids=str)
    def test_one_pixel_stays_one(self, degradation):
        pixel = torch.full((3, 1, 1), 128, dtype=torch.uint8)
        result = degrade(pixel, degradation)
        assert result.shape == (3, *degradation.size(1, 1))
        assert (result.int() - 128).abs().max() <= 2

    @pytest.mark.parametrize("condition", ["jpeg", "jpeg 101", "jpeg 75.5", "rescale 0", "blur -1", "noise 3", ""])
    def test_what_is_no_condition(self, condition):
        with pytest.raises(ValueError, match=f"'{condition}' is not a condition"):
            Degradation.parse(condition)


class TestCrops:
    SOME = RandomHistory((0.5, 1.0), 0.1, (0.3, 1.5), (50, 52))

    def test_random_crops_reach_every_place_alike(self):
        places = [self.SOME.draw(key)[1] for key in range(3000)]
        count = Counter((int(2 * down), int(3 * right)) for down, right in places)
        assert sorted(count) == [(down, right) for down in range(2) for right in range(3)]
        assert min(count.values()) > 400  # 500 expected
        image = torch.arange(12).view(1, 3, 4).expand(3, -1, -1).to(torch.uint8)
        assert int(relive(image, History(), 2, (0.99, 0.99))[0, 0, 0]) == 6
        assert int(relive(image, History(), 2, (0.0, 0.5))[0, 0, 0]) == 1

    def test_a_random_crop_is_a_function_of_its_key(self):
        image = torch.from_numpy(noise(60, 70).copy()).permute(2, 0, 1)
        view = RandomCrop(16, self.SOME)
        assert torch.equal(view(image, 7), view(image, 7))
        assert len({view(image, key).numpy().tobytes() for key in range(20)}) == 20

    def test_histories_are_drawn_as_they_are_described(self):
        drawn = [self.SOME.draw(key)[0] for key in range(4000)]
        assert [np.quantile([d.rescale for d in drawn], q) for q in (0, 0.5, 1)] == pytest.approx(
            [0.5, 0.75, 1], abs=0.02
        )
        assert np.mean([d.blur > 0 for d in drawn]) == pytest.approx(0.1, abs=0.02)
        blurs = [d.blur for d in drawn if d.blur]
        assert (min(blurs), max(blurs)) == (pytest.approx(0.3, abs=0.02), pytest.approx(1.5, abs=0.02))
        for count, share in ((0, 0.2), (1, 0.5), (2, 0.3)):
            assert np.mean([len(d.encodings) == count for d in drawn]) == pytest.approx(share, abs=0.03)
        encodings = Counter((e.kind, e.quality) for d in drawn for e in d.encodings)
        assert set(encodings) == {(kind, quality) for kind in ("JPEG", "WEBP") for quality in (50, 51, 52)}
        assert min(encodings.values()) > 0.8 * encodings.total() / 6
        assert min(Counter(d.resampling for d in drawn).values()) > 900  # of four kernels
        cuts = {cut for d in drawn for e in d.encodings for cut in e.cut}
        assert cuts == set(range(16)), "the blocks lie anywhere"

    def test_a_history_on_a_crop_is_that_of_a_whole_image(self):
        image = torch.from_numpy(noise(90, 110).copy()).permute(2, 0, 1)
        plain = History(rescale=0.7, resampling=Image.Resampling.LANCZOS)
        whole, crop = relive(image, plain), relive(image, plain, 20, (0.5, 0.5))
        top, left = corner((0.5, 0.5), *whole.shape[1:], 20)
        assert (crop.int() - whole[:, top : top + 20, left : left + 20].int()).abs().max() <= 1
        coded = relive(image, replace(plain, encodings=(Encoding("JPEG", 60, (3, 5)),), cut=(2, 1)), 20, (0.5, 0.5))
        difference = (coded.float() - crop.float()).abs().mean()
        assert difference > 0.5, "it is encoded"

    def test_all_crops_of_an_image_have_one_history_and_another_key_another(self):
        image = torch.from_numpy(noise(90, 110).copy()).permute(2, 0, 1)
        view = HistoryCrops(16, 3, self.SOME)
        assert torch.equal(view(image, 5), view(image, 5))
        assert not torch.equal(view(image, 5), view(image, 6))
        flat = torch.full((3, 90, 110), 77, dtype=torch.uint8)
        assert (view(flat, 5).int() - 77).abs().max() <= 2

    def test_fixed_crops_begin_in_the_middle_and_spread(self):
        image = torch.stack(torch.meshgrid(torch.arange(100), torch.arange(200), indexing="ij")).to(torch.uint8)
        image = torch.cat([image, image[:1]])
        crops = FixedCrops(20, 9, Degradation())(image, 0)
        corners = crops[:, :2, 0, 0].int()
        assert corners[0].tolist() == [40, 90]
        thirds = {(int(3 * top / 81), int(3 * left / 181)) for top, left in corners.tolist()}
        assert len(thirds) >= 8
        for crop, (top, left) in zip(crops, corners.tolist(), strict=True):
            assert torch.equal(crop, image[:, top : top + 20, left : left + 20])

    @pytest.mark.parametrize("size", [(1, 1), (3, 50), (50, 3), (15, 16)])
    def test_small_images_are_mirrored_out(self, size):
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        (crop,) = FixedCrops(16, 1, Degradation())(image, 0)
        rows, columns = (mirror(torch.arange(16) + max(length - 16, 0) // 2, length) for length in size)
        assert torch.equal(crop, image[:, rows][:, :, columns])

    def test_degrading_makes_small_images_smaller(self):
        image = torch.from_numpy(noise(20, 20).copy()).permute(2, 0, 1)
        whole = degrade(image, Degradation(rescale=0.5))
        (crop,) = FixedCrops(16, 1, Degradation(rescale=0.5))(image, 0)
        assert torch.equal(crop[:, :10, :10], whole)
        assert torch.equal(crop[:, 10:], crop[:, 4:10].flip(1))

    @pytest.mark.parametrize("size", [(15, 40), (40, 15), (16, 16)])
    @pytest.mark.parametrize("condition", ["clean", "rescale 0.5", "jpeg 50"])
    def test_images_that_are_mirrored_out_are_known(self, root, size, condition):
        image = torch.from_numpy(noise(*size)).permute(2, 0, 1)
        small = min(degrade(image, Degradation.parse(condition)).shape[1:]) < 16
        assert module(root).mirrors(*size, condition) == small


class TestSources:
    def test_the_parts_of_a_folder(self, root):
        write(root / "val" / "photographic", 2, seed=200)
        write(root / "val" / "generated", 3, seed=300)
        data = module(root)
        assert names(data, "train")[0].startswith("train/photographic/")
        assert data.files("train").labels.tolist() == [0] * 9 + [1] * 4, "the test takes a part"
        assert data.files("val").labels.tolist() == [0, 0, 1, 1, 1]
        assert not set(names(data, "test")) & {*names(data, "val"), *names(data, "train")}
        assert Counter(data.files("test").labels.tolist()) == {0: 1, 1: 1}
        write(root / "test" / "photographic", 1)
        write(root / "test" / "generated", 1)
        assert names(module(root), "test") == ["test/photographic/0.png", "test/generated/0.png"]

    def test_without_a_validation_part_one_is_drawn_class_by_class(self, root):
        data = module(root, val_fraction=0.4, test_fraction=0.2)
        assert Counter(data.files("train").labels.tolist()) == {0: 4, 1: 2}
        assert Counter(data.files("val").labels.tolist()) == {0: 4, 1: 2}
        assert Counter(data.files("test").labels.tolist()) == {0: 2, 1: 1}
        parts = [set(names(data, part)) for part in ("train", "val", "test")]
        assert len(set.union(*parts)) == sum(map(len, parts)), "what is reported has chosen nothing"
        assert names(module(root, val_fraction=0.4, test_fraction=0.2), "val") == names(data, "val")
        assert len({tuple(names(module(root, val_fraction=0.4, seed=seed), "val")) for seed in range(5)}) > 1

    def test_class_folders_alone_under_other_names(self, root):
        (root / "train" / "generated").rename(root / "train" / "sd 1.4")
        data = module(root / "train", class_names=("photographic", "sd 1.4"))
        assert data.class_names == ["photographic", "sd 1.4"]
        assert sum(len(data.files(part)) for part in ("train", "val", "test")) == 15

    def test_predict_takes_any_folder_and_no_label(self, root):
        data = module(root)
        assert names(data, "predict") == sorted(names(data, "predict"))
        assert len(data.files("predict")) == 15
        assert set(data.files("predict").labels.tolist()) == {-1}

    def test_predict_takes_one_image(self, root):
        data = module(root / "train" / "generated" / "3.png")
        (batch,) = served(data, data.predict_dataloader())
        assert batch["name"] == ["3.png"]
        assert batch["label"].tolist() == [-1]

    def test_relative_paths(self, root, monkeypatch):
        monkeypatch.chdir(root)
        data = module("train", num_workers=1)
        assert sum(len(batch["label"]) for batch in data.train_dataloader()) == len(data.files("train")) + 1, "balanced"

    @pytest.mark.parametrize("stage", ["fit", "validate", "test"])
    def test_an_empty_class_folder(self, root, stage):
        for path in (root / "train" / "generated").iterdir():
            path.unlink()
        with pytest.raises(FileNotFoundError, match=r"train/generated holds no images"):
            module(root).setup(stage)

    def test_a_folder_with_one_class(self, root):
        (root / "train" / "generated").rename(root / "aside")
        with pytest.raises(
            FileNotFoundError, match=r"train has no folder generated; images of both classes are needed"
        ):
            module(root).setup("fit")

    def test_a_part_that_is_not_there(self, root):
        (root / "train").rename(root / "test")
        module(root).setup("test")
        with pytest.raises(FileNotFoundError, match=r"no images to train on: .* there is test"):
            module(root).setup("fit")

    @pytest.mark.parametrize("stage", ["fit", "test"])
    def test_a_flat_folder_has_no_labels(self, root, stage):
        with pytest.raises(FileNotFoundError, match=r"holds no labelled images: .* can be predicted only"):
            module(root / "train" / "generated").setup(stage)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere is neither a folder nor a table"):
            module(tmp_path / "nowhere").setup("fit")

    def test_a_class_of_one_image_cannot_be_split(self, root):
        for path in sorted((root / "train" / "generated").iterdir())[1:]:
            path.unlink()
        with pytest.raises(ValueError, match="the class generated of the data of Zoë has only one image"):
            module(root).setup("fit")


class TestTables:
    def rows(self, root: Path) -> list[dict[str, object]]:
        paths = sorted(root.rglob("*.png"))
        return [{"path": path.relative_to(root).as_posix(), "label": path.parent.name} for path in paths]

    def test_labels_by_name_and_by_number(self, root):
        rows = self.rows(root)
        by_name = module(table(root / "names.csv", rows))
        numbers = [row | {"label": CLASSES.index(str(row["label"]))} for row in rows]
        by_number = module(table(root / "numbers.csv", numbers))
        for split in ("train", "val"):
            assert names(by_name, split) == names(by_number, split)
            assert torch.equal(by_name.files(split).labels, by_number.files(split).labels)
        assert Counter(by_name.files("train").labels.tolist()) == {0: 8, 1: 3}

    def test_the_column_split(self, root):
        rows = [row | {"split": ("train", "val")[i % 2]} for i, row in enumerate(self.rows(root))]
        data = module(table(root / "a.csv", rows))
        assert names(data, "val") == [row["path"] for row in rows if row["split"] == "val"]
        assert len(data.files("train")) + len(data.files("test")) == 8

    def test_predict_keeps_the_order_and_needs_no_label(self, root):
        rows = [{"path": row["path"]} for row in reversed(self.rows(root))]
        assert names(module(table(root / "a.csv", rows)), "predict") == [row["path"] for row in rows]

    def test_absolute_paths_outside_keep_their_names(self, root, tmp_path):
        rows = [{"path": str(root / "train/generated/0.png")}]
        (tmp_path / "elsewhere").mkdir()
        assert names(module(table(tmp_path / "elsewhere" / "a.csv", rows)), "predict") == [rows[0]["path"]]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"label": "painting"}, "line 3: the label 'painting' is not one of photographic, generated, 0, 1"),
            ({"label": ""}, "line 3: the label '' is not one of"),
            ({"split": "dev"}, "line 3: the split 'dev' is not one of train, val, test"),
            ({"path": "train/generated/0.png"}, "lists train/generated/0.png in line 2 and again in line 3"),
            ({"path": "train/../train/generated/0.png"}, "in line 2 and again in line 3"),
        ],
    )
    def test_bad_rows_are_named(self, root, change, message):
        rows = [row | {"split": "train"} for row in self.rows(root)]
        rows[1] |= change
        with pytest.raises(ValueError, match=re.escape(message)):
            module(table(root / "a.csv", rows)).setup("fit")

    def test_missing_files(self, root):
        rows = self.rows(root)
        for i in range(2, 7):
            rows[i]["path"] = f"missing/{i}.png"
        path = table(root / "a.csv", [row | {"split": "train"} for row in rows] + [])
        with pytest.raises(FileNotFoundError, match=r"5 of 15 files .*missing/2\.png, .* and 2 more.*on_error: skip"):
            module(path, val_fraction=0.01).setup("predict")
        with pytest.warns(UserWarning, match=r"5 of 15 files cannot be read and are left out: missing/2\.png"):
            assert len(module(path, on_error="skip").files("predict")) == 10

    def test_columns_and_rows_that_are_not_there(self, root):
        path = table(root / "a.csv", [{"path": "train/generated/0.png"}])
        with pytest.raises(ValueError, match=r"no column label; its columns are path"):
            module(path).setup("fit")
        path.write_text("path,label\n")
        with pytest.raises(ValueError, match="lists no images"):
            module(path).setup("predict")
        path.write_text("")
        with pytest.raises(ValueError, match="no column path; its columns are none"):
            module(path).setup("predict")

    def test_a_table_that_is_no_text_is_named(self, root):
        path = table(root / "a.csv", self.rows(root))
        path.write_bytes(path.read_bytes() + "train/generated/Zoë.png,generated\n".encode("latin-1"))
        with pytest.raises(
            ValueError, match=r"a\.csv cannot be read as a table: 'utf-8' codec .* Save it as CSV in UTF-8"
        ):
            module(path).setup("fit")

    def test_one_class(self, root):
        rows = [row for row in self.rows(root) if row["label"] == "generated"]
        with pytest.raises(ValueError, match="no image of the class photographic"):
            module(table(root / "a.csv", rows)).setup("fit")


def bomb() -> bytes:
    """A PNG of 50,000 × 50,000 pixels, by its header."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 1000)) + chunk(b"IEND", b"")
    )


def truncated() -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(60, 60)).save(file, "JPEG", quality=95)
    return file.getvalue()[: len(file.getvalue()) // 2]


def truncated_tiff() -> bytes:
    """Compressed floating-point colour, which Pillow does not know, cut off within the pixels."""
    file = io.BytesIO()
    tifffile.imwrite(file, noise(60, 60).astype(np.float32), photometric="rgb", compression="zlib")
    return file.getvalue()[: len(file.getvalue()) * 2 // 3]


UNREADABLE = {
    "truncated.jpg": truncated(),
    "truncated.tif": truncated_tiff(),
    "empty.png": b"",
    "text.jpg": b"hello\n",
    "bomb.png": bomb(),
}


class TestBadInput:
    @pytest.mark.parametrize("name", UNREADABLE)
    def test_an_unreadable_file_is_named(self, root, name):
        (root / "train" / "generated" / name).write_bytes(UNREADABLE[name])
        data = module(root, val_fraction=0.01)
        with pytest.raises(ValueError, match=re.escape(f"generated/{name} cannot be read as an image")):
            list(data.train_dataloader()) + list(data.val_dataloader()) + list(data.test_dataloader()[0])

    def test_a_bomb_that_pillow_does_not_know_is_refused_before_it_is_decoded(self, tmp_path, monkeypatch):
        tifffile.imwrite(tmp_path / "bomb.tif", noise(60, 60).astype(np.float32) / 255, photometric="rgb")
        assert read_image(tmp_path / "bomb.tif").shape == (3, 60, 60)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1799)
        with pytest.raises(ValueError, match=r"bomb\.tif cannot be read as an image: 3600 pixels are more than 3598"):
            read_image(tmp_path / "bomb.tif")

    def test_unreadable_files_are_left_out_and_counted(self, root):
        for name, content in UNREADABLE.items():
            (root / "train" / "generated" / name).write_bytes(content)
        data = module(root, on_error="skip", num_workers=1)
        with pytest.warns(
            UserWarning, match=r"5 of 20 files cannot be read and are left out: .*bomb\.png.* and 2 more"
        ):
            assert len(data.files("predict")) == 15
        batches = served(data, data.predict_dataloader())
        assert sorted(name for batch in batches for name in batch["name"]) == names(data, "predict")
        with warnings.catch_warnings(action="ignore"):
            every = [names(module(root, on_error="skip", val_fraction=0.3), split) for split in ("train", "val")]
        assert not any(Path(name).name in UNREADABLE for part in every for name in part)

    def test_a_class_without_a_readable_file(self, root):
        for path in (root / "train" / "generated").iterdir():
            path.write_bytes(b"")
        with (
            pytest.warns(UserWarning, match="cannot be read"),
            pytest.raises(ValueError, match="no image of the class generated"),
        ):
            module(root, on_error="skip").setup("fit")

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
    def test_every_kind_of_pixel_is_seen_as_colour(self, tmp_path, mode):
        Image.new(mode, (40, 30), {"F": 0.5}.get(mode, 0)).save(
            tmp_path / "ä ö.tif" if mode in "FCMYK" else tmp_path / "ä ö.png"
        )
        data = module(tmp_path, eval_crops=3)
        (batch,) = served(data, data.predict_dataloader())
        assert batch["image"].shape == (1, 3, 3, 16, 16)
        assert batch["image"].dtype == torch.float32
        value = {"F": 128 / 255, "LA": 1, "RGBA": 1, "CMYK": 1}.get(mode, 0)
        assert batch["image"].unique().tolist() == pytest.approx([value])

    def test_one_pixel(self, tmp_path):
        Image.new("RGB", (1, 1), (255, 0, 51)).save(tmp_path / "a.png")
        data = module(tmp_path)
        (batch,) = served(data, data.predict_dataloader())
        assert batch["image"].amax((0, 1, 3, 4)).tolist() == pytest.approx([1, 0, 0.2])
        assert batch["image"].amin((0, 1, 3, 4)).tolist() == pytest.approx([1, 0, 0.2])

    def test_the_first_frame_of_an_animation(self, tmp_path):
        frames = [Image.new("RGB", (20, 20), (value, 0, 0)) for value in (255, 0)]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        data = module(tmp_path)
        (batch,) = served(data, data.predict_dataloader())
        assert batch["image"][:, :, 0].min() == 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"crop_size": 0}, "crop_size must be at least 1, got 0"),
            ({"eval_crops": 0}, "eval_crops must be at least 1, got 0"),
            ({"val_fraction": 1.0}, "val_fraction must lie between 0 and 1, got 1.0"),
            ({"class_names": ("a", "a")}, "class_names must be two different names, got ['a', 'a']"),
            ({"on_error": "ignore"}, "on_error must be raise or skip, got 'ignore'"),
            ({"conditions": []}, "conditions must be one or more different ones, got []"),
            ({"conditions": ["clean", "sepia 3"]}, "'sepia 3' is not a condition"),
            ({"blur_probability": 2.0}, "blur_probability must lie between 0 and 1, got 2.0"),
            (
                {"quality": (95, 50)},
                "quality must be the smallest and the largest value, between 1 and 100, got 95 and 50",
            ),
            (
                {"rescale": (0.0, 1.0)},
                "rescale must be the smallest and the largest value, between 0.01 and 1, got 0.0",
            ),
            ({"test_fraction": 0.9}, "val_fraction + test_fraction must leave some to train on, got 1.0"),
            (
                {"val_sources": ["a"], "test_sources": ["a"]},
                "a source is for validation or for the test, got ['a'] in both",
            ),
        ],
    )
    def test_arguments_out_of_range(self, options, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            module("images", **options)


class TestBatches:
    def test_a_batch_has_the_agreed_form(self, root):
        data = module(root, eval_crops=3, val_fraction=0.4, conditions=["clean", "jpeg 50"])
        loaders = [data.train_dataloader(), data.val_dataloader(), *data.test_dataloader(), data.predict_dataloader()]
        crops = {"random": 1, "history": 3, "clean": 3, "jpeg 50": 3}
        conditions = []
        for loader in loaders:
            batch = served(data, loader)[0]
            count = len(batch["label"])
            conditions.append(batch["condition"])
            assert batch["image"].shape == (count, crops[batch["condition"]], 3, 16, 16)
            assert batch["image"].dtype == torch.float32
            assert 0 <= batch["image"].min() < 0.5 < batch["image"].max() <= 1
            assert [batch[name].dtype for name in ("label", "index", "key")] == [torch.int64] * 3
            assert batch["weight"].dtype == torch.float32
            assert len(batch["name"]) == count
            entries = {"image", "label", "index", "weight", "key", "name", "condition"}
            assert set(batch) == entries | ({"unseen"} if loader is not loaders[-1] else set())
        assert conditions == ["random", "history", "clean", "jpeg 50", "clean"]

    def test_index_name_and_label_belong_together(self, root):
        data = module(root)
        files = data.files("train")
        for batch in served(data, data.train_dataloader()):
            assert batch["name"] == [files.names[i] for i in batch["index"]]
            assert [CLASSES[label] for label in batch["label"]] == [name.split("/")[1] for name in batch["name"]]

    def test_conditions_show_the_degraded_image(self, root):
        data = module(root, conditions=["jpeg 50"], eval_crops=1, batch_size=1)
        batch = served(data, data.test_dataloader()[0])[0]
        whole = data.read(data.files("test").paths[0], "jpeg 50")
        top, left = ((length - 15) // 2 for length in whole.shape[1:])
        expected = whole[:, top : top + 16, left : left + 16] / 255
        assert torch.allclose(batch["image"][0, 0], expected)

    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize("room", [0, 20_000, 2**30])
    def test_what_is_seen_depends_on_epoch_and_image_alone(self, root, workers, room):
        def images(epoch: int, rank: int = 0, ranks: int = 1, **options) -> dict[int, torch.Tensor]:
            data = module(root, **options)
            loader = data.train_dataloader()
            sampler = loader.sampler
            sampler.num_replicas, sampler.rank = ranks, rank  # type: ignore[union-attr]
            sampler.num_samples = -(-sampler.length // ranks)  # type: ignore[union-attr]
            sampler.set_epoch(epoch)  # type: ignore[union-attr]
            return {
                int(key): image
                for batch in served(data, loader)
                for key, image, weight in zip(batch["key"], batch["image"], batch["weight"], strict=True)
                if weight > 0
            }

        kept = {"num_workers": workers, "cache_gib": room / 2**30}
        plain, other = images(1, cache_gib=0), images(1, **kept, batch_size=3)
        assert plain.keys() == other.keys()
        assert all(torch.equal(plain[i], other[i]) for i in plain)
        halves = [images(1, rank, 2, **kept) for rank in range(2)]
        assert not halves[0].keys() & halves[1].keys()
        assert (halves[0] | halves[1]).keys() == plain.keys()
        assert all(torch.equal(plain[i], half[i]) for half in halves for i in half)
        assert not images(2).keys() & plain.keys(), "keys change, and with them what is seen"

    def test_decoded_images_stay_within_their_memory(self, root, monkeypatch):
        decoded = []
        read = generated_images.read_image
        monkeypatch.setattr(generated_images, "read_image", lambda path: decoded.append(path) or read(path))

        def epoch(room: float) -> tuple[int, int]:
            decoded.clear()
            data = module(root, cache_gib=room / 2**30)
            data.setup("fit")
            count = len(decoded)
            served(data, data.train_dataloader())
            return count, len(decoded) - count

        images = [read(path) for path in module(root).files("train").paths]
        drawn = epoch(0)[1]
        assert epoch(0) == (0, drawn)
        assert epoch(sum(image.nbytes for image in images)) == (len(images), 0)
        kept, each = epoch(images[0].nbytes + images[1].nbytes)
        assert kept == 3, "the third was decoded, and had no room"
        assert drawn - 2 * -(-drawn // len(images)) <= each < drawn, "two of them are not decoded again"

    def test_the_former_switch_warns_and_works(self, root):
        for cache, room in ((True, 2.0), (False, 0.0)):
            with pytest.warns(FutureWarning, match="cache is now cache_gib"):
                assert module(root, cache=cache).cache_gib == room
        with pytest.raises(ValueError, match="cache_gib must be a number of GiB, or 0 to keep no image, got nan"):
            module(root, cache_gib=float("nan"))

    def test_uneven_counts_over_two_processes(self, root):
        data = module(root)
        files = data.files("predict")
        seen: Counter[int] = Counter()
        for rank in range(2):
            for index, weight, _ in FixedBatches(len(files), 4, num_replicas=2, rank=rank):
                seen.update(index[weight > 0].tolist())
        assert seen == Counter(range(15))

    def test_two_kinds_of_files_look_alike_after_the_same_degradation(self, tmp_path):
        """What was saved as PNG and as the JPEG that it decodes to cannot be told apart by the batch."""
        file = io.BytesIO()
        Image.fromarray(noise(40, 40)).save(file, "JPEG", quality=90)
        (tmp_path / "a.jpg").write_bytes(file.getvalue())
        Image.fromarray(np.asarray(Image.open(file))).save(tmp_path / "b.png")
        data = module(tmp_path, batch_size=2)
        (batch,) = served(data, data.predict_dataloader())
        assert torch.equal(batch["image"][0], batch["image"][1])


def test_the_command_line_understands_every_argument():
    parser = ArgumentParser()
    parser.add_class_arguments(GeneratedImagesDataModule, "data")
    words = ["root=x", "class_names=[real, fake]", "rescale=[0.7, 1]", "quality=[30, 90]", "conditions=[jpeg 30]"]
    parsed = parser.parse_args([f"--data.{word}" for word in [*words, "on_error=skip"]])
    data = GeneratedImagesDataModule(**vars(parsed.data))
    assert data.class_names == ["real", "fake"]
    assert data.conditions == ["jpeg 30"]
    assert data._history.rescale == (0.7, 1.0)


def test_real_images(shared_data):
    if not (shared_data / "aigc").is_dir():
        pytest.skip(f"no aigc in {shared_data}")
    data = GeneratedImagesDataModule(str(shared_data / "aigc"), batch_size=8, conditions=["clean", "rescale 0.5"])
    assert [Counter(data.files(split).labels.tolist()) for split in ("train", "val")] == [
        {0: 315, 1: 315},
        {0: 100, 1: 100},
    ]
    for loader in (data.train_dataloader(), *data.test_dataloader()):
        batch = data.on_after_batch_transfer(next(iter(loader)), 0)
        assert batch["image"].shape[2:] == (3, 96, 96)
        assert batch["image"].flatten(1).std(1).min() > 0.01
    path = data.files("val").paths[0]
    assert torch.equal(data.read(path), read_image(path))


def test_arguments_of_the_version_before_warn(tmp_path):
    with pytest.warns(FutureWarning, match="jpeg_quality is now quality"):
        assert GeneratedImagesDataModule(str(tmp_path), jpeg_quality=(60, 70))._history.quality == (60, 70)
    for name in ("rescale_probability", "jpeg_probability"):
        with pytest.warns(FutureWarning, match=f"{name} has no effect any more"):
            GeneratedImagesDataModule(str(tmp_path), **{name: 0.5})
