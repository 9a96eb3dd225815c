"""C code of the package that works on tensors: a library for each precision, compiled at the first call."""

import ctypes
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_modules.graph.cpu.library import load_library

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

    def serves(self, *tensors: Tensor, beside: Iterable[Any] = ()) -> bool:
        """Whether it takes these tensors: on a CPU, in one precision, not being traced or compiled, and there is one.

        Args:
            tensors: What the kernel computes with.
            beside: Other arguments, of which tensors must have memory of their own as well.
        """
        dtype = tensors[0].dtype
        return (
            dtype in _DEFINES
            and all(tensor.device.type == "cpu" and tensor.dtype == dtype for tensor in tensors)
            and all(_has_memory(value) for value in (*tensors, *beside) if torch.is_tensor(value))
            and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
            and self.library(dtype) is not None
        )

    def run(self, task: int, dtype: torch.dtype, **fields: Tensor | float | None) -> None:
        """One call; all tensors contiguous, None where there is no such argument."""
        kernel = self.library(dtype)
        assert kernel is not None, "ask `serves` before"
        call = self._call(
            **{
                name: _address(name, value) if torch.is_tensor(value) else value
                for name, value in fields.items()
                if value is not None
            }
        )
        memory = torch.zeros(kernel.memory_needed(call, task), dtype=torch.uint8, device="cpu")
        call.memory = memory.data_ptr()
        kernel.run(call, task)


def _has_memory(tensor: Tensor) -> bool:
    """False for what only stands for a tensor: fake ones, subclasses, and those of `torch.func`'s transforms."""
    if type(tensor) not in (Tensor, Parameter):
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def _address(name: str, tensor: Tensor) -> int:
    """Where a tensor lies. The kernel goes there whatever it is, so that it must be memory of this process."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous and on the CPU, got a tensor on {tensor.device}")
    return tensor.data_ptr()
