"""Crops of the embedded photographs: ten classes, two parts without a common pixel."""

import re
import socket

import pytest
import torch

from datamodules import PhotoCropsDataModule
from datamodules import photo_crops as photo_crops_module
from datamodules.photo_crops import _read_photograph, _region


@pytest.fixture(scope="module")
def data():
    data = PhotoCropsDataModule(train_crops=203, val_crops=41, batch_size=16)
    data.setup()
    return data


def test_ten_photographs_take_turns(data):
    assert len(data.class_names) == len(set(data.class_names)) == 10
    train, val, test = (data._data[split] for split in ("train", "val", "test"))
    assert [len(part) for part in (train, val, test)] == [203, 41, 41]
    assert torch.bincount(train.labels).tolist() == [21] * 3 + [20] * 7
    assert train.images.shape == (203, 3, 32, 32)
    assert train.images.dtype == torch.uint8


@pytest.mark.parametrize("name", PhotoCropsDataModule().class_names)
@pytest.mark.parametrize("val_fraction", [0.25, 0.37])
def test_the_parts_share_no_pixel_and_leave_none_out(name, val_fraction):
    height, width = _read_photograph(name).shape[1:]
    number = torch.arange(height * width).reshape(1, height, width)  # every pixel has its own
    train, held_out = (set(_region(number, part, val_fraction).flatten().tolist()) for part in (False, True))
    assert not train & held_out
    assert len(train) + len(held_out) == height * width
    assert len(held_out) / number.numel() == pytest.approx(val_fraction, abs=0.01)


def test_crops_come_from_their_own_part_only(monkeypatch):
    monkeypatch.setattr(
        photo_crops_module,
        "_region",
        lambda image, held_out, _: torch.full_like(image[:, :50, :50], 200 if held_out else 100),
    )
    data = PhotoCropsDataModule(train_crops=20, val_crops=10)
    data.setup()
    assert data._data["train"].images.unique().tolist() == [100]
    assert {int(data._data[split].images.unique()) for split in ("val", "test", "predict")} == {200}


def test_no_crop_occurs_twice(data):
    crops = [image.numpy().tobytes() for split in ("train", "val", "test") for image in data._data[split].images]
    assert len(set(crops)) == len(crops)


def test_a_crop_is_found_at_one_place_in_its_photograph(data):
    image, crop = _read_photograph("chelsea"), data._data["train"].images[1]
    same_corner = (image[:, :-31, :-31] == crop[:, :1, :1]).all(0).nonzero().tolist()
    places = [(y, x) for y, x in same_corner if torch.equal(image[:, y : y + 32, x : x + 32], crop)]
    assert len(places) == 1
    assert places[0][1] + 32 <= round(image.shape[2] * 0.75)


def test_the_seed_draws_the_crops(data):
    same, other = (PhotoCropsDataModule(train_crops=203, val_crops=41, seed=seed) for seed in (0, 1))
    for module, equal in ((same, True), (other, False)):
        module.setup("fit")
        assert torch.equal(module._data["train"].images, data._data["train"].images) is equal


def test_predict_shows_the_test_crops_with_names_and_keys(data):
    batch, test = next(iter(data.predict_dataloader())), next(iter(data.test_dataloader()))
    assert torch.equal(batch["image"], test["image"])
    assert torch.equal(batch["key"], test["key"])
    names = [data.class_names[label] for label in batch["label"]]
    assert batch["name"] == [f"{i:05d}_{name}.png" for i, name in enumerate(names)]


def test_photographs_are_reduced_to_about_one_size():
    sides = [min(_read_photograph(name).shape[1:]) for name in PhotoCropsDataModule().class_names]
    assert 190 < min(sides) <= max(sides) <= 300


def test_no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    data = PhotoCropsDataModule(train_crops=10, val_crops=10)
    data.setup("fit")
    assert len(data.train_dataloader().dataset) == 10


def test_a_photograph_that_is_missing(monkeypatch):
    monkeypatch.setitem(photo_crops_module._PHOTOGRAPHS, "chelsea", ("skimage", "data/no_such_cat.png"))
    with pytest.raises(FileNotFoundError, match=r"no_such_cat\.png: the installed scikit-image \d.*pip install"):
        PhotoCropsDataModule().setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": 0}, "crop_size must be at least 1, got 0"),
        ({"train_crops": 0}, "train_crops must be at least 1, got 0"),
        ({"val_crops": -3}, "val_crops must be at least 1, got -3"),
        ({"val_fraction": 0.0}, "val_fraction must lie between 0 and 1, got 0.0"),
        ({"val_fraction": 1.0}, "val_fraction must lie between 0 and 1, got 1.0"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PhotoCropsDataModule(**options)


@pytest.mark.parametrize("options", [{"crop_size": 100}, {"val_crops": 10**6}])
def test_crops_that_do_not_fit(options):
    with pytest.raises(ValueError, match=r"do not fit into the held-out part of .* smaller crop_size"):
        PhotoCropsDataModule(**options).setup("validate")
