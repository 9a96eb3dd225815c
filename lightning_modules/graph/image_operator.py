"""Graph diffusion of an image whose every pixel is a node, on the stencil of its neighbours."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_modules.graph.cpu.kernel import CompiledDiffusion, CompiledSimilaritySum, serves
from lightning_modules.graph.parameters import DiffusionParameters
from lightning_modules.graph.stencil import (
    FAR,
    Signal,
    StencilGeometry,
    Workspace,
    add_products_,
    box_sum_,
    edge_views,
    incident_sum,
    squared_differences,
    stencil_geometry,
)
from lightning_modules.graph.weights import GAUSSIAN_EXPONENT, SELF_WEIGHT, cosine_cutoff
from lightning_modules.graph.window_average import Averaging

# Bytes of the map of the images that are worked on at once; the working set is about six such maps. On a CPU few enough
# that it stays in the caches, and many enough that each kernel has work to pay for its call.
CHUNK_BYTES = {"cpu": 4 * 2**20}
ACCELERATOR_CHUNK_BYTES = 256 * 2**20


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
    "Nonlocal operators", MMS 2008). The distances are box filters of the squared difference of two shifted images:

    .. math:: D_\delta(q) = \frac{p^2}{n_\delta(q)} \sum_u \lVert y(q+u) - y(q+u+\delta) \rVert^2 - 2 \sigma_n^2 p^2 F

    over the :math:`n_\delta(q)` positions u of the window for which both pixels lie in the image, clamped at 0.

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
    geometry = stencil_geometry(*guide.shape[-2:], patch_size, max_radius, guide.device, guide.dtype)
    exponents = _exponents(parameters, noise_std, guide, geometry)
    function = CompiledDiffusion if serves(images, guide) else _ImageDiffusion
    return function.apply(images, guide, *exponents, geometry)


def mean_similarity(
    images: Tensor, sigma: Tensor | float, noise_std: Tensor | float, patch_size: int, max_radius: float
) -> tuple[Tensor, int]:
    """Mean similarity over the edges of each image, and the number of edges (both directions counted).

    It passes no gradient to `noise_std`.

    Shape:
        - images: `[B, C, H, W]`
        - output: `[B]`
    """
    geometry = stencil_geometry(*images.shape[-2:], patch_size, max_radius, images.device, images.dtype)
    scale = GAUSSIAN_EXPONENT / _column(sigma, images)[:, 0] ** 2
    noise = 2 * images.shape[1] * patch_size**2 * _column(noise_std, images)[:, 0] ** 2
    function = CompiledSimilaritySum if serves(images) else _SimilaritySum
    sums = function.apply(images, scale, noise, geometry)
    return sums / max(geometry.num_half_edges, 1), 2 * geometry.num_half_edges


class _Exponents(NamedTuple):
    """The parameters as they enter the kernels, each with one row for each image; kernels are powers of two.

    Attributes:
        noise: What noise is expected to add to a distance, `[B]`.
        similarity: a in S = 2^(a·D), `[B]`.
        weight: b in W = 2^(b·D + c), `[B]`.
        spatial: c for each half offset, `[B, M]`.
        tau: Step of each iteration, 0 after an image's own number of steps, `[B, k]`.
    """

    noise: Tensor
    similarity: Tensor
    weight: Tensor
    spatial: Tensor
    tau: Tensor


def _exponents(
    parameters: DiffusionParameters, noise_std: Tensor | float, guide: Tensor, geometry: StencilGeometry
) -> _Exponents:
    steps = parameters.smooth_steps
    count = int(steps.max()) if torch.is_tensor(steps) else steps
    tau = _column(parameters.tau, guide).expand(-1, count)
    if torch.is_tensor(steps):
        tau = tau * (torch.arange(count, device=guide.device) < steps.view(-1, 1))
    cutoff = cosine_cutoff(geometry.length, _column(parameters.radius, guide))
    # Beyond the radius no weight at all, exactly: a logarithm that has no derivative there, nor an infinity.
    reached = cutoff > torch.finfo(guide.dtype).tiny
    log_cutoff = torch.where(reached, torch.where(reached, cutoff, 1.0).log2(), -FAR)
    similarity, weight, space = (
        GAUSSIAN_EXPONENT / _column(width, guide) ** 2
        for width in (parameters.sigma, parameters.sigma_f, parameters.sigma_s)
    )
    spatial = space * geometry.length**2 + log_cutoff
    dimension = guide.shape[1] * geometry.patch_size**2
    noise = 2 * dimension * _column(noise_std, guide) ** 2
    return _Exponents(noise[:, 0], similarity[:, 0], weight[:, 0], spatial, tau)


def _column(value: Tensor | float, like: Tensor) -> Tensor:
    """A number, or one for each image, as `[B, 1]`."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value.reshape(-1, 1).expand(len(like), 1)


