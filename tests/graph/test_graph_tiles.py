"""Tiles: the same result as without them, seam, border, stride and gradient."""

from typing import Any

import pytest
import torch

from lightning_modules.graph import GraphDiffusion
from lightning_modules.graph.tiles import in_tiles

PARAMETERS = {"tau": 0.2, "radius": 2.5, "sigma_s": 2.0, "noise": 0.05}


@pytest.mark.parametrize("geometry", [(3, 1, "image"), (5, 1, "image"), (4, 3, "patches"), (3, 2, "patches")])
@pytest.mark.parametrize("laplacian", [None, "random_walk"])
@pytest.mark.parametrize("steps", [0, 3, torch.tensor([1, 2])])
def test_tiles_leave_no_seam(geometry: Any, laplacian: Any, steps: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 53, 71, dtype=torch.float64, generator=generator)
    features = torch.rand(2, 2, 53, 71, dtype=torch.float64, generator=generator)
    for guide in (None, features):
        results = []
        for tile_size in (None, 8):
            sigma, sigma_f = (torch.tensor([0.7, 0.9], dtype=torch.float64, requires_grad=True) for _ in range(2))
            diffusion = GraphDiffusion(*geometry, laplacian=laplacian, tile_size=tile_size)
            restored = diffusion(images, sigma=sigma, sigma_f=sigma_f, smooth_steps=steps, guide=guide, **PARAMETERS)
            gradients = torch.autograd.grad(
                (restored * images).sum(), (sigma, sigma_f), allow_unused=True, materialize_grads=True
            )
            results.append((restored, *gradients))
        for tiled, whole in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-12)


def test_a_halo_that_is_too_small_is_seen() -> None:
    images = torch.rand(1, 1, 40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def smooth(images: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images, 7, 1, 3, count_include_pad=False)

    whole = smooth(images, images)
    torch.testing.assert_close(in_tiles(smooth, (images, images), 9, 3), whole)
    assert (in_tiles(smooth, (images, images), 9, 2) - whole).abs().max() > 1e-3


def test_refuses_tiles_without_pixels() -> None:
    with pytest.raises(ValueError, match="tile_size must be a positive"):
        GraphDiffusion(3, tile_size=0)
