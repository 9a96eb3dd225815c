"""The fused kernel against the torch path: interpreted everywhere, compiled without a device, run where CUDA is."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.graph import GraphDiffusion
from lightning_modules.graph.parameters import DiffusionParameters
from lightning_modules.graph.patch_operator import diffuse_patches_dense
from lightning_modules.graph.patches import PatchGrid

triton = pytest.importorskip("triton", reason="Triton comes with torch's wheels for Linux only")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device")
VALUES = {"sigma": (0.7, 0.8), "tau": (0.15, 0.2), "radius": (4.4, 5.3), "sigma_s": (2.0, 1.5), "sigma_f": (0.8, 0.6)}


def results(diffuse: Any, laplacian: str, features: bool, steps: Any, noise: Any, each: bool) -> list[Tensor]:
    """Restored images, and the gradient in everything that has one."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 11, 7, generator=generator).to(DEVICE).requires_grad_()
    guide = torch.rand(2, 2, 11, 7, generator=generator).to(DEVICE).requires_grad_() if features else images
    values = [torch.tensor(value if each else value[0], device=DEVICE).requires_grad_() for value in VALUES.values()]
    leaves = [images, *([guide] if features else []), *values]
    if noise is None:
        noise = torch.tensor([0.02, 0.1], device=DEVICE).requires_grad_()
        leaves.append(noise)
    steps = torch.tensor(steps, device=DEVICE) if isinstance(steps, list) else steps
    grid = PatchGrid(11, 7, 4, 3)
    restored = diffuse(images, guide, DiffusionParameters(*values, steps), noise, grid, laplacian, 5.0)
    return [restored, *torch.autograd.grad(restored.square().sum(), leaves, materialize_grads=True)]


@runs
@pytest.mark.parametrize("laplacian", ["symmetric", "random_walk"])
@pytest.mark.parametrize(
    ("features", "steps", "noise", "each"),
    [(False, 3, None, True), (True, [1, 4], 0.0, True), (False, 0, 0.1, False), (True, 2, None, False)],
)
def test_kernel_equals_the_torch_path(laplacian: str, features: bool, steps: Any, noise: Any, each: bool) -> None:
    from lightning_modules.graph.patch_kernel import diffuse_patches_fused

    fused, dense = (
        results(diffuse, laplacian, features, steps, noise, each)
        for diffuse in (diffuse_patches_fused, diffuse_patches_dense)
    )
    for ours, expected in zip(fused, dense, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
def test_kernel_interpreted() -> None:
    """The arithmetic of the kernels, run by Triton's interpreter on the CPU in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "torch_path"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "8 passed" in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="what is interpreted cannot be compiled")
@pytest.mark.parametrize("name", ["_forward_kernel", "_backward_kernel", "_fold_kernel"])
def test_kernel_compiles_without_a_device(name: str) -> None:
    """Triton's compiler takes the kernels down to machine code of a real device, for graphs of 36 to 64 nodes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_modules.graph import patch_kernel

    kernel = getattr(patch_kernel, name)
    constants = {"BLOCK": 1024} if name == "_fold_kernel" else {"SIDE": 8, "N": 64, "D": 32, "SYMMETRIC": True}
    integers = ("nodes", "plane", "width", "channels", "features", "total", "area", "cover")
    indices = ("steps", "origins", "entries")
    signature = {
        argument: "constexpr"
        if argument in constants
        else "i32"
        if argument in integers
        else "*i32"
        if argument in indices
        else "*fp32"
        for argument in kernel.arg_names
    }
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", 80, 32),
        options={"num_warps": 8},
    )
    assert compiled.asm["cubin"]


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")
def test_images_on_cuda_equal_those_on_the_cpu() -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    each = {"sigma": 0.5, "tau": 0.1, "radius": 10.0, "sigma_s": 10.0, "sigma_f": 0.5}
    diffusion = GraphDiffusion(8, 5, "patches")
    expected = diffusion(images, **each, smooth_steps=5, noise_std=0.1)
    there = diffusion(images.cuda(), **each, smooth_steps=5, noise_std=0.1)
    torch.testing.assert_close(there.cpu(), expected, rtol=1e-5, atol=1e-5)
