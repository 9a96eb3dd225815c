"""Passes of K-means over samples on a CPU, compiled (passes.c): each reads the samples once and keeps no copy.

Where there is no library, and for samples elsewhere, the same is done in torch: `None` is the answer to who asks.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from lightning_modules.native.library import load_library

_SOURCE = Path(__file__).with_name("passes.c")
_DEFINES: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.float64: ("DOUBLE",)}
_MINIMUM_SHARE = 2**17  # numbers for which a thread is worth its start


class _Samples(ctypes.Structure):
    """`Samples` of passes.c."""

    _fields_ = (
        ("width", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "starts", "columns", "index", "offset", "inverse", "weights")),
    )


class _Seen(ctypes.Structure):
    """`Seen` of passes.c."""

    _fields_ = (("largest", ctypes.c_double), ("changed", ctypes.c_int64))


class _Centers(ctypes.Structure):
    """`Centers` of passes.c."""

    _fields_ = (
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("centers", "norms")),
        ("largest", ctypes.c_double),
        ("packed", ctypes.c_void_p),
        ("panels", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("error", "tiny", "error_of_double")),
    )


_RANGE = (ctypes.c_int64, ctypes.c_int64)
_SAMPLES = (ctypes.POINTER(_Samples), *_RANGE)
_INTO = (*3 * (ctypes.c_void_p,), ctypes.POINTER(_Seen))
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "panel": (ctypes.c_int64, (ctypes.c_int,)),
    "nearest": (ctypes.c_int, (*_SAMPLES, ctypes.POINTER(_Centers), *_INTO)),
    "loosen": (ctypes.c_int64, (*_RANGE, *2 * (ctypes.c_void_p,), ctypes.c_double, *2 * (ctypes.c_void_p,))),
    "add": (None, (*_SAMPLES, *3 * (ctypes.c_void_p,))),
    "inertia": (ctypes.c_double, (*_SAMPLES, *3 * (ctypes.c_void_p,))),
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
        - frame: float64 `[D]` twice, what to take from the samples and what to multiply them by; nothing where None
        - weights: float64 `[N]`
    """

    def __init__(
        self,
        compiled: ctypes.CDLL,
        x: Tensor | csr_array,
        frame: tuple[Tensor, Tensor] | None,
        weights: Tensor | None,
    ) -> None:
        self._library, self._shape = compiled, x.shape
        starts = columns = offset = inverse = None
        if not isinstance(x, Tensor):
            starts, columns = (
                torch.from_numpy(array.astype(dtype, copy=False))
                for array, dtype in ((x.indptr, np.int64), (x.indices, np.int32))
            )
            x = torch.from_numpy(x.data)
            self._terms = int(starts.diff().amax()) if self._shape[0] else 0
            self._numbers = len(x) // max(self._shape[0], 1)
        else:
            self._terms = self._numbers = self._shape[1]
        if frame is not None:
            offset, inverse = (numbers.contiguous() for numbers in frame)
        weights = None if weights is None else weights.contiguous()
        self._is_sparse = starts is not None
        # what the pointers point to is kept with them
        self._tensors = (x.contiguous(), starts, columns, offset, inverse, weights)

    def nearest(
        self,
        index: Tensor | None,
        centers: Tensor,
        labels: Tensor,
        gap: Tensor,
        members: Tensor | None = None,
    ) -> tuple[int, float]:
        """Compares samples with all centers: sets their labels, and a lower bound on the distance to the second nearest
        center less that to the nearest.

        Args:
            index: Which samples; all where None.
            centers: Centers.
            labels: Labels of before, -1 where there is none.
            gap: Bounds.
            members: Sums of `add`, to which is added what has changed its label.

        Returns:
            How many changed their label, and the largest squared norm.

        Shape:
            - index: `[M]`
            - centers: float64 `[K, D]`
            - labels, gap: `[N]`
            - members: float64 `[K, D + 2]`
        """
        samples, count = self._samples(index)
        num_components, width = centers.shape
        centers = centers.contiguous()
        squares, lanes = centers.square().sum(dim=1), self._library.panel(self._is_sparse)
        panels = -(-num_components // lanes)
        packed = torch.zeros(panels * lanes, 1 + width)
        packed[:, 0] = torch.inf  # nothing is near to what fills the last panel
        packed[:num_components, 0], packed[:num_components, 1:] = squares, -2 * centers
        packed = packed.view(panels, lanes, 1 + width).transpose(1, 2).contiguous()
        largest = float(squares.amax())
        # rounding of the products, of their sum and of the samples themselves; of no use beyond the reach of float32
        single, double = (torch.finfo(dtype) for dtype in (torch.float32, torch.float64))
        terms = 2 * (self._terms + 8)
        errors = (terms * single.eps if largest < 1e38 else torch.inf, terms * single.tiny, terms * double.eps)
        pointers = (centers.data_ptr(), squares.data_ptr(), largest, packed.data_ptr())
        given = _Centers(num_components, *pointers, panels, *errors)
        into = (labels.data_ptr(), gap.data_ptr())

        def work(first: int, last: int, own: Tensor | None) -> tuple[int, float]:
            seen = _Seen()
            if self._library.nearest(samples, first, last, given, *into, None if own is None else own.data_ptr(), seen):
                raise MemoryError("no memory is left for a few samples")
            return seen.changed, seen.largest

        changed, norms = zip(*self._adding(work, members, count, 1 + num_components), strict=True)
        return sum(changed), max(norms)

    def loosen(self, labels: Tensor, moved: Tensor, slack: float, gap: Tensor) -> Tensor:
        """Takes from the bound of each sample how far the centers have moved; the samples for which at most `slack` is
        left of it.

        Shape:
            - labels, gap: `[N]`
            - moved: float64 `[K]`, by label
            - output: `[M]`
        """
        index = torch.empty(len(labels), dtype=torch.long)
        moved = moved.contiguous()
        given, into = (labels.data_ptr(), moved.data_ptr(), slack), (gap.data_ptr(), index.data_ptr())

        def work(first: int, last: int) -> Tensor:
            return index[first : first + self._library.loosen(first, last, *given, *into)]

        # numpy: torch would copy them on all its threads, which then wait for more on the cores that the passes want
        found = [part.numpy() for part in _on_threads(work, len(labels), 1)]
        return torch.from_numpy(found[0] if len(found) == 1 else np.concatenate(found))

    def add(self, index: Tensor, labels: Tensor, old: Tensor, members: Tensor) -> None:
        """Adds samples that have weight to the sums of their labels, and takes them from those of their old ones, where
        these are not -1: the sums of the samples, of their weights, and their number.

        Shape:
            - index: `[M]`
            - labels, old: `[M]`
            - members: float64 `[K, D + 2]`
        """
        samples, count = self._samples(index)
        given = (labels.data_ptr(), old.data_ptr())

        def work(first: int, last: int, own: Tensor) -> None:
            self._library.add(samples, first, last, *given, own.data_ptr())

        self._adding(work, members, count, 1)

    def inertia(self, labels: Tensor, centers: Tensor) -> float:
        """Sum of the squared distances of all samples to the centers of their labels, weighted.

        Shape:
            - labels: `[N]`
            - centers: float64 `[K, D]`
        """
        samples, count = self._samples(None)
        centers = centers.contiguous()
        norms = centers.square().sum(dim=1)
        given = (labels.data_ptr(), centers.data_ptr(), norms.data_ptr())

        def work(first: int, last: int) -> float:
            return float(self._library.inertia(samples, first, last, *given))

        return sum(self._on_threads(work, count, 1))

    def _samples(self, index: Tensor | None) -> tuple[_Samples, int]:
        x, starts, columns, *others = self._tensors
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in (x, starts, columns, index, *others))
        return _Samples(self._shape[1], *pointers), self._shape[0] if index is None else len(index)

    def _adding(
        self, work: Callable[[int, int, Any], Any], members: Tensor | None, count: int, times: int
    ) -> list[Any]:
        """Results of work that adds to members, on members of its own where others work beside it."""

        def part(first: int, last: int) -> tuple[Any, Tensor | None]:
            own = members if members is None or last - first == count else torch.zeros_like(members)
            return work(first, last, own), own

        results = self._on_threads(part, count, times)
        for _, own in results:
            if own is not members:
                members += own
        return [result for result, _ in results]

    def _on_threads(self, work: Callable[[int, int], Any], count: int, times: int) -> list[Any]:
        return _on_threads(work, count, self._numbers * times)


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
    first, *others = pairwise(count * part // parts for part in range(parts + 1))
    with ThreadPoolExecutor(parts - 1) as pool:
        futures = [pool.submit(work, *bounds) for bounds in others]
        return [work(*first), *(future.result() for future in futures)]
