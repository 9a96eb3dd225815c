"""CIFAR-10, decoded once and kept in memory."""

import os
import pickle
import tempfile
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from datamodules.image_data_module import BatchDataset, ImageDataModule, Split, TensorImages
from lightning_modules.imaging import permutation

_CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# what a damaged pickle, or a pickle of something else, raises on its way through torchvision
_READ_ERRORS = (
    OSError,
    EOFError,
    pickle.UnpicklingError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
)


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10: 32×32 colour images of ten classes, split by seed, all in memory.

    The training batches are split into training and validation; `test` and `predict` take the test batch. Partial
    copies load as well: the official file names count, not the number of images.

    Args:
        root: Folder that contains `cifar-10-batches-py`.
        download: Fetch the data set into `root` if it is not there.
        batch_size: Images per batch on each device.
        num_workers: Worker processes of each loader; 0 is fast, since nothing is decoded after the start.
        val_size: Images held out of the training batches for validation, as a count or as a fraction.
        seed: Seed of the split, the order, the augmentation and the noise keys; by default that of `--seed_everything`.
        verify_checksum: Insist on the official checksum of every file. Worth setting for files from an unknown source:
            they are pickles, which can run code.
        augment: Mirror training images left to right at random.
        max_shift: Move training images by up to this many pixels at random.
        url: Address of another copy of the official archive `cifar-10-python.tar.gz`.
        prepare_data_per_node: Download on every node; set to false where the nodes share a file system.

    Example:
        >>> data = CIFAR10DataModule(root="data", batch_size=64)
        >>> data.class_names[3]
        'cat'
    """

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        batch_size: int = 128,
        num_workers: int = 0,
        val_size: int | float = 5000,
        seed: int | None = None,
        verify_checksum: bool = False,
        augment: bool = True,
        max_shift: int = 0,
        url: str | None = None,
        prepare_data_per_node: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, augment, max_shift)
        if not (0 < val_size < 1 if isinstance(val_size, float) else val_size >= 1):
            raise ValueError(f"val_size must be a count of at least 1 or a fraction between 0 and 1, got {val_size}")
        self.root = root
        self.download = download
        self.val_size = val_size
        self.verify_checksum = verify_checksum
        self.url = url
        self.prepare_data_per_node = prepare_data_per_node

    @property
    def class_names(self) -> list[str]:
        """The official names of the ten classes."""
        return list(_CLASS_NAMES)

    def prepare_data(self) -> None:
        """Downloads the data set where that was asked for and it is not there yet."""
        if self.download:
            _download(Path(self.root).expanduser(), self.url or CIFAR10.url, self.verify_checksum)

    def load_split(self, split: Split) -> BatchDataset:
        """Reads the training batches, split in two, or the test batch.

        Args:
            split: `train`, `val`, `test` or `predict`.
        """
        images, labels = _read(Path(self.root).expanduser(), split in ("train", "val"), self.verify_checksum)
        if split == "test":
            return TensorImages(images, labels)
        if split == "predict":
            names = [f"{i:05d}_{_CLASS_NAMES[label]}.png" for i, label in enumerate(labels.tolist())]
            return TensorImages(images, labels, names)
        train, val = self._split(len(images))
        self._data.setdefault("train", TensorImages(images[train], labels[train]))
        self._data.setdefault("val", TensorImages(images[val], labels[val]))
        return self._data[split]

    def _split(self, length: int) -> tuple[Tensor, Tensor]:
        val_size = self.val_size if isinstance(self.val_size, int) else max(1, round(self.val_size * length))
        if val_size >= length:
            raise ValueError(
                f"val_size={self.val_size} leaves no image to train on: the training batches in "
                f"{Path(self.root) / CIFAR10.base_folder} hold {length} images. Give a smaller count, or a fraction "
                "such as 0.1."
            )
        order = permutation(length, self.seed)
        return order[val_size:].sort().values, order[:val_size].sort().values


class _AnyCIFAR10(CIFAR10):
    """torchvision's reader without the checksums: the files only have to be there."""

    train_list = [[name, None] for name, _ in CIFAR10.train_list]  # noqa: RUF012
    test_list = [[name, None] for name, _ in CIFAR10.test_list]  # noqa: RUF012
    meta = {**CIFAR10.meta, "md5": None}  # noqa: RUF012