class _ImageDiffusion(torch.autograd.Function):
    """The operator, some images at a time; it keeps its inputs and S·y, and computes the rest again to go back."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, guide: Tensor, *arguments: Any) -> Tensor:
        *exponents, geometry = arguments
        workspace, needed = Workspace(), any(ctx.needs_input_grad)
        output = torch.empty_like(images, memory_format=torch.contiguous_format)
        smoothed = []
        for part in _chunks(guide, geometry):
            own = _Exponents(*(exponent[part] for exponent in exponents))
            output[part], first = _diffuse(images[part], guide[part], own, geometry, workspace)
            if needed:
                smoothed.append(first.clone())
        if needed:
            ctx.save_for_backward(images, guide, *exponents, *smoothed)
            ctx.geometry = geometry
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, guide, *exponents = ctx.saved_tensors[:7]
        smoothed = ctx.saved_tensors[7:]
        geometry, needs, workspace = ctx.geometry, ctx.needs_input_grad[:7], Workspace()
        grads: list[Tensor | None] = [None] * len(needs)
        for part, first in zip(_chunks(guide, geometry), smoothed, strict=True):
            own = _Exponents(*(exponent[part] for exponent in exponents))
            found = _diffuse_backward(grad[part], first, images[part], guide[part], own, geometry, workspace, needs)
            for index, value in enumerate(found):
                if needs[index] and value is not None:
                    total = grads[index]
                    if total is None:
                        total = grads[index] = torch.empty_like(ctx.saved_tensors[index])
                    total[part] = value
        return (*grads, None)


class _SimilaritySum(torch.autograd.Function):
    """Sum of the similarities of all pairs, `[B]`, some images at a time."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, scale: Tensor, noise: Tensor, geometry: StencilGeometry) -> Tensor:
        ctx.save_for_backward(images, scale, noise)
        ctx.geometry = geometry
        workspace = Workspace()
        sums = torch.empty_like(scale)
        for part in _chunks(images, geometry):
            distance = _distances(images[part], noise[part], geometry, workspace)
            sums[part] = distance.mul_(scale[part, None, None]).exp2_().sum((1, 2))
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, scale, noise = ctx.saved_tensors
        geometry, workspace = ctx.geometry, Workspace()
        grads = [
            torch.empty_like(t) if need else None
            for t, need in zip((images, scale), ctx.needs_input_grad[:2], strict=True)
        ]
        for part in _chunks(images, geometry):
            factor = (grad[part] * math.log(2))[:, None, None]
            distance = _distances(images[part], noise[part], geometry, workspace)
            power = torch.exp2(distance * scale[part, None, None]).mul_(factor)
            if grads[1] is not None:
                grads[1][part] = (power * distance).sum((1, 2))
            if grads[0] is not None:
                power.mul_(scale[part, None, None]).mul_(distance > 0)
                grads[0][part] = _distances_backward(power, images[part], geometry, workspace)
        return (*grads, None, None)


