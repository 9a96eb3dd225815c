"""A folder of the user's own images."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules._sampler import SampleBatch
from datamodules.image_data_module import BatchDataset, ImageDataModule, Split
from lightning_modules.imaging import ImageBatch, check_noise_std, cut_crop, find_images, mix, permutation, read_image

_PLACE_STREAM = 0xC209_9ED5  # sets the place of a crop apart from what else is derived from its key


class ImageFolderDataModule(ImageDataModule):
    """Images of any size and format in a folder and the folders below it.

    `predict` takes whole images, one a batch, to be restored as they are. `fit`, `validate` and `test` take square
    crops, to which the module adds its noise: one crop of each image in an epoch, at another place in each epoch of
    training and always at the same place in evaluation. An image smaller than a crop is continued by its mirror
    image. Grey, palette, 16-bit, floating-point and CMYK images are converted to eight-bit RGB, transparent ones laid
    over white, and the orientation that a camera recorded is applied. There are no labels: every label is −1.

    Args:
        root: Folder with the images.
        crop_size: Side of a crop, in pixels.
        batch_size: Crops per batch on each device; `predict` takes one image at a time.
        num_workers: Worker processes of each loader, which decode the files.
        val_fraction: Part of the images, chosen by seed, that is kept for validation and test. 1 keeps all of them, for
            a folder that is there to be tested on; 0 trains on all of them, without validation.
        seed: Seed of the split, the crops, the order, the augmentation and the noise keys; by default that of
            `--seed_everything`.
        noise_std: Standard deviation of the noise that the images in the folder have, on a scale where white is 1,
            where it is known; handed on in `predict`.
        augment: Mirror training crops left to right at random.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = tempfile.mkdtemp()
        >>> Image.new("L", (40, 30), 51).save(f"{root}/grey.png")
        >>> data = ImageFolderDataModule(root, noise_std=25 / 255)
        >>> batch = data.on_after_batch_transfer(next(iter(data.predict_dataloader())), 0)
        >>> batch["name"], batch["image"].shape
        (['grey.png'], torch.Size([1, 3, 30, 40]))
    """

    def __init__(
        self,
        root: str,
        crop_size: int = 64,
        batch_size: int = 16,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        seed: int | None = None,
        noise_std: float | None = None,
        augment: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, augment)
        if crop_size < 1:
            raise ValueError(f"crop_size must be at least 1, got {crop_size}")
        if not 0 <= val_fraction <= 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        if noise_std is not None:
            check_noise_std(noise_std)
        self.root = root
        self.crop_size = crop_size
        self.val_fraction = val_fraction
        self.noise_std = noise_std

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Returns the validation batches; no loader at all where no image is held out."""
        return super().val_dataloader() if len(self._dataset("val")) else []

    def load_split(self, split: Split) -> BatchDataset:
        """Finds the images of a split.

        Args:
            split: `train`, `val`, `test` or `predict`.
        """
        root = Path(self.root).expanduser()
        paths = find_images(root)
        if split == "predict":
            return _WholeImages(paths, [path.relative_to(root).as_posix() for path in paths], self.noise_std)
        held_out = self._held_out(len(paths))
        train = split == "train"
        chosen = [path for path, out in zip(paths, held_out.tolist(), strict=True) if out != train]
        if not chosen and split != "val":
            purpose, change = ("train on", "a smaller") if train else ("test on", "a larger")
            raise ValueError(
                f"val_fraction={self.val_fraction} of the {len(paths)} images in {root} leaves none to {purpose}. Give "
                f"{change} one, or add images"
            )
        return _Crops(chosen, self.crop_size)

    def _held_out(self, length: int) -> Tensor:
        count = round(self.val_fraction * length)
        if 0 < self.val_fraction < 1:
            count = min(max(count, 1), max(length - 1, 1))  # some image on either side, where there are two
        held_out = torch.zeros(length, dtype=torch.bool)
        held_out[permutation(length, self.seed)[:count]] = True
        return held_out

    def _batch_size(self, split: Split) -> int:
        return 1 if split == "predict" else self.batch_size


class _Crops(BatchDataset):
    """One crop of each image, at a place drawn from the sample's key."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths = paths
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, samples: SampleBatch) -> ImageBatch:
        places = zip(samples.index.tolist(), mix(samples.key + _PLACE_STREAM).tolist(), strict=True)
        return samples.batch(torch.stack([self._crop(read_image(self.paths[i]), place) for i, place in places]))

    def _crop(self, image: Tensor, place: int) -> Tensor:
        height, width = image.shape[1:]
        top = (place & 0x7FFFFFFF) % max(height - self.size + 1, 1)
        left = (place >> 32 & 0x7FFFFFFF) % max(width - self.size + 1, 1)
        return cut_crop(image, top, left, self.size)


class _WholeImages(BatchDataset):
    """The images as they are, one a batch, to which no noise is to be added."""

    def __init__(self, paths: list[Path], names: list[str], noise_std: float | None) -> None:
        self.paths = paths
        self.names = names
        self.noise_std = noise_std

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, samples: SampleBatch) -> ImageBatch:
        chosen = samples.index.tolist()
        batch = samples.batch(torch.stack([read_image(self.paths[i]) for i in chosen]))
        batch["clean"] = False
        batch["name"] = [self.names[i] for i in chosen]
        if self.noise_std is not None:
            batch["noise_std"] = torch.full(samples.index.shape, self.noise_std)
        return batch
