"""Crops of the photographs that come with scikit-image and scikit-learn: real images without any download."""

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.image_data_module import BatchDataset, ImageDataModule, Split, TensorImages
from lightning_modules.imaging import permutation

# name -> package and file; only files inside the wheels: skimage.data would fetch others from the internet
_PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
    "ihc": ("skimage", "data/ihc.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "motorcycle_left": ("skimage", "data/motorcycle_left.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
_SHORTER_SIDE = 256  # pixels, about


class PhotoCropsDataModule(ImageDataModule):
    """Crops of ten colour photographs, one class each, that need no download.

    Each photograph is first reduced by the whole number that brings its shorter side closest to 256 pixels, by
    averaging blocks. That removes most of the compression artefacts of those that are JPEG files, and a small crop then
    shows structure: two thirds of the 32×32 crops of the retina, 1411 pixels wide, would be flat without it. Then it is
    cut in two across its longer side: training crops come from one part, validation and test crops from the other.

    Args:
        crop_size: Side of a crop, in pixels.
        batch_size: Images per batch on each device.
        num_workers: Worker processes of each loader; 0 is fast, since nothing is decoded after the start.
        train_crops: Number of training crops, spread evenly over the photographs.
        val_crops: Number of validation crops, and of test crops, which are others from the same region.
        seed: Seed of the crops, the order, the augmentation and the noise keys; by default that of `--seed_everything`.
        val_fraction: Part of each photograph that is kept for validation and test.
        augment: Mirror training images left to right at random.

    Example:
        >>> data = PhotoCropsDataModule(batch_size=8, train_crops=20, val_crops=10)
        >>> batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
        >>> batch["image"].shape, data.class_names[1]
        (torch.Size([8, 3, 32, 32]), 'chelsea')
    """

    def __init__(
        self,
        crop_size: int = 32,
        batch_size: int = 64,
        num_workers: int = 0,
        train_crops: int = 2000,
        val_crops: int = 250,
        seed: int | None = None,
        val_fraction: float = 0.25,
        augment: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, augment)
        for name, value in (("crop_size", crop_size), ("train_crops", train_crops), ("val_crops", val_crops)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        self.crop_size = crop_size
        self.train_crops = train_crops
        self.val_crops = val_crops
        self.val_fraction = val_fraction

    @property
    def class_names(self) -> list[str]:
        """The names of the photographs."""
        return list(_PHOTOGRAPHS)

    def load_split(self, split: Split) -> BatchDataset:
        """Cuts the crops of a split; `test` and `predict` are the same.

        Args:
            split: `train`, `val`, `test` or `predict`.
        """
        if split == "train":
            return TensorImages(*self._crops(held_out=False, count=self.train_crops))
        images, labels = self._crops(held_out=True, count=2 * self.val_crops)
        if split == "val":
            return TensorImages(images[: self.val_crops], labels[: self.val_crops])
        images, labels = images[self.val_crops :], labels[self.val_crops :]
        if split == "test":
            return TensorImages(images, labels)
        names = [f"{i:05d}_{self.class_names[label]}.png" for i, label in enumerate(labels.tolist())]
        return TensorImages(images, labels, names)

    def _crops(self, held_out: bool, count: int) -> tuple[Tensor, Tensor]:
        """Cuts `count` different crops out of one part of the photographs, which take turns."""
        size = self.crop_size
        labels = torch.arange(count) % len(_PHOTOGRAPHS)
        images = torch.empty(count, 3, size, size, dtype=torch.uint8)
        for label, name in enumerate(_PHOTOGRAPHS):
            region = _region(_read_photograph(name), held_out, self.val_fraction)
            wanted = len(images[label :: len(_PHOTOGRAPHS)])
            rows, columns = region.shape[1] - size + 1, region.shape[2] - size + 1
            if min(rows, columns) < 1 or rows * columns < wanted:
                part = "held-out" if held_out else "training"
                raise ValueError(
                    f"{wanted} different crops of {size}×{size} pixels do not fit into the {part} part of {name}, "
                    f"{region.shape[1]}×{region.shape[2]} pixels. Choose a smaller crop_size or another "
                    f"val_fraction (now {self.val_fraction}), or fewer crops."
                )
            place = permutation(rows * columns, self.seed, int(held_out), label)[:wanted]
            windows = region.unfold(1, size, 1).unfold(2, size, 1)  # a view: [C, rows, columns, size, size]
            images[label :: len(_PHOTOGRAPHS)] = windows[:, place // columns, place % columns].transpose(0, 1)
        return images, labels


def _region(image: Tensor, held_out: bool, val_fraction: float) -> Tensor:
    """Returns one of the two parts, without a common pixel, of an image cut across its longer side."""
    axis = 1 if image.shape[1] > image.shape[2] else 2
    boundary = round(image.shape[axis] * (1 - val_fraction))
    return image.narrow(axis, boundary, image.shape[axis] - boundary) if held_out else image.narrow(axis, 0, boundary)


def _read_photograph(name: str) -> Tensor:
    """Reads and reduces a photograph.

    Shape:
        - output: `[3, H, W]`, uint8
    """
    package, file = _PHOTOGRAPHS[name]
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
