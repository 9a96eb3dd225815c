"""The user's own images: every kind of file, whole for predict, cropped otherwise."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import ImageFolderDataModule, _decoded, image_folder
from datamodules.image_folder import _scaled
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


class TestFolder:
    def test_absent(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
            ImageFolderDataModule(str(tmp_path / "nowhere")).setup("predict")

    def test_empty(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"{tmp_path} holds no images.*\.png, .*\.webp"):
            ImageFolderDataModule(str(tmp_path)).setup("fit")


class TestPredict:
    def test_whole_images_with_names_that_are_not_said_to_be_clean(self, folder):
        data = ImageFolderDataModule(str(folder), noise_std=0.1)
        batches = [data.on_after_batch_transfer(batch, 0) for batch in data.predict_dataloader()]
        assert [batch["name"] for batch in batches][-2:] == [["sub/image_5.png"], ["sub/image_6.png"]]
        assert [tuple(batch["image"].shape) for batch in batches] == [(1, 3, 20 + i, 30 - 3 * i) for i in range(7)]
        assert set(batches[0]) == {"image", "label", "index", "weight", "key", "name", "noise_std", "clean"}
        assert batches[0]["clean"] is False
        assert batches[0]["noise_std"].tolist() == pytest.approx([0.1])
        assert batches[0]["label"].tolist() == [-1]
        with Image.open(folder / "image_3.png") as image:
            assert np.array_equal((batches[3]["image"][0] * 255).round().permute(1, 2, 0), np.asarray(image))

    def test_unknown_noise_is_not_claimed(self, folder):
        assert "noise_std" not in next(iter(ImageFolderDataModule(str(folder)).predict_dataloader()))

    def test_an_unreadable_file_is_named_by_the_worker(self, folder):
        (folder / "image_1.png").write_bytes(b"")
        data = ImageFolderDataModule(str(folder), num_workers=1, on_error="raise")
        with pytest.raises(ValueError, match=r"image_1\.png cannot be read"):
            list(data.predict_dataloader())

    @pytest.mark.filterwarnings("ignore:.*does not have many workers")
    def test_unreadable_files_are_counted_and_left_out_of_every_split(self, folder):
        (folder / "image_1.png").write_bytes(b"")
        (folder / "sub" / "image_5.png").write_bytes((folder / "sub" / "image_5.png").read_bytes()[:300])
        data = ImageFolderDataModule(str(folder), crop_size=8, batch_size=1, val_fraction=0.4, crops_per_image=1)
        with pytest.warns(UserWarning, match=r"^2 of 7 files cannot be read.*image_1\.png, .*image_5\.png$"):
            names = [batch["name"][0] for batch in data.predict_dataloader()]
        assert names == ["image_0.png", "image_2.png", "image_3.png", "image_4.png", "sub/image_6.png"]
        data.setup("fit")
        assert len(list(data.train_dataloader())) == len(data._data["train"].paths) == 3
        assert len(data._data["val"].paths) == 2
        for path in folder.rglob("*.png"):
            path.write_bytes(b"")
        with (
            pytest.raises(ValueError, match="holds no image that can be read"),
            pytest.warns(UserWarning, match="^7 of 7"),
        ):
            ImageFolderDataModule(str(folder)).setup("fit")

    def test_on_error_is_checked(self, folder):
        with pytest.raises(ValueError, match="on_error must be raise or skip, got 'ignore'"):
            ImageFolderDataModule(str(folder), on_error="ignore")

    def test_whole_images_have_all_their_bits_and_the_colors_below_transparency(self, tmp_path):
        deep = np.array([[1000, 1001], [40000, 65535]], np.uint16)
        Image.fromarray(deep).save(tmp_path / "deep.png")
        Image.new("RGBA", (3, 2), (10, 20, 30, 0)).save(tmp_path / "transparent.png")
        deep_image, transparent = (
            batch["image"][0] for batch in ImageFolderDataModule(str(tmp_path)).predict_dataloader()
        )
        assert torch.equal(deep_image, torch.from_numpy(deep / 65535).float().expand(3, -1, -1))
        assert torch.allclose(transparent[:, 0, 0], torch.tensor([10, 20, 30]) / 255)


class TestCrops:
    def test_a_batch_has_the_agreed_form(self, folder):
        data = ImageFolderDataModule(str(folder), crop_size=8, batch_size=3, val_fraction=0.3, crops_per_image=1)
        sizes = []
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
            batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
            sizes.append([tuple(batch["image"].shape) for batch in batches])
            assert set(batches[0]) == {"image", "label", "index", "weight", "key"}
            assert batches[0]["image"].dtype == torch.float32
        assert sizes == [[(3, 3, 8, 8), (2, 3, 8, 8)], [(3, 3, 8, 8)] * 32, [(3, 3, 8, 8)] * 32]

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

    @pytest.mark.parametrize("resampling", [Image.Resampling.BICUBIC, Image.Resampling.BOX])
    @pytest.mark.parametrize("corner", [(0, 0), (12, 40), (120 - 48, 156 - 48)], ids=str)
    def test_a_scaled_crop_is_cut_out_of_the_scaled_image(self, resampling, corner):
        pixels = np.random.default_rng(0).integers(0, 256, (120, 156, 3), dtype=np.uint8)
        whole = np.asarray(Image.fromarray(pixels).resize((52, 40), resampling))  # by a third
        crop = _scaled(torch.from_numpy(pixels).permute(2, 0, 1), corner, 48.0, 16, resampling)
        top, left = corner[0] // 3, corner[1] // 3
        if corner[1] % 3 == 0:
            assert np.array_equal(crop.permute(1, 2, 0), whole[top : top + 16, left : left + 16])
        else:  # between the pixels of that image
            assert not np.array_equal(crop.permute(1, 2, 0), whole[top : top + 16, left : left + 16])

    def test_the_factors_fill_their_range_and_the_crops_the_image(self, tmp_path):
        ramp = np.broadcast_to(np.arange(240, dtype=np.uint8), (240, 240))
        Image.fromarray(ramp).save(tmp_path / "a.png")
        options = {"crop_size": 16, "val_fraction": 0, "augment": False, "crops_per_image": 200, "batch_size": 200}
        data = ImageFolderDataModule(str(tmp_path), rescale=(0.25, 0.5), **options)
        crops = next(iter(data.train_dataloader()))["image"][:, 0].double()
        factors = 11 / (crops[:, 0, 13] - crops[:, 0, 2])
        assert 0.245 < factors.min() < 0.26
        assert 0.48 < factors.max() < 0.51
        assert crops.min() < 5
        assert crops.max() > 234

    def test_the_scale_is_drawn_between_the_factors_and_by_key(self, folder):
        def crops(epoch: int, **options) -> torch.Tensor:
            data = ImageFolderDataModule(
                str(folder), crop_size=8, val_fraction=0, batch_size=21, crops_per_image=3, augment=False, **options
            )
            loader = data.train_dataloader()
            loader.sampler.set_epoch(epoch)
            (batch,) = loader
            return batch["image"][batch["index"].argsort()]

        assert len(crops(0)) == 21
        assert len(crops(0).flatten(1).unique(dim=0)) == 21, "each at a place of its own"
        assert not torch.equal(crops(0, rescale=(0.5, 0.9)), crops(0))
        assert torch.equal(crops(0, rescale=(0.5, 0.9)), crops(0, rescale=(0.5, 0.9), cache_gib=0))
        assert not torch.equal(crops(0, rescale=(0.5, 0.9)), crops(1, rescale=(0.5, 0.9)))

    def test_small_images_are_scaled_down_less_and_tiny_ones_mirrored(self, tmp_path):
        Image.fromarray(np.full((9, 40), 7, np.uint8)).save(tmp_path / "a.png")
        for size in (8, 16):
            data = ImageFolderDataModule(str(tmp_path), crop_size=size, val_fraction=0, rescale=(0.2, 0.3))
            crop = next(iter(data.train_dataloader()))["image"]
            assert crop.shape == (16, 3, size, size)
            assert (crop == 7).all()

    def test_training_crops_are_turned_and_evaluation_crops_are_not(self, folder):
        data = ImageFolderDataModule(str(folder), crop_size=8, val_fraction=0.5, batch_size=40, crops_per_image=10)
        for loader, moves in ((data.train_dataloader(), True), (data.val_dataloader(), False)):
            batch = next(iter(loader))
            image = data.on_after_batch_transfer(batch, 0)["image"] * 255
            moved = (image.round() != batch["image"]).flatten(1).any(1)
            assert moved.any() == moves

    def test_an_epoch_of_few_images_has_a_hundred_batches(self, folder):
        data = ImageFolderDataModule(str(folder), val_fraction=0.3, crop_size=8)  # five to train on, two to validate
        data.setup()
        assert len(data.train_dataloader()) == 1600 / data.batch_size == 100
        for loader in (data.val_dataloader(), data.test_dataloader()):
            batches = list(loader)
            assert sum(len(batch["image"]) for batch in batches) == 96
            crops = torch.cat([batch["image"] for batch in batches])
            assert len(crops.flatten(1).unique(dim=0)) > 70, "at places of their own"

    def test_an_epoch_of_many_images_has_one_crop_of_each(self, tmp_path):
        for number in range(1700):
            (tmp_path / f"{number}.png").touch()
        data = ImageFolderDataModule(str(tmp_path), val_fraction=0.05, cache_gib=0, on_error="raise")
        data.setup("fit")
        assert [len(data._data[split]) for split in ("train", "val")] == [1615, 170], "two of each of 85"

    def test_decoded_images_stay_within_their_memory(self, tmp_path, monkeypatch):
        for number in range(20):  # each pixel has a value of its own
            values = np.random.default_rng(number).permutation(2400).reshape(40, 60)
            Image.fromarray(
                np.stack([values // 256, values % 256, np.full_like(values, number)], 2).astype(np.uint8)
            ).save(tmp_path / f"{number:02d}.png")
        decoded = []
        for module in (image_folder, _decoded):
            monkeypatch.setattr(module, "read_image", lambda path: decoded.append(path.name) or read_image(path))

        def epoch(room: float, seed: int = 0) -> tuple[torch.Tensor, ImageFolderDataModule]:
            options = {"crop_size": 8, "batch_size": 10, "val_fraction": 0.25, "seed": seed}
            data = ImageFolderDataModule(str(tmp_path), **options, crops_per_image=4, cache_gib=room / 2**30)
            decoded.clear()
            data.setup("fit")
            return torch.cat([batch["image"] for batch in data.train_dataloader()]), data

        whole, _ = epoch(20 * 7200)
        assert len(decoded) == len(set(decoded)) == 20
        crops, data = epoch(20 * 1800)  # a quarter: parts of 20×30 pixels
        assert len(decoded) == len(set(decoded)) == 20, "once each, and not again for a crop"
        kept = [part for split in ("train", "val") for part in data._data[split].parts]
        assert sum(part.untyped_storage().nbytes() for part in kept) == 20 * 1800
        assert {part.shape for part in kept} == {(3, 20, 30)}
        places = set()
        for part in kept:
            pixels = part.long().numpy()
            value = pixels[0] * 256 + pixels[1]
            order = np.random.default_rng(int(pixels[2, 0, 0])).permutation(2400).reshape(40, 60)
            top, left = (int(side[0]) for side in np.nonzero(order == int(value[0, 0])))
            assert np.array_equal(value, order[top : top + 20, left : left + 30])
            places.add((top, left))
        assert len(places) > 15, "of each image at a place of its own"
        assert torch.equal(crops, epoch(20 * 1800)[0])
        assert not torch.equal(crops, epoch(20 * 1800, seed=1)[0])
        assert torch.equal(whole, epoch(1e12)[0])
        for room in (0, 20 * 3 * 8 * 8 - 1):  # no room for a crop of each
            each, data = epoch(room)
            assert data._data["train"].parts is None
            assert torch.equal(whole, each)
            assert len(decoded) == len(each) == 15 * 4

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"cache_gib": -1.0}, "cache_gib must be a number of GiB, or 0 to keep no image, got -1.0"),
            ({"rescale": (0.0, 0.5)}, "rescale must be two factors"),
            ({"rescale": (0.6, 0.5)}, "rescale must be two factors"),
            ({"rescale": (0.5, 1.5)}, "rescale must be two factors"),
            ({"crops_per_image": 0}, "crops_per_image must be at least 1"),
        ],
        ids=str,
    )
    def test_impossible_scales(self, options, message):
        with pytest.raises(ValueError, match=message):
            ImageFolderDataModule("nowhere", **options)

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
        assert [len(data._data[split].paths) for split in ("train", "val")] == [1, 1]

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
