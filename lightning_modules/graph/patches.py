"""Patches of an image on a regular grid, and their folding back."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_modules._cached import cached_tensors


@dataclass(frozen=True)
class PatchGrid:
    """Patches of an image: `patch_size`² windows, `stride` pixels apart, every pixel covered.

    The last row and column of patches are always included, closer than `stride` to their neighbours where the stride
    does not divide the image.

    Args:
        height: Height H of the image in pixels.
        width: Width W of the image in pixels.
        patch_size: Side p of a patch in pixels.
        stride: Distance of neighbouring patches in pixels, at most `patch_size`.

    Raises:
        ValueError: If a size is not positive, the stride leaves pixels uncovered, or the image is smaller than a patch.

    Example:
        >>> grid = PatchGrid(height=5, width=7, patch_size=3, stride=2)
        >>> images = torch.rand(2, 1, 5, 7)
        >>> patches = grid.extract(images)
        >>> patches.shape, torch.allclose(grid.average(patches), images)
        (torch.Size([2, 6, 9]), True)
    """

    height: int
    width: int
    patch_size: int
    stride: int

    def __post_init__(self) -> None:
        check_patch_geometry(self.patch_size, self.stride)
        check_patch_fits(self.height, self.width, self.patch_size)

    @cached_property
    def tops(self) -> list[int]:
        """Rows of the image at which patches begin."""
        return _axis_origins(self.height, self.patch_size, self.stride)

    @cached_property
    def lefts(self) -> list[int]:
        """Columns of the image at which patches begin."""
        return _axis_origins(self.width, self.patch_size, self.stride)

    @property
    def num_patches(self) -> int:
        """Number N of patches, row by row."""
        return len(self.tops) * len(self.lefts)

    @property
    def centers(self) -> Tensor:
        """Patch centres (row, column) in pixels, float64 `[N, 2]`."""
        origins = torch.cartesian_prod(torch.tensor(self.tops), torch.tensor(self.lefts)).view(-1, 2)
        return origins.double() + (self.patch_size - 1) / 2

    def extract(self, images: Tensor) -> Tensor:
        """Patch vectors of the images.

        Args:
            images: Images.

        Shape:
            - images: `[B, C, H, W]`
            - output: `[B, N, D]` with D = C·p², channel by channel
        """
        return _Extract.apply(images, self)

    def fold(self, patches: Tensor) -> Tensor:
        """Sum of the patches in the image plane: the adjoint of `extract`.

        Args:
            patches: Patch vectors.

        Shape:
            - patches: `[B, N, D]` with D = C·p²
            - output: `[B, C, H, W]`
        """
        return _Fold.apply(patches, self)

    def average(self, patches: Tensor) -> Tensor:
        """Image in which each pixel is the mean of the patches that cover it.

        Args:
            patches: Patch vectors.

        Shape:
            - patches: `[B, N, D]`
            - output: `[B, C, H, W]`
        """
        return self.fold(patches).div_(self.coverage(patches.device, patches.dtype))

    def coverage(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """Number of patches that cover each pixel.

        Shape:
            - output: `[1, 1, H, W]`
        """
        return _coverage(self, torch.device(device), dtype)


@cached_tensors(maxsize=32)
def _coverage(grid: PatchGrid, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _fold(torch.ones(1, grid.num_patches, grid.patch_size**2, device=device, dtype=dtype), grid)


# One axis after the other, by slices: several times as fast as a gather and a scatter of single pixels, and the sums
# are the same on every run, also on an accelerator. The rows, which come second here and first there, move p²
# neighbouring numbers at a time.


def _extract(images: Tensor, grid: PatchGrid) -> Tensor:
    size = grid.patch_size
    strips = torch.stack([images[..., left : left + size] for left in grid.lefts], dim=1)  # [B, N_W, C, H, p]
    patches = torch.stack([strips[:, :, :, top : top + size] for top in grid.tops], dim=1)
    return patches.view(len(images), grid.num_patches, images.shape[1] * size**2)


def _fold(patches: Tensor, grid: PatchGrid) -> Tensor:
    size, tops, lefts = grid.patch_size, grid.tops, grid.lefts
    channels = patches.shape[2] // size**2
    patches = patches.reshape(len(patches), len(tops), len(lefts), channels, size, size)
    strips = patches.new_empty(len(patches), len(lefts), channels, grid.height, size)
    end = 0
    for row, top in enumerate(tops):
        # Rows that an earlier patch has reached are added to, the others written: none is set to zero first.
        shared = end - top
        if shared:
            strips[:, :, :, top:end] += patches[:, row, :, :, :shared]
        strips[:, :, :, end : top + size] = patches[:, row, :, :, shared:]
        end = top + size
    images = patches.new_zeros(len(patches), channels, grid.height, grid.width)
    for column, left in enumerate(lefts):
        images[..., left : left + size] += strips[:, column]
    return images


class _Extract(torch.autograd.Function):
    """`PatchGrid.extract`, whose backward pass is its adjoint instead of the scatter that autograd would derive."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, grid: PatchGrid) -> Tensor:
        ctx.grid = grid
        return _extract(images, grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Fold.apply(grad, ctx.grid), None


class _Fold(torch.autograd.Function):
    """`PatchGrid.fold`, the adjoint of `_Extract`."""

    @staticmethod
    def forward(ctx: Any, patches: Tensor, grid: PatchGrid) -> Tensor:
        ctx.grid = grid
        return _fold(patches, grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Extract.apply(grad, ctx.grid), None


def check_patch_fits(height: int, width: int, patch_size: int) -> None:
    """Raise `ValueError` if images of this size are smaller than a patch."""
    if min(height, width) < patch_size:
        raise ValueError(
            f"the image is {height}×{width} pixels and smaller than a patch (patch_size={patch_size}): give images of "
            f"at least {patch_size}×{patch_size} or a smaller patch_size"
        )


def check_patch_geometry(patch_size: int, stride: int) -> None:
    """Raise `ValueError` unless `1 ≤ stride ≤ patch_size` (a larger stride would leave pixels that no patch covers)."""
    for name, value in (("patch_size", patch_size), ("stride", stride)):
        if value <= 0:
            raise ValueError(f"{name} must be a positive number of pixels, got {value}")
    if stride > patch_size:
        raise ValueError(
            f"stride={stride} exceeds patch_size={patch_size}, so no patch would cover some pixels: "
            "lower the stride or enlarge the patch"
        )


def _axis_origins(length: int, patch_size: int, stride: int) -> list[int]:
    last = length - patch_size
    origins = list(range(0, last + 1, stride))
    return origins if origins[-1] == last else [*origins, last]
