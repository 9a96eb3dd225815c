"""Base of the DataModules of images: loaders, batches of one form, conversion and augmentation on the device."""

import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules._augmentation import flip_and_shift
from datamodules._sampler import EpochBatches, EpochLoader, FixedBatches, SampleBatch
from lightning_modules.checkpoints.trust import GuardedCheckpoint
from lightning_modules.imaging import SPLIT_STREAMS, ImageBatch, decode_image, stream

Split = Literal["train", "val", "test", "predict"]

_SPLITS: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
    None: ("train", "val", "test", "predict"),
}


class ImageDataModule(GuardedCheckpoint, L.LightningDataModule, ABC):
    """Base for a DataModule of images: a subclass writes `load_split`, and `class_names` where there are classes.

    Its batches are `lightning_modules.imaging.ImageBatch`, the same on any number of processes and after a resume.

    Args:
        batch_size: Images per batch on each device.
        num_workers: Worker processes of each loader.
        seed: Seed of splits, order, augmentation and the noise keys; by default that of `--seed_everything`, or 0. A
            checkpoint keeps it.
        augment: Mirror training images left to right at random.
        max_shift: Move training images by up to this many pixels at random.

    Example:
        >>> from torchvision.datasets import FakeData
        >>> class Fakes(ImageDataModule):
        ...     def load_split(self, split):
        ...         return FakeData(size=20 if split == "train" else 5, image_size=(3, 8, 12), num_classes=4)
        >>> data = Fakes(batch_size=4)
        >>> batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
        >>> batch["image"].shape, batch["image"].dtype, batch["label"].shape
        (torch.Size([4, 3, 8, 12]), torch.float32, torch.Size([4]))
    """

    def __init__(
        self,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int | None = None,
        augment: bool = False,
        max_shift: int = 0,
    ) -> None:
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
        self.augment = augment
        self.max_shift = max_shift
        self._seed, self._seed_is_given = seed, seed is not None
        self._data: dict[Split, BatchDataset] = {}

    @property
    def seed(self) -> int:
        """The seed given, else that of `--seed_everything` at its first use."""
        if self._seed is None:
            self._seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        return self._seed

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the labels; empty where there are none."""
        return []

    @abstractmethod
    def load_split(self, split: Split) -> Dataset[Any] | Sequence[Any]:
        """Loads a split, once.

        Return `TensorImages`; or anything with a length and indices whose samples are `(image, label)` or images, such
        as a data set of torchvision, an image being a PIL image, an array `[H, W]` or `[H, W, 3]` of bytes, or a tensor
        `[C, H, W]` of bytes or of floating point where white is 1; or a `BatchDataset`. PIL images and arrays become
        RGB. The images of one batch need one size.

        Args:
            split: `train`, `val`, `test` or `predict`.
        """

    def setup(self, stage: str | None = None) -> None:
        """Loads what the stage needs, once.

        Args:
            stage: `fit`, `validate`, `test` or `predict`; None for all of them.
        """
        seed = self.seed  # settled from here on
        if self.trainer is not None and not self._seed_is_given:
            self._seed = self.trainer.strategy.broadcast(seed)  # `seed_everything: true` may differ by process
        for split in _SPLITS[stage]:
            count = len(self._dataset(split))
            for verb in ("validate", "test"):  # Lightning's stages are equal to these names, and print as others
                if stage == verb and not count:
                    raise ValueError(f"there is nothing to {verb} on: hold some data out, as with val_fraction=0.1")

    def has_split(self, split: Split) -> bool:
        """Tells whether a split has samples; of one that has not been loaded that is assumed.

        Args:
            split: `train`, `val`, `test` or `predict`.
        """
        return split not in self._data or len(self._data[split]) > 0

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns the training batches: shuffled anew in each epoch, or fixed under `overfit_batches`."""
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        sampler = FixedBatches if overfit else EpochBatches
        return self._training_loader(sampler, shuffle=not overfit)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Returns the validation batches, in order, with the same keys in every epoch."""
        return self._loader("val", DataLoader, FixedBatches)

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns the test batches, in order."""
        return self._loader("test", DataLoader, FixedBatches)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Returns the batches to predict, in order, each with the names of its images."""
        return self._loader("predict", DataLoader, FixedBatches)

    def state_dict(self) -> dict[str, Any]:
        """Returns the seed, for the checkpoint."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the seed of the checkpoint, so that splits and order stay, unless one is given."""
        if not self._seed_is_given and state_dict["seed"] != self.seed:
            self._seed = state_dict["seed"]
            self._data.clear()

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Converts the images to float in [0, 1] and augments those of a training batch, on the device.

        Args:
            batch: A batch as its loader made it.
            dataloader_idx: Unused; Lightning passes it.
        """
        batch = batch.copy()
        augment, image = batch.pop("augment", False), batch["image"]
        if augment:
            image = flip_and_shift(image, batch["key"], self.max_shift)
        batch["image"] = image.float().div_(255) if image.dtype == torch.uint8 else image
        return batch

    def _dataset(self, split: Split) -> "BatchDataset":
        if split not in self._data:
            data = self.load_split(split)
            self._data[split] = data if isinstance(data, BatchDataset) else _Samples(data)
        return self._data[split]

    def _training_loader(self, sampler: Callable[..., EpochBatches], shuffle: bool) -> DataLoader[Any]:
        return self._loader(
            "train", EpochLoader, sampler, shuffle=shuffle, accumulation=self._accumulation, done=self._batches_done
        )

    def _loader(
        self,
        split: Split,
        loader: type[DataLoader[Any]],
        sampler: Callable[..., EpochBatches],
        data: "BatchDataset | None" = None,
        **options: Any,
    ) -> DataLoader[Any]:
        data = self._dataset(split) if data is None else data
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        seed = int(stream(self.seed, SPLIT_STREAMS[split]))
        return loader(
            data,
            batch_size=None,  # the sampler hands out whole batches
            sampler=sampler(len(data), self._batch_size(split), seed=seed, **ranks, **options),
            collate_fn=partial(_finish, split=split, augment=self.augment),
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

    def _batches_done(self) -> int:
        return 0 if self.trainer is None else self.trainer.fit_loop.batch_idx + 1


class BatchDataset(Dataset[ImageBatch], ABC):
    """A data set that is asked for whole batches."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, samples: SampleBatch) -> ImageBatch:
        """Returns the batch of these samples, with their `index`, `weight` and `key`."""


