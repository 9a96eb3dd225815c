"""The dense patch operator beside message passing: awkward geometry, layouts, numbers for parameters."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.graph import GraphDiffusion

NAMES = ("sigma", "tau", "radius", "sigma_s", "sigma_f")
NUMBERS = {"sigma": 1.7, "tau": 0.2, "radius": 7.0, "sigma_s": 5.0, "sigma_f": 1.8, "smooth_steps": 3}


def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(size, dtype=dtype, generator=torch.Generator().manual_seed(0))


def results(
    size: tuple[int, int, int, int],
    geometry: tuple[int, int],
    reach: float,
    steps: Any,
    features: int = 0,
    laplacian: Any = "symmetric",
    dtype: torch.dtype = torch.float64,
    implementation: Any = "auto",
) -> list[Tensor]:
    """Restored images, and the gradients in all that has one."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, height, width = size

    def random(*size: int) -> Tensor:  # the same in either precision
        return torch.rand(size, generator=generator).to(dtype)

    images, guide = random(*size).requires_grad_(), random(batch, max(features, 1), height, width).requires_grad_()
    spread = geometry[0] * (channels / 6) ** 0.5  # of the patches: the distances are about its square
    base = (spread, 0.15, 0.9 * reach, 0.7 * reach, 1.1 * spread)
    leaves = [(value * (0.8 + 0.4 * random(batch))).requires_grad_() for value in base]
    noise = torch.linspace(0.01, 0.1, batch).to(dtype).requires_grad_()
    diffusion = GraphDiffusion(*geometry, "patches", laplacian, implementation, reach=reach)
    restored = diffusion(
        images,
        **dict(zip(NAMES, leaves, strict=True)),
        smooth_steps=steps,
        noise=noise,
        guide=guide if features else None,
    )
    inputs = (images, guide, noise, *leaves)
    score = (restored * restored.detach().cos()).sum()
    return [restored, *torch.autograd.grad(score, inputs, allow_unused=True, materialize_grads=True)]


CASES = [
    ((3, 3, 32, 32), (8, 5), 10.0, 5),  # the textbook graph
    ((2, 3, 64, 64), (8, 8), 10.0, torch.tensor([4, 1])),  # 64 nodes, patches side by side
    ((2, 1, 11, 7), (4, 3), 5.0, torch.tensor([0, 3]), 2),  # a guide with more channels; not one whole vector
    ((2, 9, 9, 13), (3, 2), 30.0, 2, 1),  # all joined to all; a guide with fewer channels
    ((1, 2, 16, 20), (7, 3), 3.5, 0),  # no step
    ((1, 2, 16, 20), (8, 5), 3.0, 2),  # hardly an edge
    ((1, 1, 5, 5), (5, 1), 3.0, 2),  # one node
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("laplacian", ["symmetric", "random_walk"])
@pytest.mark.parametrize("case", CASES)
def test_dense_equals_message_passing(case: Any, laplacian: str, dtype: torch.dtype, tolerance: float) -> None:
    found = results(*case, laplacian=laplacian, dtype=dtype)
    # In float32 message passing loses more digits than are asked for here.
    for one, expected in zip(found, results(*case, laplacian=laplacian, implementation="message_passing"), strict=True):
        scale = max(1.0, float(expected.detach().abs().max()))
        torch.testing.assert_close(one, expected.to(dtype), rtol=tolerance, atol=tolerance * scale)


def test_numbers_serve_as_parameters() -> None:
    images = random(3, 3, 20, 17)
    each = {name: torch.full((3,), value) for name, value in NUMBERS.items() if name != "smooth_steps"}
    diffusion = GraphDiffusion(6, 4, "patches")
    expected = diffusion(images, **each, smooth_steps=torch.full((3,), 3), noise=torch.full((3,), 0.1))
    assert torch.equal(diffusion(images, **NUMBERS, noise=0.1), expected)
    one = {name: torch.tensor([value]) for name, value in NUMBERS.items()}
    assert torch.equal(diffusion(images, **one, noise=torch.tensor([0.1])), expected)


def test_an_image_alone_and_in_a_batch() -> None:
    images = random(4, 3, 19, 24)
    diffusion = GraphDiffusion(6, 4, "patches")
    together = diffusion(images, **NUMBERS)
    for index in range(4):
        torch.testing.assert_close(diffusion(images[index : index + 1], **NUMBERS), together[index : index + 1])


def test_not_a_number_stays_one_and_in_its_image() -> None:
    images = random(3, 1, 13, 13)
    images[1, 0, 4, 4] = torch.nan
    images.requires_grad_()
    sigma = torch.full((3,), 1.7, requires_grad=True)
    diffusion = GraphDiffusion(4, 3, "patches")
    restored = diffusion(images, **{**NUMBERS, "sigma": sigma})
    grads = torch.autograd.grad(restored.sum(), (images, sigma))
    for result in (restored, *grads):
        assert result[1].isnan().any()
        assert result[::2].isfinite().all()
    assert restored[1, 0, 2:7, 2:7].isnan().all()


def test_any_layout_of_images_guide_and_gradient() -> None:
    images, guide, grad = random(2, 3, 19, 24), random(2, 2, 19, 24), random(2, 24, 19, 3).permute(0, 3, 2, 1)
    diffusion = GraphDiffusion(6, 4, "patches")

    def found(images: Tensor, guide: Tensor) -> tuple[Tensor, ...]:
        leaves = [images.detach().requires_grad_(), guide.detach().requires_grad_()]
        restored = diffusion(leaves[0], **NUMBERS, guide=leaves[1])
        return restored, *torch.autograd.grad(restored, leaves, grad)

    expected = found(images, guide)
    others = (images.contiguous(memory_format=torch.channels_last), guide.mT.contiguous().mT)
    for one, other in zip(found(*others), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(diffusion(images, **NUMBERS, guide=guide), expected[0])
