"""CIFAR-10: what loads, what is split, and what is said about files that do not load."""

import functools
import hashlib
import pickle
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from datamodules import CIFAR10DataModule
from datamodules import cifar10 as cifar10_module


def edit_batch(root: Path, name: str, **changes) -> Path:
    path = root / "cifar-10-batches-py" / name
    path.write_bytes(pickle.dumps({**pickle.loads(path.read_bytes()), **changes}))
    return path


def test_a_batch_has_the_agreed_form(fake_cifar):
    data = CIFAR10DataModule(str(fake_cifar()), batch_size=4, val_size=5)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        raw = next(iter(loader))
        assert raw["image"].dtype == torch.uint8
        batch = data.on_after_batch_transfer(raw, 0)
        assert batch["image"].shape == (4, 3, 32, 32)
        assert batch["image"].dtype == batch["weight"].dtype == torch.float32
        assert 0 <= float(batch["image"].min()) <= float(batch["image"].max()) <= 1
        assert batch["label"].dtype == batch["index"].dtype == batch["key"].dtype == torch.int64
        assert set(batch) - {"name", "clean"} == {"image", "label", "index", "weight", "key"}
        assert batch.get("clean") is (True if "name" in batch else None)


def test_the_images_are_those_in_the_files(fake_cifar):
    root = fake_cifar()
    data = CIFAR10DataModule(str(root), batch_size=6, val_size=5)
    batch = next(iter(data.predict_dataloader()))
    entry = pickle.loads((root / "cifar-10-batches-py" / "test_batch").read_bytes())
    assert np.array_equal(batch["image"].numpy().reshape(6, 3072), entry["data"])
    assert batch["label"].tolist() == entry["labels"]
    assert batch["name"][:2] == ["00000_airplane.png", "00001_automobile.png"]
    assert torch.equal(next(iter(data.test_dataloader()))["key"], batch["key"])


def test_the_split_is_whole_disjoint_and_drawn_by_seed(fake_cifar):
    root = str(fake_cifar(rows=10))

    def rows(seed: int, split: str) -> set[bytes]:
        data = CIFAR10DataModule(root, val_size=20, seed=seed)
        data.setup("fit")
        return {image.numpy().tobytes() for image in data._data[split].images}

    assert len(rows(0, "train")) == 30
    assert len(rows(0, "val")) == 20
    assert not rows(0, "train") & rows(0, "val")
    assert rows(0, "val") == rows(0, "val") != rows(1, "val")


def test_val_size_may_be_a_fraction(fake_cifar):
    data = CIFAR10DataModule(str(fake_cifar(rows=10)), val_size=0.1)
    data.setup("validate")
    assert len(data._data["val"]) == 5


@pytest.mark.parametrize("val_size", [0, -1, 0.0, 1.0, 2.5])
def test_val_size_without_meaning(val_size):
    with pytest.raises(ValueError, match=f"val_size must be a count .* got {val_size}"):
        CIFAR10DataModule(val_size=val_size)


def test_val_size_larger_than_the_data(fake_cifar):
    with pytest.raises(ValueError, match=r"val_size=5000 leaves no image to train on.*hold 20 images"):
        CIFAR10DataModule(str(fake_cifar())).setup("fit")


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("num_workers", -1), ("max_shift", -1)])
def test_arguments_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
        CIFAR10DataModule(**{name: value})


def test_evaluation_has_other_keys_than_training_and_neither_is_augmented_twice(fake_cifar):
    data = CIFAR10DataModule(str(fake_cifar()), batch_size=100, val_size=5)
    keys = [set(next(iter(loader))["key"].tolist()) for loader in (data.train_dataloader(), data.val_dataloader())]
    assert not keys[0] & keys[1]
    raw = next(iter(data.val_dataloader()))
    batch = data.on_after_batch_transfer(raw, 0)
    assert torch.equal(batch["image"], raw["image"].float() / 255)
    assert torch.equal(data.on_after_batch_transfer(batch, 0)["image"], batch["image"])


def test_training_images_are_mirrored_and_shifted(fake_cifar):
    root = str(fake_cifar(rows=40))
    plain = CIFAR10DataModule(root, batch_size=300, val_size=5, augment=False)
    raw = next(iter(plain.train_dataloader()))
    assert torch.equal(plain.on_after_batch_transfer(raw, 0)["image"], raw["image"].float() / 255)
    flipping = CIFAR10DataModule(root, batch_size=300, val_size=5)
    image = flipping.on_after_batch_transfer(next(iter(flipping.train_dataloader())), 0)["image"]
    same = (image == raw["image"].float() / 255).flatten(1).all(1)
    mirrored = (image == raw["image"].flip(-1).float() / 255).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 60 < int(mirrored.sum()) < 140
    shifting = CIFAR10DataModule(root, batch_size=300, val_size=5, max_shift=4)
    moved = shifting.on_after_batch_transfer(next(iter(shifting.train_dataloader())), 0)["image"]
    assert int((moved == image).flatten(1).all(1).sum()) < 20


def test_setup_twice_reads_once(fake_cifar, monkeypatch):
    data = CIFAR10DataModule(str(fake_cifar()), val_size=5)
    data.setup("fit")
    monkeypatch.setattr(cifar10_module, "_read", None)
    data.setup("fit")
    data.setup("validate")
    assert len(data._data["train"]) > 0


def test_absent(tmp_path):
    data = CIFAR10DataModule(str(tmp_path / "nowhere"))
    data.prepare_data()  # download=False: nothing happens
    with pytest.raises(FileNotFoundError) as error:
        data.setup("fit")
    for part in (str(tmp_path / "nowhere" / "cifar-10-batches-py"), "data_batch_1", "tar -xzf", "-c demo"):
        assert part in str(error.value)
    assert not (tmp_path / "nowhere").exists()