def _chunks(guide: Tensor, geometry: StencilGeometry) -> list[slice]:
    """Equal parts of the batch whose maps are about as large as the device likes them."""
    each = guide.element_size() * max(geometry.valid.numel(), 1)
    limit = CHUNK_BYTES.get(guide.device.type, ACCELERATOR_CHUNK_BYTES)
    count = -(-len(guide) // max(1, limit // each))
    size = max(1, -(-len(guide) // max(count, 1)))
    return [slice(first, first + size) for first in range(0, len(guide), size)]


def _diffuse(
    images: Tensor, guide: Tensor, exponents: _Exponents, geometry: StencilGeometry, workspace: Workspace
) -> tuple[Tensor, Tensor]:
    """Restored images, and the flattened S·y; both are overwritten by the next call with the workspace."""
    distance = _distances(guide, exponents.noise, geometry, workspace)
    signal = _load(images, "signal", geometry, workspace)
    first = workspace.empty("first", images, *signal.core.shape)
    _similarity(distance, exponents, geometry, workspace)(signal, first)
    signal.core.copy_(first)
    if exponents.tau.shape[1]:
        averaging = _weights(distance, exponents, geometry, workspace)
        average = workspace.empty("average", images, *signal.core.shape)
        for tau in exponents.tau.unbind(1):
            signal.core.lerp_(averaging(signal, average), tau[:, None, None])
    return geometry.unflatten(signal.core), first


def _diffuse_backward(
    grad: Tensor,
    first: Tensor,
    images: Tensor,
    guide: Tensor,
    exponents: _Exponents,
    geometry: StencilGeometry,
    workspace: Workspace,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of images, guide and exponents, where needed."""
    needs_image, needs_guide, needs_noise, *_ = needs
    through_distance = needs_guide or needs_noise
    distance = _distances(guide, exponents.noise, geometry, workspace)
    flow = _load(grad, "flow", geometry, workspace).core
    grad_distance: Tensor | None = None
    grad_image = grad_guide = grad_noise = grad_weight = grad_spatial = grad_tau = None
    if exponents.tau.shape[1]:
        averaging = _weights(distance, exponents, geometry, workspace)
        grad_tau, power = _steps_backward(flow, first, exponents.tau, averaging)
        grad_spatial = power.sum(2)
        if through_distance:
            grad_distance = power * exponents.weight[:, None, None]
        grad_weight = power.mul_(distance).sum((1, 2))
    averaging = _similarity(distance, exponents, geometry, workspace)
    outflow, source = averaging.flows(1, images.shape[1])
    _store(images, source[0], geometry)
    torch.mul(flow, averaging.inverse_norm, out=outflow[0].core)
    if needs_image:
        grad_image = geometry.unflatten(averaging.adjoint(outflow[0], torch.empty_like(first)))
    power = averaging.backward([first])
    if through_distance:
        part = power * exponents.similarity[:, None, None]
        grad_distance = (part if grad_distance is None else grad_distance.add_(part)).mul_(distance > 0)
        grad_noise = -grad_distance.sum((1, 2))
    grad_similarity = power.mul_(distance).sum((1, 2))
    if needs_guide and grad_distance is not None:
        grad_guide = _distances_backward(grad_distance, guide, geometry, workspace)
    return grad_image, grad_guide, grad_noise, grad_similarity, grad_weight, grad_spatial, grad_tau


def _steps_backward(flow: Tensor, first: Tensor, tau: Tensor, averaging: Averaging) -> tuple[Tensor, Tensor]:
    """Gradient of τ and of the exponents of the weights; that of the first signal takes the place of `flow`."""
    steps = tau.unbind(1)
    outflows, signals = averaging.flows(len(steps), flow.shape[1])
    averages: list[Tensor] = []
    workspace = averaging.workspace
    for index in range(len(steps)):
        if index == 0:
            signals[0].core.copy_(first)
        else:
            torch.lerp(signals[index - 1].core, averages[-1], steps[index - 1][:, None, None], out=signals[index].core)
        averages.append(averaging(signals[index], workspace.empty(f"average {index}", first, *first.shape)))
    average = workspace.empty("average", first, *first.shape)
    grad_tau = []
    for index in reversed(range(len(steps))):
        step = steps[index][:, None, None]
        grad_tau.append((averages[index] - signals[index].core).mul_(flow).sum((1, 2)))
        torch.mul(flow, averaging.inverse_norm * step, out=outflows[index].core)
        averaging.adjoint(outflows[index], average)
        torch.addcmul(average, flow, 1 - step, out=flow)
    return torch.stack(grad_tau[::-1], 1), averaging.backward(averages)


def _load(images: Tensor, name: str, geometry: StencilGeometry, workspace: Workspace) -> Signal:
    signal = Signal(workspace.padded(name, images, images.shape[1], geometry), geometry)
    _store(images, signal, geometry)
    return signal


def _store(images: Tensor, signal: Signal, geometry: StencilGeometry) -> None:
    geometry.unflatten(signal.core).copy_(images)


def _distances(guide: Tensor, noise: Tensor, geometry: StencilGeometry, workspace: Workspace) -> Tensor:
    """Squared distances of the windows, `[B, M, n]`, without the part that noise is expected to add."""
    squared = squared_differences(_load(guide, "guide", geometry, workspace).padded, geometry, workspace)
    box_sum_(squared, geometry.patch_size, geometry.pitch, workspace)
    return squared.mul_(geometry.scale).add_(geometry.far).sub_(noise[:, None, None]).clamp_min_(0)


def _distances_backward(grad: Tensor, guide: Tensor, geometry: StencilGeometry, workspace: Workspace) -> Tensor:
    """Gradient of the guide given that of the distances, which is overwritten."""
    flow = box_sum_(grad.mul_(geometry.scale), geometry.patch_size, geometry.pitch, workspace)
    flow.mul_(geometry.valid)
    signal = _load(guide, "guide", geometry, workspace)
    grad_guide = -incident_sum(flow, flow, geometry)[:, None] * signal.core
    add_products_(grad_guide, edge_views(flow, flow, geometry), signal.neighbors)
    return -2 * geometry.unflatten(grad_guide)


def _similarity(distance: Tensor, exponents: _Exponents, geometry: StencilGeometry, workspace: Workspace) -> Averaging:
    half = workspace.empty("half", distance, *distance.shape)
    torch.mul(distance, exponents.similarity[:, None, None], out=half).exp2_()
    return Averaging(half, 1.0, geometry, workspace)


def _weights(distance: Tensor, exponents: _Exponents, geometry: StencilGeometry, workspace: Workspace) -> Averaging:
    half = workspace.empty("half", distance, *distance.shape)
    torch.addcmul(exponents.spatial[:, :, None], distance, exponents.weight[:, None, None], out=half).exp2_()
    return Averaging(half, SELF_WEIGHT, geometry, workspace)
