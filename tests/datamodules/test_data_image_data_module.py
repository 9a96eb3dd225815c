"""A DataModule of one's own is one method; where it has no seed, `--seed_everything` decides."""

import contextlib
import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import FakeData
from torchvision.transforms import ToTensor

from datamodules import (
    BatchDataset,
    CIFAR10DataModule,
    GeneratedImagesDataModule,
    ImageDataModule,
    ImageFolderDataModule,
    PatchDataModule,
    PhotoCropsDataModule,
    SampleBatch,
    TensorImages,
)
from lightning_modules.cli import main
from lightning_modules.imaging import check_batch

CONFIGS = Path(__file__).parents[2] / "configs"


class Own(ImageDataModule):
    """Whatever it is given, for every split."""

    def __init__(self, data: Any, **options: Any) -> None:
        super().__init__(**options)
        self.source = data

    def load_split(self, split: str) -> Any:
        return self.source


def batches(data: ImageDataModule, split: str = "train") -> list[dict[str, Any]]:
    return [data.on_after_batch_transfer(batch, 0) for batch in getattr(data, f"{split}_dataloader")()]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_of_torchvision(workers: int) -> None:
    source = FakeData(size=5, image_size=(3, 7, 11), num_classes=4)
    for split in ("train", "val", "test", "predict"):
        found = batches(Own(source, batch_size=3, num_workers=workers, seed=0), split)
        for batch in found:
            check_batch(batch, ["image", "label", "weight", "key", "index"], image_channels=3)
        images, labels, index = (torch.cat([batch[name] for batch in found]) for name in ("image", "label", "index"))
        assert sorted(index.tolist()) == list(range(5))
        for i, image, label in zip(index.tolist(), images, labels.tolist(), strict=True):
            assert torch.equal((image * 255).round().byte().permute(1, 2, 0), torch.from_numpy(np.array(source[i][0])))
            assert label == source[i][1]
        names = [name for batch in found for name in batch.get("name", [])]
        assert names == ([f"{i:05d}.png" for i in range(5)] if split == "predict" else [])
    assert Own(source).class_names == []


PIXELS = torch.randint(0, 256, (4, 3, 7, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
ARRAYS = PIXELS.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ([(image, 2) for image in PIXELS], 2),
        ([(image / 255, torch.tensor(2)) for image in PIXELS], 2),
        ([(image, np.int32(2)) for image in ARRAYS], 2),
        ([[Image.fromarray(image), 2] for image in ARRAYS], 2),
        ([Image.fromarray(image) for image in ARRAYS], -1),
        (list(PIXELS), -1),
        (PIXELS, -1),
        (TensorDataset(PIXELS), -1),
        (TensorDataset(PIXELS, torch.full((4,), 2)), 2),
        (Subset(TensorDataset(PIXELS, torch.full((4,), 2)), [0, 1, 2, 3]), 2),
        (TensorImages(PIXELS, torch.full((4,), 2)), 2),
        (TensorImages(PIXELS / 255), -1),
    ],
    ids=lambda source: type(source).__name__,
)
def test_samples_of_any_kind(source: Any, label: int) -> None:
    (batch,) = batches(Own(source), "val")
    check_batch(batch, ["image", "label", "weight", "key", "index"], image_channels=3)
    torch.testing.assert_close(batch["image"], PIXELS / 255)
    assert batch["label"].tolist() == [label] * 4


def test_a_gray_tensor_keeps_its_channel() -> None:
    source = FakeData(size=3, image_size=(3, 7, 11), transform=lambda image: ToTensor()(image.convert("L")))
    assert batches(Own(source), "test")[0]["image"].shape == (3, 1, 7, 11)


def test_a_dataset_of_batches() -> None:
    class Numbers(BatchDataset):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, samples: SampleBatch) -> Any:
            return samples.batch(samples.index[:, None, None, None].expand(-1, 1, 2, 2) / 10) | {"extra": "kept"}

    found = batches(Own(Numbers(), batch_size=2), "predict")
    assert torch.cat([batch["image"][:, 0, 0, 0] for batch in found]).tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [batch["name"] for batch in found] == [["00000.png", "00001.png"], ["00002.png", "00003.png"], ["00004.png"]]
    assert found[0]["extra"] == "kept"


