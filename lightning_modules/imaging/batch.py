"""Batch contract: what data hands to modules, and how a plain `(image, label)` becomes it."""

from collections.abc import Collection, Mapping
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from lightning_modules.imaging.counters import draw, stream

# A stream of keys for each split: validation must not repeat the noise of training; predict shows the images of test.
SPLIT_STREAMS = {"train": 0, "val": 1, "test": 2, "predict": 2}
_KEYS = 1  # sets the keys of an epoch apart from its order

# The two lines that supply an entry.
_REMEDIES = {
    "image": ("image = pixels.float() / 255  # [B, C, H, W], white is 1", "image"),
    "label": ("label = torch.full((len(image),), -1)  # int64, the number of the class; -1: unknown", "label"),
    "weight": ("weight = torch.ones(len(image))  # 0: a repeat that fills up the batch", "weight"),
    "key": (
        "from lightning_modules.imaging import draw, key_stream  # or hand over (image, label), which needs no key",
        "draw(key_stream(0, epoch), torch.as_tensor(index))  # int64, another one for each sample",
    ),
    "index": ("index = torch.tensor(positions)  # int64, the samples' positions in the data set", "index"),
    "name": ("name = [f'{position:05d}.png' for position in positions]  # paths below the root of the data", "name"),
    "noise_std": (
        "level = 25 / 255  # of the noise that the images have; white is 1",
        "torch.full((len(image),), level)",
    ),
}
_INTEGERS = ("label", "key", "index")


class ImageBatch(TypedDict, total=False):
    """A batch of B images.

    Entries:
        - image: `[B, C, H, W]`, floating point, black is 0 and white is 1; of a detector `[B, V, C, S, S]`, V crops of
          each image. Between a loader and `ImageDataModule.on_after_batch_transfer` they are bytes.
        - label: `[B]`, int64, the number of the class; −1 where it is unknown.
        - weight: `[B]`, floating point. The mean of `weight · value` over a batch, averaged over processes and
          accumulated batches, is the exact mean over the samples; a padded repeat has the weight 0.
        - key: `[B]`, int64. Whatever is drawn at random for a sample follows from its key: its noise, crop and
          augmentation. Keys change from epoch to epoch in training only.
        - index: `[B]`, int64, the sample's position in its data set.
        - name: list of B paths below the root of the data, by which results are called.
        - noisy: like image, the noisy side of a pair whose clean side is image; left out where noise is to be added,
          or where the images are noisy and have no clean side.
        - noise_std: `[B]`, or a map `[B, 1, H, W]`, floating point, the standard deviation of the noise that the images
          already have, where white is 1; left out where it is unknown.
        - clean: whether the images of a batch to predict are clean, so that the module's noise is added first; False,
          as where it is left out, for images that are restored as they are. Only prediction reads it.
        - condition: the degradation of all images of the batch, such as `jpeg 75`.
        - unseen: `[B]`, bool, whether an image is of a source that is not trained on; of a detector's labelled data.
        - augment: private to `ImageDataModule`.
    """

    image: Tensor
    label: Tensor
    weight: Tensor
    key: Tensor
    index: Tensor
    name: list[str]
    noisy: Tensor
    noise_std: Tensor
    clean: bool
    condition: str
    unseen: Tensor
    augment: bool


def key_stream(seed: int, epoch: int) -> Tensor:
    """The stream that an epoch's keys are drawn from, by the samples' indices.

    Shape:
        - output: `[]`, int64
    """
    return stream(seed, epoch, _KEYS)


def as_batch(
    batch: Any, *, seed: int, epoch: int, rank: int, world_size: int, position: int, split_stream: int
) -> ImageBatch:
    """Turns what a data loader yields into an `ImageBatch`.

    `(image, label)`, `(image,)` or an image tensor gets weights of 1, and index and key by its position in the order of
    all processes together. A dict keeps what it has; missing weights are 1 and missing labels −1. It gets no key: its
    maker decides what one sample is.

    Args:
        batch: The batch.
        seed: Seed of the keys.
        epoch: Epoch of training; 0 in evaluation, which sees the same noise every time.
        rank: Number of this process.
        world_size: Number of processes.
        position: How many samples this process has seen in this epoch before.
        split_stream: Which of `SPLIT_STREAMS`.

    Raises:
        TypeError: If the batch is of another form, or its labels are not integers.

    Example:
        >>> where = {"seed": 0, "epoch": 0, "rank": 0, "world_size": 1, "position": 6, "split_stream": 0}
        >>> batch = as_batch((torch.rand(2, 3, 8, 8), torch.tensor([4, 1])), **where)
        >>> batch["label"].tolist(), batch["index"].tolist(), batch["weight"].tolist()
        ([4, 1], [6, 7], [1.0, 1.0])
    """
    result: dict[str, Any]
    if isinstance(batch, Mapping):
        result = dict(batch)
    else:
        entries = (batch,) if isinstance(batch, Tensor) else batch
        if not isinstance(entries, tuple | list) or len(entries) not in (1, 2) or not isinstance(entries[0], Tensor):
            raise TypeError(
                f"a batch must be a dict, (image, label) or a tensor of images, got {_describe(batch)}: give a dict "
                "with the entries of lightning_modules.imaging.ImageBatch for anything else"
            )
        image = entries[0]
        index = (torch.arange(len(image), device=image.device) + position) * world_size + rank
        keys = draw(key_stream(int(stream(seed, split_stream)), epoch), index)
        result = {"image": image, "index": index, "key": keys}
        if len(entries) == 2:
            result["label"] = _integers(entries[1]).to(image.device)
    images = result.get("image")
    if isinstance(images, Tensor):
        result.setdefault("label", images.new_full((len(images),), -1, dtype=torch.int64))
        result.setdefault("weight", torch.ones(len(images), device=images.device))
    return cast(ImageBatch, result)


