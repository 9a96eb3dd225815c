"""The compiled patch operator beside the one in torch and message passing: awkward geometry, threads, processes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.graph import GraphDiffusion, patch_cpu_kernel, patch_operator

NAMES = ("sigma", "tau", "radius", "sigma_s", "sigma_f")
NUMBERS = {"sigma": 1.7, "tau": 0.2, "radius": 7.0, "sigma_s": 5.0, "sigma_f": 1.8, "smooth_steps": 3}


@pytest.fixture(autouse=True)
def kernel() -> None:
    if patch_cpu_kernel.library(torch.float32) is None or patch_cpu_kernel.library(torch.float64) is None:
        pytest.skip("no compiled kernel: no C compiler, or LIGHTNING_EM_COMPILE=0")


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
    reference: bool = False,
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
    diffusion = GraphDiffusion(*geometry, "patches", laplacian, reference)
    restored = diffusion(
        images,
        **dict(zip(NAMES, leaves, strict=True)),
        smooth_steps=steps,
        noise_std=noise,
        max_radius=reach,
        features=guide if features else None,
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
    ((0, 3, 12, 12), (4, 3), 5.0, 2),  # no image
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("laplacian", ["symmetric", "random_walk"])
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_torch_and_message_passing(
    case: Any, laplacian: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.setattr(patch_operator, "diffuse_patches_dense", None)
        found = results(*case, laplacian=laplacian, dtype=dtype)
    monkeypatch.setattr(patch_operator, "serves", lambda *_, **__: False)
    others = [results(*case, laplacian=laplacian, dtype=dtype)]
    if case[0][0]:  # PyG has no graph of no image
        # In float32 message passing loses more digits than are asked for here.
        others.append(results(*case, laplacian=laplacian, reference=True))
    for other in others:
        for one, expected in zip(found, other, strict=True):
            scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
            torch.testing.assert_close(one, expected.to(dtype), rtol=tolerance, atol=tolerance * scale)


def test_numbers_serve_as_parameters() -> None:
    images = random(3, 3, 20, 17)
    each = {name: torch.full((3,), value) for name, value in NUMBERS.items() if name != "smooth_steps"}
    diffusion = GraphDiffusion(6, 4, "patches")
    expected = diffusion(images, **each, smooth_steps=torch.full((3,), 3), noise_std=torch.full((3,), 0.1))
    assert torch.equal(diffusion(images, **NUMBERS, noise_std=0.1), expected)
    one = {name: torch.tensor([value]) for name, value in NUMBERS.items()}
    assert torch.equal(diffusion(images, **one, noise_std=torch.tensor([0.1])), expected)


def test_the_number_of_threads_changes_no_bit() -> None:
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 9):  # more than images, too
            torch.set_num_threads(count)
            found.append(results((5, 3, 19, 24), (6, 4), 7.0, 3, dtype=torch.float32))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, expected) for one, expected in zip(other, found[0], strict=True))


def test_an_image_alone_and_in_a_batch() -> None:
    images = random(4, 3, 19, 24)
    diffusion = GraphDiffusion(6, 4, "patches")
    together = diffusion(images, **NUMBERS)
    for index in range(4):
        assert torch.equal(diffusion(images[index : index + 1], **NUMBERS), together[index : index + 1])


def test_not_a_number_stays_one_and_in_its_image() -> None:
    images = random(3, 1, 13, 13)
    images[1, 0, 4, 4] = torch.nan
    images.requires_grad_()
    sigma = torch.full((3,), 1.7, requires_grad=True)
    diffusion = GraphDiffusion(4, 3, "patches")
    for threads in (1, 3):  # one thread takes the images one after the other, in the same memory
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            restored = diffusion(images, **{**NUMBERS, "sigma": sigma})
            grads = torch.autograd.grad(restored.sum(), (images, sigma))
        finally:
            torch.set_num_threads(before)
        for result in (restored, *grads):
            assert result[1].isnan().any()
            assert result[::2].isfinite().all()
        assert restored[1, 0, 2:7, 2:7].isnan().all()


@pytest.mark.parametrize(("sigma", "nothing"), [(0.8, False), (0.5, True), (0.3, True), (0.01, True)])
def test_weights_that_count_for_nothing_are_exactly_zero(sigma: float, nothing: bool) -> None:
    """Products of smaller ones would be subnormal numbers, whose arithmetic is slow."""
    images = torch.zeros(1, 1, 6, 12)
    images[..., 6:] = 1.0  # two patches, 6 apart: similarity exp(-36 / 2 sigma^2), 4e-13 and 5e-32
    width = torch.tensor([sigma], requires_grad=True)
    p = {**NUMBERS, "sigma": width, "sigma_f": width, "max_radius": 7.0}
    (grad,) = torch.autograd.grad(GraphDiffusion(6, 6, "patches")(images, **p).square().sum(), width)
    assert (grad.item() == 0) == nothing


def test_any_layout_of_images_guide_and_gradient() -> None:
    images, guide, grad = random(2, 3, 19, 24), random(2, 2, 19, 24), random(2, 24, 19, 3).permute(0, 3, 2, 1)
    diffusion = GraphDiffusion(6, 4, "patches")

    def found(images: Tensor, guide: Tensor) -> tuple[Tensor, ...]:
        leaves = [images.detach().requires_grad_(), guide.detach().requires_grad_()]
        restored = diffusion(leaves[0], **NUMBERS, features=leaves[1])
        return restored, *torch.autograd.grad(restored, leaves, grad)

    expected = found(images, guide)
    others = (images.contiguous(memory_format=torch.channels_last), guide.mT.contiguous().mT)
    for one, other in zip(found(*others), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    with torch.inference_mode():
        assert torch.equal(diffusion(images, **NUMBERS, features=guide), expected[0])


def test_second_derivatives_are_refused() -> None:
    images = random(1, 1, 9, 9).requires_grad_()
    restored = GraphDiffusion(4, 3, "patches")(images, **NUMBERS)
    (grad,) = torch.autograd.grad(restored.square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_arguments_that_are_not_in_memory_do_no_harm() -> None:
    images, diffusion = random(2, 3, 13, 13), GraphDiffusion(5, 4, "patches")
    expected = diffusion(images, **NUMBERS, max_radius=7.0)
    with torch.device("meta"):  # the default device of new tensors, of which none may be the kernel's
        assert torch.equal(diffusion(images, **NUMBERS, max_radius=7.0), expected)
    with pytest.raises((RuntimeError, NotImplementedError)):  # a crash of the interpreter otherwise
        diffusion(images, **{**NUMBERS, "smooth_steps": torch.tensor([3, 1], device="meta")}, max_radius=7.0)
    with pytest.raises(ValueError, match="steps must be contiguous and on the CPU"):
        patch_cpu_kernel._kernel.run(0, torch.float32, steps=torch.ones(2, device="meta"))


def test_a_transform_that_fails_leaves_nothing_behind() -> None:
    images, diffusion = random(1, 3, 14, 14), GraphDiffusion(5, 4, "patches")
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda y: diffusion(y, **NUMBERS, max_radius=7.0).sum())(images)
    assert diffusion(images, **NUMBERS, max_radius=7.0).isfinite().all()
