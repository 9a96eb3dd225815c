"""The dense patch path on a CPU as one compiled kernel (patch_cpu_kernel.c): an image's matrices never leave the cache.

It serves where `serves` says so; `patch_operator` has the same in torch. Both are tested against the same references.
"""

import ctypes
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from lightning_modules.graph.compiled_kernel import CompiledKernel
from lightning_modules.graph.laplacian import DEGREE_FLOOR, Laplacian
from lightning_modules.graph.parameters import DiffusionParameters
from lightning_modules.graph.patches import PatchGrid
from lightning_modules.graph.weights import GAUSSIAN_EXPONENT

_RESTORE, _RESTORE_BACKWARD = range(2)

_SIZES = ("batch", "channels", "features", "height", "width", "patch")
_COUNTS = ("rows", "columns", "edges", "entries", "lengths", "symmetric", "threads")
_TABLES = (
    *("tops", "lefts", "share"),
    *("first", "second", "length", "there", "back", "start", "node", "neighbor", "distinct"),
)
_TENSORS = ("steps", "values", "images", "guide", "output", "grad", "grad_images", "grad_guide", "grad_values")

# Entries that follow the last edge, so that the kernel may work on whole vectors of them.
_VECTOR = 16


class _Call(ctypes.Structure):
    """`Call` of patch_cpu_kernel.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (*_SIZES, *_COUNTS)),
        *((name, ctypes.c_void_p) for name in (*_TABLES, *_TENSORS)),
        ("exponent", ctypes.c_double),
        ("degree_floor", ctypes.c_double),
        ("memory", ctypes.c_void_p),
    )


_kernel = CompiledKernel("patch_cpu_kernel.c", ("patch_matrix.h", "patch_pixels.h", "native.h"), _Call)
library, serves = _kernel.library, _kernel.serves


def diffuse_patches_compiled(
    images: Tensor,
    guide: Tensor,
    parameters: DiffusionParameters,
    noise_std: Tensor | float,
    grid: PatchGrid,
    laplacian: Laplacian,
    max_radius: float,
) -> Tensor:
    """Restored images, as `patch_operator.diffuse_patches_dense`: for what `serves` takes, symmetric or random walk.

    Shape:
        - images: `[B, C, H, W]`; guide: `[B, F, H, W]`
        - output: as images
    """

    def each(value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=images.dtype, device="cpu").view(-1).expand(len(images))

    values = torch.stack([each(value) for value in (*parameters[:5], noise_std)], dim=1)
    steps = torch.as_tensor(parameters.smooth_steps, device="cpu").ceil().to(torch.int64).clamp_min(0)
    steps = steps.view(-1).expand(len(images)).contiguous()
    with torch.device("cpu"):  # whatever the default device is
        geometry = _geometry(grid, max_radius, images.dtype)
    own = None if guide is images else guide
    restored: Tensor = _Diffusion.apply(images, own, values, steps, geometry, laplacian == "symmetric")
    return restored


class _Geometry(NamedTuple):
    """What images of one size have in common.

    Attributes:
        grid: Where the patches lie.
        num_edges: Number of edges, each counted once.
        tables: The kernel's tables, by name; see `Grid` in patch_pixels.h and `Graph` in patch_matrix.h.
    """

    grid: PatchGrid
    num_edges: int
    tables: dict[str, Tensor]


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # made in a validation and cached, it must still serve a training step
def _geometry(grid: PatchGrid, max_radius: float, dtype: torch.dtype) -> _Geometry:
    distance = torch.cdist(grid.centers, grid.centers, compute_mode="donot_use_mm_for_euclid_dist")
    joined = (distance > 0) & (distance <= max_radius)
    node, neighbor = joined.nonzero().T
    lengths, length = distance[joined].unique(return_inverse=True)
    entry = torch.zeros_like(joined, dtype=torch.int64)  # of a pair of nodes
    entry[joined] = torch.arange(len(node))
    once = node < neighbor
    first, second = node[once], neighbor[once]
    of_edges = {"first": first, "second": second, "length": length[once]}
    of_entries = {"node": node, "neighbor": neighbor}
    tables = {
        "tops": torch.tensor(grid.tops),
        "lefts": torch.tensor(grid.lefts),
        "there": entry[first, second],
        "back": entry[second, first],
        "distinct": lengths,
        "start": pad(joined.sum(1).cumsum(0), (1, 0)),
        "share": 1 / grid.coverage(dtype=dtype),
        **{name: pad(table, (0, _VECTOR)) for name, table in {**of_edges, **of_entries}.items()},
    }
    return _Geometry(grid, len(first), tables)


class _Diffusion(torch.autograd.Function):
    """Images, guide (None: the images), values, steps, geometry, whether the Laplacian is the symmetric one."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        guide: Tensor | None,
        values: Tensor,
        steps: Tensor,
        geometry: _Geometry,
        symmetric: bool,
    ) -> Tensor:
        images, guide = images.contiguous(), None if guide is None else guide.contiguous()
        ctx.save_for_backward(images, guide, values, steps)
        ctx.geometry, ctx.symmetric = geometry, symmetric
        output = torch.empty_like(images)
        inputs = {"images": images, "guide": guide, "values": values, "steps": steps}
        _run(_RESTORE, geometry, symmetric, **inputs, output=output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, guide, values, steps = ctx.saved_tensors
        # Those of the values cost nothing; of image and guide only what is asked for.
        grad_images = torch.empty_like(images) if ctx.needs_input_grad[0] else None
        grad_guide = torch.empty_like(guide) if ctx.needs_input_grad[1] else None
        grads = {"grad_images": grad_images, "grad_guide": grad_guide, "grad_values": torch.empty_like(values)}
        inputs = {"images": images, "guide": guide, "values": values, "steps": steps, "grad": grad.contiguous()}
        _run(_RESTORE_BACKWARD, ctx.geometry, ctx.symmetric, **inputs, **grads)
        return (*grads.values(), None, None, None)


def _run(task: int, geometry: _Geometry, symmetric: bool, **tensors: Tensor | None) -> None:
    """One call of the kernel; all tensors contiguous, None where there is no such argument."""
    images, guide, grid = tensors["images"], tensors["guide"], geometry.grid
    assert images is not None
    # The kernel reads where these say there is something, and nothing stops it.
    assert guide is None or (len(guide), *guide.shape[2:]) == (len(images), *images.shape[2:]), "sizes differ"
    assert images.shape[2:] == (grid.height, grid.width), "not the size of the grid"
    _kernel.run(
        task,
        images.dtype,
        batch=len(images),
        channels=images.shape[1],
        features=0 if guide is None else guide.shape[1],
        height=grid.height,
        width=grid.width,
        patch=grid.patch_size,
        rows=len(grid.tops),
        columns=len(grid.lefts),
        edges=geometry.num_edges,
        entries=2 * geometry.num_edges,
        lengths=len(geometry.tables["distinct"]),
        symmetric=symmetric,
        threads=torch.get_num_threads(),
        exponent=GAUSSIAN_EXPONENT,
        degree_floor=DEGREE_FLOOR,
        **geometry.tables,
        **tensors,
    )