def check_batch(batch: Mapping[str, Any], needed: Collection[str], image_channels: int | None = None) -> None:
    """Refuses a batch that is not what `ImageBatch` describes; for the first batch of a run, because it waits for it.

    Args:
        batch: The batch, as it is on the device.
        needed: Entries without which the module cannot do.
        image_channels: How many channels the images must have; None for any number.

    Raises:
        TypeError: If an entry is of another type, such as bytes for images.
        ValueError: If an entry is missing, of another length, or out of range.
    """
    for name in needed:
        if name not in batch:
            line, value = _REMEDIES[name]
            raise ValueError(
                f"the batch has no entry {name!r}, which is needed; it has {', '.join(batch) or 'none'}. Supply it in "
                f'the data set or the DataModule:\n    {line}\n    batch["{name}"] = {value}'
            )
    if "image" in batch:
        _check_image(batch["image"], image_channels)
    if "noisy" in batch:
        _check_image(batch["noisy"], image_channels, "noisy")
        if batch["noisy"].shape != batch["image"].shape:
            raise ValueError(
                f"the two sides of a pair must have one shape, got noisy {list(batch['noisy'].shape)} and image "
                f"{list(batch['image'].shape)}"
            )
    size = len(batch["image"]) if "image" in batch else None
    for name in ("label", "key", "index", "weight", "name"):
        if name in batch:
            _check_entry(name, batch[name], size)
    if "noise_std" in batch:
        level = torch.as_tensor(batch["noise_std"])
        if level.ndim not in (0, 1, 4) or (level.ndim and size is not None and len(level) not in (1, size)):
            raise ValueError(f"noise_std must be one number for each of the {size} images, got {_describe(level)}")
        for extreme in level.aminmax() if level.numel() else ():
            check_noise_std(float(extreme))


def check_noise_std(value: float, name: str = "noise_std") -> None:
    """Refuses a noise level that is not on the scale where white is 1.

    Example:
        >>> check_noise_std(25)
        Traceback (most recent call last):
        ValueError: noise_std must lie between 0 and 1, where white is 1, got 25; 25 of 255 is 0.0980
    """
    if not 0 <= value <= 1:
        hint = f"; {value:g} of 255 is {value / 255:.4f}" if value > 1 else ""
        raise ValueError(f"{name} must lie between 0 and 1, where white is 1, got {value}{hint}")


def _check_image(image: Any, channels: int | None, name: str = "image") -> None:
    if not isinstance(image, Tensor):
        raise TypeError(f"{name} must be a tensor [B, C, H, W], got {_describe(image)}")
    if not image.is_floating_point():
        raise TypeError(
            f"{name} must be floating point, where white is 1, got {image.dtype}: divide bytes by 255 or "
            "subclass datamodules.ImageDataModule, which converts them on the device"
        )
    if image.ndim != 4:
        raise ValueError(f"{name} must be [B, C, H, W], got {list(image.shape)}")
    if image.numel() == 0:
        raise ValueError(f"the batch is empty: {name} is {list(image.shape)}; leave it out, or look at the sampler")
    if channels is not None and image.shape[1] != channels:
        raise ValueError(f"{name} must have {channels} channels, got {list(image.shape)}")
    if image.device.type == "cpu" and not bool(image.isfinite().all()):
        raise ValueError(f"{name} has NaN or infinite pixels: replace them, or leave the image out")


def _check_entry(name: str, value: Any, size: int | None) -> None:
    if name == "name":
        fits, expected = isinstance(value, list | tuple) and all(isinstance(n, str) for n in value), "a list of strings"
    elif not isinstance(value, Tensor) or value.ndim != 1:
        fits, expected = False, "a tensor [B]"
    elif name in _INTEGERS:
        fits, expected = value.dtype == torch.int64, "int64"
    else:
        fits, expected = value.is_floating_point(), "floating point"
    if not fits:
        raise TypeError(f"{name} must be {expected}, got {_describe(value)}")
    if size is not None and len(value) != size:
        raise ValueError(f"{name} must have one entry for each of the {size} images, got {len(value)}")


def _integers(label: Any) -> Tensor:
    try:
        label = torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"labels must be one integer for each image, got {_describe(label)}") from error
    if label.is_floating_point() or label.is_complex() or label.ndim != 1:
        raise TypeError(
            f"labels must be one integer for each image, got {_describe(label)}; give a dict with the entries of "
            "lightning_modules.imaging.ImageBatch for anything else"
        )
    return label.to(torch.int64)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(entry).__name__ for entry in value[:4]) or 'nothing'}"
    return type(value).__name__
