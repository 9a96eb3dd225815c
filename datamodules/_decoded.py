"""Decoded images that are kept in memory, within `cache_gib`."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from lightning_modules.imaging import read_image, seeded_uniform

GIB = 2**30


def check_cache_gib(cache_gib: float) -> None:
    """Refuses what is no amount of memory."""
    if not cache_gib >= 0:
        raise ValueError(f"cache_gib must be a number of GiB, or 0 to keep no image, got {cache_gib}")


def decode_within(paths: Sequence[Path], read: Callable[[Path], Tensor], cache_gib: float) -> list[Tensor]:
    """Decodes the first images whole, as many as there is room for.

    Before worker processes start, which then share the memory.

    Args:
        paths: The files.
        read: Decodes one of them.
        cache_gib: Room in GiB.

    Shape:
        - output: `[3, H, W]` each, uint8
    """
    kept: list[Tensor] = []
    room = cache_gib * GIB
    for path in paths if room else ():
        image = read(path)
        room -= image.nbytes
        if room < 0:
            break
        kept.append(image.clone() if image.nbytes < image.untyped_storage().nbytes() else image)
    return kept


def decode_parts(paths: list[Path], pixels: int, keys: Tensor, threads: int) -> list[Tensor]:
    """Decodes images, of each no more than so many pixels: a part of its proportions, at a place drawn from its key.

    Before worker processes start, which then share the memory.

    Shape:
        - keys: `[N]`, int64
        - output: `[3, H, W]` each, uint8
    """

    def part(path: Path, place: list[float]) -> Tensor:
        image = read_image(path)
        height, width = image.shape[1:]
        share = min(1.0, math.sqrt(pixels / (height * width)))
        height, width = max(1, int(height * share)), max(1, int(width * share))
        top, left = (
            int(p * (side - kept + 1)) for p, side, kept in zip(place, image.shape[1:], (height, width), strict=True)
        )
        return image if share == 1 else image[:, top : top + height, left : left + width].clone()

    with ThreadPoolExecutor(max(threads, 1)) as pool:  # Pillow decodes without holding the interpreter's lock
        return list(pool.map(part, paths, seeded_uniform(keys, 2).tolist()))