def _read(root: Path, train: bool, verify_checksum: bool) -> tuple[Tensor, Tensor]:
    folder = root / CIFAR10.base_folder
    missing = [name for name in _file_names() if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"CIFAR-10: {folder} lacks {', '.join(missing)}. {_how_to_place(root)}")
    try:
        data = (CIFAR10 if verify_checksum else _AnyCIFAR10)(root, train=train)
        images, labels = torch.from_numpy(data.data), torch.tensor(data.targets)
        if images.dtype != torch.uint8 or len(images) != len(labels):
            raise ValueError("not the official content")
        if len(images) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < len(_CLASS_NAMES):
            raise ValueError("no images, or labels outside 0 to 9")
    except _READ_ERRORS as error:
        reason = _what_is_wrong(folder, verify_checksum) or f"{folder}: {error}"
        raise ValueError(f"CIFAR-10: {reason}. {_how_to_place(root)}") from error
    return images.permute(0, 3, 1, 2).contiguous(), labels


def _download(root: Path, url: str, verify_checksum: bool) -> None:
    folder = root / CIFAR10.base_folder
    if all((folder / name).is_file() for name in _file_names()) and not _what_is_wrong(folder, verify_checksum):
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        # checks the archive's md5, also that of an archive placed here by hand, and fetches it only if it differs
        download_url(url, root, CIFAR10.filename, CIFAR10.tgz_md5)
        with tempfile.TemporaryDirectory(prefix=".cifar-10-", dir=root) as scratch:
            extract_archive(str(root / CIFAR10.filename), scratch)
            folder.mkdir(exist_ok=True)
            for name in _file_names():  # whole files only: an interrupted extraction leaves nothing behind
                os.replace(Path(scratch) / CIFAR10.base_folder / name, folder / name)
    except (OSError, RuntimeError, EOFError, ValueError, HTTPException) as error:
        raise RuntimeError(
            f"CIFAR-10 could not be downloaded from {url} to {root / CIFAR10.filename}: {error}. {_how_to_place(root)}"
        ) from error


def _what_is_wrong(folder: Path, verify_checksum: bool) -> str | None:
    """Names the first damaged file of a copy and what is wrong with it."""
    if verify_checksum:
        official = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
        for name, md5 in official:
            if not check_integrity(str(folder / name), md5):
                return f"{folder / name} differs from the official file (verify_checksum=True compares their md5)"
    for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list]:
        if (reason := _what_is_wrong_with_batch(folder / name)) is not None:
            return f"{folder / name} {reason}"
    return None


def _what_is_wrong_with_batch(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            entry: dict[str, Any] = pickle.load(file, encoding="latin1")
        pixels, labels = np.asarray(entry["data"]), np.asarray(entry["labels"])
    except _READ_ERRORS as error:
        return f"is truncated or not a CIFAR-10 batch ({type(error).__name__}: {error})"
    if pixels.dtype != np.uint8:
        unusual = pixels[~np.isfinite(pixels)] if pixels.dtype.kind == "f" else pixels[:0]
        found = f"holds the pixel value {unusual.flat[0]}" if unusual.size else f"holds pixels of type {pixels.dtype}"
        return f"{found}; CIFAR-10 has whole numbers from 0 to 255 (uint8)"
    if pixels.ndim != 2 or pixels.shape[1] != 3 * 32 * 32 or len(pixels) != len(labels):
        return f"has {len(labels)} labels and pixels of shape {pixels.shape}; expected 3072 for each label"
    if labels.size and not 0 <= labels.min() <= labels.max() < len(_CLASS_NAMES):
        return f"has labels from {labels.min()} to {labels.max()}; expected 0 to 9"
    return None


def _file_names() -> list[str]:
    return [
        *(name for name, _ in CIFAR10.train_list),
        *(name for name, _ in CIFAR10.test_list),
        CIFAR10.meta["filename"],
    ]


def _how_to_place(root: Path) -> str:
    hint = ""
    if root.name == CIFAR10.base_folder or (root / CIFAR10.train_list[0][0]).is_file():
        hint = f"It looks as if root should be {root.parent}, one folder up. "
    return (
        f"{hint}Expected layout: {root / CIFAR10.base_folder}/ with {', '.join(_file_names())}. "
        f"To place the data by hand, fetch {CIFAR10.url} on any machine and unpack it with "
        f"`tar -xzf {CIFAR10.filename} -C {root}`; or set download=True. To start without any download, run "
        "`lightning-em fit -c demo`, whose photographs come with the installation."
    )
