"""Graph diffusion of an image whose every pixel is a node: a stencil of shifted slices, no edge list."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_modules.graph.message_passing import SELF_WEIGHT
from lightning_modules.graph.parameters import DiffusionParameters, repeat_step
from lightning_modules.graph.topology import half_offsets
from lightning_modules.graph.weights import debias_distance, edge_weight, gaussian

Offsets = tuple[tuple[int, int], ...]


def diffuse_image(
    images: Tensor,
    guide: Tensor,
    parameters: DiffusionParameters,
    noise_std: Tensor | float,
    patch_size: int,
    max_radius: float,
) -> Tensor:
    r"""Diffuse images over the graph of their pixels, folding the patches after every step.

    With the similarity S and the weights W of the windows around two pixels, each normalised over the neighbours of a
    pixel and averaged over the windows that cover it (:math:`A_S`, :math:`A_W`):

    .. math:: x \leftarrow A_S\, y, \qquad x \leftarrow (1 - \tau)\, x + \tau A_W\, x \quad (k \text{ times})

    Patch-wise non-local means followed by diffusion on the same graph (Buades, Coll & Morel, CVPR 2005; Gilboa & Osher,
    "Nonlocal operators", MMS 2008).

    Args:
        images: Signal y.
        guide: What the windows are compared on; the images themselves, or learned features.
        parameters: Numbers, or one for each image.
        noise_std: Noise σ_n of the guide; a number or one for each image.
        patch_size: Side p of the windows, odd.
        max_radius: Radius of the topology in pixels.

    Shape:
        - images: `[B, C, H, W]`; guide: `[B, F, H, W]`
        - output: `[B, C, H, W]`
    """
    per_image = parameters.map(lambda value: value.view(-1, 1, 1, 1))
    noise = noise_std.view(-1, 1, 1, 1) if torch.is_tensor(noise_std) else noise_std
    geometry = _geometry(*guide.shape[-2:], patch_size, max_radius, guide.device, guide.dtype)
    distance = debias_distance(window_distances(guide, geometry), noise, guide.shape[1] * patch_size**2)

    similarity = gaussian(distance, per_image.sigma) * geometry.valid
    restored = _Stencil.apply(*_averaging_weights(similarity, 1.0, geometry, patch_size), images, geometry.offsets)
    if isinstance(parameters.smooth_steps, int) and parameters.smooth_steps == 0:
        return restored
    weight = edge_weight(distance, geometry.length, per_image.sigma_s, per_image.sigma_f, per_image.radius)
    inner, own = _averaging_weights(weight * geometry.valid, SELF_WEIGHT, geometry, patch_size)

    def step(image: Tensor) -> Tensor:
        return (1 - per_image.tau) * image + per_image.tau * _Stencil.apply(inner, own, image, geometry.offsets)

    return repeat_step(step, restored, per_image.smooth_steps)


def mean_similarity(images: Tensor, sigma: Tensor | float, patch_size: int, max_radius: float) -> tuple[Tensor, int]:
    """Mean similarity over the edges of each image, and the number of edges (both directions counted).

    Shape:
        - images: `[B, C, H, W]`
        - output: `[B]`
    """
    geometry = _geometry(*images.shape[-2:], patch_size, max_radius, images.device, images.dtype)
    width = sigma.view(-1, 1, 1, 1) if torch.is_tensor(sigma) else sigma
    similarity = gaussian(window_distances(images, geometry), width) * geometry.valid
    half_edges = geometry.num_half_edges
    return similarity.sum((1, 2, 3)) / max(half_edges, 1), 2 * half_edges


class StencilGeometry(NamedTuple):
    """What depends on the image's size alone; M is the number of half offsets, one of each pair ±δ.

    Attributes:
        offsets: Half offsets δ = (row, column).
        valid: 1 where both a pixel and its neighbour at δ lie in the image, `[M, H, W]`.
        scale: p² over the number of terms of the window that are valid for δ, `[M, H, W]`.
        length: ‖δ‖, `[M, 1, 1]`.
        num_half_edges: Number of valid pairs.
        patch_size: Side p of the windows.
    """

    offsets: Offsets
    valid: Tensor
    scale: Tensor
    length: Tensor
    num_half_edges: int
    patch_size: int


def window_distances(guide: Tensor, geometry: StencilGeometry) -> Tensor:
    r"""Squared distances of the windows around each pixel q and its neighbour q+δ, clipped at the border.

    .. math:: D_\delta(q) = \frac{p^2}{n_\delta(q)} \sum_u \lVert y(q+u) - y(q+u+\delta) \rVert^2

    over the :math:`n_\delta(q)` positions u of the window for which both pixels lie in the image: a box filter of the
    squared difference of two shifted images, once for each pair ±δ.

    Args:
        guide: Images or features y.
        geometry: Offsets and borders.

    Shape:
        - guide: `[B, F, H, W]`
        - output: `[B, M, H, W]`
    """
    return box_sum(_SquaredDifferences.apply(guide, geometry.offsets), geometry.patch_size) * geometry.scale


def box_sum(maps: Tensor, size: int) -> Tensor:
    """Sum over the centred `size`×`size` window, zeros outside; `size` odd.

    Shape:
        - maps: `[..., H, W]`
        - output: as maps
    """
    if size == 1:
        return maps
    height, width = maps.shape[-2:]
    padded = F.pad(maps, (size // 2,) * 4)
    rows = padded[..., :height, :]
    for shift in range(1, size):
        rows = rows + padded[..., shift : shift + height, :]
    columns = rows[..., :width]
    for shift in range(1, size):
        columns = columns + rows[..., shift : shift + width]
    return columns


def _averaging_weights(
    half: Tensor, self_weight: float, geometry: StencilGeometry, patch_size: int
) -> tuple[Tensor, Tensor]:
    """Weights of the neighbours at ±δ `[B, 2M, H, W]` and of the pixel itself `[B, 1, H, W]`; they sum to one."""
    weight = torch.cat([half, _at_opposite(half, geometry.offsets)], dim=1)
    total = self_weight + weight.sum(1, keepdim=True)
    both = torch.cat([geometry.valid, _at_opposite(geometry.valid[None], geometry.offsets)[0]])
    covered = box_sum(weight / total, patch_size) * both
    own = box_sum(self_weight / total, patch_size)
    norm = own + covered.sum(1, keepdim=True)
    return covered / norm, own / norm


def _at_opposite(half: Tensor, offsets: Offsets) -> Tensor:
    """Values at −δ: what the pixel q−δ has for its neighbour q, zero where q−δ lies outside."""
    moved = [F.pad(half[:, m], (b, -b, a, -a)) for m, (a, b) in enumerate(offsets)]
    return torch.stack(moved, dim=1) if moved else half


def _region(offset: tuple[int, int], height: int, width: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Pixels q whose neighbour q+δ lies in the image, and those neighbours."""
    a, b = offset
    here = slice(max(0, -a), height - max(0, a)), slice(max(0, -b), width - max(0, b))
    there = slice(max(0, a), height + min(0, a)), slice(max(0, b), width + min(0, b))
    return here, there


