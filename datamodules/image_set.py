"""Images of the user's own, in memory or in a folder, with noise or without, and pairs of both."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules._sampler import SampleBatch
from datamodules.image_data_module import BatchDataset, ImageDataModule, Split
from lightning_modules.imaging import (
    ImageBatch,
    check_noise_std,
    color_channels,
    corner,
    cut_crop,
    find_images,
    find_white,
    mix,
    read_picture,
    seeded_uniform,
    to_picture,
)

# Sets the place of a crop apart from what else is derived from its key.
_PLACE_STREAM = 0x5BE0_CD19
# Largest value of floating point that noise may have brought an image to where white is 1.
_MOST = 10.0

Images = Tensor | Sequence[Any] | str | Path


class ImageSetDataModule(ImageDataModule):
    """Images to learn from: a tensor, a list, or a folder; clean, noisy, or noisy ones with their clean sides.

    Images of one size, in memory, are taken whole. Of a folder, and where sizes differ, batches hold square crops, at
    other places each time, whose pixels are those of the image: nothing is scaled, turned or laid over white. The
    channels are those of the first image; gray among color is taken for color, and color among gray for gray. All
    splits are of the same images.

    Args:
        images: Images `[N, C, H, W]`; a list of tensors `[C, H, W]`, of arrays `[H, W]` or `[H, W, C]`, of PIL images
            or of paths; or a folder. Bytes, or floating point where white is 1.
        clean: The clean side of each, in the same order, or a folder with files of the same names; None where the
            images are clean, or have no clean side.
        noise_std: Standard deviation of the noise that the images have, where it is known, on a scale where white is 1.
        crop_size: Side of a crop, in pixels; an image smaller than that is continued by its mirror image.
        batch_size: Images per batch on each device; of fewer images there are several crops each.
        num_workers: Worker processes of each loader, which decode the files.
        seed: Seed of the order, the crops and the noise keys; by default that of `--seed_everything`.

    Shape:
        - images: `[N, C, H, W]`, where it is a tensor
        - clean: `[N, C, H, W]`, where it is a tensor

    Raises:
        ValueError: If there is no image, one is none, or the two sides of a pair differ in number or size.

    Example:
        >>> data = ImageSetDataModule([torch.rand(1, 20, 30), torch.rand(1, 24, 18)], crop_size=16, batch_size=4)
        >>> batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
        >>> batch["image"].shape
        torch.Size([4, 1, 16, 16])
    """

    def __init__(
        self,
        images: Images,
        clean: Images | None = None,
        noise_std: float | None = None,
        crop_size: int = 128,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if crop_size < 1:
            raise ValueError(f"crop_size must be at least 1, got {crop_size}")
        if noise_std is not None:
            check_noise_std(noise_std)
        self.images = images
        self.clean = clean
        self.noise_std = noise_std
        self.crop_size = crop_size

    def load_split(self, split: Split) -> BatchDataset:
        """Finds the images, which are the same in every split.

        Args:
            split: `train`, `val`, `test` or `predict`.
        """
        sides = [_sources(self.images, "images")] if self.clean is None else _pairs(self.images, self.clean)
        return _ImageSet(sides, self.noise_std, self.crop_size, self.batch_size if split == "train" else 1)


class _ImageSet(BatchDataset):
    """Whole images, or crops at places drawn from the samples' keys.

    Args:
        sides: The images; of pairs, the noisy ones and then the clean ones.
        noise_std: Level of the noise that they have.
        crop_size: Side of a crop.
        least: Samples that there are at least, where they are crops.
    """

    def __init__(self, sides: list[list[Tensor | Path]], noise_std: float | None, crop_size: int, least: int) -> None:
        self.sides, self.noise_std, self.crop_size = sides, noise_std, crop_size
        first = sides[0]
        self.whole = len({source.shape if isinstance(source, Tensor) else None for source in first}) == 1
        self.whole = self.whole and isinstance(first[0], Tensor)
        self.repeats = 1 if self.whole else math.ceil(least / len(first))
        self.channels = len(_pixels(first[0]))

    def __len__(self) -> int:
        return len(self.sides[0]) * self.repeats

    def __getitem__(self, samples: SampleBatch) -> ImageBatch:
        numbers = (samples.index % len(self.sides[0])).tolist()
        places = seeded_uniform(mix(samples.key + _PLACE_STREAM), 2).tolist()
        taken = [self._sample(number, (place[0], place[1])) for number, place in zip(numbers, places, strict=True)]
        stacked = [torch.stack(side) for side in zip(*taken, strict=True)]
        batch = samples.batch(stacked[-1])
        if len(stacked) == 2:
            batch["noisy"] = stacked[0]
        if self.noise_std is not None:
            batch["noise_std"] = torch.full((len(numbers),), self.noise_std)
            batch["clean"] = False
        return batch

    def _sample(self, number: int, place: tuple[float, float]) -> list[Tensor]:
        """An image, or the two sides of a pair at the same place."""
        pixels = [self._with_channels(_pixels(side[number])) for side in self.sides]
        if len({each.shape for each in pixels}) > 1:
            raise ValueError(
                f"the two sides of pair {number} differ: {' and '.join(str(list(each.shape)) for each in pixels)}"
            )
        if self.whole:
            return pixels
        height, width = pixels[0].shape[1:]
        start = corner(place, height, width, self.crop_size)
        return [cut_crop(each, *start, self.crop_size) for each in pixels]

    def _with_channels(self, pixels: Tensor) -> Tensor:
        if len(pixels) == self.channels:
            return pixels
        if len(pixels) == 1:
            return pixels.expand(self.channels, -1, -1)
        if self.channels == 1:
            return pixels.mean(0, keepdim=True)
        raise ValueError(f"the first image has {self.channels} channels and another one {len(pixels)}")


def _pairs(noisy: Images, clean: Images) -> list[list[Tensor | Path]]:
    """Both sides of each pair, in one order."""
    sides = [_sources(noisy, "images"), _sources(clean, "clean")]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"pairs need as many clean images as noisy ones, got {len(sides[1])} and {len(sides[0])}")
    if isinstance(noisy, str | Path) and isinstance(clean, str | Path):
        names = [[_below(path, root) for path in side] for side, root in zip(sides, (noisy, clean), strict=True)]
        differing = sorted(set(names[0]) ^ set(names[1]))
        if differing:
            raise ValueError(f"pairs have the same names in both folders; {differing[0]} is in one of them only")
    return sides


def _below(path: Tensor | Path, root: str | Path) -> str:
    assert isinstance(path, Path)
    return path.relative_to(Path(root).expanduser()).with_suffix("").as_posix()


def _sources(images: Any, name: str) -> list[Tensor | Path]:
    """Pixels `[C, H, W]`, or the paths of files that hold them."""
    if isinstance(images, str | Path):
        return [*find_images(Path(images).expanduser())]
    if isinstance(images, Tensor | np.ndarray) and images.ndim != 4:
        raise ValueError(
            f"{name} must be [N, C, H, W], got {list(images.shape)}: put a single image into a list, [image]"
        )
    if isinstance(images, np.ndarray):
        raise ValueError(
            f"{name} of NumPy arrays must be a list of [H, W] or [H, W, C], got one array: give list(array)"
        )
    if not isinstance(images, Tensor | list | tuple):
        raise ValueError(f"{name} must be a tensor, a list of images or a folder, got {type(images).__name__}")
    if len(images) == 0:
        raise ValueError(f"{name} has no image: give at least one")
    return [_source(image, f"{name}[{index}]") for index, image in enumerate(images)]


def _source(image: Any, name: str) -> Tensor | Path:
    if isinstance(image, str | Path):
        path = Path(image).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{name}: {path} is not a file")
        return path
    if isinstance(image, Image.Image):
        return to_picture(image).pixels
    if isinstance(image, np.ndarray) and image.ndim in (2, 3):
        array = image if image.ndim == 3 else image[..., None]
        planes = torch.from_numpy(np.ascontiguousarray(array[..., : color_channels(array)])).movedim(-1, 0)
    elif isinstance(image, Tensor) and image.ndim in (2, 3):
        planes = image.detach().cpu() if image.ndim == 3 else image.detach().cpu()[None]
    else:
        got = list(image.shape) if isinstance(image, Tensor | np.ndarray) else type(image).__name__
        raise ValueError(f"{name} must be a tensor [C, H, W], an array [H, W, C], a PIL image or a path, got {got}")
    if 0 in planes.shape:
        raise ValueError(f"{name} has no pixels: {list(planes.shape)}")
    if planes.dtype == torch.uint8:
        return planes  # a quarter of the memory
    if not planes.is_floating_point():
        return planes.float() / find_white(planes.movedim(0, -1).numpy(), name)[0]
    if not planes.isfinite().all():
        raise ValueError(f"{name} has NaN or infinite pixels: replace them, or leave the image out")
    if planes.amax() > _MOST:
        raise ValueError(
            f"{name} has the value {float(planes.amax()):g}: floating point has 1 for white; divide by 255"
        )
    return planes.float()


def _pixels(source: Tensor | Path) -> Tensor:
    pixels = source if isinstance(source, Tensor) else read_picture(source).pixels
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
