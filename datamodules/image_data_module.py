"""What the image DataModules share: loaders, batches of one form, conversion and augmentation on the device."""

from abc import ABC, abstractmethod
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules._augmentation import flip_and_shift
from datamodules._sampler import Draw, EpochBatches, EpochLoader, FixedBatches
from lightning_modules.imaging import stream

Split = Literal["train", "val", "test", "predict"]
Batch = dict[str, Any]

_SPLITS: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
    None: ("train", "val", "test", "predict"),
}
# a stream of keys for each split: validation must not repeat the noise that training saw; predict shows test's images
_STREAMS: dict[Split, int] = {"train": 0, "val": 1, "test": 2, "predict": 2}


class ImageDataModule(L.LightningDataModule, ABC):
    """Base of the image DataModules; a subclass says how to load a split and what the classes are called.

    Args:
        batch_size: Images per batch on each device.
        num_workers: Worker processes of each loader.
        seed: Seed of splits, order, augmentation and the noise keys.
        augment: Mirror training images left to right at random.
        max_shift: Move training images by up to this many pixels at random.
    """

    def __init__(self, batch_size: int, num_workers: int, seed: int, augment: bool, max_shift: int = 0) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("max_shift", max_shift, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.augment = augment
        self.max_shift = max_shift
        self._data: dict[Split, Dataset[Batch]] = {}

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the labels."""

    @abstractmethod
    def _load(self, split: Split) -> Dataset[Batch]:
        """Loads a split: a data set that turns a ``(index, weight, key)`` of a batch into that batch."""

    def setup(self, stage: str | None = None) -> None:
        """Loads what the stage needs, once.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None for all of them.
        """
        for split in _SPLITS[stage]:
            self._dataset(split)

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns the training batches: shuffled anew in each epoch, or fixed under ``overfit_batches``."""
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        sampler = FixedBatches if overfit else EpochBatches
        return self._loader("train", EpochLoader, sampler, shuffle=not overfit, accumulation=self._accumulation)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Returns the validation batches, in order, with the same keys in every epoch."""
        return self._loader("val", DataLoader, FixedBatches)

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns the test batches, in order."""
        return self._loader("test", DataLoader, FixedBatches)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Returns the batches to predict, in order, each with the names of its images."""
        return self._loader("predict", DataLoader, FixedBatches)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Converts the images to float in [0, 1] and augments those of a training batch, on the device.

        Args:
            batch: A batch as its loader made it.
            dataloader_idx: Unused; Lightning passes it.
        """
        batch = dict(batch)
        augment, image = batch.pop("augment", False), batch["image"]
        if augment:
            image = flip_and_shift(image, batch["key"], self.max_shift)
        batch["image"] = image.float().div_(255) if image.dtype == torch.uint8 else image
        return batch

    def _dataset(self, split: Split) -> Dataset[Batch]:
        if split not in self._data:
            self._data[split] = self._load(split)
        return self._data[split]

    def _loader(
        self,
        split: Split,
        loader: type[DataLoader[Any]],
        sampler: type[EpochBatches],
        data: Dataset[Batch] | None = None,
        **options: Any,
    ) -> DataLoader[Any]:
        data = self._dataset(split) if data is None else data
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        seed = int(stream(self.seed, _STREAMS[split]))
        return loader(
            data,
            batch_size=None,  # the sampler hands out whole batches
            sampler=sampler(len(data), self._batch_size(split), seed=seed, **ranks, **options),  # type: ignore[arg-type]
            num_workers=self.num_workers,
            # test and predict pass once, and over as many loaders as there are conditions
            persistent_workers=self.num_workers > 0 and split in ("train", "val"),
            pin_memory=torch.cuda.is_available(),
        )

    def _batch_size(self, split: Split) -> int:
        return self.batch_size

    def _accumulation(self) -> tuple[int, float]:
        if self.trainer is None:
            return 1, float("inf")
        return self.trainer.accumulate_grad_batches, self.trainer.num_training_batches


class TensorImages(Dataset[Batch]):
    """Images of one size, decoded, in memory.

    Args:
        images: The images, uint8.
        labels: Their labels.
        names: File names to write predictions to.
        augment: Mark the batches for augmentation.

    Shape:
        - images: [N, C, H, W], uint8.
        - labels: [N], int64.
    """

    def __init__(self, images: Tensor, labels: Tensor, names: list[str] | None = None, augment: bool = False) -> None:
        self.images = images
        self.labels = labels
        self.names = names
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: Draw) -> Batch:
        index, weight, key = item
        batch: Batch = {
            "image": self.images.index_select(0, index),
            "label": self.labels.index_select(0, index),
            "index": index,
            "weight": weight,
            "key": key,
            "augment": self.augment,
        }
        if self.names is not None:
            batch["name"] = [self.names[i] for i in index.tolist()]
        return batch