def test_names_that_are_given_are_kept() -> None:
    (batch,) = batches(Own(TensorImages(PIXELS, names=["a.png", "b.png", "c.png", "d.png"])), "predict")
    assert batch["name"] == ["a.png", "b.png", "c.png", "d.png"]


def test_training_images_alone_are_augmented() -> None:
    source = TensorImages(PIXELS.repeat(10, 1, 1, 1))
    for split, augment in (("train", True), ("train", False), ("val", True), ("test", True), ("predict", True)):
        (batch,) = batches(Own(source, augment=augment, batch_size=40), split)
        kept = (batch["image"] == source.images[batch["index"]] / 255).flatten(1).all(1)
        assert bool(kept.all()) == (split != "train" or not augment), (split, augment)
        assert "augment" not in batch


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([(PIXELS[0], "cat")], TypeError, "sample 0 of the data set has the label 'cat'; labels must be integers"),
        ([(PIXELS[0], 1.5)], TypeError, "has the label 1.5; labels must be integers"),
        ([(PIXELS[0], PIXELS[1])], TypeError, "labels must be integers"),
        ([(PIXELS[0], 1, 2)], TypeError, r"sample 0 .* must be \(image, label\) or an image.*got tuple"),
        ([PIXELS[0, 0]], TypeError, r"a tensor \[C, H, W\], got \[7, 11\]"),
        (["a.png"], TypeError, "got str"),
        (
            [PIXELS[0], PIXELS[0, :, :5]],
            ValueError,
            r"must have one size, got \(3, 5, 11\) and \(3, 7, 11\): crop them",
        ),
    ],
)
def test_samples_of_another_kind_are_named(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        batches(Own(source), "val")


def order(data: ImageDataModule) -> list[int]:
    return torch.cat([batch["key"] for batch in data.train_dataloader()]).tolist()


def test_the_seed_of_the_run_decides_where_none_is_given() -> None:
    def keys(run: int | None, own: int | None = None) -> list[int]:
        if run is not None:
            L.seed_everything(run, verbose=False)
        return order(Own(PIXELS, seed=own))

    assert keys(None) == keys(0) == keys(None, 0)
    assert keys(3) == keys(None, 3) == keys(7, 3)
    assert len({tuple(keys(seed)) for seed in range(5)}) == 5


def test_the_seed_settles_at_first_use() -> None:
    L.seed_everything(1, verbose=False)
    data = Own(PIXELS)
    data.setup("fit")
    L.seed_everything(2, verbose=False)
    assert data.seed == 1


def test_it_is_the_seed_of_every_datamodule(tmp_path: Path) -> None:
    L.seed_everything(5, verbose=False)
    for data in (
        CIFAR10DataModule(),
        PhotoCropsDataModule(),
        ImageFolderDataModule(str(tmp_path)),
        GeneratedImagesDataModule(str(tmp_path)),
        PatchDataModule(),
    ):
        assert data.seed == 5
    assert CIFAR10DataModule(seed=0).seed == 0


class KeyRecorder(L.LightningModule):
    """Notes the keys that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.keys: list[list[int]] = []

    def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
        self.keys.append(batch["key"].tolist())
        return self.weight * 0

    def validation_step(self, batch: dict[str, Any]) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, data: ImageDataModule, epochs: int, ckpt: Path | None = None) -> list[list[int]]:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    module = KeyRecorder()
    trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[keep], default_root_dir=folder, **quiet)
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module.keys


def test_a_resumed_run_keeps_its_seed(fake_cifar: Any, tmp_path: Path) -> None:
    def cifar(**options: Any) -> CIFAR10DataModule:
        return CIFAR10DataModule(str(fake_cifar(rows=4)), batch_size=4, val_size=4, **options)

    L.seed_everything(1, verbose=False)
    whole = cifar()
    keys = fit(tmp_path / "whole", whole, 3)
    ckpt = tmp_path / "whole" / "epoch=1.ckpt"
    L.seed_everything(2, verbose=False)
    resumed = cifar()
    assert fit(tmp_path / "resumed", resumed, 3, ckpt) == keys[8:]
    assert torch.equal(resumed._data["val"].images, whole._data["val"].images)
    given = fit(tmp_path / "given", cifar(seed=2), 3, ckpt)  # a seed that is given counts
    assert len(given) == 4
    assert given != keys[8:]


def test_held_out_files_stay_held_out(fake_photographs: Any) -> None:
    root = fake_photographs(count=8) / "train"
    trained = GeneratedImagesDataModule(str(root), val_fraction=0.3, seed=3)
    held_out = trained.files("val").names
    evaluated = GeneratedImagesDataModule(str(root), val_fraction=0.3)
    evaluated.setup("validate")
    evaluated.load_state_dict(trained.state_dict())
    assert evaluated.files("val").names == held_out
    other = {tuple(GeneratedImagesDataModule(str(root), val_fraction=0.3, seed=s).files("val").names) for s in range(5)}
    assert len(other) > 1


def test_seed_everything_decides_what_a_diffusion_alone_learns(tmp_path: Path) -> None:
    def learned(seed: int, *words: str) -> dict[str, torch.Tensor]:
        name = f"{seed} {' '.join(words)}"
        with contextlib.chdir(tmp_path):
            main(
                [
                    *("fit", "-c", str(CONFIGS / "demo.yaml"), f"--seed_everything={seed}", "--trainer.max_epochs=1"),
                    *("--trainer.accelerator=cpu", "--data.train_crops=20", "--data.val_crops=10"),
                    *("--data.batch_size=10", "--trainer.limit_val_batches=0", "--trainer.logger=false"),
                    *("--trainer.callbacks=callbacks.EMParameterCallback", f"--trainer.default_root_dir={name}"),
                    *("--trainer.callbacks.rule=callbacks.GradientRule", *words),
                ]
            )
            (path,) = Path(name).rglob("*.ckpt")
            return torch.load(path, weights_only=True)["state_dict"]

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        tensors = [name for name, value in one.items() if torch.is_tensor(value)]
        return all(torch.equal(one[name], other[name]) for name in tensors)

    first = learned(0)
    assert not same(first, learned(1))
    assert same(first, learned(1, "--data.seed=0"))


@pytest.mark.parametrize("value", [25, 1.5, -0.1, float("nan")])
@pytest.mark.parametrize(
    "make", [lambda v: ImageFolderDataModule("x", noise_std=v), lambda v: PatchDataModule(noise_std=v)]
)
def test_levels_off_the_scale_are_refused(make: Any, value: float) -> None:
    message = f"noise_std must lie between 0 and 1, where white is 1, got {value}"
    hint = "; 25 of 255 is 0.0980" if value == 25 else ""
    with pytest.raises(ValueError, match=re.escape(message + hint)):
        make(value)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_cifar: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.fromarray(ARRAYS[0]).save(tmp_path / "a.png")
    fake_cifar()
    np.save(tmp_path / "a.npy", np.zeros((3, 2), np.float32))
    for data, split in (
        (ImageFolderDataModule("~"), "predict"),
        (GeneratedImagesDataModule("~/a.png"), "predict"),
        (CIFAR10DataModule("~/fake_cifar", val_size=2), "test"),
        (PatchDataModule("~", patch_size=4, patches_per_image=2), "train"),
        (PatchDataModule(array="~/a.npy"), "train"),
    ):
        assert len(data._dataset(split)) > 0
    elsewhere = CIFAR10DataModule("~/new", download=True, url="file:///nowhere.tar.gz")
    with pytest.raises(RuntimeError, match=re.escape(str(tmp_path / "new"))):
        elsewhere.prepare_data()
    assert not Path("~").exists()
