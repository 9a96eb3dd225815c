"""RestoredImageWriter: names, sizes, the CSV, and nothing lost."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from callbacks.restored_image_writer import RestoredImageWriter


class Samples(Dataset):
    """Images of one colour each: image i has the value i / 255."""

    def __init__(self, names: list[str], channels: int = 3, clean: bool = False) -> None:
        self.names, self.channels, self.clean = names, channels, clean

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.full((self.channels, 5, 7), index / 255)
        return {"image": image, "index": index, "weight": 1.0, "name": self.names[index]}


class Duck(LightningModule):
    def __init__(self, clean: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.clean = clean

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        image = batch["image"]
        known = {"clean": image} if self.clean else {}
        return known | {
            "restored": image + 0.01 if self.clean else image,
            "noisy": image + 0.1,
            "name": batch["name"],
            "noise_std": torch.full((len(image),), 0.25),
            "parameters": {"sigma": batch["index"] / 2, "smooth_steps": torch.full((len(image),), 5)},
        }


class Weighted(Samples):
    """Marks the repeats that fill up the last process as such, as the DataModules do."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index % len(self)) | {"weight": float(index < len(self))}


class PaddedSampler(DistributedSampler):
    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))  # past the end: a repeat


class TwoProcesses(LightningModule):
    """Owns its loader, since the rank is known only inside the process."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.inner, self.names = Duck(), names

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return self.inner.predict_step(batch, batch_idx)

    def predict_dataloader(self) -> DataLoader:
        data = Weighted(self.names)
        sampler = PaddedSampler(data, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=2, sampler=sampler)


def predict(tmp_path: Path, data: Dataset, module: LightningModule | None = None, **arguments: Any) -> Any:
    writer = RestoredImageWriter(str(tmp_path / "out"), **arguments)
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[writer], enable_progress_bar=False)
    return trainer.predict(module or Duck(), DataLoader(data, 2))


def rows(tmp_path: Path) -> list[dict[str, str]]:
    with (tmp_path / "out" / "restored.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def files(tmp_path: Path) -> list[str]:
    return sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png"))


def test_images_keep_name_size_and_values(tmp_path: Path) -> None:
    predict(tmp_path, Samples(["b.jpg", "deep/er/a.TIFF", "c.png"]))
    assert files(tmp_path) == ["b.png", "c.png", "deep/er/a.png"]
    for index, name in enumerate(["b.png", "deep/er/a.png", "c.png"]):
        image = Image.open(tmp_path / "out" / name)
        assert (image.size, image.mode) == ((7, 5), "RGB")
        assert np.all(np.asarray(image) == index)


def test_the_csv_tells_what_was_done_in_the_order_of_the_input(tmp_path: Path) -> None:
    predict(tmp_path, Samples(["b.jpg", "a.jpg", "c.jpg"]))
    first, second, third = rows(tmp_path)
    assert [row["name"] for row in (first, second, third)] == ["b.jpg", "a.jpg", "c.jpg"]
    assert second == {
        "name": "a.jpg",
        "output": "a.png",
        "width": "7",
        "height": "5",
        "noise_std": "0.25",
        "sigma": "0.5",
        "smooth_steps": "5",
    }


def test_psnr_is_there_where_the_clean_image_is_known(tmp_path: Path) -> None:
    predict(tmp_path, Samples(["a.png"]), Duck(clean=True))
    (row,) = rows(tmp_path)
    assert float(row["psnr_noisy"]) == pytest.approx(20, abs=1e-3)
    assert float(row["psnr"]) == pytest.approx(40, abs=1e-3)


def test_grey_images_stay_grey(tmp_path: Path) -> None:
    predict(tmp_path, Samples(["a.png"], channels=1))
    assert Image.open(tmp_path / "out" / "a.png").mode == "L"


def test_names_that_differ_in_their_suffix_alone_do_not_overwrite_each_other(tmp_path: Path) -> None:
    predict(tmp_path, Samples(["a.jpg", "b.jpg", "a.png"]))
    assert files(tmp_path) == ["a.jpg.png", "a.png.png", "b.png"]
    assert np.asarray(Image.open(tmp_path / "out" / "a.png.png")).max() == 2
    assert [row["output"] for row in rows(tmp_path)] == ["a.jpg.png", "b.png", "a.png.png"]


def test_a_second_run_replaces_its_own_results_alone(tmp_path: Path) -> None:
    predict(tmp_path, Samples(["a.jpg"]))
    predict(tmp_path, Samples(["a.jpg"]))
    original = tmp_path / "out" / "b.png"
    Image.new("RGB", (3, 3), (9, 9, 9)).save(original)
    with pytest.raises(FileExistsError, match=r"b\.png exists .* set output_dir"):
        predict(tmp_path, Samples(["a.jpg", "b.png"]))
    assert Image.open(original).size == (3, 3)


def test_padded_repeats_are_skipped(tmp_path: Path) -> None:
    class Padded(Samples):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return super().__getitem__(min(index, 1)) | {"weight": float(index < 2)}

    predict(tmp_path, Padded(["a.jpg", "b.jpg", ""]))
    assert files(tmp_path) == ["a.png", "b.png"]
    assert len(rows(tmp_path)) == 2


@pytest.mark.parametrize("keep", [False, True])
def test_predictions_stay_in_memory_on_request_alone(tmp_path: Path, keep: bool) -> None:
    result = predict(tmp_path, Samples(["a.jpg"]), keep_predictions=keep)
    assert (result is not None) == keep


def test_the_default_directory_is_below_the_run(tmp_path: Path) -> None:
    writer = RestoredImageWriter()
    trainer = Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, callbacks=[writer], enable_progress_bar=False
    )
    trainer.predict(Duck(), DataLoader(Samples(["a.jpg"]), 1))
    assert (tmp_path / "restored" / "a.png").is_file()


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    names = ["b.jpg", "a.jpg", "c.gif", "a.png", "d.jpg"]
    writer = RestoredImageWriter(str(tmp_path / "out"))
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        logger=False,
        callbacks=[writer],
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    trainer.predict(TwoProcesses(names))
    assert files(tmp_path) == ["a.jpg.png", "a.png.png", "b.png", "c.png", "d.png"]
    assert [row["name"] for row in rows(tmp_path)] == names
    for index, row in enumerate(rows(tmp_path)):
        assert np.asarray(Image.open(tmp_path / "out" / row["output"])).max() == index


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "a/../../b.png"])
def test_names_may_not_leave_the_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="below the input's root"):
        predict(tmp_path, Samples([name]))


def test_equal_names_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two images are called 'a\.jpg'"):
        predict(tmp_path, Samples(["a.jpg", "a.jpg"]))


def test_what_predict_step_does_not_return_is_named(tmp_path: Path) -> None:
    class Silent(Duck):
        def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
            return {"restored": batch["image"], "noisy": batch["image"], "name": batch["name"]}

    with pytest.raises(TypeError, match=r"Silent\.predict_step; noise_std, parameters is missing"):
        predict(tmp_path, Samples(["a.jpg"]), Silent())


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output_dir must name a directory, got ' '"):
        RestoredImageWriter(" ")
    with pytest.raises(ValueError, match=r"output_dir must name a directory, got .*file"):
        RestoredImageWriter(str(tmp_path / "file"))
