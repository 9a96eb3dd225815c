"""The embedded photographs: crops of ten to train on, others whole to evaluate on."""

import re
import socket

import pytest
import torch

from datamodules import PhotoCropsDataModule
from datamodules import photo_crops as photo_crops_module
from datamodules.photo_crops import _TEST, _TRAIN, _VAL, _read_photograph


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


def test_no_photograph_is_in_two_splits():
    files = [file for split in (_TRAIN, _VAL, _TEST) for file in split.values()]
    assert len(set(files)) == len(files) == 15


@pytest.mark.parametrize("whole", [True, False])
def test_evaluation_sees_no_photograph_that_is_trained_on(monkeypatch, whole):
    levels = {name: 10 * level for level, split in enumerate((_TRAIN, _VAL, _TEST), start=1) for name in split}
    monkeypatch.setattr(
        photo_crops_module,
        "_read_photograph",
        lambda name, *_: torch.full((3, 40, 50), levels[name], dtype=torch.uint8),
    )
    data = PhotoCropsDataModule(train_crops=20, val_crops=None if whole else 10, augment=False)
    data.setup()
    for split, level in (("train", 10), ("val", 20), ("test", 30), ("predict", 30)):
        for batch in getattr(data, f"{split}_dataloader")():
            assert batch["image"].unique().tolist() == [level]
            assert (batch["label"] >= 0).all() if split == "train" else (batch["label"] == -1).all()


def test_photographs_to_evaluate_on_are_whole():
    data = PhotoCropsDataModule(batch_size=16)
    for loader, names in ((data.val_dataloader(), _VAL), (data.predict_dataloader(), _TEST)):
        batches = list(loader)
        assert [batch["name"] for batch in batches] == [[f"{name}.png"] for name in names]
        for batch, (name, file) in zip(batches, names.items(), strict=True):
            assert torch.equal(batch["image"][0], _read_photograph(name, *file))
            assert batch["label"].tolist() == [-1]
            assert batch["weight"].tolist() == [1]


def test_no_crop_occurs_twice(data):
    crops = [image.numpy().tobytes() for split in ("train", "val", "test") for image in data._data[split].images]
    assert len(set(crops)) == len(crops)


def test_a_crop_is_found_at_one_place_in_its_photograph(data):
    image, crop = _read_photograph("hubble", *_TRAIN["hubble_deep_field"]), data._data["train"].images[1]
    same_corner = (image[:, :-31, :-31] == crop[:, :1, :1]).all(0).nonzero().tolist()
    places = [(y, x) for y, x in same_corner if torch.equal(image[:, y : y + 32, x : x + 32], crop)]
    assert len(places) == 1


def test_the_seed_draws_the_crops(data):
    same, other = (PhotoCropsDataModule(train_crops=203, val_crops=41, seed=seed) for seed in (0, 1))
    for module, equal in ((same, True), (other, False)):
        module.setup("fit")
        assert torch.equal(module._data["train"].images, data._data["train"].images) is equal


def test_predict_shows_the_test_crops_with_names_and_keys(data):
    batch, test = next(iter(data.predict_dataloader())), next(iter(data.test_dataloader()))
    assert torch.equal(batch["image"], test["image"])
    assert torch.equal(batch["key"], test["key"])
    assert batch["name"] == [f"{i:05d}_{[*_TEST][i % len(_TEST)]}.png" for i in range(len(batch["index"]))]


def test_photographs_are_reduced_to_about_one_size():
    files = {**_TRAIN, **_VAL, **_TEST}
    sides = [min(_read_photograph(name, *file).shape[1:]) for name, file in files.items()]
    assert 190 < min(sides) <= max(sides) <= 1.2 * 256


def test_no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    data = PhotoCropsDataModule(train_crops=10, val_crops=10)
    data.setup("fit")
    assert len(data.train_dataloader().dataset) == 10


def test_a_photograph_that_is_missing(monkeypatch):
    monkeypatch.setitem(_VAL, "chelsea", ("skimage", "data/no_such_cat.png"))
    with pytest.raises(FileNotFoundError, match=r"no_such_cat\.png: the installed scikit-image \d.*pip install"):
        PhotoCropsDataModule().setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": 0}, "crop_size must be at least 1, got 0"),
        ({"train_crops": 0}, "train_crops must be at least 1, got 0"),
        ({"val_crops": -3}, "val_crops must be at least 1, got -3"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PhotoCropsDataModule(**options)


@pytest.mark.parametrize("options", [{"crop_size": 250, "val_crops": 9}, {"val_crops": 10**6}])
def test_crops_that_do_not_fit(options):
    with pytest.raises(ValueError, match=r"do not fit into .* smaller crop_size"):
        PhotoCropsDataModule(**options).setup("validate")
