"""The batch contract: what a plain loader yields becomes it, and what is not it is refused with the remedy."""

import re
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from datamodules import PhotoCropsDataModule
from lightning_modules.imaging import SPLIT_STREAMS, as_batch, check_batch, draw, key_stream

ALL = ("image", "label", "weight", "key", "index")


def plain(batch: Any, **options: int) -> dict[str, Any]:
    where = {"seed": 0, "epoch": 0, "rank": 0, "world_size": 1, "position": 0, "split_stream": 0}
    return as_batch(batch, **(where | options))


def valid(size: int = 4) -> dict[str, Any]:
    return plain((torch.rand(size, 3, 7, 5), torch.zeros(size, dtype=torch.int64))) | {
        "name": [f"{i}.png" for i in range(size)],
        "noise_std": torch.full((size,), 25 / 255),
    }


@pytest.mark.parametrize("form", [tuple, list])
@pytest.mark.parametrize("label", [torch.tensor([3, 0]), torch.tensor([3, 0], dtype=torch.uint8), [3, 0]])
def test_a_plain_pair_becomes_a_batch(form: type, label: Any) -> None:
    image = torch.rand(2, 3, 7, 5)
    batch = plain(form((image, label)), position=6)
    assert set(batch) == set(ALL)
    assert batch["image"] is image
    assert batch["label"].tolist() == [3, 0]
    assert batch["index"].tolist() == [6, 7]
    assert batch["weight"].tolist() == [1, 1]
    check_batch(batch, ALL, image_channels=3)


def test_a_tensor_and_a_tuple_of_one_have_no_labels() -> None:
    image = torch.rand(2, 3, 7, 5)
    for batch in (plain(image), plain((image,))):
        assert batch["label"].tolist() == [-1, -1]
        check_batch(batch, ALL)


def test_keys_differ_by_sample_epoch_seed_and_split_and_nothing_else() -> None:
    image = torch.rand(3, 3, 7, 5)
    keys = [plain(image, **at)["key"] for at in ({}, {"epoch": 1}, {"seed": 1}, {"split_stream": 1}, {"position": 3})]
    assert len(set(torch.cat(keys).tolist())) == 15
    assert torch.equal(plain(image * 0)["key"], keys[0])


def test_two_processes_draw_what_one_draws() -> None:
    one = plain(torch.rand(6, 3, 7, 5), position=4)
    two = [plain(torch.rand(3, 3, 7, 5), position=2, rank=rank, world_size=2) for rank in (0, 1)]
    for name in ("index", "key"):
        assert torch.equal(torch.stack([batch[name] for batch in two], 1).flatten(), one[name])


def test_a_plain_loader_draws_what_a_datamodule_draws() -> None:
    data = PhotoCropsDataModule(train_crops=10, val_crops=10, batch_size=4, seed=3)
    expected = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    images = torch.cat([batch["image"] for batch in expected])
    labels = torch.cat([batch["label"] for batch in expected])
    position = 0
    for found, batch in zip(DataLoader(TensorDataset(images, labels), batch_size=4), expected, strict=True):
        found = plain(found, seed=3, position=position, split_stream=SPLIT_STREAMS["val"])
        position += len(found["image"])
        for name in ALL:
            assert torch.equal(found[name], batch[name]), name


def test_a_dict_keeps_what_it_has_and_gets_no_key() -> None:
    given = {"image": torch.rand(2, 3, 7, 5), "camera": "left"}
    batch = plain(given)
    assert set(given) == {"image", "camera"}
    assert batch["camera"] == "left"
    assert batch["weight"].tolist() == [1, 1]
    assert batch["label"].tolist() == [-1, -1]
    assert "key" not in batch
    own = {"image": given["image"], "weight": torch.tensor([2.0, 0.0]), "label": torch.tensor([1, 2])}
    assert plain(own)["weight"] is own["weight"]
    assert plain(own)["label"] is own["label"]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("images", "got str"),
        (None, "got NoneType"),
        ((), "got a tuple of nothing"),
        ((torch.rand(2, 3, 4, 4),) * 3, "got a tuple of Tensor, Tensor, Tensor"),
        (([1], [2]), "got a tuple of list, list"),
        (
            (torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)),
            r"labels must be one integer for each image, got torch.float32",
        ),
        ((torch.rand(2, 3, 4, 4), ["cat", "dog"]), "labels must be one integer for each image, got a list of str, str"),
        ((torch.rand(2, 3, 4, 4), torch.zeros(2, 5).long()), r"labels must be one integer .* \[2, 5\]; give a dict"),
    ],
)
def test_other_forms_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        plain(batch)


