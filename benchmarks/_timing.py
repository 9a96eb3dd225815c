"""Times, and the least time that the machine would need."""

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from _common import PROJECT

# Bytes per array: far more than the caches hold, so that the copy measures the memory.
_COPY_BYTES = 256 * 2**20
_MATRIX_SIDE = 2048


def median_ms(call: Callable[[], Any], repeats: int = 5, warm_up: int = 1) -> float:
    """Median wall time of a call in milliseconds, after `warm_up` calls that do not count."""
    for _ in range(warm_up):
        call()
    _synchronize()
    gc.collect()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        _synchronize()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@lru_cache
def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes per second that a copy moves, reads and writes counted."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / (1e-3 * median_ms(lambda: target.copy_(source), repeats=7, warm_up=2))


@lru_cache
def matrix_rate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of a matrix product, multiplications and additions counted."""
    left, right = (torch.randn(_MATRIX_SIDE, _MATRIX_SIDE, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    taken = median_ms(lambda: torch.mm(left, right, out=product), repeats=7, warm_up=2)
    return 2 * _MATRIX_SIDE**3 / (1e-3 * taken)


def floor_ms(moved_bytes: float, operations: float, device: str = "cpu") -> float:
    """The least time in milliseconds: bytes that must move, or operations to be done, whichever takes longer."""
    return 1e3 * max(moved_bytes / copy_bandwidth(device), operations / matrix_rate(device))


def record(
    work: str, ours_ms: float, peer: str | None = None, peer_ms: float | None = None, **more: Any
) -> dict[str, Any]:
    """One row of the results; the ratio is how many times faster than the peer we are. A peer may have `failed`."""
    row: dict[str, Any] = {"work": work, "ours_ms": ours_ms}
    if peer is not None:
        row["peer"] = peer
    if peer_ms is not None:
        row |= {"peer_ms": peer_ms, "ratio": peer_ms / ours_ms}
    return row | {name: value for name, value in more.items() if value is not None}


def in_own_process(script: str, *words: str, threads: int | None = None) -> tuple[str, float]:
    """Run a script in a fresh interpreter; what it printed, and its peak resident memory in MiB (Linux).

    The peak is that of the process only: VmHWM starts anew with it, unlike `ru_maxrss`, which begins at its parent's.
    """
    preamble = f"import sys; sys.path[:0] = [{str(PROJECT)!r}, {str(PROJECT / 'benchmarks')!r}]\n"
    preamble += f"import torch; torch.set_num_threads({threads or torch.get_num_threads()})\n"
    epilogue = "\nprint('PEAK_KIB', next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))\n"
    done = subprocess.run(
        [sys.executable, "-c", preamble + script + epilogue, *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the benchmark's own process failed:\n{done.stderr[-2000:]}")
    printed, _, peak = done.stdout.rpartition("PEAK_KIB")
    return printed.strip(), int(peak) / 1024
