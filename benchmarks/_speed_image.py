"""The image operator: compiled and eager, one photograph, large images, and how time and memory grow."""

import argparse
import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from _peers import failure
from _plain_torch import plain_image_operator
from _timing import floor_ms, in_own_process, median_ms, record
from torch import Tensor

from datamodules import CIFAR10DataModule
from lightning_modules.graph import GraphDiffusion, image_operator
from lightning_modules.graph.cpu import kernel

NOISE_STD = 25 / 255
PARAMETERS = {"sigma": 0.213, "tau": 0.142, "sigma_s": 1.5, "sigma_f": 0.309}
STEPS = 5
BATCH = 256

_LARGE = """
import sys, time
from lightning_modules.graph import GraphDiffusion
from lightning_modules.noise import estimate_noise_std
side = int(sys.argv[1])
image = torch.rand(1, 3, side, side)
with torch.inference_mode():
    begin = time.perf_counter()
    GraphDiffusion(patch_size=3)(
        image, sigma=0.213, tau=0.142, radius=3.0, sigma_s=1.5, sigma_f=0.309, smooth_steps=5,
        noise=estimate_noise_std(image),
    )
    print(time.perf_counter() - begin)
"""

# From the end of the imports to the first result, all of it: compiling, or reading the cache, and computing.
_FIRST = """
import time
from lightning_modules.graph import GraphDiffusion
images, sigma = torch.rand(256, 3, 32, 32), torch.full((256,), 0.213, requires_grad=True)
begin = time.perf_counter()
restored = GraphDiffusion(3)(images, sigma=sigma, tau=0.142, radius=3.0, sigma_s=1.5, sigma_f=0.309, smooth_steps=5)
forward = time.perf_counter()
restored.square().mean().backward()
print(forward - begin, time.perf_counter() - begin)
"""


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Results of this section, as records of `_timing.record`."""
    yield from _operator(options)
    yield from _large(options)
    yield from _scaling()


def restore(images: Tensor, radius: float = 3.0, gradient: bool = False, **more: Any) -> Tensor:
    """Restored images; with `gradient`, of a loss with respect to each image's four parameters, as in training."""
    leaves = {name: torch.full((len(images),), value, requires_grad=gradient) for name, value in PARAMETERS.items()}
    with torch.set_grad_enabled(gradient):
        restored = GraphDiffusion(3, **more)(images, **leaves, radius=radius, smooth_steps=STEPS, noise=NOISE_STD)
    if gradient:
        restored.square().mean().backward()
    return restored