@pytest.mark.parametrize("name", [*ALL, "name", "noise_std"])
def test_a_missing_entry_is_named_with_the_two_lines_that_supply_it(name: str) -> None:
    batch = valid()
    removed = batch.pop(name)
    with pytest.raises(ValueError, match=f"no entry '{name}', which is needed") as error:
        check_batch(batch, [name])
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 2
    context = {"batch": batch, "torch": torch, "pixels": torch.zeros(4, 3, 7, 5), "positions": range(4), **batch}
    exec("\n".join(line.strip() for line in lines), context | {"seed": 0, "epoch": 0})
    check_batch(batch, [name])
    assert len(batch[name]) == len(removed)
    check_batch({key: value for key, value in batch.items() if key != name}, [])  # what nobody needs may be missing


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        (
            {"image": torch.zeros(4, 3, 7, 5, dtype=torch.uint8)},
            TypeError,
            r"divide bytes by 255 or subclass .*ImageDataModule",
        ),
        (
            {"image": [torch.rand(3, 7, 5)] * 4},
            TypeError,
            r"image must be a tensor \[B, C, H, W\], got a list of Tensor",
        ),
        ({"image": torch.rand(3, 7, 5)}, ValueError, r"image must be \[B, C, H, W\], got \[3, 7, 5\]"),
        ({"image": torch.rand(0, 3, 7, 5)}, ValueError, "the batch is empty"),
        ({"image": torch.rand(4, 3, 0, 5)}, ValueError, "the batch is empty"),
        ({"image": torch.rand(4, 1, 7, 5)}, ValueError, r"image must have 3 channels, got \[4, 1, 7, 5\]"),
        ({"image": torch.full((4, 3, 7, 5), torch.nan)}, ValueError, "image has NaN or infinite pixels"),
        ({"noise_std": torch.full((4,), 25.0)}, ValueError, "noise_std must lie between 0 and 1.*25 of 255 is 0.0980"),
        ({"noise_std": 25}, ValueError, "25 of 255 is 0.0980"),
        ({"noise_std": torch.tensor([0.1, -0.1, 0.1, 0.1])}, ValueError, "noise_std must lie between 0 and 1"),
        ({"noise_std": torch.tensor([0.1, torch.nan, 0.1, 0.1])}, ValueError, "noise_std must lie between 0 and 1"),
        ({"noise_std": torch.full((3,), 0.1)}, ValueError, r"noise_std must be one number for each of the 4 images"),
        ({"weight": torch.ones(3)}, ValueError, "weight must have one entry for each of the 4 images, got 3"),
        ({"weight": torch.ones(4, 1)}, TypeError, r"weight must be a tensor \[B\], got torch.float32 \[4, 1\]"),
        ({"weight": torch.ones(4, dtype=torch.int64)}, TypeError, "weight must be floating point, got torch.int64"),
        ({"key": torch.rand(4)}, TypeError, "key must be int64, got torch.float32"),
        ({"label": torch.zeros(4, dtype=torch.int32)}, TypeError, "label must be int64, got torch.int32"),
        ({"label": [0, 0, 0, 0]}, TypeError, r"label must be a tensor \[B\], got a list of int"),
        ({"index": torch.arange(5)}, ValueError, "index must have one entry for each of the 4 images, got 5"),
        ({"name": "a.png"}, TypeError, "name must be a list of strings, got str"),
        ({"name": ["a.png"]}, ValueError, "name must have one entry for each of the 4 images, got 1"),
    ],
)
def test_an_entry_of_another_form_is_refused(entry: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.compile(message)):
        check_batch(valid() | entry, ALL, image_channels=3)


def test_what_is_right_passes() -> None:
    check_batch(valid(), [*ALL, "name", "noise_std"], image_channels=3)
    for level in (0.1, torch.tensor(0.1), torch.full((1,), 0.1), torch.rand(4, 1, 7, 5)):
        check_batch(valid() | {"noise_std": level}, ALL)
    keys = draw(key_stream(0, 0), torch.arange(4))
    check_batch({"image": torch.rand(4, 1, 7, 5).double(), "key": keys}, ["image", "key"])