class TensorImages(BatchDataset):
    """Images of one size, decoded, in memory.

    Args:
        images: The images, bytes, or floating point where white is 1.
        labels: Their labels; None where there are none.
        names: File names to write predictions to; by default the images' numbers.

    Shape:
        - images: `[N, C, H, W]`
        - labels: `[N]`, int64
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None, names: list[str] | None = None) -> None:
        self.images = images
        self.labels = torch.full((len(images),), -1) if labels is None else labels
        self.names = names

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, samples: SampleBatch) -> ImageBatch:
        index = samples.index
        batch = samples.batch(self.images.index_select(0, index), self.labels.index_select(0, index))
        if self.names is not None:
            batch["name"] = [self.names[i] for i in index.tolist()]
        return batch


class _Samples(BatchDataset):
    """Any data set of `(image, label)` or images, decoded and stacked."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, samples: SampleBatch) -> ImageBatch:
        images, labels = [], []
        for index in samples.index.tolist():
            sample = self.data[index]
            image, label = (*sample, -1)[:2] if isinstance(sample, tuple | list) and len(sample) < 3 else (sample, -1)
            image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
            image = decode_image(image) if isinstance(image, Image.Image) else image
            if not isinstance(image, Tensor) or image.ndim != 3:
                got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise TypeError(
                    f"sample {index} of the data set must be (image, label) or an image, and an image a PIL image, an "
                    f"array or a tensor [C, H, W], got {got}"
                )
            images.append(image)
            try:
                labels.append(operator.index(label))
            except TypeError as error:
                raise TypeError(
                    f"sample {index} of the data set has the label {label!r:.80}; labels must be integers, −1 for none"
                ) from error
        if len(sizes := {tuple(image.shape) for image in images}) > 1:
            raise ValueError(
                f"the images of a batch must have one size, got {' and '.join(map(str, sorted(sizes)[:2]))}: crop them "
                "in the data set (a torchvision transform), or set batch_size to 1"
            )
        return samples.batch(torch.stack(images), torch.tensor(labels))


def _finish(batch: ImageBatch, split: Split, augment: bool) -> ImageBatch:
    """Adds what follows from the split: that training images are augmented; of what is predicted, names, and that the
    images are clean.
    """
    if split == "train" and augment:
        batch = {**batch, "augment": True}
    if split == "predict":
        names = [f"{index:05d}.png" for index in batch["index"].tolist()]
        batch = {**batch, "name": batch.get("name", names)}
        if "condition" not in batch:  # a detector's
            batch["clean"] = batch.get("clean", True)
    return batch
