"""Photographs that come with scikit-image and scikit-learn: real images without any download."""

from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules._sampler import SampleBatch
from datamodules.image_data_module import BatchDataset, ImageDataModule, Split, TensorImages
from lightning_modules.imaging import ImageBatch, permutation

# name -> package and file; only files inside the wheels: skimage.data would fetch others from the internet
_Files = Mapping[str, tuple[str, str]]
_TRAIN: _Files = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
    "ihc": ("skimage", "data/ihc.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "motorcycle_left": ("skimage", "data/motorcycle_left.png"),
    "coins": ("skimage", "data/coins.png"),
    "brick": ("skimage", "data/brick.png"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
}
_VAL: _Files = {
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
}
_TEST: _Files = {
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "camera": ("skimage", "data/camera.png"),
}
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
_SHORTER_SIDE = 256  # pixels, about


class PhotoCropsDataModule(ImageDataModule):
    """Crops of ten photographs, one class each, to train on, and other photographs to validate and test on.

    They need no download. Three of those to train on are of textures, brick, grass and gravel, which with the coins
    are gray; of three others validation is, and of two more test and `predict`: whole, one a batch, and without a
    label, since they belong to no class that is trained on.

    Each photograph is first reduced by the whole number that brings its shorter side closest to 256 pixels, by
    averaging blocks. That removes most of the compression artefacts of those that are JPEG files, and a small crop then
    shows structure: two thirds of the 32×32 crops of the retina, 1411 pixels wide, would be flat without it.

    Args:
        crop_size: Side of a crop, in pixels.
        batch_size: Crops per batch on each device; whole photographs are one a batch.
        num_workers: Worker processes of each loader; 0 is fast, since nothing is decoded after the start.
        train_crops: Number of training crops, spread evenly over the photographs.
        val_crops: Number of validation crops, and of test crops, where many small images are wanted, as for noise whose
            level differs by image; None takes the photographs whole.
        seed: Seed of the crops, the order, the augmentation and the noise keys; by default that of `--seed_everything`.
        augment: Mirror training images left to right at random.

    Example:
        >>> data = PhotoCropsDataModule(batch_size=8, train_crops=20)
        >>> crops, photograph = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
        >>> crops["image"].shape, photograph["image"].shape, data.class_names[1]
        (torch.Size([8, 3, 32, 32]), torch.Size([1, 3, 300, 451]), 'hubble_deep_field')
    """

    def __init__(
        self,
        crop_size: int = 32,
        batch_size: int = 64,
        num_workers: int = 0,
        train_crops: int = 2000,
        val_crops: int | None = None,
        seed: int | None = None,
        augment: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, augment)
        for name, value in (("crop_size", crop_size), ("train_crops", train_crops), ("val_crops", val_crops)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.crop_size = crop_size
        self.train_crops = train_crops
        self.val_crops = val_crops

    @property
    def class_names(self) -> list[str]:
        """The names of the photographs to train on."""
        return list(_TRAIN)

    def load_split(self, split: Split) -> BatchDataset:
        """Cuts the crops of a split, or reads its photographs; `test` and `predict` are the same.

        Args:
            split: `train`, `val`, `test` or `predict`.
        """
        if split == "train":
            return TensorImages(*self._crops(_TRAIN, self.train_crops))
        files = _VAL if split == "val" else _TEST
        if self.val_crops is None:
            return _Photographs(files)
        images, numbers = self._crops(files, self.val_crops)
        names = [f"{i:05d}_{[*files][number]}.png" for i, number in enumerate(numbers.tolist())]
        return TensorImages(images, names=names)

    def _batch_size(self, split: Split) -> int:
        return self.batch_size if split == "train" or self.val_crops is not None else 1

    def _crops(self, files: _Files, count: int) -> tuple[Tensor, Tensor]:
        """Cuts `count` different crops out of photographs, which take turns, and numbers each by its photograph."""
        size = self.crop_size
        numbers = torch.arange(count) % len(files)
        images = torch.empty(count, 3, size, size, dtype=torch.uint8)
        for number, (name, file) in enumerate(files.items()):
            photograph = _read_photograph(name, *file)
            wanted = len(images[number :: len(files)])
            rows, columns = photograph.shape[1] - size + 1, photograph.shape[2] - size + 1
            if min(rows, columns) < 1 or rows * columns < wanted:
                raise ValueError(
                    f"{wanted} different crops of {size}×{size} pixels do not fit into {name}, "
                    f"{photograph.shape[1]}×{photograph.shape[2]} pixels. Choose a smaller crop_size, or fewer crops."
                )
            place = permutation(rows * columns, self.seed, [*_TRAIN, *_VAL, *_TEST].index(name))[:wanted]
            windows = photograph.unfold(1, size, 1).unfold(2, size, 1)  # a view: [C, rows, columns, size, size]
            images[number :: len(files)] = windows[:, place // columns, place % columns].transpose(0, 1)
        return images, numbers


class _Photographs(BatchDataset):
    """Whole photographs, of different sizes, one a batch."""

    def __init__(self, files: _Files) -> None:
        self.names = [f"{name}.png" for name in files]
        self.images = [_read_photograph(name, *file) for name, file in files.items()]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, samples: SampleBatch) -> ImageBatch:
        chosen = samples.index.tolist()
        batch = samples.batch(torch.stack([self.images[i] for i in chosen]))
        batch["name"] = [self.names[i] for i in chosen]
        return batch


def _read_photograph(name: str, package: str, file: str) -> Tensor:
    """Reads and reduces a photograph.

    Shape:
        - output: `[3, H, W]`, uint8
    """
    spec = find_spec(package)  # finds the folder without importing the package
    path = Path(str(spec.origin)).parent / file if spec is not None else Path(file)
    if not path.is_file():
        distribution = _DISTRIBUTIONS[package]
        raise FileNotFoundError(
            f"{path}: the installed {distribution} {_version(distribution)} comes without the photograph {name}. "
            f"Install the wheel from PyPI, which has it: pip install --force-reinstall --no-deps {distribution}"
        )
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image = image.reduce(max(1, round(min(image.size) / _SHORTER_SIDE)))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(not installed)"
