"""Small patches of images, or the samples of a file, for what learns from their distribution."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules._sampler import EpochBatches, SampleBatch
from datamodules.image_data_module import BatchDataset, ImageDataModule, Split
from datamodules.image_folder import ImageFolderDataModule
from datamodules.photo_crops import PhotoCropsDataModule
from lightning_modules.imaging import ImageBatch, check_noise_std, draw, find_images, mix, read_image, stream

_PATCHES, _VALIDATION = 101, 102  # streams apart from those of the loaders
# A batch whose samples are within this many times its own length is read in one piece.
_SPAN = 4


class PatchDataModule(ImageDataModule):
    """Patches at random places of many images, or the samples of a `.npy` file, streamed in batches.

    One source is given: `root`, a folder of images; `images`, another DataModule, whose training images are used; or
    `array`, a file with an array [N, D], which is read batch by batch and may be larger than the memory. Where none is,
    the images are crops of the photographs that come with the installation.

    `predict` takes whole images: those of `predict_root`, else those of `root`.

    Args:
        root: Folder with images.
        images: DataModule with images.
        array: File with an array [N, D] of N samples, made by `numpy.save`.
        patch_size: Side of a patch, in pixels.
        patches_per_image: Patches drawn from each image. An image has the same ones in every epoch.
        gray: Turn colors into gray.
        remove_mean: Subtract each patch's mean.
        batch_size: Patches per batch on each device.
        num_workers: Worker processes of each loader.
        val_fraction: Part of the images (of the samples) kept for validation.
        shuffle: Draw the order anew in each epoch. Exact EM does not need it; stepwise EM does.
        seed: Seed of the places, the split and the order; by default that of `--seed_everything`.
        predict_root: Folder with the images to restore.
        noise_std: Standard deviation of the noise of the images to restore, where white is 1.
        rows: The former name of `array`.
        grey: The former name of `gray`.

    Example:
        >>> from datamodules import PhotoCropsDataModule
        >>> data = PatchDataModule(images=PhotoCropsDataModule(train_crops=10), patches_per_image=5, batch_size=16)
        >>> data.setup("fit")
        >>> data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)["image"].shape
        torch.Size([16, 1, 8, 8])
    """

    def __init__(
        self,
        root: str | None = None,
        images: L.LightningDataModule | None = None,
        array: str | None = None,
        patch_size: int = 8,
        patches_per_image: int = 1000,
        gray: bool = True,
        remove_mean: bool = True,
        batch_size: int = 16384,
        num_workers: int = 0,
        val_fraction: float = 0.0,
        shuffle: bool = False,
        seed: int | None = None,
        predict_root: str | None = None,
        noise_std: float | None = None,
        rows: str | None = None,
        grey: bool | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if rows is not None:
            array = rows
            warnings.warn("PatchDataModule: rows is now array", FutureWarning, stacklevel=2)
        if grey is not None:
            gray = grey
            warnings.warn("PatchDataModule: grey is now gray", FutureWarning, stacklevel=2)
        given = [name for name, source in (("root", root), ("images", images), ("array", array)) if source is not None]
        if len(given) > 1:
            raise ValueError(f"give one of root, images and array, got {given}")
        if not given:
            images = PhotoCropsDataModule(augment=False)
        for name, value in (("patch_size", patch_size), ("patches_per_image", patches_per_image)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and below 1, got {val_fraction}")
        if noise_std is not None:
            check_noise_std(noise_std)
        self.root, self.images, self.array = root, images, array
        self.patch_size, self.patches_per_image = patch_size, patches_per_image
        self.gray, self.remove_mean = gray, remove_mean
        self.val_fraction, self.shuffle = val_fraction, shuffle
        self.predict_root, self.noise_std = predict_root, noise_std

    def prepare_data(self) -> None:
        """Lets the other DataModule prepare its data."""
        if self.images is not None:
            self.images.prepare_data()

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns the training batches, in order unless `shuffle` is set."""
        return self._training_loader(EpochBatches, self.shuffle)

    def has_split(self, split: Split) -> bool:
        """Tells whether a split has samples: what is held out to validate and test on, a folder to predict."""
        if split == "predict":
            return (self.predict_root or self.root) is not None
        return super().has_split("val" if split == "test" else split)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Returns the validation batches; no loader at all where nothing is held out."""
        return super().val_dataloader() if len(self._dataset("val")) else []

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Converts patches to float in [0, 1] and removes their means, on the device.

        Args:
            batch: A batch as its loader made it.
            dataloader_idx: Unused; Lightning passes it.
        """
        whole = "name" in batch
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        image = batch["image"]
        if whole and self.gray and image.shape[1] == 3 and bool((image == image[:, :1]).all()):
            batch["image"] = image[:, :1]  # a gray file, decoded to three equal channels
        if not whole and self.remove_mean and self.array is None:
            batch["image"] = image - image.mean(dim=(1, 2, 3), keepdim=True)
        return batch

    def _batch_size(self, split: Split) -> int:
        return 1 if split == "predict" else self.batch_size

    def load_split(self, split: Split) -> BatchDataset:
        """Draws the patches of a split; to `predict`, finds whole images.

        Args:
            split: `train`, `val` or `predict`.
        """
        if split == "predict":
            folder = self.predict_root or self.root
            if folder is None:
                raise ValueError(
                    "predict restores whole images: give predict_root, a folder; the components of an array's rows are "
                    "those of load_from_checkpoint(CHECKPOINT).predict(rows) of the module's class"
                )
            return ImageFolderDataModule(folder, noise_std=self.noise_std).load_split("predict")
        if self.array is not None:
            return _FileSamples(Path(self.array).expanduser(), self.val_fraction, split == "train")
        return _Patches(self._draw_patches(split == "train"))

    def _draw_patches(self, train: bool) -> Tensor:
        """Patches `[N, C, p, p]`, uint8, of the images on one side of the split."""
        source = self._folder_images() if self.root is not None else self._module_images()
        kept = [image for number, image in enumerate(source) if self._held_out(number) != train]
        if not kept:
            if train:
                raise ValueError(f"val_fraction={self.val_fraction} leaves no image to learn from")
            return torch.empty(0, 1, self.patch_size, self.patch_size, dtype=torch.uint8)
        places = stream(self.seed, _PATCHES, int(train))
        patches = []
        for number, image in enumerate(kept):
            index = torch.arange(number * self.patches_per_image, (number + 1) * self.patches_per_image)
            patches.append(self._cut(image, draw(places, index)))
        return torch.cat(patches)

    def _held_out(self, number: int) -> bool:
        share = int(draw(stream(self.seed, _VALIDATION), torch.tensor(number))) / 2**62
        return share < self.val_fraction

    def _folder_images(self) -> Any:
        for path in find_images(Path(str(self.root)).expanduser()):
            yield self._as_gray(read_image(path))

    def _module_images(self) -> Any:
        assert self.images is not None
        if isinstance(self.images, ImageDataModule):
            self.images.load_state_dict(self.state_dict())  # one seed, unless the images have their own
        self.images.setup("fit")
        for batch in self.images.train_dataloader():
            images = self.images.on_after_batch_transfer(batch, 0)["image"]
            yield from self._as_gray((images * 255).round().to(torch.uint8))

    def _as_gray(self, image: Tensor) -> Tensor:
        if not self.gray or image.shape[-3] == 1:
            return image
        luma = image.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32)
        return torch.einsum("c,...chw->...hw", luma, image.float()).round().to(torch.uint8).unsqueeze(-3)

    def _cut(self, image: Tensor, keys: Tensor) -> Tensor:
        side = self.patch_size
        height, width = image.shape[-2:]
        if min(height, width) < side:
            raise ValueError(f"an image of {height}×{width} is smaller than patch_size={side}")
        top = (keys & 0x7FFFFFFF) % (height - side + 1)
        left = (mix(keys) & 0x7FFFFFFF) % (width - side + 1)
        steps = torch.arange(side)
        rows, columns = top[:, None] + steps, left[:, None] + steps
        return image[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)


