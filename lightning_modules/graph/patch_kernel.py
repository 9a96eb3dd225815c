"""The dense patch path on CUDA: one Triton program for each image, forward and backward, and no matrix in memory.

The mathematics is that of `patch_operator.diffuse_patches_dense`. A program cuts its image's patches straight out of
the image, keeps the N×N matrices of its graph in registers and writes restored patches, which a second kernel averages.
The backward pass saves nothing but the inputs.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_modules.graph.laplacian import DEGREE_FLOOR, Laplacian
from lightning_modules.graph.parameters import DiffusionParameters
from lightning_modules.graph.patches import PatchGrid

# Entries of the patch vectors that a program holds at a time, and pixels that one program averages.
_ENTRIES, _PIXELS = 32, 1024
_FLOOR = tl.constexpr(DEGREE_FLOOR)
_PI = tl.constexpr(torch.pi)


def diffuse_patches_fused(
    images: Tensor,
    guide: Tensor,
    parameters: DiffusionParameters,
    noise_std: Tensor | float,
    grid: PatchGrid,
    laplacian: Laplacian,
    max_radius: float,
) -> Tensor:
    """Restored images, as `patch_operator.diffuse_patches_dense`: float32, symmetric or random walk, at most 64 nodes.

    A count of steps for each image is read on the device: nothing waits for it.

    Shape:
        - images: `[B, C, H, W]`; guide: `[B, F, H, W]`
        - output: as images
    """
    size, device = len(images), images.device

    def each(value: Tensor | float) -> Tensor:
        return (value.to(images) if torch.is_tensor(value) else images.new_full((1,), value)).view(-1).expand(size)

    sigma, tau, radius, sigma_s, sigma_f, steps = parameters
    values = torch.stack([each(value) for value in (sigma, tau, radius, sigma_s, sigma_f, noise_std)], dim=1)
    if not torch.is_tensor(steps):
        steps = torch.full((size,), steps, dtype=torch.int32, device=device)
    with torch.cuda.device_of(images):  # Triton launches on the current device, whatever that of the tensors is
        return _Diffusion.apply(
            images, guide, values, steps.to(device, torch.int32).expand(size), grid, laplacian, max_radius
        )


class _Tables(NamedTuple):
    """Geometry on the device.

    Attributes:
        origins: Pixel at which each patch begins, in the flattened plane, `[N]`.
        lengths: Lengths of the edges, −1 where there is none, `[N, N]`.
        entries: Patch entries n·p² + e that cover each pixel, −1 where there are fewer, `[K, H·W]`.
    """

    origins: Tensor
    lengths: Tensor
    entries: Tensor


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # made in a validation and cached, it must still serve a training step
def _tables(grid: PatchGrid, max_radius: float, device: torch.device) -> _Tables:
    pixel = torch.arange(grid.height * grid.width, dtype=torch.float64).view(1, 1, grid.height, grid.width)
    pixels = grid.extract(pixel)[0].long()  # [N, p²]
    length = torch.cdist(grid.centers, grid.centers, compute_mode="donot_use_mm_for_euclid_dist")
    lengths = torch.where((length > 0) & (length <= max_radius), length, -1.0)
    covered, order = pixels.flatten().sort(stable=True)
    count = torch.bincount(covered)
    place = torch.arange(len(covered)) - (count.cumsum(0) - count)[covered]  # among the entries of the same pixel
    entries = torch.full((int(count.max()), len(count)), -1)
    entries[place, covered] = order
    return _Tables(pixels[:, 0].int().to(device), lengths.float().to(device), entries.int().to(device))


class _Diffusion(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        guide: Tensor,
        values: Tensor,
        steps: Tensor,
        grid: PatchGrid,
        laplacian: Laplacian,
        max_radius: float,
    ) -> Tensor:
        images, guide, values, steps = (part.contiguous() for part in (images, guide, values, steps))
        ctx.save_for_backward(images, guide, values, steps)
        ctx.tables, ctx.grid, ctx.laplacian = _tables(grid, max_radius, images.device), grid, laplacian
        patches = images.new_empty(len(images), grid.num_patches, images.shape[1] * grid.patch_size**2)
        geometry, rows = _geometry(ctx, images, guide)
        _forward_kernel[(len(images),)](images, guide, values, steps, patches, *geometry, num_warps=rows // 4)
        return _folded(patches, grid, ctx.tables) / grid.coverage(images.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, guide, values, steps = ctx.saved_tensors
        grid = ctx.grid
        grad = (grad / grid.coverage(grad.device)).contiguous()
        shape = (len(images), grid.num_patches)
        grad_patches = images.new_empty(*shape, images.shape[1] * grid.patch_size**2)
        grad_features = images.new_empty(*shape, guide.shape[1] * grid.patch_size**2)
        grad_values = torch.empty_like(values)
        geometry, rows = _geometry(ctx, images, guide)
        _backward_kernel[(len(images),)](
            *(images, guide, values, steps, grad, grad_patches, grad_features, grad_values),
            *geometry,
            num_warps=rows // 8,
        )
        grads = (_folded(part, grid, ctx.tables) for part in (grad_patches, grad_features))
        return *grads, grad_values, None, None, None, None


def _geometry(ctx: Any, images: Tensor, guide: Tensor) -> tuple[tuple[Any, ...], int]:
    """The arguments that both kernels end with, and the number of rows of their matrices."""
    grid, nodes = ctx.grid, ctx.grid.num_patches
    rows = max(16, triton.next_power_of_2(nodes))  # a product of matrices wants at least 16
    sizes = (nodes, grid.height * grid.width, grid.width, images.shape[1], guide.shape[1])
    return (*ctx.tables[:2], *sizes, grid.patch_size, rows, _ENTRIES, ctx.laplacian == "symmetric"), rows


def _folded(patches: Tensor, grid: PatchGrid, tables: _Tables) -> Tensor:
    """Sum of the patches in the image plane, as `PatchGrid.fold`."""
    size, nodes, dimension = patches.shape
    area = grid.patch_size**2
    images = patches.new_empty(size, dimension // area, grid.height, grid.width)
    blocks = (triton.cdiv(images.numel(), _PIXELS),)
    cover, plane = tables.entries.shape
    _fold_kernel[blocks](
        patches, images, tables.entries, images.numel(), plane, images.shape[1], nodes, area, cover, _PIXELS
    )
    return images


@triton.jit
def _fold_kernel(patches, images, entries, total, plane, channels, nodes, area, cover, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    pixel, channel, image = index % plane, index // plane % channels, index // plane // channels
    value = tl.zeros([BLOCK], tl.float32)
    for place in range(cover):
        entry = tl.load(entries + place * plane + pixel, mask=inside, other=-1)
        node = image * nodes + entry // area
        value += tl.load(
            patches + (node * channels + channel) * area + entry % area, mask=inside & (entry >= 0), other=0.0
        )
    tl.store(images + index, value, mask=inside)


@triton.jit
def _cut(image, origins, first, nodes, plane, width, dimension, SIDE: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """Entries `first` to `first + D` of the patch vectors of an image, `[N, D]`."""
    node, entry = tl.arange(0, N), first + tl.arange(0, D)
    origin = tl.load(origins + node, mask=node < nodes, other=0)
    within = entry % (SIDE * SIDE)
    offset = entry // (SIDE * SIDE) * plane + within // SIDE * width + within % SIDE
    inside = (node < nodes)[:, None] & (entry < dimension)[None, :]
    return tl.load(image + origin[:, None] + offset[None, :], mask=inside, other=0.0)


@triton.jit
def _cut_centered(
    image, origins, first, nodes, plane, width, dimension, SIDE: tl.constexpr, N: tl.constexpr, D: tl.constexpr
):
    """The same less the mean node: the Gram form of the distance loses no digits to an offset."""
    patches = _cut(image, origins, first, nodes, plane, width, dimension, SIDE, N, D)
    mean = tl.sum(patches, 0) / nodes
    return tl.where((tl.arange(0, N) < nodes)[:, None], patches - mean[None, :], 0.0)


@triton.jit
def _graph(
    guide, values, origins, lengths, nodes, plane, width, dimension, SIDE: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Lengths, distances before the clamp, similarities, weights, degrees, factors of the normalisation, inner step."""
    sigma, radius = tl.load(values), tl.load(values + 2)
    sigma_s, sigma_f, noise = tl.load(values + 3), tl.load(values + 4), tl.load(values + 5)
    node = tl.arange(0, N)
    self = node[:, None] == node[None, :]
    inside = (node < nodes)[:, None] & (node < nodes)[None, :]
    gram = tl.zeros([N, N], tl.float32)
    for first in range(0, dimension, D):
        features = _cut_centered(guide, origins, first, nodes, plane, width, dimension, SIDE, N, D)
        gram = tl.dot(features, tl.trans(features), gram, input_precision="ieee")
    square = tl.sum(tl.where(self, gram, 0.0), 1)
    biased = square[:, None] + square[None, :] - 2 * gram - 2 * dimension * noise * noise
    distance = tl.maximum(biased, 0.0)
    length = tl.load(lengths + node[:, None] * nodes + node[None, :], mask=inside, other=-1.0)
    edge = length > 0
    similarity = tl.where(edge, tl.exp(-0.5 * distance / (sigma * sigma)), tl.where(self, 1.0, 0.0))
    cutoff = 0.5 * (1 + tl.cos(tl.minimum(length / radius, 1.0) * _PI))
    spatial = tl.exp(-0.5 * length * length / (sigma_s * sigma_s))
    unlike = tl.exp(-0.5 * distance / (sigma_f * sigma_f))
    weight = tl.where(edge, unlike * (spatial * cutoff), 0.0)
    degree = tl.sum(weight, 1)
    if SYMMETRIC:
        factor = 1 / tl.sqrt(tl.maximum(degree, _FLOOR))
        inner = weight * factor[:, None] * factor[None, :]
    else:
        factor = 1 / tl.maximum(degree, _FLOOR)
        inner = weight * factor[:, None]
    return length, biased, similarity, weight, degree, factor, inner


