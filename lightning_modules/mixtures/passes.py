"""Passes of K-means over dense samples on a CPU, compiled (passes.c): each reads the samples once and keeps no copy.

Where there is no library, and for samples elsewhere, the same is done in torch: `None` is the answer to who asks.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.native.library import load_library

_SOURCE = Path(__file__).with_name("passes.c")
_DEFINES: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.float64: ("DOUBLE",)}
_MINIMUM_SHARE = 2**17  # numbers for which a thread is worth its start


class _Samples(ctypes.Structure):
    """`Samples` of passes.c."""

    _fields_ = (
        ("width", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "index", "offset", "inverse", "weights")),
    )


_RANGE = (ctypes.c_int64, ctypes.c_int64)
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "panel": (ctypes.c_int64, ()),
    "nearest": (
        ctypes.c_double,
        (ctypes.POINTER(_Samples), *_RANGE, ctypes.c_void_p, ctypes.c_int64, *2 * (ctypes.c_double,))
        + 2 * (ctypes.c_void_p,),
    ),
    "add": (None, (ctypes.POINTER(_Samples), *_RANGE, *5 * (ctypes.c_void_p,))),
    "inertia": (ctypes.c_double, (ctypes.POINTER(_Samples), *_RANGE, *2 * (ctypes.c_void_p,))),
    "moments": (None, (ctypes.c_void_p, ctypes.c_int64, *_RANGE, *4 * (ctypes.c_void_p,))),
}

_libraries: dict[torch.dtype, ctypes.CDLL | None] = {}
_lock = threading.Lock()  # two threads of one process would compile it twice


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The passes for samples of a type, compiled at the first call; None where they cannot be."""
    if dtype not in _DEFINES:
        return None
    with _lock:
        if dtype not in _libraries:
            found = load_library(_SOURCE, (), _DEFINES[dtype], tuple(_SIGNATURES))
            for name, (result, arguments) in _SIGNATURES.items() if found is not None else ():
                function = getattr(found, name)
                function.restype, function.argtypes = result, arguments
            _libraries[dtype] = found
        return _libraries[dtype]


def library_for(x: Tensor) -> ctypes.CDLL | None:
    """The library for a tensor, None where it is to be left to torch.

    Shape:
        - x: any
    """
    return library(x.dtype) if x.device.type == "cpu" and type(x) is Tensor and not x.requires_grad else None