class _Patches(BatchDataset):
    """Patches in memory, uint8."""

    def __init__(self, patches: Tensor) -> None:
        self.patches = patches

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, samples: SampleBatch) -> ImageBatch:
        return samples.batch(self.patches.index_select(0, samples.index))


class _FileSamples(BatchDataset):
    """Samples of a `.npy` file, read when they are asked for: pages that are mapped would count as memory."""

    def __init__(self, path: Path, val_fraction: float, train: bool) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file: array must be one with an array [N, D], made by numpy.save")
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise ValueError(
                f"{path} holds no array of numbers that numpy.save has written; rows of a CSV file become one by "
                "numpy.save('rows.npy', numpy.loadtxt('rows.csv', delimiter=','))"
            ) from None
        if array.ndim != 2 or array.dtype.kind not in "fiu" or not array.flags.c_contiguous:
            raise ValueError(f"{path} must hold numbers [N, D] in C order, got {array.dtype} {array.shape}")
        self.path, self.dtype, self.width = path, array.dtype, array.shape[1]
        # float32 holds integers of two bytes; torch reads only numbers in the machine's own byte order
        wide = array.dtype.itemsize > 2
        self.kept = array.dtype.newbyteorder("=") if array.dtype.kind == "f" else np.dtype("f8" if wide else "f4")
        self.offset = array.offset
        count = array.shape[0]
        kept = count - round(val_fraction * count)
        self.first: int = 0 if train else kept
        self.length: int = kept if train else count - kept
        if train and not self.length:
            raise ValueError(f"{path} holds no samples to learn from: {count} samples, val_fraction={val_fraction}")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, samples: SampleBatch) -> ImageBatch:
        index = samples.index
        low, high = int(index.min()), int(index.max()) + 1
        if high - low <= _SPAN * len(index):
            found = self._read(low, high - low)[(index - low).numpy()]
        else:
            order, inverse = np.unique(index.numpy(), return_inverse=True)
            found = np.concatenate([self._read(int(first), 1) for first in order])[inverse]
        return samples.batch(torch.from_numpy(found.astype(self.kept, copy=False)))

    def _read(self, first: int, count: int) -> NDArray[Any]:
        start = self.offset + (self.first + first) * self.width * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, count * self.width, offset=start).reshape(count, self.width)