@triton.jit
def _diffused(signal, inner, tau, steps):
    """The signal `[N, N]` after a number of steps."""
    for _ in range(steps):
        signal = (1 - tau) * signal + tau * tl.dot(inner, signal, input_precision="ieee")
    return signal


@triton.jit
def _forward_kernel(
    images, guide, values, steps, restored, origins, lengths, nodes, plane, width, channels, features,
    SIDE: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    values += image * 6
    dimension = channels * SIDE * SIDE
    _, _, similarity, _, _, _, inner = _graph(
        guide + image * features * plane, values, origins, lengths, nodes, plane, width, features * SIDE * SIDE,
        SIDE, N, D, SYMMETRIC,
    )  # fmt: skip
    smoothed = _diffused(similarity, inner, tl.load(values + 1), tl.load(steps + image))
    operator = smoothed / tl.sum(smoothed, 1)[:, None]
    node = tl.arange(0, N)
    for first in range(0, dimension, D):
        patches = _cut(images + image * channels * plane, origins, first, nodes, plane, width, dimension, SIDE, N, D)
        entry = first + tl.arange(0, D)
        inside = (node < nodes)[:, None] & (entry < dimension)[None, :]
        target = restored + (image * nodes + node[:, None]) * dimension + entry[None, :]
        tl.store(target, tl.dot(operator, patches, input_precision="ieee"), mask=inside)


@triton.jit
def _backward_kernel(
    images, guide, values, steps, grad, grad_patches, grad_features, grad_values, origins, lengths, nodes, plane, width,
    channels, features, SIDE: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    values += image * 6
    sigma, tau, radius = tl.load(values), tl.load(values + 1), tl.load(values + 2)
    sigma_s, sigma_f, noise = tl.load(values + 3), tl.load(values + 4), tl.load(values + 5)
    count = tl.load(steps + image)
    guide += image * features * plane
    length, biased, similarity, weight, degree, factor, inner = _graph(
        guide, values, origins, lengths, nodes, plane, width, features * SIDE * SIDE, SIDE, N, D, SYMMETRIC
    )
    smoothed = _diffused(similarity, inner, tau, count)
    total = tl.sum(smoothed, 1)[:, None]
    operator = smoothed / total

    # Through the product with the patches.
    node = tl.arange(0, N)
    dimension = channels * SIDE * SIDE
    grad_operator = tl.zeros([N, N], tl.float32)
    for first in range(0, dimension, D):
        base = image * channels * plane
        patches = _cut(images + base, origins, first, nodes, plane, width, dimension, SIDE, N, D)
        grad_restored = _cut(grad + base, origins, first, nodes, plane, width, dimension, SIDE, N, D)
        grad_operator = tl.dot(grad_restored, tl.trans(patches), grad_operator, input_precision="ieee")
        entry = first + tl.arange(0, D)
        inside = (node < nodes)[:, None] & (entry < dimension)[None, :]
        target = grad_patches + (image * nodes + node[:, None]) * dimension + entry[None, :]
        tl.store(target, tl.dot(tl.trans(operator), grad_restored, input_precision="ieee"), mask=inside)

    # Through the steps, backwards; what went into each is computed again: k²/2 small products instead of k matrices.
    grad_signal = (grad_operator - tl.sum(grad_operator * operator, 1)[:, None]) / total
    grad_inner = tl.zeros([N, N], tl.float32)
    for done in range(count):
        signal = _diffused(similarity, inner, tau, count - 1 - done)
        grad_inner = tl.dot(grad_signal, tl.trans(signal), grad_inner, input_precision="ieee")
        grad_signal = (1 - tau) * grad_signal + tau * tl.dot(tl.trans(inner), grad_signal, input_precision="ieee")
    self = node[:, None] == node[None, :]
    grad_tau = tl.sum(grad_inner * (inner - tl.where(self, 1.0, 0.0)))
    grad_inner = tau * grad_inner

    # Through the normalisation; an isolated node's degree stands at the floor.
    free = degree > _FLOOR
    if SYMMETRIC:
        product = grad_inner * weight
        grad_factor = tl.sum(product * factor[None, :], 1) + tl.sum(product * factor[:, None], 0)
        grad_degree = tl.where(free, -0.5 * grad_factor * factor * factor * factor, 0.0)
        grad_weight = grad_inner * factor[:, None] * factor[None, :] + grad_degree[:, None]
    else:
        grad_degree = tl.where(free, -tl.sum(grad_inner * weight, 1) * factor * factor, 0.0)
        grad_weight = grad_inner * factor[:, None] + grad_degree[:, None]

    # Through the kernels.
    edge = length > 0
    distance = tl.maximum(biased, 0.0)
    by_sigma = tl.where(edge, grad_signal * similarity, 0.0)
    by_weight = tl.where(edge, grad_weight * weight, 0.0)
    ratio = tl.minimum(length / radius, 1.0) * _PI
    without_cutoff = tl.exp(-0.5 * (distance / (sigma_f * sigma_f) + length * length / (sigma_s * sigma_s)))
    by_radius = tl.where(edge, grad_weight * without_cutoff * 0.5 * tl.sin(ratio) * ratio / radius, 0.0)
    by_distance = -0.5 * (by_sigma / (sigma * sigma) + by_weight / (sigma_f * sigma_f))
    by_distance = tl.where(biased > 0, by_distance, 0.0)
    grad_values += image * 6
    tl.store(grad_values, tl.sum(by_sigma * distance) / (sigma * sigma * sigma))
    tl.store(grad_values + 1, grad_tau)
    tl.store(grad_values + 2, tl.sum(by_radius))
    tl.store(grad_values + 3, tl.sum(by_weight * length * length) / (sigma_s * sigma_s * sigma_s))
    tl.store(grad_values + 4, tl.sum(by_weight * distance) / (sigma_f * sigma_f * sigma_f))
    dimension = features * SIDE * SIDE
    tl.store(grad_values + 5, -4 * dimension * noise * tl.sum(by_distance))

    # Through the distances: the Laplacian of the summed gradients, applied to the features.
    both = by_distance + tl.trans(by_distance)
    rows = tl.sum(both, 1)[:, None]
    for first in range(0, dimension, D):
        cut = _cut_centered(guide, origins, first, nodes, plane, width, dimension, SIDE, N, D)
        value = 2 * (rows * cut - tl.dot(both, cut, input_precision="ieee"))
        entry = first + tl.arange(0, D)
        inside = (node < nodes)[:, None] & (entry < dimension)[None, :]
        tl.store(grad_features + (image * nodes + node[:, None]) * dimension + entry[None, :], value, mask=inside)
