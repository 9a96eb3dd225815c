"""Selection of images by which neither size nor format of a file stands for its class."""

from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from datamodules.labels import LabelledFiles
from lightning_modules.imaging import permutation, read_image

# Part of the images that may be smaller than what all are cut to, and are left out.
_SMALLEST = 0.05


def matching_formats(files: LabelledFiles, seed: int) -> Tensor:
    """Chooses as many files of either class in each format, source by source; by seed, where a class has more.

    Shape:
        - output: `[N]`, bool

    Raises:
        ValueError: If the classes of a source have no format in common.
    """
    groups: dict[tuple[str, str], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for place, (path, source) in enumerate(zip(files.paths, files.sources, strict=True)):
        groups[source, _format(path)][int(files.labels[place])].append(place)
    chosen = torch.zeros(len(files), dtype=torch.bool)
    for both in groups.values():
        count = min(map(len, both))
        for label, members in enumerate(both):
            order = permutation(len(members), seed, label)[:count].tolist()
            chosen[[members[i] for i in order]] = True
    for source in dict.fromkeys(files.sources):
        if not chosen[[name == source for name in files.sources]].any():
            formats = sorted({name for owner, name in groups if owner == source})
            raise ValueError(
                f"match_formats: the classes of {source} have none of their formats, {', '.join(formats)}, in common; "
                "export both from their originals in one format, or use twins"
            )
    return chosen


def shared_side(paths: list[Path]) -> tuple[int, Tensor]:
    """Returns the side of the square that nineteen in twenty images can give, and which can.

    Shape:
        - output: a number, and `[N]`, bool
    """
    shorter = torch.tensor([min(_size(path)) for path in paths])
    side = int(shorter.sort().values[int(_SMALLEST * len(shorter))])
    return side, shorter >= side


def middle(image: Tensor, side: int) -> Tensor:
    """The square in the middle of an image.

    Shape:
        - image: `[C, H, W]`, H and W at least the side
        - output: `[C, side, side]`
    """
    top, left = ((length - side) // 2 for length in image.shape[1:])
    return image[:, top : top + side, left : left + side]


def _format(path: Path) -> str:
    try:
        with Image.open(path) as image:
            return image.format or path.suffix.lower()
    except UnidentifiedImageError:
        return path.suffix.lower()


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except UnidentifiedImageError:  # formats that Pillow does not know
        height, width = read_image(path).shape[1:]
        return width, height
