"""The image operator on a CPU as one compiled kernel (kernel.c): an image's maps never leave the cache.

`is_supported` says for what; `image_operator` has the same in torch. Both are tested against the same references.
"""

import ctypes
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_modules.graph.cpu.library import load_library
from lightning_modules.graph.first_derivatives import first_derivatives
from lightning_modules.graph.stencil import StencilGeometry
from lightning_modules.graph.weights import SELF_WEIGHT

_FOLDER = Path(__file__).parent
_DEFINES: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.float64: ("DOUBLE",)}

_RESTORE, _RESTORE_BACKWARD, _SIMILARITY, _SIMILARITY_BACKWARD = range(4)

_SIZES = ("batch", "channels", "features", "height", "width", "patch", "offsets", "steps", "threads")
_INPUTS = ("images", "guide", "bias", "similarity", "weight", "within", "spatial", "tau")
_POINTERS = (
    *("rows", "columns", *_INPUTS),
    *("output", "first", "sums", "grad"),
    *("grad_images", "grad_guide", "grad_bias", "grad_similarity", "grad_weight", "grad_spatial", "grad_tau"),
)


class _Call(ctypes.Structure):
    """`Call` of kernel.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_double) for name in ("self_similarity", "self_weight")),
        ("memory", ctypes.c_void_p),
    )


_libraries: dict[torch.dtype, ctypes.CDLL | None] = {}
_lock = threading.Lock()  # two threads of one process would compile it twice


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernel for a precision, compiled at the first call; None where it cannot be."""
    with _lock:
        if dtype not in _libraries:
            found = load_library(_FOLDER / "kernel.c", (_FOLDER / "planes.h", _FOLDER / "vectors.h"), _DEFINES[dtype])
            if found is not None:
                found.memory_needed.restype = ctypes.c_int64
                found.memory_needed.argtypes = found.run.argtypes = [ctypes.POINTER(_Call), ctypes.c_int64]
                found.run.restype = None
            _libraries[dtype] = found
        return _libraries[dtype]


def is_supported(*tensors: Tensor) -> bool:
    """Whether the kernel takes these tensors: on a CPU, in one precision, not being traced or compiled.

    Shape:
        - tensors: any
    """
    dtype = tensors[0].dtype
    return (
        dtype in _DEFINES
        and all(tensor.device.type == "cpu" and tensor.dtype == dtype for tensor in tensors)
        and all(_has_memory(tensor) for tensor in tensors)
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
        and library(dtype) is not None
    )


def _has_memory(tensor: Tensor) -> bool:
    """False for what is a tensor in name only: fake ones, subclasses, and those of `torch.func`'s transforms."""
    if type(tensor) not in (Tensor, Parameter):
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


class CompiledDiffusion(torch.autograd.Function):
    """`image_operator.diffuse_image`: images, guide, bias, similarity, weight, within, spatial, tau, geometry."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Restored images; keeps the inputs and S·y."""
        *inputs, geometry = arguments
        inputs = [tensor.contiguous() for tensor in inputs]
        output = torch.empty_like(inputs[0])
        first = torch.empty_like(output) if any(ctx.needs_input_grad) else None
        _run(_RESTORE, geometry, **_named(inputs), output=output, first=first)
        if first is not None:
            ctx.save_for_backward(*inputs, first)
            ctx.geometry = geometry
        return output

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs; computes the rest again."""
        *inputs, first = ctx.saved_tensors
        named = _named(inputs)
        # Those of the numbers cost nothing; of image and guide only what is asked for. Without steps, W plays no part.
        wanted = ["bias", "similarity", *(("weight", "spatial", "tau") if inputs[-1].shape[1] else ())]
        wanted += [name for name, need in zip(_INPUTS[:2], ctx.needs_input_grad, strict=False) if need]
        grads = {name: torch.empty_like(value) for name, value in named.items() if name in wanted}
        targets = {f"grad_{name}": value for name, value in grads.items()}
        _run(_RESTORE_BACKWARD, ctx.geometry, **named, first=first, grad=grad_output.contiguous(), **targets)
        return (*(grads.get(name) for name in _INPUTS), None)


class CompiledSimilaritySum(torch.autograd.Function):
    """`image_operator.mean_similarity`, but for the number of edges; passes no gradient to the bias."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, similarity: Tensor, bias: Tensor, geometry: StencilGeometry) -> Tensor:
        """The sums, `[B]`."""
        images, similarity, bias = (tensor.contiguous() for tensor in (images, similarity, bias))
        ctx.save_for_backward(images, similarity, bias)
        ctx.geometry = geometry
        sums = torch.empty_like(similarity)
        inputs = {"images": images, "guide": images, "similarity": similarity, "bias": bias}
        _run(_SIMILARITY, geometry, **inputs, sums=sums)
        return sums

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the images and the similarity's exponent."""
        images, similarity, bias = ctx.saved_tensors
        grads = [
            torch.empty_like(tensor) if need else None
            for tensor, need in zip((images, similarity), ctx.needs_input_grad, strict=False)
        ]
        inputs = {"images": images, "guide": images, "similarity": similarity, "bias": bias}
        targets = {"grad_images": grads[0], "grad_similarity": grads[1]}
        _run(_SIMILARITY_BACKWARD, ctx.geometry, **inputs, grad=grad_output.contiguous(), **targets)
        return (*grads, None, None)


def _named(inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(_INPUTS, inputs, strict=True))


def _run(task: int, geometry: StencilGeometry, **tensors: Tensor | None) -> None:
    """One call of the kernel; all tensors contiguous, None where there is no such argument."""
    images, guide, tau = tensors["images"], tensors["guide"], tensors.get("tau")
    assert images is not None
    assert guide is not None
    # The kernel reads where these say there is something, and nothing stops it.
    assert (len(guide), *guide.shape[2:]) == (len(images), *images.shape[2:]), "images and guide differ in size"
    rows, columns = torch.tensor(geometry.offsets, dtype=torch.int64, device="cpu").view(-1, 2).T.contiguous()
    sizes = (*images.shape[:2], guide.shape[1], *images.shape[2:], geometry.patch_size, len(geometry.offsets))
    steps = 0 if tau is None else tau.shape[1]
    tensors |= {"rows": rows, "columns": columns}
    call = _Call(
        **dict(zip(_SIZES, (*sizes, steps, torch.get_num_threads()), strict=True)),
        **{name: _address(name, tensor) for name, tensor in tensors.items() if tensor is not None},
        self_similarity=1.0,
        self_weight=SELF_WEIGHT,
    )
    kernel = library(images.dtype)
    assert kernel is not None, "ask `is_supported` before"
    memory = torch.zeros(kernel.memory_needed(call, task), dtype=torch.uint8, device="cpu")
    call.memory = memory.data_ptr()
    kernel.run(call, task)


def _address(name: str, tensor: Tensor) -> int:
    """Address of a tensor. The kernel goes there whatever it is, so that it must be memory of this process."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous and on the CPU, got a tensor on {tensor.device}")
    return tensor.data_ptr()
