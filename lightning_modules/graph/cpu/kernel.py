"""The image operator on a CPU as one compiled kernel (kernel.c): an image's maps never leave the cache.

It serves where `serves` says so; `image_operator` has the same in torch. Both are tested against the same references.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_modules.graph.cpu.compiled_kernel import CompiledKernel
from lightning_modules.graph.stencil import StencilGeometry
from lightning_modules.graph.weights import SELF_WEIGHT

_RESTORE, _RESTORE_BACKWARD, _SIMILARITY, _SIMILARITY_BACKWARD = range(4)

_SIZES = ("batch", "channels", "features", "height", "width", "patch", "offsets", "steps", "threads")
_POINTERS = (
    *("rows", "columns", "images", "guide", "noise", "similarity", "weight", "spatial", "tau"),
    *("output", "first", "sums", "grad"),
    *("grad_images", "grad_guide", "grad_noise", "grad_similarity", "grad_weight", "grad_spatial", "grad_tau"),
)


class _Call(ctypes.Structure):
    """`Call` of kernel.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_double) for name in ("self_similarity", "self_weight")),
        ("memory", ctypes.c_void_p),
    )


_kernel = CompiledKernel("kernel.c", ("planes.h", "vectors.h"), _Call)
library, serves = _kernel.library, _kernel.serves


class CompiledDiffusion(torch.autograd.Function):
    """`image_operator.diffuse_image`: images, guide, noise, similarity, weight, spatial, tau, geometry."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, guide: Tensor, *arguments: Any) -> Tensor:
        """Restored images; keeps the inputs and S·y."""
        *exponents, geometry = arguments
        inputs = [tensor.contiguous() for tensor in (images, guide, *exponents)]
        output = torch.empty_like(inputs[0])
        first = torch.empty_like(output) if any(ctx.needs_input_grad) else None
        _run(_RESTORE, geometry, **_named(inputs), output=output, first=first)
        if first is not None:
            ctx.save_for_backward(*inputs, first)
            ctx.geometry = geometry
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs; computes the rest again."""
        *inputs, first = ctx.saved_tensors
        numbers = inputs[2:]
        # Those of the numbers cost nothing; of image and guide only what is asked for. Without steps, W plays no part.
        used = len(numbers) if numbers[-1].shape[1] else 2
        grads = [
            torch.empty_like(t) if need else None for t, need in zip(inputs, ctx.needs_input_grad[:2], strict=False)
        ]
        grads += [torch.empty_like(t) if index < used else None for index, t in enumerate(numbers)]
        wanted = {f"grad_{name}": value for name, value in _named(grads).items()}
        _run(_RESTORE_BACKWARD, ctx.geometry, **_named(inputs), first=first, grad=grad.contiguous(), **wanted)
        return (*grads, None)


class CompiledSimilaritySum(torch.autograd.Function):
    """Sum of the similarities of all pairs, `[B]`: images, scale, noise, geometry."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, scale: Tensor, noise: Tensor, geometry: StencilGeometry) -> Tensor:
        """The sums, `[B]`."""
        images, scale, noise = (tensor.contiguous() for tensor in (images, scale, noise))
        ctx.save_for_backward(images, scale, noise)
        ctx.geometry = geometry
        sums = torch.empty_like(scale)
        _run(_SIMILARITY, geometry, images=images, guide=images, similarity=scale, noise=noise, sums=sums)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the images and the scale."""
        images, scale, noise = ctx.saved_tensors
        grads = [
            torch.empty_like(tensor) if need else None
            for tensor, need in zip((images, scale), ctx.needs_input_grad, strict=False)
        ]
        inputs = {"images": images, "guide": images, "similarity": scale, "noise": noise, "grad": grad.contiguous()}
        _run(_SIMILARITY_BACKWARD, ctx.geometry, **inputs, grad_images=grads[0], grad_similarity=grads[1])
        return (*grads, None, None)


def _named(tensors: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    """The arguments of `CompiledDiffusion`, by the names of the kernel's."""
    names = ("images", "guide", "noise", "similarity", "weight", "spatial", "tau")
    return dict(zip(names, tensors, strict=True))


def _run(task: int, geometry: StencilGeometry, **tensors: Tensor | None) -> None:
    """One call of the kernel; all tensors contiguous, None where there is no such argument."""
    images, guide, tau = tensors["images"], tensors["guide"], tensors.get("tau")
    assert images is not None
    assert guide is not None
    # The kernel reads where these say there is something, and nothing stops it.
    assert (len(guide), *guide.shape[2:]) == (len(images), *images.shape[2:]), "images and guide differ in size"
    rows, columns = torch.tensor(geometry.offsets, dtype=torch.int64, device="cpu").view(-1, 2).T.contiguous()
    _kernel.run(
        task,
        images.dtype,
        **dict(zip(_SIZES, (*images.shape[:2], guide.shape[1], *images.shape[2:], geometry.patch_size), strict=False)),
        offsets=len(geometry.offsets),
        steps=0 if tau is None else tau.shape[1],
        threads=torch.get_num_threads(),
        rows=rows,
        columns=columns,
        self_similarity=1.0,
        self_weight=SELF_WEIGHT,
        **tensors,
    )
