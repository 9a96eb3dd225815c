"""Images of the user's own: every form of them gives the same pixels, and what is not one is named."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import ImageSetDataModule

BYTES = torch.randint(0, 256, (5, 3, 9, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
FLOATS = BYTES.float() / 255
ARRAYS = [image.permute(1, 2, 0).numpy() for image in BYTES]


def batches(images: Any, clean: Any = None, **options: Any) -> list[dict[str, Any]]:
    data = ImageSetDataModule(images, clean, **{"batch_size": 5, "crop_size": 64, "seed": 0, **options})
    return [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]


@pytest.mark.parametrize("form", ["tensor", "bytes", "list", "arrays", "float arrays", "16 bits", "pictures"])
def test_every_form_in_memory_gives_the_same_pixels(form: str) -> None:
    given: Any = {
        "tensor": FLOATS,
        "bytes": BYTES,
        "list": list(FLOATS),
        "arrays": ARRAYS,
        "float arrays": [array.astype(np.float64) / 255 for array in ARRAYS],
        "16 bits": [array.astype(np.uint16) * 257 for array in ARRAYS],
        "pictures": [Image.fromarray(array) for array in ARRAYS],
    }[form]
    (batch,) = batches(given)
    torch.testing.assert_close(batch["image"], FLOATS)
    assert "noisy" not in batch
    assert batch.get("clean", True)


@pytest.mark.parametrize("listed", [False, True])
def test_files_give_parts_of_themselves(tmp_path: Path, listed: bool) -> None:
    for index, array in enumerate(ARRAYS):
        Image.fromarray(array).save(tmp_path / f"{index}.png")
    given = sorted(tmp_path.iterdir()) if listed else str(tmp_path)
    (batch,) = batches(given, crop_size=7)
    assert batch["image"].shape == (5, 3, 7, 7)
    for crop, whole in zip(batch["image"], FLOATS, strict=True):
        places = whole.unfold(1, 7, 1).unfold(2, 7, 1)  # [3, 3, 6, 7, 7]
        assert (places == crop[:, None, None]).all(0).all(-1).all(-1).any(), "no part of the image"


def test_both_sides_of_a_pair_are_cut_at_one_place() -> None:
    clean = [image[:, :, : 12 - index % 3] for index, image in enumerate(FLOATS)]
    noisy = [image + 0.25 for image in clean]
    data = ImageSetDataModule(noisy, clean, crop_size=5, batch_size=5, seed=0)
    seen = set()
    for epoch in range(2):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batch = data.on_after_batch_transfer(next(iter(loader)), 0)
        torch.testing.assert_close(batch["noisy"] - batch["image"], torch.full((5, 3, 5, 5), 0.25))
        seen |= {tuple(crop.flatten().tolist()) for crop in batch["image"]}
    assert len(seen) > 5, "other places each time"


def test_noisy_images_say_their_level_and_small_ones_are_continued() -> None:
    (batch,) = batches([FLOATS[0], FLOATS[1][:, :, :10]], noise_std=0.1, crop_size=16)
    assert torch.equal(batch["noise_std"], torch.full((2,), 0.1))
    assert batch["clean"] is False
    assert batch["image"].shape == (2, 3, 16, 16)
    assert set(batch["image"].unique().tolist()) <= set(FLOATS[:2].unique().tolist())


def test_gray_among_color_and_color_among_gray() -> None:
    (batch,) = batches([FLOATS[0], FLOATS[1][:1]], crop_size=9)
    assert batch["image"].shape == (2, 3, 9, 9)
    (batch,) = batches([FLOATS[1][:1], FLOATS[0]], crop_size=9)
    assert batch["image"].shape == (2, 1, 9, 9)


def test_fewer_images_than_a_batch_has_are_cut_more_than_once() -> None:
    data = ImageSetDataModule([FLOATS[0], FLOATS[1][:, :8]], crop_size=4, batch_size=16, seed=0)
    assert len(next(iter(data.train_dataloader()))["image"]) == 16


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "nothing": ([], {}, ValueError, "images has no image: give at least one"),
    "a number": (3, {}, ValueError, "images must be a tensor, a list of images or a folder, got int"),
    "no folder": ("nowhere", {}, FileNotFoundError, "nowhere"),
    "no file": (["nowhere.png"], {}, FileNotFoundError, r"images\[0\]: nowhere.png is not a file"),
    "one image": (FLOATS[0], {}, ValueError, r"put a single image into a list"),
    "one array": (np.stack(ARRAYS), {}, ValueError, r"give list\(array\)"),
    "words": ([FLOATS[0], {}], {}, ValueError, r"images\[1\] must be a tensor .* got dict"),
    "no pixels": ([torch.rand(3, 0, 4)], {}, ValueError, r"images\[0\] has no pixels"),
    "NaN": ([FLOATS[0], FLOATS[1] * math.nan], {}, ValueError, r"images\[1\] has NaN or infinite pixels"),
    "255 for white": ([255 * FLOATS[0]], {}, ValueError, "floating point has 1 for white; divide by 255"),
    "channels": ([FLOATS[0], torch.rand(2, 9, 12)], {}, ValueError, "has 3 channels and another one 2"),
    "fewer clean": (FLOATS, {"clean": FLOATS[:3]}, ValueError, "as many clean images as noisy ones, got 3 and 5"),
    "other size": (FLOATS, {"clean": FLOATS[:, :, :8]}, ValueError, r"the two sides of pair \d differ"),
    "bad clean": (FLOATS, {"clean": [FLOATS[0] * math.inf] * 5}, ValueError, r"clean\[0\] has NaN or infinite"),
    "crop": (FLOATS, {"crop_size": 0}, ValueError, "crop_size must be at least 1, got 0"),
    "level": (FLOATS, {"noise_std": 25}, ValueError, "where white is 1, got 25"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_set_of_images_is_named(case: str) -> None:
    images, options, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        batches(images, **options)


def test_folders_of_other_names_are_no_pairs(tmp_path: Path) -> None:
    for folder, name in (("noisy", "a"), ("clean", "b")):
        (tmp_path / folder).mkdir()
        Image.fromarray(ARRAYS[0]).save(tmp_path / folder / f"{name}.png")
    with pytest.raises(ValueError, match="the same names in both folders; a is in one of them only"):
        batches(str(tmp_path / "noisy"), str(tmp_path / "clean"))