def test_root_one_folder_too_deep(fake_cifar):
    root = fake_cifar()
    with pytest.raises(FileNotFoundError, match=f"root should be {root}, one folder up"):
        CIFAR10DataModule(str(root / "cifar-10-batches-py")).setup("fit")


def test_truncated(fake_cifar):
    root = fake_cifar()
    path = root / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"data_batch_3 is truncated.*-c demo") as error:
        CIFAR10DataModule(str(root), val_size=5).setup("fit")
    assert str(path) in str(error.value)


def test_nothing_but_the_file_names(fake_cifar):
    root = fake_cifar()
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(b"")
    with pytest.raises(ValueError, match="test_batch is truncated"):
        CIFAR10DataModule(str(root)).setup("test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": np.full((4, 3072), np.nan, np.float32)}, "holds the pixel value nan"),
        ({"data": np.zeros((4, 3072), np.int64)}, "pixels of type int64"),
        ({"data": np.zeros((4, 3071), np.uint8)}, "shape .4, 3071."),
        ({"labels": [0, 1, 2]}, "3 labels and pixels of shape .4, 3072."),
        ({"labels": [0, 1, 2, 10]}, "labels from 0 to 10"),
        ({"labels": [0, 1, 2, -1]}, "labels from -1 to 2"),
    ],
)
def test_wrong_content(fake_cifar, changes, message):
    root = fake_cifar()
    path = edit_batch(root, "data_batch_2", **changes)
    with pytest.raises(ValueError, match=message) as error:
        CIFAR10DataModule(str(root), val_size=5).setup("fit")
    assert str(path) in str(error.value)


def test_verify_checksum_refuses_a_partial_copy(fake_cifar):
    root = fake_cifar()
    with pytest.raises(ValueError, match="data_batch_1 differs from the official file"):
        CIFAR10DataModule(str(root), val_size=5, verify_checksum=True).setup("fit")


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class TestDownload:
    @pytest.fixture
    def archive(self, fake_cifar, tmp_path, monkeypatch) -> Path:
        """An archive to be served, with torchvision's checksum adjusted to it."""
        source, path = fake_cifar(), tmp_path / "server" / "cifar-10-python.tar.gz"
        path.parent.mkdir()
        with tarfile.open(path, "w:gz") as tar:
            tar.add(source / "cifar-10-batches-py", "cifar-10-batches-py")
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
        return path

    @pytest.fixture
    def url(self, archive) -> Iterator[str]:
        handler = functools.partial(QuietHandler, directory=archive.parent)
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}/{archive.name}"
            server.shutdown()

    def test_download_unpacks_whole_files(self, url, tmp_path):
        data = CIFAR10DataModule(str(tmp_path / "new"), download=True, url=url, val_size=5)
        data.prepare_data()
        data.setup()
        assert len(data._data["train"]) == 15
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
        ]

    def test_what_is_there_is_kept(self, fake_cifar):
        root = fake_cifar()
        before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        CIFAR10DataModule(str(root), download=True, url="file:///nowhere").prepare_data()
        assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before

    def test_a_damaged_file_is_fetched_again(self, url, tmp_path):
        data = CIFAR10DataModule(str(tmp_path / "new"), download=True, url=url, val_size=5)
        data.prepare_data()
        (tmp_path / "new" / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"half")
        data.prepare_data()
        data.setup("fit")
        assert len(data._data["train"]) == 15

    def test_an_archive_placed_by_hand_needs_no_network(self, archive, tmp_path):
        (tmp_path / "new").mkdir()
        archive.rename(tmp_path / "new" / archive.name)
        data = CIFAR10DataModule(str(tmp_path / "new"), download=True, url="file:///nowhere", val_size=5)
        data.prepare_data()
        data.setup("fit")
        assert len(data._data["train"]) == 15

    @pytest.mark.parametrize("served", ["nothing", "half"])
    def test_failure_leaves_nothing_that_counts_as_good(self, archive, url, tmp_path, served):
        archive.write_bytes(archive.read_bytes()[:-200]) if served == "half" else archive.unlink()
        data = CIFAR10DataModule(str(tmp_path / "new"), download=True, url=url)
        with pytest.raises(RuntimeError, match=r"could not be downloaded.*-c demo"):
            data.prepare_data()
        assert not (tmp_path / "new" / "cifar-10-batches-py").exists()
        with pytest.raises(FileNotFoundError):
            data.setup("fit")

    def test_root_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(RuntimeError, match="could not be downloaded"):
            CIFAR10DataModule(str(tmp_path / "file" / "data"), download=True).prepare_data()


class TestRealData:
    def test_the_partial_copy_loads(self, cifar_root):
        data = CIFAR10DataModule(str(cifar_root), val_size=0.1)
        data.setup()
        assert len(data._data["train"]) + len(data._data["val"]) == 8068
        assert len(data._data["test"]) == 500
        assert (
            CIFAR10DataModule().class_names
            == pickle.loads((cifar_root / "cifar-10-batches-py" / "batches.meta").read_bytes(), encoding="latin1")[
                "label_names"
            ]
        )


def test_a_batch_costs_the_same_python_calls_whatever_its_size(fake_cifar):
    root = str(fake_cifar(rows=103))

    def calls(batch_size: int) -> int:
        data = CIFAR10DataModule(root, batch_size=batch_size, val_size=3, max_shift=2)
        batches, count = iter(data.train_dataloader()), 0
        data.on_after_batch_transfer(next(batches), 0)

        def note(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(note)
        try:
            data.on_after_batch_transfer(next(batches), 0)
        finally:
            sys.setprofile(None)
        return count

    assert calls(2) == calls(256)
