"""A folder of the user's own images."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules._augmentation import turn
from datamodules._decoded import GIB, check_cache_gib, decode_parts
from datamodules._readable import OnError, check_on_error, find_readable
from datamodules._sampler import SampleBatch
from datamodules.image_data_module import BatchDataset, ImageDataModule, Split
from lightning_modules.imaging import (
    ImageBatch,
    check_noise_std,
    cut_crop,
    draw,
    find_images,
    mix,
    permutation,
    read_image,
    read_picture,
    stream,
)

# Set the place of a crop, and that of one that is scaled, apart from what else is derived from its key.
_PLACE_STREAM = 0xC209_9ED5
_SCALE_STREAM = 0x51AC_E0F7
# Sets the places of the parts of images that are kept apart from other streams of the seed.
_PART_STREAM = 0x70A7_0F1B
_BITS = 0x7FFF_FFFF
# Crops of an epoch, and of an evaluation, that there are at least: of few photographs several each.
_LEAST_CROPS = {"train": 1600, "val": 96, "test": 96}
# What images are scaled down by: each smooths in its own way, and none is to be learned.
_FILTERS = (Image.Resampling.BICUBIC, Image.Resampling.BOX)


class ImageFolderDataModule(ImageDataModule):
    """Images of any size and format in a folder and the folders below it.

    `predict` takes whole images, one a batch, to be restored as they are. `fit`, `validate` and `test` take square
    crops, to which the module adds its noise: in an epoch of training at other places each time, and in evaluation
    always at the same, several of each where images are few. An image smaller than a crop is continued by its mirror
    image. Grey, palette and CMYK images are converted to RGB, and the orientation that a camera recorded is applied;
    crops have eight bits, laid over white where there is transparency, and whole images the depth of their files and
    the colors beneath. There are no labels: every label is −1.

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
        augment: Mirror training crops left to right, and turn them by quarters, at random.
        rescale: Smallest and largest factor, 1 at most, by which the image is scaled down before a crop is taken, drawn
            for each crop: photographs at their own size are smooth, and carry the traces of JPEG. None leaves them.
        cache_gib: Memory of each process for decoded images, in GiB, at 3 bytes a pixel. Of images that are too large
            for their equal share of it a part is kept, at a place drawn by the seed, and their crops are of that part.
            0 keeps nothing: the whole image is decoded for each of its crops.
        crops_per_image: Training crops of each image in an epoch; by default as many as make 1600 of all images, a
            hundred batches of the default size, and one at least.
        on_error: `skip` decodes all files at the start and leaves out those that cannot be read, with a warning that
            counts them; `raise` ends the run at the first of them.

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
        rescale: tuple[float, float] | None = None,
        cache_gib: float = 2.0,
        crops_per_image: int | None = None,
        on_error: OnError = "skip",
    ) -> None:
        super().__init__(batch_size, num_workers, seed, augment)
        check_on_error(on_error)
        for name, value in (("crop_size", crop_size), ("crops_per_image", crops_per_image)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_cache_gib(cache_gib)
        if rescale is not None and not 0 < rescale[0] <= rescale[1] <= 1:
            raise ValueError(f"rescale must be two factors with 0 < lower ≤ upper ≤ 1, got {rescale}")
        if not 0 <= val_fraction <= 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        if noise_std is not None:
            check_noise_std(noise_std)
        self.root = root
        self.crop_size = crop_size
        self.val_fraction = val_fraction
        self.noise_std = noise_std
        self.rescale = rescale
        self.cache_gib = cache_gib
        self.crops_per_image = crops_per_image
        self.on_error = on_error
        self._paths: list[Path] = []

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Converts and augments; see `ImageDataModule.on_after_batch_transfer`."""
        converted = super().on_after_batch_transfer(batch, dataloader_idx)
        if batch.get("augment", False):
            converted["image"] = turn(converted["image"], batch["key"])
        return converted

    def has_split(self, split: Split) -> bool:
        """Tells whether a split has samples; those that are held out are tested on as well."""
        return super().has_split("val" if split == "test" else split)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Returns the validation batches; no loader at all where no image is held out."""
        return super().val_dataloader() if len(self._dataset("val")) else []

    def load_split(self, split: Split) -> BatchDataset:
        """Finds the images of a split.

        Args:
            split: `train`, `val`, `test` or `predict`.
        """
        root = Path(self.root).expanduser()
        paths = self._find(root)
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
        count = math.ceil(_LEAST_CROPS[split] / max(len(chosen), 1))
        if train and self.crops_per_image is not None:
            count = self.crops_per_image
        room = self.cache_gib * GIB / len(paths)
        least = self.crop_size / (1.0 if self.rescale is None else self.rescale[0])
        parts = None
        if room >= 3 * least**2:
            keys = draw(stream(self.seed, _PART_STREAM), torch.arange(len(paths)))[held_out != train]
            parts = decode_parts(chosen, int(room / 3), keys, self.num_workers)
        return _Crops(chosen, self.crop_size, self.rescale, parts, count)

    def _find(self, root: Path) -> list[Path]:
        """The files, looked at once."""
        if not self._paths:
            paths = find_images(root)
            if self.on_error == "skip":
                readable = find_readable(paths, [str(path) for path in paths], self.num_workers)
                paths = [path for path, good in zip(paths, readable.tolist(), strict=True) if good]
                if not paths:
                    raise ValueError(f"{root} holds no image that can be read")
            self._paths = paths
        return self._paths

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
    """Crops of each image, each at a place, and of the image at a scale, drawn from the sample's key.

    Args:
        paths: The files.
        size: Side of a crop.
        rescale: Range of the factors by which images are scaled down.
        parts: The images, or what is kept of each; None decodes them for each crop.
        crops_per_image: Crops of each image.
    """

    def __init__(
        self,
        paths: list[Path],
        size: int,
        rescale: tuple[float, float] | None,
        parts: list[Tensor] | None,
        crops_per_image: int,
    ) -> None:
        self.paths = paths
        self.size = size
        self.rescale = rescale
        self.crops_per_image = crops_per_image
        self.parts = parts

    def __len__(self) -> int:
        return len(self.paths) * self.crops_per_image

    def __getitem__(self, samples: SampleBatch) -> ImageBatch:
        draws = (samples.index % len(self.paths), *(mix(samples.key + each) for each in (_PLACE_STREAM, _SCALE_STREAM)))
        return samples.batch(
            torch.stack([self._crop(*each) for each in zip(*(d.tolist() for d in draws), strict=True)])
        )

    def _crop(self, index: int, place: int, scale: int) -> Tensor:
        image = read_image(self.paths[index]) if self.parts is None else self.parts[index]
        down, right = place & _BITS, place >> 32 & _BITS
        height, width = image.shape[1:]
        if self.rescale is not None:
            lower, upper = self.rescale
            factor = lower + (upper - lower) * (scale & _BITS) / _BITS
            factor = max(factor, self.size / min(height, width))  # an image that is small is scaled down less
            if factor < 1:
                side = self.size / factor
                corner = ((height - side) * down / _BITS, (width - side) * right / _BITS)
                return _scaled(image, corner, side, self.size, _FILTERS[scale >> 32 & 1])
        top, left = down % max(height - self.size + 1, 1), right % max(width - self.size + 1, 1)
        return cut_crop(image, top, left, self.size)


def _scaled(image: Tensor, corner: tuple[float, float], side: float, size: int, resampling: Image.Resampling) -> Tensor:
    """A square of the image scaled down to `size` pixels, as it would be cut out of the whole image scaled down.

    Shape:
        - image: `[3, H, W]`, uint8
        - output: `[3, size, size]`, uint8
    """
    margin = math.ceil(2 * side / size) + 1  # as far as the wider filter reaches
    spans, box = [], []
    for start, length in zip(corner, image.shape[1:], strict=True):
        first, last = max(int(start) - margin, 0), min(math.ceil(start + side) + margin, length)
        spans.append(slice(first, last))
        box.append((start - first, min(start - first + side, last - first)))
    window = Image.fromarray(image[:, spans[0], spans[1]].permute(1, 2, 0).contiguous().numpy())
    (top, bottom), (left, right) = box
    return torch.from_numpy(np.array(window.resize((size, size), resampling, (left, top, right, bottom)))).permute(
        2, 0, 1
    )


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
        # As `restore` takes it: with all its bits, and the colors below what is transparent.
        batch = samples.batch(torch.stack([read_picture(self.paths[i]).pixels.expand(3, -1, -1) for i in chosen]))
        batch["clean"] = False
        batch["name"] = [self.names[i] for i in chosen]
        if self.noise_std is not None:
            batch["noise_std"] = torch.full(samples.index.shape, self.noise_std)
        return batch
