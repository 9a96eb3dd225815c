"""Photographs and generated images, for a detector that tells them apart."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules._degradation import Degradation, degrade
from datamodules._detector_crops import FixedCrops, RandomCrop, RandomDegradation, View
from datamodules._readable import OnError, check_on_error, find_readable
from datamodules._sampler import FixedBatches, SampleBatch
from datamodules.image_data_module import BatchDataset, ImageDataModule, Split
from datamodules.labels import (
    LabelledFiles,
    find_labelled,
    find_unlabelled,
    require_classes,
    require_files,
)
from lightning_modules.imaging import ImageBatch, read_image

_CONDITIONS = ("clean", "jpeg 95", "jpeg 75", "jpeg 50", "rescale 0.75", "rescale 0.5", "blur 1")


class GeneratedImagesDataModule(ImageDataModule):
    """Photographs and generated images of any size and format, as crops at their native resolution.

    `root` is a folder `{train,val,test}/{photographic,generated}`, a folder with only the two class folders, or a
    table (`.csv`) with the columns `path` (relative to the table), `label` (a class name, or 0 and 1) and, if wanted,
    `split` (train, val or test). Without a validation part a stratified part of the training images is held out by
    seed; without a test part the validation part is tested on. To `predict`, `root` may also be any folder, a table
    without labels, or one image; labels are then not looked at.

    Nothing is resized, and no metadata is read but the orientation. Images of both classes are decoded, degraded and
    cropped in the same way, so that format, size and compression cannot stand for the label; in training a degradation
    is drawn for each image, and the place of the crop with it, the grid of JPEG blocks lying anywhere. Every random
    number is a function of seed, epoch and image. An image smaller than a crop is continued by its mirror image.

    A batch holds `image` [B, V, 3, S, S] with the V crops of each image (1 in training), `label` [B] (0 and 1 in the
    order of `class_names`, −1 where unknown), `index`, `weight` and `key` [B], `name`, a list of paths relative to the
    root, and `condition`, the degradation of its images.

    Args:
        root: Folder or table with the images; to predict, also a single image.
        class_names: Names of the folders with photographs and with generated images.
        crop_size: Side of a crop, in pixels.
        batch_size: Images per batch on each device.
        num_workers: Worker processes of each loader, which decode and degrade.
        eval_crops: Crops of each image in evaluation, always at the same places.
        conditions: Degradations to test under, in turn: `clean`, `jpeg 75`, `rescale 0.5`, `blur 1`.
        val_fraction: Part of the training images held out where there is no validation part.
        seed: Seed of the split, the order, the crops and the degradations; by default that of `--seed_everything`.
        augment: Mirror training crops left to right at random.
        rescale_probability: Probability that a training image is rescaled.
        rescale: Smallest and largest factor.
        blur_probability: Probability that a training image is blurred.
        blur_sigma: Smallest and largest standard deviation of the blur, in pixels.
        jpeg_probability: Probability that a training image is encoded once more.
        jpeg_quality: Lowest and highest JPEG quality.
        cache: Decode training and validation images once and keep them in memory, 3 bytes a pixel; for small data.
        on_error: `raise` at a file that cannot be read, or `skip`: decode all files at the start, and leave such files
            out with a warning that counts them.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = tempfile.mkdtemp()
        >>> Image.new("L", (40, 30), 51).save(f"{root}/grey.png")
        >>> data = GeneratedImagesDataModule(root, crop_size=32, eval_crops=2)
        >>> batch = data.on_after_batch_transfer(next(iter(data.predict_dataloader())), 0)
        >>> batch["name"], batch["image"].shape, batch["condition"]
        (['grey.png'], torch.Size([1, 2, 3, 32, 32]), 'clean')
    """

    def __init__(
        self,
        root: str,
        class_names: tuple[str, str] = ("photographic", "generated"),
        crop_size: int = 96,
        batch_size: int = 32,
        num_workers: int = 0,
        eval_crops: int = 4,
        conditions: list[str] | None = None,
        val_fraction: float = 0.1,
        seed: int | None = None,
        augment: bool = True,
        rescale_probability: float = 0.3,
        rescale: tuple[float, float] = (0.5, 1.0),
        blur_probability: float = 0.1,
        blur_sigma: tuple[float, float] = (0.3, 1.5),
        jpeg_probability: float = 0.5,
        jpeg_quality: tuple[int, int] = (50, 95),
        cache: bool = False,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(batch_size, num_workers, seed, augment)
        for name, value in (("crop_size", crop_size), ("eval_crops", eval_crops)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        if len(set(class_names)) != 2:
            raise ValueError(f"class_names must be two different names, got {list(class_names)}")
        check_on_error(on_error)
        self.conditions = list(_CONDITIONS if conditions is None else conditions)
        if not self.conditions or len(set(self.conditions)) < len(self.conditions):
            raise ValueError(f"conditions must be one or more different ones, got {self.conditions}")
        for condition in self.conditions:
            Degradation.parse(condition)
        self._random_degradation = RandomDegradation(
            rescale_probability, rescale, blur_probability, blur_sigma, jpeg_probability, jpeg_quality
        )
        self.root = root
        self._class_names = list(class_names)
        self.crop_size = crop_size
        self.eval_crops = eval_crops
        self.val_fraction = val_fraction
        self.cache = cache
        self.on_error = on_error
        self._files: dict[Split, LabelledFiles] = {}

    @property
    def class_names(self) -> list[str]:
        """The two names, that of the photographs first."""
        return self._class_names

    def test_dataloader(self) -> list[DataLoader[Any]]:  # type: ignore[override]
        """Returns one loader for each condition, all over the same images."""
        files = self.files("test")
        return [
            self._loader("test", DataLoader, FixedBatches, data=_Crops(files, self._fixed_crops(condition), condition))
            for condition in self.conditions
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the seed of the checkpoint, and with the files that it held out."""
        self._files.clear()
        super().load_state_dict(state_dict)

    def files(self, split: Split) -> LabelledFiles:
        """Returns the files of a split: their `paths`, `names` and `labels`, in the order of the batches' `index`.

        Args:
            split: `train`, `val`, `test` or `predict`.
        """
        if split not in self._files:
            self._files[split] = self._find(split)
        return self._files[split]

    def read(self, path: Path, condition: str = "clean") -> Tensor:
        """Returns a whole image as it is under a condition.

        Args:
            path: The image file.
            condition: `clean`, or a degradation.

        Shape:
            - output: `[3, H, W]`, uint8
        """
        return degrade(read_image(path), Degradation.parse(condition))

    def mirrors(self, height: int, width: int, condition: str = "clean") -> bool:
        """Tells whether an image of a size is smaller than a crop, and so continued by its mirror image.

        Args:
            height: Height of the image as its file has it, in pixels.
            width: Width, likewise.
            condition: `clean`, or a degradation, which may rescale it.
        """
        return min(Degradation.parse(condition).size(height, width)) < self.crop_size

    def _find(self, split: Split) -> LabelledFiles:
        root = Path(self.root).expanduser()
        if split == "predict":
            files = find_unlabelled(root)
        else:
            files = find_labelled(root, split, self.class_names, self.val_fraction, self.seed)
        if self.on_error == "skip":
            files = files.select(find_readable(files.paths, files.names, self.num_workers))
        else:
            require_files(files)
        if not len(files):
            raise ValueError(f"{root} holds no image that can be read")
        if split != "predict":
            require_classes(files, root, self.class_names)
        return files

    def load_split(self, split: Split) -> BatchDataset:
        """Finds the images of a split, and decodes them where they are cached.

        Args:
            split: `train`, `val`, `test` or `predict`.
        """
        files = self.files(split)
        cache = self.cache and split in ("train", "val")  # the others are passed over once
        if split == "train":
            return _Crops(files, RandomCrop(self.crop_size, self._random_degradation), "random", cache)
        return _Crops(files, self._fixed_crops("clean"), "clean", cache)

    def _fixed_crops(self, condition: str) -> FixedCrops:
        return FixedCrops(self.crop_size, self.eval_crops, Degradation.parse(condition))


class _Crops(BatchDataset):
    """What is seen of each image of a batch."""

    def __init__(self, files: LabelledFiles, view: View, condition: str, cache: bool = False) -> None:
        self.files = files
        self.view = view
        self.condition = condition
        # Decoded before worker processes start, which then share the memory.
        self.images = [read_image(path) for path in files.paths] if cache else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, samples: SampleBatch) -> ImageBatch:
        chosen = samples.index.tolist()
        crops = [self.view(self._image(i), number) for i, number in zip(chosen, samples.key.tolist(), strict=True)]
        batch = samples.batch(torch.stack(crops), self.files.labels.index_select(0, samples.index))
        return {**batch, "name": [self.files.names[i] for i in chosen], "condition": self.condition}

    def _image(self, index: int) -> Tensor:
        return read_image(self.files.paths[index]) if self.images is None else self.images[index]
