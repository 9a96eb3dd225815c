"""The compiled image operator beside the one in torch: awkward images, threads, processes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.graph import GraphDiffusion, image_operator
from lightning_modules.graph.cpu import kernel

NAMES = ("sigma", "tau", "radius", "sigma_s", "sigma_f")


@pytest.fixture(autouse=True)
def compiled() -> None:
    if kernel.library(torch.float32) is None or kernel.library(torch.float64) is None:
        pytest.skip("no compiled kernel: no C compiler, or LIGHTNING_EM_COMPILE=0")


def results(
    size: tuple[int, int, int, int],
    patch_size: int,
    reach: float,
    steps: Any,
    features: int = 0,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Restored images, their smoothness, and the gradients of both in all that has one."""
    generator = torch.Generator().manual_seed(0)
    batch, _, height, width = size
    images = torch.rand(size, dtype=dtype, generator=generator).requires_grad_()
    guide = torch.rand(batch, max(features, 1), height, width, dtype=dtype, generator=generator).requires_grad_()
    base = (0.7, 0.15, 0.9 * reach, 2.0, 0.8)
    leaves = [(v * (0.8 + 0.4 * torch.rand(batch, dtype=dtype, generator=generator))).requires_grad_() for v in base]
    noise = torch.linspace(0.01, 0.1, batch, dtype=dtype).requires_grad_()
    diffusion = GraphDiffusion(patch_size, reach=reach)
    restored = diffusion(
        images,
        **dict(zip(NAMES, leaves, strict=True)),
        smooth_steps=steps,
        noise=noise,
        guide=guide if features else None,
    )
    smoothness = diffusion.smoothness(images, sigma=leaves[0]).similarity
    score = (restored * restored.detach().cos()).sum() + smoothness.sum()
    inputs = (images, guide, noise, *leaves)
    return [restored, smoothness, *torch.autograd.grad(score, inputs, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize(
    "case",
    [
        ((3, 1, 5, 20), 5, 2.3, torch.tensor([1, 0, 4]), 5),  # guide with other channels than the images
        ((2, 9, 33, 35), 1, 4.0, 2, 2),  # more channels than one group; not one whole vector
        ((1, 3, 5, 4), 3, 9.0, 0, 0),  # smaller than the radius
        ((2, 2, 4, 64), 3, 3.0, 1, 0),  # whole vectors; fewer rows than the radius
        ((1, 3, 130, 70), 11, 4.0, 3, 0),  # several blocks of rows, wide windows
    ],
)
def test_kernel_equals_torch(case: Any, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = results(*case, dtype=dtype)
    monkeypatch.setattr(image_operator, "is_supported", lambda *_, **__: False)
    for one, expected in zip(found, results(*case, dtype=dtype), strict=True):
        torch.testing.assert_close(
            one, expected, rtol=tolerance, atol=tolerance * max(1, float(expected.detach().abs().max()))
        )


@pytest.mark.parametrize("size", [(5, 3, 17, 20), (2, 3, 150, 90)])  # an image for each thread; all threads on one
def test_the_number_of_threads_changes_no_bit(size: tuple[int, int, int, int]) -> None:
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(results(size, 3, 4.0, 3, dtype=torch.float32))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, expected) for one, expected in zip(other, found[0], strict=True))


@pytest.mark.usefixtures("graph_backend")
def test_not_a_number_stays_one() -> None:
    images = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    images[0, 0, 4, 4] = torch.nan
    p = {"sigma": 0.7, "tau": 0.2, "radius": 2.0, "sigma_s": 2.0, "sigma_f": 0.8, "smooth_steps": 2}
    restored = GraphDiffusion(3)(images, **p)
    assert restored[0, 0, 2:7, 2:7].isnan().all()
    assert restored[1].isfinite().all()


def test_any_layout_of_the_images() -> None:
    images = torch.rand(2, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    p = {"sigma": 0.7, "tau": 0.2, "radius": 2.0, "sigma_s": 2.0, "sigma_f": 0.8, "smooth_steps": 2}
    expected = GraphDiffusion(3)(images, **p)
    for other in (images.contiguous(memory_format=torch.channels_last), images.mT.contiguous().mT):
        leaf = other.requires_grad_()
        restored = GraphDiffusion(3)(leaf, **p)
        assert torch.equal(restored, expected)
        restored.sum().backward()
        assert leaf.grad is not None


def test_calls_leave_nothing_to_the_next_one_of_their_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the memory, whatever they are, in inference too; what is large is given back."""
    sizes = [(2, 3, 40, 30), (1, 2, 9, 12)]
    expected = [results(size, 3, 4.0, 2) for size in sizes]
    kernel._of_thread.memory.fill_(255)
    for size, wanted in zip(sizes, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(results(size, 3, 4.0, 2), wanted, strict=True))
    monkeypatch.setattr(kernel, "_of_thread", threading.local())
    with torch.inference_mode():
        GraphDiffusion(3)(
            torch.rand(1, 1, 8, 8), sigma=0.7, tau=0.2, radius=2.0, sigma_s=2.0, sigma_f=0.8, smooth_steps=1
        )
    results(sizes[1], 3, 4.0, 2)
    kept = len(kernel._of_thread.memory)
    monkeypatch.setattr(kernel, "_MOST_KEPT", kept)
    assert len(results((4, 3, 60, 60), 3, 4.0, 2)) == len(expected[0])
    assert len(kernel._of_thread.memory) == kept


def test_threads_do_not_share_their_memory() -> None:
    sizes = [(2, 3, 30 + index, 40) for index in range(6)]
    expected = [results(size, 3, 4.0, 2)[0] for size in sizes]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda size: results(size, 3, 4.0, 2)[0], 3 * sizes))
    assert all(torch.equal(one, other) for one, other in zip(found, 3 * expected, strict=True))
