"""Images of any size in bounded memory: tiles that overlap far enough to leave no seam."""

from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

Index = tuple[EllipsisType, slice, slice]


def in_tiles(
    operator: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    tile_size: int,
    halo: int,
    patch_size: int = 1,
    stride: int = 1,
) -> Tensor:
    """Apply an operator tile by tile, each with a halo of its surroundings that is computed and thrown away.

    The result equals `operator(*inputs)` if no output pixel depends on a pixel more than `halo` away, and the
    operator treats a border of the image as a border of its input. Gradients flow as they do without tiles.

    Args:
        operator: Maps the inputs to images.
        inputs: Images, and what goes along with them pixel by pixel: a guide, maps.
        tile_size: Side of the tiles without their halo.
        halo: Pixels around a tile.
        patch_size: Side of the patches that the operator takes from its input.
        stride: Distance of the patches; a tile begins and ends where a patch does.

    Shape:
        - inputs: `[B, C, H, W]`, C that of each
        - output: as the first of the inputs
    """
    height, width = inputs[0].shape[-2:]
    parts = tiles(height, width, tile_size, halo, patch_size, stride)
    if len(parts) == 1:
        return operator(*inputs)
    output = torch.empty_like(inputs[0])
    for tile in parts:
        whole = operator(*(tensor[tile.around].contiguous() for tensor in inputs))
        output[tile.core] = whole[tile.inner]
    return output


class Tile(NamedTuple):
    """Where a tile lies, as indices of images.

    Attributes:
        core: The tile, in the image.
        around: The tile and its halo, in the image.
        inner: The tile, in what is computed of `around`.
    """

    core: Index
    around: Index
    inner: Index


def tiles(height: int, width: int, tile_size: int, halo: int, patch_size: int = 1, stride: int = 1) -> list[Tile]:
    """The tiles of an image; see `in_tiles`."""
    rows, columns = (_spans(length, tile_size, halo, patch_size, stride) for length in (height, width))
    return [
        Tile(
            (..., row, column),
            (..., row_around, column_around),
            (..., _within(row, row_around), _within(column, column_around)),
        )
        for row, row_around in rows
        for column, column_around in columns
    ]


def _spans(length: int, tile_size: int, halo: int, patch_size: int, stride: int) -> list[tuple[slice, slice]]:
    """Tiles along an axis, each with the part of the image that it is computed from."""
    around = tile_size + 2 * halo
    if length <= around:
        return [(slice(0, length), slice(0, length))]
    count = -(-length // tile_size)
    spans = []
    for index in range(count):
        tile = slice(index * length // count, (index + 1) * length // count)
        # All of one size, so that what depends on the size is computed once; only the stride may add some pixels.
        first = min(max(tile.start - halo, 0), length - around) // stride * stride
        last = first + patch_size + -(-(around - patch_size) // stride) * stride
        if last < tile.stop + halo:
            last += -(-(tile.stop + halo - last) // stride) * stride
        spans.append((tile, slice(first, min(last, length))))
    return spans


def _within(inner: slice, outer: slice) -> slice:
    return slice(inner.start - outer.start, inner.stop - outer.start)
