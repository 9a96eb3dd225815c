"""Noise and widths that vary: a bias for each offset, maps of the level, of σ and of σ_f."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.graph import GraphDiffusion
from lightning_modules.graph.image_operator import diffuse_image
from lightning_modules.graph.message_passing import diffuse_image_reference
from lightning_modules.graph.parameters import DiffusionParameters
from lightning_modules.graph.topology import half_offsets

VALUES = {"tau": 0.2, "radius": 2.4, "sigma_s": 2.0}
SIZE = (2, 3, 9, 7)


def random(*size: int) -> Tensor:
    return torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(size)))


def gradients(
    operator: Callable[..., Tensor], noise: Tensor, sigma: Tensor, sigma_f: Tensor, guide: Tensor | None = None
) -> list[Tensor]:
    """Restored images and the gradients in images, noise, σ and σ_f."""
    images = random(*SIZE).requires_grad_()
    leaves = [images, *(value.clone().requires_grad_() for value in (noise, sigma, sigma_f))]
    steps = torch.tensor([2, 3])
    parameters = DiffusionParameters.of_each(images, sigma=leaves[2], sigma_f=leaves[3], smooth_steps=steps, **VALUES)
    restored = operator(images, images if guide is None else guide, parameters, leaves[1], 3, 2.0, 2.5)
    return [restored, *torch.autograd.grad((restored * restored.detach().cos()).sum(), leaves)]


def equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("graph_backend")
def test_white_noise_has_one_bias_for_all_offsets() -> None:
    level, widths = torch.tensor([0.05, 0.1]).double(), [torch.full((2,), 0.7).double()] * 2
    bias = (2 * 27 * level**2)[:, None].expand(-1, len(half_offsets(2.5)))
    for operator in (diffuse_image, diffuse_image_reference):
        one, other = (gradients(operator, noise, *widths) for noise in (level, bias))
        for index in (0, 1, 3, 4):
            torch.testing.assert_close(one[index], other[index], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("graph_backend")
@pytest.mark.parametrize("channels", [None, 5])
def test_a_bias_for_each_offset(channels: int | None) -> None:
    guide = None if channels is None else random(2, channels, 9, 7)
    bias, widths = 0.6 * random(2, len(half_offsets(2.5))), [torch.tensor([0.7, 0.9]).double()] * 2
    found, expected = (gradients(f, bias, *widths, guide) for f in (diffuse_image, diffuse_image_reference))
    equal(found, expected)


@pytest.mark.usefixtures("graph_backend")
def test_a_bias_on_images_smaller_than_the_offsets() -> None:
    bias, images = 0.3 * random(1, len(half_offsets(3.0))), random(1, 3, 2, 9)
    parameters = DiffusionParameters.of_each(images, sigma=0.7, sigma_f=0.8, smooth_steps=2, **VALUES)
    found, expected = (
        f(images, images, parameters, bias, 1, 3.0, 2.5) for f in (diffuse_image, diffuse_image_reference)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"the bias of the distances must be \[1, 14\]"):
        diffuse_image(images, images, parameters, bias[:, 1:], 1, 3.0, 2.5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("maps", ["noise", "widths", "both"])
def test_maps_equal_the_reference(maps: str, channels: int) -> None:
    level: Tensor = 0.05 + 0.2 * random(2, channels, 9, 7) if maps != "widths" else torch.tensor([0.05, 0.1]).double()
    shape = (2,) if maps == "noise" else (2, 1, 9, 7)
    widths = [0.5 + 0.5 * random(*shape), 0.6 + 0.5 * random(*shape)]
    found, expected = (gradients(f, level, *widths) for f in (diffuse_image, diffuse_image_reference))
    equal(found, expected)


def test_constant_maps_equal_numbers() -> None:
    images = random(*SIZE)
    level, sigma, sigma_f = (torch.tensor(pair).double() for pair in ((0.05, 0.1), (0.7, 0.9), (0.8, 0.6)))
    as_map = [value.view(-1, 1, 1, 1).expand(-1, 1, 9, 7) for value in (level, sigma, sigma_f)]
    restored = [
        GraphDiffusion(3)(images, noise=noise, sigma=s, sigma_f=f, smooth_steps=2, **VALUES)
        for noise, s, f in ((level, sigma, sigma_f), as_map)
    ]
    torch.testing.assert_close(restored[1], restored[0], rtol=0, atol=1e-12)


def test_maps_leave_no_seam_between_tiles() -> None:
    images = random(1, 3, 40, 37)
    maps: dict[str, Any] = {
        "noise": 0.05 + 0.2 * random(1, 1, 40, 37),
        "sigma": 0.5 + 0.5 * random(1, 1, 40, 37),
        "sigma_f": 0.5 + 0.5 * random(1, 1, 40, 37),
    }
    whole, tiled = (
        GraphDiffusion(3, tile_size=size, reach=2.0)(images, **maps, **VALUES, smooth_steps=1) for size in (None, 8)
    )
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_level_of_zero_in_a_map_gives_finite_gradients(dtype: torch.dtype) -> None:
    images = random(*SIZE).to(dtype).requires_grad_()
    level = (0.2 * random(2, 1, 9, 7)).to(dtype)
    level[:, :, :5] = 0
    level.requires_grad_()
    widths = {"sigma": 3 * level, "sigma_f": 4 * level}
    restored = GraphDiffusion(3)(images, **widths, noise=level, smooth_steps=2, **VALUES)
    # Nothing is like a window without noise but itself.
    torch.testing.assert_close(restored[:, :, :2], images[:, :, :2], rtol=0, atol=1e-6)
    assert (restored - images)[:, :, 6:].abs().max() > 1e-2
    for gradient in torch.autograd.grad(restored.square().sum(), (images, level)):
        assert gradient.isfinite().all()


def test_refuses_maps_where_there_are_none() -> None:
    images = random(*SIZE)
    values: dict[str, Any] = {**VALUES, "sigma": 0.7, "sigma_f": 0.7, "smooth_steps": 2}
    with pytest.raises(ValueError, match="signal='patches' takes no maps, got one of noise"):
        GraphDiffusion(3, 2, "patches")(images, **values, noise=0.1 * random(2, 1, 9, 7))
    with pytest.raises(ValueError, match=r"tau must be one number .* got \[2, 1, 9, 7\]"):
        GraphDiffusion(3)(images, **{**values, "tau": random(2, 1, 9, 7)})
    with pytest.raises(ValueError, match=r"sigma must be one number .* got \[2, 1, 9, 6\]"):
        GraphDiffusion(3)(images, **{**values, "sigma": random(2, 1, 9, 6)})
