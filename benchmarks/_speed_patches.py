"""Signals on patches, the textbook graph, beside SciPy and message passing."""

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from _timing import floor_ms, median_ms, record
from scipy.sparse import csr_matrix, diags
from torch import Tensor

from datamodules import CIFAR10DataModule
from lightning_modules.graph import GraphDiffusion, PatchGrid, radius_graph

NOISE_STD = 25 / 255
RADIUS, STEPS = 10.0, 5
PARAMETERS = {"sigma": 0.3, "tau": 0.1, "radius": RADIUS, "sigma_s": 10.0, "sigma_f": 0.3}
BATCH = 256
_SCIPY_IMAGES = 32


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Results of this section, as records of `_timing.record`."""
    images = _noisy(options, BATCH)
    grid = PatchGrid(32, 32, 8, 5)
    pipeline = SciPyPipeline(grid)
    difference = np.abs(restore(images[:4]).numpy() - pipeline(images[:4].numpy())).max()
    print(f"per image, batch {BATCH}; largest difference to SciPy {difference:.1e}")

    floor, reference = _floor(images, grid), "our MessagePassing reference"
    pixels = images.numpy()[:_SCIPY_IMAGES]
    scipy = {
        count: median_ms(lambda count=count: [pipeline(part) for part in np.split(pixels, _SCIPY_IMAGES // count)])
        for count in (1, 2, 4, 8, 16, 32)
    }
    fastest = min(scipy, key=scipy.__getitem__)
    peers = {f"SciPy sparse, the fastest of batches of 1 to 32 ({fastest})": scipy[fastest] / _SCIPY_IMAGES}
    for name, gradient, passes, repeats in (("forward", False, 1, 21), ("forward + backward", True, 3, 9)):
        peers[reference] = (
            median_ms(lambda gradient=gradient: restore(images, gradient=gradient, implementation="message_passing"))
            / BATCH
        )
        ours = median_ms(lambda gradient=gradient: restore(images, gradient=gradient), repeats, 3) / BATCH
        for peer, taken in peers.items():
            work = f"textbook graph (patch 8, stride 5), 32×32, {name}"
            yield record(work, ours, peer, taken, floor_ms=passes * floor)
        peers.clear()  # SciPy has no gradients


def restore(images: Tensor, gradient: bool = False, implementation: Any = "auto") -> Tensor:
    """Restored images; with `gradient`, of a loss with respect to each image's five parameters, as in training."""
    leaves: dict[str, Tensor | float] = dict(PARAMETERS)
    if gradient:
        leaves = {name: torch.full((len(images),), v, requires_grad=True) for name, v in PARAMETERS.items()}
    with torch.set_grad_enabled(gradient):
        diffusion = GraphDiffusion(8, 5, "patches", implementation=implementation)
        restored = diffusion(images, **leaves, smooth_steps=STEPS, noise=NOISE_STD)
    if gradient:
        restored.square().mean().backward()
    return restored


class SciPyPipeline:
    """The same operator as one would write it with NumPy and SciPy: one sparse matrix for all. Edges are given."""

    def __init__(self, grid: PatchGrid) -> None:
        self.grid = grid
        source, target = radius_graph(grid.centers, RADIUS).numpy()
        order = np.lexsort((source, target))
        self.source, self.target = source[order], target[order]
        self.counts = np.bincount(target, minlength=grid.num_patches)
        centers = grid.centers.numpy()
        self.length = np.linalg.norm(centers[self.source] - centers[self.target], axis=1).astype(np.float32)
        self.origins = (centers - (grid.patch_size - 1) / 2).astype(int)
        self.coverage = grid.coverage()[0].numpy()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        size, nodes, count = self.grid.patch_size, self.grid.num_patches, len(images)
        cut = [images[:, :, top : top + size, left : left + size] for top, left in self.origins]
        patches = np.stack(cut, 1).reshape(count, nodes, -1)
        distance = np.square(patches[:, self.source] - patches[:, self.target]).sum(2)
        distance = np.maximum(distance - 2 * NOISE_STD**2 * patches.shape[2], 0)
        sigma, tau, radius, sigma_s, sigma_f = PARAMETERS.values()
        cutoff = 0.5 * (1 + np.cos(np.pi * np.minimum(self.length / radius, 1)))
        spatial = np.exp(-(self.length**2) / (2 * sigma_s**2)) * cutoff
        columns = (self.source + nodes * np.arange(count)[:, None]).ravel()
        starts = np.concatenate([[0], np.tile(self.counts, count).cumsum()])

        def sparse(weights: np.ndarray) -> csr_matrix:
            return csr_matrix((weights.ravel(), columns, starts), shape=(count * nodes, count * nodes))

        similarity = sparse(np.exp(-distance / (2 * sigma**2)))
        weight = sparse(spatial * np.exp(-distance / (2 * sigma_f**2)))
        degree = np.asarray(weight.sum(1)).ravel()
        alone = degree <= 1e-12  # such a patch keeps its value
        root = diags(np.where(alone, 0, 1 / np.sqrt(np.maximum(degree, 1e-12))))
        inner = root @ weight @ root + diags(alone.astype(weight.dtype))
        signal = np.concatenate([patches, np.ones_like(patches[..., :1])], 2).reshape(count * nodes, -1)
        signal = signal + similarity @ signal
        for _ in range(STEPS):
            signal = (1 - tau) * signal + tau * (inner @ signal)
        restored = (signal[:, :-1] / signal[:, -1:]).reshape(count, nodes, -1, size, size)
        total = np.zeros_like(images)
        for number, (top, left) in enumerate(self.origins):
            total[:, :, top : top + size, left : left + size] += restored[:, number]
        return total / self.coverage


def _floor(images: Tensor, grid: PatchGrid) -> float:
    """Milliseconds an image: in and out once; distances and steps along the edges, and the product S'P."""
    nodes, dimension = grid.num_patches, images.shape[1] * grid.patch_size**2
    edges = radius_graph(grid.centers, RADIUS).shape[1]  # both directions counted
    operations = 3 * edges // 2 * dimension + STEPS * 2 * edges * nodes + 2 * nodes**2 * dimension
    return floor_ms(2 * images[0].numel() * images.element_size(), operations)


def _noisy(options: argparse.Namespace, count: int) -> Tensor:
    data = CIFAR10DataModule(root=str(options.data), batch_size=count)
    data.setup("test")
    clean = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)["image"]
    return clean + NOISE_STD * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