class _SquaredDifferences(torch.autograd.Function):
    """‖y(q) − y(q+δ)‖² for each half offset; the differences are computed again in the backward pass, not kept."""

    @staticmethod
    def forward(ctx: Any, guide: Tensor, offsets: Offsets) -> Tensor:
        ctx.save_for_backward(guide)
        ctx.offsets = offsets
        batch, _, height, width = guide.shape
        squared = guide.new_zeros(batch, len(offsets), height, width)
        for m, offset in enumerate(offsets):
            here, there = _region(offset, height, width)
            squared[:, m, *here] = (guide[..., *here] - guide[..., *there]).square().sum(1)
        return squared

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (guide,) = ctx.saved_tensors
        grad_guide = torch.zeros_like(guide)
        for m, offset in enumerate(ctx.offsets):
            here, there = _region(offset, *guide.shape[-2:])
            flow = (guide[..., *here] - guide[..., *there]) * (2 * grad[:, m : m + 1, *here])
            grad_guide[..., *here] += flow
            grad_guide[..., *there] -= flow
        return grad_guide, None


class _Stencil(torch.autograd.Function):
    """Σ_δ A_δ(q) x(q+δ) over +δ and −δ, plus a(q) x(q); keeps only its inputs."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, own: Tensor, image: Tensor, offsets: Offsets) -> Tensor:
        ctx.save_for_backward(weight, own, image)
        ctx.offsets = _both_signs(offsets)
        output = own * image
        for k, offset in enumerate(ctx.offsets):
            here, there = _region(offset, *image.shape[-2:])
            output[..., *here].addcmul_(weight[:, k : k + 1, *here], image[..., *there])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        weight, own, image = ctx.saved_tensors
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[0] else None
        grad_own = (grad * image).sum(1, keepdim=True) if ctx.needs_input_grad[1] else None
        grad_image = own * grad if ctx.needs_input_grad[2] else None
        for k, offset in enumerate(ctx.offsets):
            here, there = _region(offset, *image.shape[-2:])
            if grad_weight is not None:
                grad_weight[:, k, *here] = (grad[..., *here] * image[..., *there]).sum(1)
            if grad_image is not None:
                grad_image[..., *there].addcmul_(weight[:, k : k + 1, *here], grad[..., *here])
        return grad_weight, grad_own, grad_image, None


def _both_signs(offsets: Offsets) -> Offsets:
    return offsets + tuple((-a, -b) for a, b in offsets)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # made in a validation and cached, it must still serve a training step
def _geometry(
    height: int, width: int, patch_size: int, max_radius: float, device: torch.device, dtype: torch.dtype
) -> StencilGeometry:
    offsets = tuple((a, b) for a, b in half_offsets(max_radius) if a < height and abs(b) < width)
    valid = torch.zeros(len(offsets), height, width, dtype=torch.float64)
    for m, offset in enumerate(offsets):
        here, _ = _region(offset, height, width)
        valid[m, *here] = 1
    terms = box_sum(valid, patch_size).clamp_min(1)
    length = torch.tensor([(a * a + b * b) ** 0.5 for a, b in offsets], dtype=torch.float64).view(-1, 1, 1)
    tensors = ((patch_size**2 / terms), length)
    scale, length = (tensor.to(device, dtype) for tensor in tensors)
    return StencilGeometry(offsets, valid.to(device, dtype), scale, length, int(valid.sum()), patch_size)
