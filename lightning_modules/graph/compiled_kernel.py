"""C code of the package that works on tensors: a library for each precision, compiled at the first call."""

import ctypes
import threading
from pathlib import Path

import torch
from torch import Tensor

from lightning_modules.graph.native import load_library

_DEFINES: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.float64: ("DOUBLE",)}


class CompiledKernel:
    """A C file next to this one with `memory_needed(call, task)` and `run(call, task)`.

    Args:
        source: Name of the C file.
        headers: Names of the files that it includes.
        call: Its struct `Call`, whose last field is `memory`.
    """

    def __init__(self, source: str, headers: tuple[str, ...], call: type[ctypes.Structure]) -> None:
        folder = Path(__file__).parent
        self._source, self._headers = folder / source, tuple(folder / header for header in headers)
        self._call = call
        self._libraries: dict[torch.dtype, ctypes.CDLL | None] = {}
        self._lock = threading.Lock()  # two threads of one process would compile it twice

    def library(self, dtype: torch.dtype) -> ctypes.CDLL | None:
        """The kernel for a precision, compiled at the first call; None where it cannot be."""
        with self._lock:
            if dtype not in self._libraries:
                self._libraries[dtype] = self._load(dtype)
            return self._libraries[dtype]

    def _load(self, dtype: torch.dtype) -> ctypes.CDLL | None:
        found = load_library(self._source, self._headers, _DEFINES[dtype])
        if found is not None:
            found.memory_needed.restype = ctypes.c_int64
            found.memory_needed.argtypes = found.run.argtypes = [ctypes.POINTER(self._call), ctypes.c_int64]
            found.run.restype = None
        return found

    def serves(self, *tensors: Tensor) -> bool:
        """Whether it takes these tensors: on a CPU, in one precision, outside `torch.compile`, and compiled."""
        dtype = tensors[0].dtype
        return (
            dtype in _DEFINES
            and all(tensor.device.type == "cpu" and tensor.dtype == dtype for tensor in tensors)
            and not torch.compiler.is_compiling()
            and self.library(dtype) is not None
        )

    def run(self, task: int, dtype: torch.dtype, **fields: Tensor | float | None) -> None:
        """One call; all tensors contiguous, None where there is no such argument."""
        kernel = self.library(dtype)
        assert kernel is not None, "ask `serves` before"
        call = self._call(
            **{
                name: value.data_ptr() if torch.is_tensor(value) else value
                for name, value in fields.items()
                if value is not None
            }
        )
        memory = torch.zeros(kernel.memory_needed(call, task), dtype=torch.uint8)
        call.memory = memory.data_ptr()
        kernel.run(call, task)
