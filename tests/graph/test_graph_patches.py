"""Patches: every pixel covered, extraction and folding adjoint."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_modules.graph import PatchGrid


@st.composite
def grids(draw: st.DrawFn) -> PatchGrid:
    patch_size = draw(st.integers(1, 6))
    stride = draw(st.integers(1, patch_size))
    height, width = (draw(st.integers(patch_size, 17)) for _ in range(2))
    return PatchGrid(height, width, patch_size, stride)


@given(grids(), st.integers(1, 3))
def test_extraction_and_folding_are_adjoint_and_average_inverts(grid: PatchGrid, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, channels, grid.height, grid.width, dtype=torch.float64, generator=generator)
    patches = grid.extract(images)
    other = torch.randn(patches.shape, dtype=torch.float64, generator=generator)
    torch.testing.assert_close((patches * other).sum(), (images * grid.fold(other)).sum())
    torch.testing.assert_close(grid.average(patches), images)
    assert grid.coverage().min() >= 1
    assert patches.shape == (2, grid.num_patches, channels * grid.patch_size**2)


def test_equals_unfold_where_the_stride_divides() -> None:
    images = torch.rand(2, 3, 11, 8)
    expected = F.unfold(images, kernel_size=5, stride=3).transpose(1, 2)
    torch.testing.assert_close(PatchGrid(11, 8, 5, 3).extract(images), expected)


def test_textbook_geometry_includes_the_last_row_and_column() -> None:
    grid = PatchGrid(32, 32, 8, 5)
    assert grid.num_patches == 36
    assert grid.centers.max().item() == 24 + 3.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 8, 0, 1), "patch_size must be a positive number of pixels, got 0"),
        ((8, 8, 3, -1), "stride must be a positive number of pixels, got -1"),
        ((8, 8, 3, 4), "stride=4 exceeds patch_size=3"),
        ((8, 7, 8, 1), "8×7 pixels and smaller than a patch"),
    ],
)
def test_refuses_impossible_geometry(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchGrid(*arguments)
