"""Graph diffusion of an image whose every pixel is a node: a stencil of shifted slices, no edge list."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_modules.graph.parameters import DiffusionParameters, repeat_step
from lightning_modules.graph.topology import half_offsets
from lightning_modules.graph.weights import SELF_WEIGHT, debias_distance, edge_weight, gaussian

Offsets = tuple[tuple[int, int], ...]

# Squared distance of pairs that leave the image: no kernel of a width under 10⁵ lets any weight through, and unlike an
# infinity it gives no NaN in the gradient.
FAR = 1e12


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

    similarity = gaussian(distance, per_image.sigma)
    restored = _diffuse(similarity, 1.0, images, 1.0, 1, geometry)
    if isinstance(parameters.smooth_steps, int) and parameters.smooth_steps == 0:
        return restored
    weight = edge_weight(distance, geometry.length, per_image.sigma_s, per_image.sigma_f, per_image.radius)
    return _diffuse(weight, SELF_WEIGHT, restored, per_image.tau, per_image.smooth_steps, geometry)


def mean_similarity(images: Tensor, sigma: Tensor | float, patch_size: int, max_radius: float) -> tuple[Tensor, int]:
    """Mean similarity over the edges of each image, and the number of edges (both directions counted).

    Shape:
        - images: `[B, C, H, W]`
        - output: `[B]`
    """
    geometry = _geometry(*images.shape[-2:], patch_size, max_radius, images.device, images.dtype)
    width = sigma.view(-1, 1, 1, 1) if torch.is_tensor(sigma) else sigma
    similarity = gaussian(window_distances(images, geometry), width)
    half_edges = geometry.num_half_edges
    return similarity.sum((1, 2, 3)) / max(half_edges, 1), 2 * half_edges


class StencilGeometry(NamedTuple):
    """What depends on the image's size alone; M is the number of half offsets, one of each pair ±δ.

    Attributes:
        offsets: Half offsets δ = (row, column).
        valid: 1 where both a pixel and its neighbour lie in the image, for +δ and then for −δ, `[2M, H, W]`.
        scale: p² over the number of terms of the window that are valid for δ, 0 where the pair is not, `[M, H, W]`.
        far: A distance without similarity where the pair is not valid, 0 elsewhere, `[M, H, W]`.
        length: ‖δ‖, `[M, 1, 1]`.
        num_half_edges: Number of valid pairs.
        patch_size: Side p of the windows.
    """

    offsets: Offsets
    valid: Tensor
    scale: Tensor
    far: Tensor
    length: Tensor
    num_half_edges: int
    patch_size: int


def window_distances(guide: Tensor, geometry: StencilGeometry) -> Tensor:
    r"""Squared distances of the windows around each pixel q and its neighbour q+δ, clipped at the border.

    .. math:: D_\delta(q) = \frac{p^2}{n_\delta(q)} \sum_u \lVert y(q+u) - y(q+u+\delta) \rVert^2

    over the :math:`n_\delta(q)` positions u of the window for which both pixels lie in the image: a box filter of the
    squared difference of two shifted images, once for each pair ±δ. Pairs that leave the image are `FAR` apart.

    Args:
        guide: Images or features y.
        geometry: Offsets and borders.

    Shape:
        - guide: `[B, F, H, W]`
        - output: `[B, M, H, W]`
    """
    squared = _SquaredDifferences.apply(guide, geometry.offsets)
    return torch.addcmul(geometry.far, box_sum(squared, geometry.patch_size), geometry.scale)


def box_sum(maps: Tensor, size: int) -> Tensor:
    """Sum over the centred `size`×`size` window, zeros outside; `size` odd.

    Shape:
        - maps: `[..., H, W]`
        - output: as maps
    """
    return maps if size == 1 else _BoxSum.apply(maps, size)


def _diffuse(
    half: Tensor,
    self_weight: float,
    image: Tensor,
    tau: Tensor | float,
    smooth_steps: Tensor | int,
    geometry: StencilGeometry,
) -> Tensor:
    """`x ← (1−τ) x + τ A x`, `smooth_steps` times, for the averaging operator A of the half weights."""
    weight, own = _AveragingWeights.apply(half, self_weight, geometry)

    def step(image: Tensor) -> Tensor:
        return torch.lerp(image, _Stencil.apply(weight, own, image, geometry.offsets), tau)

    return repeat_step(step, image, smooth_steps)


class _BoxSum(torch.autograd.Function):
    """Separable box filter; its own adjoint."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, size: int) -> Tensor:
        ctx.size = size
        return _box(maps, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _box(grad, ctx.size), None


def _box(maps: Tensor, size: int) -> Tensor:
    for dim in (-2, -1):
        length, total = maps.shape[dim], maps.clone(memory_format=torch.contiguous_format)
        for shift in range(1, min(size // 2, length - 1) + 1):
            total.narrow(dim, shift, length - shift).add_(maps.narrow(dim, 0, length - shift))
            total.narrow(dim, 0, length - shift).add_(maps.narrow(dim, shift, length - shift))
        maps = total
    return maps


class _AveragingWeights(torch.autograd.Function):
    r"""Weights of the neighbours at +δ and −δ, `[B, 2M, H, W]`, and of the pixel itself, `[B, 1, H, W]`.

    The weights w of a pixel and s of itself are normalised by :math:`t = s + \sum w`, averaged over the windows that
    cover a pixel (box filter b), cut to valid pairs V and normalised again:

    .. math:: c = V\, b(w / t), \quad o = b(s / t), \quad n = o + \sum c, \quad A = c / n, \quad a = o / n
    """

    @staticmethod
    def forward(ctx: Any, half: Tensor, self_weight: float, geometry: StencilGeometry) -> tuple[Tensor, Tensor]:
        weight = _both_directions(half, geometry.offsets)
        inverse_total = (weight.sum(1, keepdim=True) + self_weight).reciprocal_()
        covered = _box(weight * inverse_total, geometry.patch_size).mul_(geometry.valid)
        own = _box(self_weight * inverse_total, geometry.patch_size)
        inverse_norm = (own + covered.sum(1, keepdim=True)).reciprocal_()
        covered.mul_(inverse_norm)
        own.mul_(inverse_norm)
        ctx.save_for_backward(weight, inverse_total, covered, own, inverse_norm)
        ctx.self_weight, ctx.geometry = self_weight, geometry
        return covered, own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_own: Tensor) -> tuple[Tensor, None, None]:
        weight, inverse_total, covered, own, inverse_norm = ctx.saved_tensors
        geometry = ctx.geometry
        through_norm = (grad * covered).sum(1, keepdim=True).addcmul_(grad_own, own)
        grad = (grad - through_norm).mul_(inverse_norm).mul_(geometry.valid)
        grad = _box(grad, geometry.patch_size)
        grad_own = _box((grad_own - through_norm) * inverse_norm, geometry.patch_size)
        through_total = (grad * weight).sum(1, keepdim=True).add_(grad_own, alpha=ctx.self_weight).mul_(inverse_total)
        grad = grad.sub_(through_total).mul_(inverse_total)
        return _fold_directions(grad, geometry.offsets), None, None


def _both_directions(half: Tensor, offsets: Offsets) -> Tensor:
    """Values at +δ, and at −δ what the pixel q−δ has for its neighbour q; zero where q−δ lies outside."""
    count = len(offsets)
    both = half.new_zeros(len(half), 2 * count, *half.shape[2:])
    both[:, :count] = half
    for m, offset in enumerate(offsets):
        here, there = _region(offset, *half.shape[-2:])
        both[:, count + m, *there] = half[:, m, *here]
    return both


def _fold_directions(both: Tensor, offsets: Offsets) -> Tensor:
    """Adjoint of `_both_directions`."""
    count = len(offsets)
    half = both[:, :count].clone()
    for m, offset in enumerate(offsets):
        here, there = _region(offset, *both.shape[-2:])
        half[:, m, *here] += both[:, count + m, *there]
    return half


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
                for channel in range(image.shape[1]):
                    grad_weight[:, k, *here].addcmul_(grad[:, channel, *here], image[:, channel, *there])
            if grad_image is not None:
                grad_image[..., *there].addcmul_(weight[:, k : k + 1, *here], grad[..., *here])
        return grad_weight, grad_own, grad_image, None


def _both_signs(offsets: Offsets) -> Offsets:
    return offsets + tuple((-a, -b) for a, b in offsets)


@lru_cache(
    maxsize=2
)  # a few hundred bytes for each pixel: a folder of photographs of many sizes must not fill the memory
@torch.inference_mode(False)  # made in a validation and cached, it must still serve a training step
def _geometry(
    height: int, width: int, patch_size: int, max_radius: float, device: torch.device, dtype: torch.dtype
) -> StencilGeometry:
    offsets = tuple((a, b) for a, b in half_offsets(max_radius) if a < height and abs(b) < width)
    half = torch.zeros(1, len(offsets), height, width, dtype=torch.float64)
    for m, offset in enumerate(offsets):
        here, _ = _region(offset, height, width)
        half[:, m, *here] = 1
    terms = _box(half, patch_size)[0].clamp_min(1)
    scale = half[0] * patch_size**2 / terms
    length = torch.tensor([(a * a + b * b) ** 0.5 for a, b in offsets], dtype=torch.float64).view(-1, 1, 1)
    valid, far = _both_directions(half, offsets)[0], FAR * (1 - half[0])
    valid, scale, far, length = (tensor.to(device, dtype) for tensor in (valid, scale, far, length))
    return StencilGeometry(offsets, valid, scale, far, length, int(half.sum()), patch_size)
