"""The image operator on a CPU as one compiled kernel (kernel.c): an image's maps never leave the cache.

`is_supported` says for what; `stencil_diffusion` has the same in torch. Both are tested against the same references.
"""

import ctypes
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_modules._cached import cached_tensors
from lightning_modules.graph.exponents import Exponents
from lightning_modules.graph.stencil import StencilGeometry
from lightning_modules.graph.weights import SELF_WEIGHT
from lightning_modules.native.library import load_library
from lightning_modules.operators.operator import is_readable

_FOLDER = Path(__file__).parent
_DEFINES: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.float64: ("DOUBLE",)}

_RESTORE, _RESTORE_BACKWARD, _SIMILARITY, _SIMILARITY_BACKWARD = range(4)

_SIZES = ("batch", "channels", "features", "height", "width", "patch", "offsets", "steps", "threads")
_POINTERS = (
    *("rows", "columns", "images", "guide", "bias", "similarity", "weight", "within", "spatial", "tau"),
    *("output", "first", "sums", "grad"),
    *("grad_images", "grad_guide", "grad_bias", "grad_similarity", "grad_weight", "grad_spatial", "grad_tau"),
)
_NUMBERS = ("bias", "similarity", "weight", "within", "spatial", "tau")  # in the order of `Exponents`
_WRITTEN = {"output", "first", "sums", *(name for name in _POINTERS if name.startswith("grad_"))}
# What each task cannot do without; the rest may be null.
_NEEDED = {
    _RESTORE: ("images", "guide", *_NUMBERS, "output"),
    _RESTORE_BACKWARD: (
        *("images", "guide", *_NUMBERS, "first", "grad"),
        *("grad_bias", "grad_similarity", "grad_weight", "grad_spatial", "grad_tau"),
    ),
    _SIMILARITY: ("guide", "bias", "similarity", "sums"),
    _SIMILARITY_BACKWARD: ("guide", "bias", "similarity", "grad", "grad_similarity"),
}


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
_of_thread = threading.local()  # `memory`: of its last call
_MOST_KEPT = 2**27  # bytes; a tile of a large photograph takes fewer


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernel for a precision, compiled at the first call; None where it cannot be."""
    with _lock:
        if dtype not in _libraries:
            includes = (_FOLDER / "planes.h", _FOLDER / "vectors.h")
            found = load_library(_FOLDER / "kernel.c", includes, _DEFINES[dtype], ("memory_needed", "run"))
            if found is not None:
                found.memory_needed.restype = found.run.restype = ctypes.c_int64
                found.memory_needed.argtypes = [ctypes.POINTER(_Call), ctypes.c_int64]
                found.run.argtypes = [*found.memory_needed.argtypes, ctypes.c_int64]
            _libraries[dtype] = found
        return _libraries[dtype]


def is_supported(*tensors: Tensor) -> bool:
    """Whether the kernel takes these tensors: in the memory of this process, in one precision.

    Shape:
        - tensors: any
    """
    dtype = tensors[0].dtype
    return (
        dtype in _DEFINES
        and is_readable(tensors[0])
        and all(tensor.dtype == dtype and tensor.device.type == "cpu" for tensor in tensors)
        and library(dtype) is not None
    )


def restore(
    images: Tensor, guide: Tensor, exponents: Exponents, geometry: StencilGeometry, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """`stencil_diffusion.restore`, for exponents that are numbers.

    Shape:
        - images: `[B, C, H, W]`; guide: `[B, F, H, W]`
        - output: as images
    """
    output = images.new_empty(images.shape)
    first = images.new_empty(images.shape) if keep else None
    _run(_RESTORE, geometry, images=images, guide=guide, **_numbers(exponents), output=output, first=first)
    return output, first


def restore_backward(
    grad_output: Tensor,
    smoothed: Tensor,
    images: Tensor,
    guide: Tensor,
    exponents: Exponents,
    geometry: StencilGeometry,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Exponents]:
    """`stencil_diffusion.restore_backward`, for exponents that are numbers.

    Shape:
        - grad_output, smoothed, images: `[B, C, H, W]`; guide: `[B, F, H, W]`
        - output: as images, as guide
    """
    numbers = _numbers(exponents)
    # Those of the numbers cost nothing; of image and guide only what is asked for.
    grads = {f"grad_{name}": torch.zeros_like(value) for name, value in numbers.items()}
    targets = [
        value.new_empty(value.shape) if need else None for value, need in zip((images, guide), needs, strict=False)
    ]
    inputs = {"images": images, "guide": guide, **numbers, "first": smoothed.contiguous(), "grad": grad_output}
    outputs = {name: value for name, value in grads.items() if name != "grad_within"}
    _run(_RESTORE_BACKWARD, geometry, **inputs, **outputs, grad_images=targets[0], grad_guide=targets[1])
    bias, similarity, weight, *others = grads.values()
    own = Exponents(bias[:, :, None], similarity[:, None, None], weight[:, None, None], *others)
    return targets[0], targets[1], own


def similarity_sum(images: Tensor, scale: Tensor, bias: Tensor, geometry: StencilGeometry) -> Tensor:
    """`stencil_diffusion.similarity_sum`.

    Shape:
        - images: `[B, C, H, W]`
        - scale: `[B]`
        - bias: `[B, M]`
        - output: `[B]`
    """
    sums = scale.new_empty(scale.shape)
    _run(_SIMILARITY, geometry, guide=images, similarity=scale, bias=bias, sums=sums)
    return sums


def similarity_sum_backward(
    grad: Tensor, images: Tensor, scale: Tensor, bias: Tensor, geometry: StencilGeometry, needs_images: bool
) -> tuple[Tensor | None, Tensor]:
    """`stencil_diffusion.similarity_sum_backward`.

    Shape:
        - grad, scale: `[B]`
        - images: `[B, C, H, W]`
        - bias: `[B, M]`
        - output: as images, as scale
    """
    grad_images, grad_scale = images.new_empty(images.shape) if needs_images else None, scale.new_empty(scale.shape)
    inputs = {"guide": images, "similarity": scale, "bias": bias, "grad": grad}
    _run(_SIMILARITY_BACKWARD, geometry, **inputs, grad_images=grad_images, grad_similarity=grad_scale)
    return grad_images, grad_scale


def _numbers(exponents: Exponents) -> dict[str, Tensor]:
    """The exponents as the kernel takes them."""
    bias, similarity, weight, *others = exponents
    return dict(zip(_NUMBERS, (bias[:, :, 0], similarity[:, 0, 0], weight[:, 0, 0], *others), strict=True))


def _run(task: int, geometry: StencilGeometry, **tensors: Tensor | None) -> None:
    """One call of the kernel, which goes where it is sent: all that it will read or write is checked here.

    Args:
        task: Which.
        geometry: Of the images.
        tensors: By the names of `Call`; None where there is none.
    """
    guide = tensors["guide"]
    if guide is None or guide.ndim != 4:
        raise ValueError(f"the kernel needs a guide [B, F, H, W], got {None if guide is None else list(guide.shape)}")
    images, tau = tensors.get("images"), tensors.get("tau")
    kernel = library(guide.dtype) if guide.dtype in _DEFINES else None
    if kernel is None:
        raise RuntimeError(f"there is no kernel for {guide.dtype} here: ask is_supported first")
    sizes = {
        "batch": len(guide),
        "channels": guide.shape[1] if images is None else images.shape[1],
        "features": guide.shape[1],
        "height": geometry.height,
        "width": geometry.width,
        "patch": geometry.patch_size,
        "offsets": len(geometry.offsets),
        "steps": 0 if tau is None else tau.shape[1],
        "threads": torch.get_num_threads(),
    }
    missing = [name for name in _NEEDED[task] if tensors.get(name) is None]
    if missing or geometry.patch_size < 1 or geometry.patch_size % 2 == 0:
        raise ValueError(f"the kernel needs {', '.join(missing) or f'an odd patch_size, got {geometry.patch_size}'}")
    shapes = _shapes(sizes, of_images=images is not None)
    # Held until the kernel is done: a copy that is contiguous has no other owner.
    held = {name: _checked(name, tensor, shapes[name], guide) for name, tensor in tensors.items() if tensor is not None}
    rows, columns = _offsets(geometry.offsets, geometry.height, geometry.width)
    call = _Call(
        **sizes,
        rows=rows.data_ptr(),
        columns=columns.data_ptr(),
        **{name: _address(name, tensor) for name, tensor in held.items()},
        self_similarity=1.0,
        self_weight=SELF_WEIGHT,
    )
    memory = _zeros(kernel.memory_needed(call, task))
    call.memory = memory.data_ptr()
    if not kernel.run(call, task, len(memory)):
        raise RuntimeError(f"the kernel needs more than {len(memory)} bytes for {sizes}")


def _zeros(size: int) -> Tensor:
    """Memory for a call, that of this thread's last one where it is enough: a system that hands out pages of a
    photograph's size one by one takes a fifth of the time to restore it.

    Shape:
        - output: uint8 `[size]`
    """
    kept: Tensor | None = getattr(_of_thread, "memory", None)
    if kept is not None and size <= len(kept):
        return kept[:size].zero_()
    with torch.inference_mode(False):  # or later calls outside of it could not clear it
        memory = torch.zeros(size, dtype=torch.uint8, device="cpu")
    if size <= _MOST_KEPT:
        _of_thread.memory = memory
    return memory


def _shapes(sizes: dict[str, int], of_images: bool) -> dict[str, tuple[int, ...]]:
    """What the kernel takes every tensor to be."""
    batch, channels, features, height, width, _, offsets, steps, _ = sizes.values()
    images, guide = (batch, channels, height, width), (batch, features, height, width)
    numbers: dict[str, tuple[int, ...]] = {
        "bias": (batch, offsets),
        "similarity": (batch,),
        "weight": (batch,),
        "within": (offsets,),
        "spatial": (batch, offsets),
        "tau": (batch, steps),
    }
    return {
        **dict.fromkeys(("images", "output", "first", "grad_images"), images),
        **dict.fromkeys(("guide", "grad_guide"), guide),
        **{prefix + name: shape for name, shape in numbers.items() for prefix in ("", "grad_")},
        "sums": (batch,),
        "grad": images if of_images else (batch,),
    }


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...], guide: Tensor) -> Tensor:
    """The tensor, contiguous. What is written must be so already."""
    if tensor.shape != shape or tensor.dtype != guide.dtype or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} must be {guide.dtype} {list(shape)} on the CPU, got {tensor.dtype} {list(tensor.shape)} on "
            f"{tensor.device}"
        )
    if name in _WRITTEN and not tensor.is_contiguous():
        raise ValueError(f"{name} is written to and must be contiguous")
    return tensor.contiguous()


def _address(name: str, tensor: Tensor) -> int:
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise ValueError(f"{name} is a tensor in name only: it has no memory")
    return address


@cached_tensors(maxsize=16)
def _offsets(offsets: tuple[tuple[int, int], ...], height: int, width: int) -> Tensor:
    """Rows and columns of the half offsets, int64 `[2, M]`."""
    for row, column in offsets:
        if not ((row, column) > (0, 0) and row < height and abs(column) < width):
            raise ValueError(f"({row}, {column}) is not a half offset within images of {height}×{width} pixels")
    return torch.tensor(offsets, dtype=torch.int64, device="cpu").view(-1, 2).T.contiguous()
