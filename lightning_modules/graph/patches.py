"""Patches of an image on a regular grid, and their folding back."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class PatchGrid:
    """Where the patches of an image lie: `patch_size`² windows, `stride` pixels apart, every pixel covered.

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
        if min(self.height, self.width) < self.patch_size:
            raise ValueError(
                f"the image is {self.height}×{self.width} pixels and smaller than a patch "
                f"(patch_size={self.patch_size}): give images of at least {self.patch_size}×{self.patch_size} or a "
                "smaller patch_size"
            )

    @cached_property
    def _origins(self) -> Tensor:
        rows = _axis_origins(self.height, self.patch_size, self.stride)
        columns = _axis_origins(self.width, self.patch_size, self.stride)
        with torch.inference_mode(False):  # cached: see `_pixels`
            return torch.cartesian_prod(torch.tensor(rows), torch.tensor(columns)).view(-1, 2)

    @property
    def num_patches(self) -> int:
        """Number N of patches, row by row."""
        return len(self._origins)

    @property
    def centers(self) -> Tensor:
        """Patch centres (row, column) in pixels, float64 `[N, 2]`."""
        return self._origins.double() + (self.patch_size - 1) / 2

    def _pixels(self, device: torch.device) -> Tensor:
        """Index of each patch entry in the flattened image plane, `[N, p²]`."""
        return _pixel_indices(self, device)

    def extract(self, images: Tensor) -> Tensor:
        """Patch vectors of the images.

        Args:
            images: Images.

        Shape:
            - images: `[B, C, H, W]`
            - output: `[B, N, D]` with D = C·p², channel by channel
        """
        batch, channels = images.shape[:2]
        patches = images.flatten(2)[:, :, self._pixels(images.device)]  # [B, C, N, p²]
        return patches.transpose(1, 2).reshape(batch, self.num_patches, channels * self.patch_size**2)

    def fold(self, patches: Tensor) -> Tensor:
        """Sum of the patches in the image plane: the adjoint of `extract`.

        Args:
            patches: Patch vectors.

        Shape:
            - patches: `[B, N, D]` with D = C·p²
            - output: `[B, C, H, W]`
        """
        batch, nodes, dimension = patches.shape
        area = self.patch_size**2
        values = patches.view(batch, nodes, dimension // area, area).transpose(1, 2).flatten(2)
        plane = values.new_zeros(batch, dimension // area, self.height * self.width)
        plane = plane.index_add(2, self._pixels(patches.device).flatten(), values)
        return plane.view(batch, -1, self.height, self.width)

    def average(self, patches: Tensor) -> Tensor:
        """Image in which each pixel is the mean of the patches that cover it.

        Args:
            patches: Patch vectors.

        Shape:
            - patches: `[B, N, D]`
            - output: `[B, C, H, W]`
        """
        return self.fold(patches) / self.coverage(patches.device, patches.dtype)

    def coverage(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """Number of patches that cover each pixel, `[1, 1, H, W]`."""
        ones = torch.ones(1, self.num_patches, self.patch_size**2, device=device, dtype=dtype)
        return self.fold(ones)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # made in a validation and cached, it must still serve a training step
def _pixel_indices(grid: PatchGrid, device: torch.device) -> Tensor:
    offsets = torch.cartesian_prod(torch.arange(grid.patch_size), torch.arange(grid.patch_size)).view(-1, 2)
    position = grid._origins[:, None] + offsets
    return (position[..., 0] * grid.width + position[..., 1]).to(device)


def check_patch_geometry(patch_size: int, stride: int) -> None:
    """Raise `ValueError` unless `1 ≤ stride ≤ patch_size` (a larger stride would leave pixels that no patch covers)."""
    for name, value in (("patch_size", patch_size), ("stride", stride)):
        if value <= 0:
            raise ValueError(f"{name} must be a positive number of pixels, got {value}")
    if stride > patch_size:
        raise ValueError(
            f"stride={stride} exceeds patch_size={patch_size}, so some pixels would lie in no patch: "
            "lower the stride or enlarge the patch"
        )


def _axis_origins(length: int, patch_size: int, stride: int) -> list[int]:
    last = length - patch_size
    origins = list(range(0, last + 1, stride))
    return origins if origins[-1] == last else [*origins, last]