class Passes:
    """Samples, and the passes over them: where they are in memory, and how they are standardized.

    Shape:
        - x: `[N, D]`
        - offset, inverse: float64 `[D]`
        - weights: float64 `[N]`
    """

    def __init__(
        self, compiled: ctypes.CDLL, x: Tensor, offset: Tensor, inverse: Tensor, weights: Tensor | None
    ) -> None:
        self._library = compiled
        # what the pointers point to is kept with them
        self._x, self._offset, self._inverse = x.contiguous(), offset.contiguous(), inverse.contiguous()
        self._weights = None if weights is None else weights.contiguous()

    def nearest(self, index: Tensor | None, centers: Tensor) -> tuple[Tensor, Tensor, float]:
        """Label, and a lower bound on the distance to the second nearest center less that to the nearest: NaN where
        float32 does not tell the two apart. Last the largest squared norm.

        Shape:
            - index: `[M]`, all samples where None
            - centers: float64 `[K, D]`
            - output: `[M]` twice
        """
        samples, count = self._samples(index)
        num_components, width = centers.shape
        squares, lanes = centers.square().sum(dim=1), self._library.panel()
        panels = -(-num_components // lanes)
        packed = torch.zeros(panels * lanes, 1 + width)
        packed[:, 0] = torch.inf  # nothing is near to what fills the last panel
        packed[:num_components, 0], packed[:num_components, 1:] = squares, -2 * centers
        packed = packed.view(panels, lanes, 1 + width).transpose(1, 2).contiguous()
        largest = float(squares.amax())
        # rounding of the products, of their sum and of the samples themselves; of no use beyond the reach of float32
        error = 2 * (width + 8) * torch.finfo(torch.float32).eps if largest < 1e38 else torch.inf
        labels = torch.empty(count, dtype=torch.long)
        gap = torch.empty(count, dtype=self._x.dtype)

        def work(first: int, last: int) -> float:
            into = (labels.data_ptr(), gap.data_ptr())
            return float(self._library.nearest(samples, first, last, packed.data_ptr(), panels, error, largest, *into))

        norms = _on_threads(work, count, width * (1 + num_components))
        if min(norms) < 0:
            raise MemoryError("no memory is left for a few samples")
        return labels, gap, max(norms)

    def add(self, index: Tensor | None, labels: Tensor, old: Tensor | None, num_labels: int) -> Tensor:
        """What samples that have weight add to their labels, and take from their old ones: the sums of the samples, of
        their weights, and their number.

        Shape:
            - index: `[M]`, all samples where None
            - labels, old: `[M]`
            - output: float64 `[num_labels, D + 2]`
        """
        samples, count = self._samples(index)
        width = self._x.shape[1]

        def work(first: int, last: int) -> tuple[Tensor, Tensor]:
            sums = torch.zeros(num_labels, width, dtype=torch.float64)
            numbers = torch.zeros(2, num_labels, dtype=torch.float64)
            former = None if old is None else old.data_ptr()
            into = (sums.data_ptr(), numbers[0].data_ptr(), numbers[1].data_ptr())
            self._library.add(samples, first, last, labels.data_ptr(), former, *into)
            return sums, numbers

        sums, numbers = zip(*_on_threads(work, count, width), strict=True)
        return torch.cat([torch.stack(sums).sum(dim=0), torch.stack(numbers).sum(dim=0).T], dim=1)

    def inertia(self, labels: Tensor, centers: Tensor) -> float:
        """Sum of the squared distances of all samples to the centers of their labels, weighted.

        Shape:
            - labels: `[N]`
            - centers: float64 `[K, D]`
        """
        samples, count = self._samples(None)
        centers = centers.contiguous()

        def work(first: int, last: int) -> float:
            return float(self._library.inertia(samples, first, last, labels.data_ptr(), centers.data_ptr()))

        return sum(_on_threads(work, count, self._x.shape[1]))

    def _samples(self, index: Tensor | None) -> tuple[_Samples, int]:
        where = (self._x, index, self._offset, self._inverse, self._weights)
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in where)
        return _Samples(self._x.shape[1], *pointers), len(self._x if index is None else index)


def moments(x: Tensor) -> list[tuple[int, Tensor, Tensor]] | None:
    """Number of samples, their mean and their sum of squares about it, for parts of the samples; None where it is to be
    done in torch, or where some number is not finite.

    Shape:
        - x: `[N, D]`
        - output: float64 `[D]` twice, for each part
    """
    compiled = library_for(x) if len(x) else None
    if compiled is None:
        return None
    x, width = x.contiguous(), x.shape[1]
    shift = x[0].double()

    def work(first: int, last: int) -> tuple[int, Tensor, Tensor]:
        mean, squares, *scratch = torch.empty(4, width, dtype=torch.float64)
        into = (shift.data_ptr(), mean.data_ptr(), squares.data_ptr(), scratch[0].data_ptr())
        compiled.moments(x.data_ptr(), width, first, last, *into)
        return last - first, shift + mean, squares

    parts = _on_threads(work, len(x), width)
    return parts if all(bool(torch.isfinite(squares).all()) for _, _, squares in parts) else None


def _on_threads(work: Callable[[int, int], Any], count: int, width: int) -> list[Any]:
    """Results of work on the samples from a first to a last, in parts for as many threads as torch has.

    Args:
        work: What is to be done: ctypes lets other threads run meanwhile.
        count: Samples.
        width: Numbers in each that the work goes through.
    """
    parts = max(1, min(torch.get_num_threads(), count * width // _MINIMUM_SHARE))
    if parts == 1:
        return [work(0, count)]
    bounds = [count * part // parts for part in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        return list(pool.map(work, bounds[:-1], bounds[1:]))