def _operator(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    images = _cifar(options, BATCH)
    forms: dict[str, Any] = {"eager": eager()}
    if kernel.library(torch.float32) is None:
        print("no compiled rows: no C compiler, or LIGHTNING_EM_COMPILE=0")
    else:
        forms = {"compiled": contextlib.nullcontext(), **forms}
    peers: dict[str, Callable[..., Tensor]] = {"plain torch": plain_image_operator}
    if options.unrolled:
        peers["torch.compile of plain torch"] = torch.compile(plain_image_operator, dynamic=False)
    difference = (_plain(images, False, plain_image_operator) - restore(images)).abs().max()
    print(f"per image, batch {BATCH}; largest difference to plain torch {difference:.1e}")
    for name, gradient, passes in (("forward", False, 1), ("forward + backward", True, 3)):
        times: dict[str, float | str] = {}
        for peer, plain in peers.items():
            try:
                times[peer] = median_ms(partial(_plain, images, gradient, plain)) / BATCH
            except Exception as error:
                times[peer] = failure(error)
        # In and out once; of the operations those of the definition, box filters counted as sums of three.
        floor = floor_ms(2 * 4 * 3 * 32 * 32, passes * 32 * 32 * _operations(offsets=14))
        for form, context in forms.items():
            with context:
                ours = median_ms(lambda gradient=gradient: restore(images, gradient=gradient), repeats=9) / BATCH
            for peer, taken in times.items():
                known: dict[str, Any] = {"failed": taken} if isinstance(taken, str) else {"peer_ms": taken}
                yield record(f"image operator 32×32, {form}, {name}", ours, peer, **known, floor_ms=floor)
        if len(forms) == 2:
            yield from _beside_eager(gradient, name)
    if len(forms) == 2:
        yield from _first_results(options)


def eager() -> Any:
    """A context in which the operator runs in torch."""
    return mock.patch.object(image_operator, "is_supported", return_value=False)


def _plain(images: Tensor, gradient: bool, operator: Callable[..., Tensor]) -> Tensor:
    theta = {name: torch.tensor(value, requires_grad=gradient) for name, value in PARAMETERS.items()}
    with torch.set_grad_enabled(gradient):
        restored = operator(images, 3, 3, **theta, steps=STEPS, noise_std=NOISE_STD)
    if gradient:
        restored.square().mean().backward()
    return restored


def _beside_eager(gradient: bool, name: str) -> Iterator[dict[str, Any]]:
    """Other sizes, compiled beside eager."""
    generator = torch.Generator().manual_seed(0)
    for batch, side, radius in ((16, 96, 3.0), (1, 500, 6.0)):
        images = torch.rand(batch, 3, side, side, generator=generator)
        compiled = median_ms(lambda images=images, radius=radius: restore(images, radius, gradient)) / batch
        with eager():
            peer = median_ms(lambda images=images, radius=radius: restore(images, radius, gradient)) / batch
        work = f"image operator {side}×{side}, batch {batch}, radius {radius:.0f}, compiled, {name}"
        yield record(work, compiled, "ours in eager torch", peer)


def _first_results(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Fresh processes with an empty cache, and with the one that the first has left."""
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, XDG_CACHE_HOME=cache):
        for state in ("cold", "warm"):
            forward, both = in_own_process(_FIRST, threads=options.threads)[0].splitlines()[-1].split()
            yield record(f"image operator, first output on a {state} cache", 1e3 * float(forward))
            yield record(f"image operator, first gradients on a {state} cache", 1e3 * float(both))


def _operations(offsets: int, channels: int = 3, filters: int = 2 * 2) -> float:
    """Floating-point operations for each pixel, with `offsets` half offsets."""
    distances = offsets * (3 * channels + filters + 3)
    weights = 2 * offsets * (2 + 2 + 2 * (1 + filters + 1))
    steps = (STEPS + 1) * (2 * offsets + 1) * 2 * channels
    return distances + weights + steps


def _large(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    base = in_own_process("import lightning_modules", threads=options.threads)[1]
    sides, times, peaks = (512, 1024, 2048), [], []
    for side in sides:
        printed, peak = in_own_process(_LARGE, str(side), threads=options.threads)
        times.append(1e3 * float(printed.splitlines()[-1]))
        peaks.append(peak)
        yield record(f"{side}×{side} colour, own process", times[-1], peak_mib=peak, base_mib=base)
    print(f"time grows with pixels to the power {_exponent([s * s for s in sides], times):.3f}")
    print(f"memory above the {base:.0f} MiB of the imports grows to the power ", end="")
    print(f"{_exponent([s * s for s in sides], [peak - base for peak in peaks]):.3f}")


def _scaling() -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    tables = {
        "image side": [(side, 3.0, 1) for side in (32, 64, 128, 256, 512, 1024)],
        "radius": [(128, float(radius), 1) for radius in (2, 3, 4, 6, 8, 10)],
        "batch": [(32, 3.0, batch) for batch in (1, 4, 16, 64, 128, 256, 512)],
    }
    for name, cases in tables.items():
        sizes, times = [], []
        for side, radius, batch in cases:
            images = torch.rand(batch, 3, side, side, generator=generator)
            times.append(median_ms(lambda images=images, radius=radius: restore(images, radius)))
            sizes.append({"image side": side * side, "radius": radius**2, "batch": batch}[name])
            yield record(f"scaling with {name}: {batch} of {side}×{side}, radius {radius:.0f}", times[-1])
        what = {"image side": "pixels", "radius": "radius²", "batch": "images"}[name]
        # The smallest are all overhead: what it costs to call torch, whatever the size.
        print(
            f"time grows with {what} to the power {_exponent(sizes, times):.3f}; "
            f"the larger half alone {_exponent(sizes[len(sizes) // 2 :], times[len(times) // 2 :]):.3f}"
        )


def _exponent(sizes: list[float], values: list[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    x, y = ([math.log(value) for value in series] for series in (sizes, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def _cifar(options: argparse.Namespace, count: int) -> Tensor:
    """Noisy test images."""
    data = CIFAR10DataModule(root=str(options.data), batch_size=count, val_size=100, augment=False)
    data.setup("test")
    clean = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)["image"]
    return clean + NOISE_STD * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
