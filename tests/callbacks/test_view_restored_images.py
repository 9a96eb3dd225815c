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


class Files(Samples):
    """Files of the user's own, which the writer may look at."""

    def __init__(self, root: Path, names: list[str]) -> None:
        super().__init__(names)
        self.paths = [root / name for name in names]


def test_files_come_back_in_their_own_kind(tmp_path: Path) -> None:
    gray, alpha = np.full((5, 7), 40000, np.uint16), np.arange(35, dtype=np.uint8).reshape(5, 7)
    Image.new("RGB", (7, 5)).save(tmp_path / "a.jpg", quality=40, dpi=(300, 300))
    Image.new("RGBA", (7, 5)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        image.putalpha(Image.fromarray(alpha))
        image.save(tmp_path / "a.png")
    Image.fromarray(gray).save(tmp_path / "b.tif")
    Image.new("L", (7, 5)).save(tmp_path / "c.gif")
    names = ["a.jpg", "a.png", "b.tif", "c.gif"]
    predict(tmp_path, Files(tmp_path, names))
    assert [row["output"] for row in rows(tmp_path)] == ["a.jpg", "a.png", "b.tif", "c.gif.png"]
    out = tmp_path / "out"
    with Image.open(out / "a.jpg") as image, Image.open(tmp_path / "a.jpg") as source:
        assert image.quantization == source.quantization
        assert image.info["dpi"] == (300, 300)
    with Image.open(out / "a.png") as image:
        assert np.array_equal(np.asarray(image)[..., 3], alpha)
        assert np.all(np.asarray(image)[..., :3] == 1)
    with Image.open(out / "b.tif") as image:
        assert image.mode == "I;16"
        assert np.all(np.asarray(image) == 2 * 257)
    assert Image.open(out / "c.gif.png").format == "PNG"


def test_what_cannot_be_written_is_listed_when_everything_else_is_done(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        Image.new("L", (7, 5)).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(
        RuntimeError, match=r"1 images could not be written, all others are: b\.png: .*b\.png cannot be read"
    ):
        predict(tmp_path, Files(tmp_path, ["a.png", "b.png", "c.png"]))
    assert files(tmp_path) == ["a.png", "c.png"]
    assert [row["name"] for row in rows(tmp_path)] == ["a.png", "c.png"]


class Stopping(Duck):
    """Fails at the second batch."""

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        if batch_idx == 1:
            raise RuntimeError("stopped")
        return super().predict_step(batch, batch_idx)


def test_what_is_finished_is_finished(tmp_path: Path) -> None:
    data = Samples(["a.jpg", "b.jpg", "c.jpg"])
    with pytest.raises(RuntimeError, match="stopped"):
        predict(tmp_path, data, Stopping())
    assert files(tmp_path) == ["a.png", "b.png"]
    assert [row["output"] for row in rows(tmp_path)] == ["a.png", "b.png"]
    predict(tmp_path, data)
    assert files(tmp_path) == ["a.png", "b.png", "c.png"]


def test_a_run_goes_on_where_another_was_killed(tmp_path: Path) -> None:
    data = Samples(["a.jpg", "b.jpg", "c.jpg"])
    with pytest.raises(RuntimeError, match="stopped"):
        predict(tmp_path, data, Stopping())
    (tmp_path / "out" / "restored.csv").unlink()  # which a killed process does not write
    predict(tmp_path, data)
    assert len(rows(tmp_path)) == 3
    assert not list((tmp_path / "out").glob(".*"))


def test_names_that_nobody_has_announced_stay_apart(tmp_path: Path) -> None:
    class Silent(Samples):
        def __init__(self, silent: list[str]) -> None:
            super().__init__([])
            self.silent = silent

        def __len__(self) -> int:
            return len(self.silent)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": torch.zeros(3, 5, 7), "index": index, "weight": 1.0, "name": self.silent[index]}

    predict(tmp_path, Silent(["a.jpg", "a.png"]))
    assert files(tmp_path) == ["a.jpg.png", "a.png"]


@pytest.mark.parametrize("length", [244, 250, 255])
def test_names_may_be_as_long_as_the_file_system_has_them(tmp_path: Path, length: int) -> None:
    name = "x" * (length - 4) + ".png"
    predict(tmp_path, Samples([name]))
    assert files(tmp_path) == [name]


def test_leftovers_and_folders_of_an_output_s_name(tmp_path: Path) -> None:
    (tmp_path / "out" / "b.png").mkdir(parents=True)
    (tmp_path / "out" / "a.png.part.png").touch()
    with pytest.raises(FileExistsError, match=r"b\.png exists"):
        predict(tmp_path, Samples(["a.png", "b.jpg"]))


def test_results_are_not_restored_again(tmp_path: Path) -> None:
    for name in ("a.png", "out/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (7, 5)).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"out/a\.png is a result of an earlier run .* set output_dir"):
        predict(tmp_path, Files(tmp_path, ["a.png", "out/a.png"]))
