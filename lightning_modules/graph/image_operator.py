"""Graph diffusion of an image whose every pixel is a node, on the stencil of its neighbours."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.graph.cpu.kernel import CompiledDiffusion, CompiledSimilaritySum, is_supported
from lightning_modules.graph.first_derivatives import first_derivatives
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
    pair_sum,
    squared_differences,
    stencil_geometry,
    window_sum,
)
from lightning_modules.graph.topology import half_offsets
from lightning_modules.graph.weights import (
    GAUSSIAN_EXPONENT,
    MIN_SQUARED_WIDTH,
    SELF_WEIGHT,
    cosine_cutoff,
    gaussian_exponent,
    white_noise_bias,
)
from lightning_modules.graph.window_average import WindowAverage

# Bytes of the map of the images that are worked on at once; the working set is about six such maps. On a CPU few enough
# that it stays in the caches, and many enough that each kernel has work to pay for its call.
CHUNK_BYTES = {"cpu": 4 * 2**20}
ACCELERATOR_CHUNK_BYTES = 256 * 2**20

_INPUTS = 8  # images, guide and the exponents


def diffuse_image(
    images: Tensor,
    guide: Tensor,
    parameters: DiffusionParameters,
    noise: Tensor,
    patch_size: int,
    reach: float,
    max_radius: float,
) -> Tensor:
    r"""Diffuse images over the graph of their pixels, folding the patches after every step.

    With the similarity S and the weights W of the windows around two pixels, each normalised over the neighbours of a
    pixel and averaged over the windows that cover it (:math:`A_S`, :math:`A_W`):

    .. math:: x \leftarrow A_S\, y, \qquad x \leftarrow (1 - \tau)\, x + \tau A_W\, x \quad (k \text{ times})

    Patch-wise non-local means followed by diffusion on the same graph (Buades, Coll & Morel, CVPR 2005; Gilboa & Osher,
    "Nonlocal operators", MMS 2008). The distances are box filters of the squared difference of two shifted images:

    .. math:: D_\delta(q) = \frac{p^2}{n_\delta(q)} \sum_u \lVert y(q+u) - y(q+u+\delta) \rVert^2 - 2 \sigma_n^2 p^2 F

    over the :math:`n_\delta(q)` positions u of the window for which both pixels are in the image, clamped at 0. S joins
    pixels at most `reach` apart, W those nearer than its radius: the result does not depend on `max_radius`.

    Where σ, σ_f and the noise level are maps, a pair of pixels has the mean of their σ² and σ_f², and what is taken off
    a distance is the sum of the variances over the two windows.

    Args:
        images: Signal y.
        guide: What the windows are compared on; the images themselves, or learned features.
        parameters: One number for each image; σ and σ_f may be maps.
        noise: Noise of the guide: its standard deviation σ_n, a map of it (one channel for all, or one each), or what
            it adds to the squared distance of two windows at each offset, in the order of `half_offsets` of the larger
            one of `reach` and `max_radius`.
        patch_size: Side p of the windows, odd.
        reach: Largest distance of similar pixels.
        max_radius: Bound of the radius of W.

    Shape:
        - images: `[B, C, H, W]`; guide: `[B, F, H, W]`
        - parameters: `[B]`; σ and σ_f `[B]` or `[B, 1, H, W]`
        - noise: `[B]`, `[B, 1 or F, H, W]` or `[B, M]`
        - output: `[B, C, H, W]`
    """
    radius = max(reach, max_radius)
    geometry = stencil_geometry(*guide.shape[-2:], patch_size, radius, guide.device, guide.dtype)
    exponents = _exponents(parameters, _bias(noise, guide, geometry, radius), reach, geometry)
    if exponents.are_numbers and is_supported(images, guide, *exponents):
        return CompiledDiffusion.apply(images, guide, *exponents.numbers(), geometry)
    return _ImageDiffusion.apply(images, guide, *exponents, geometry)


def mean_similarity(images: Tensor, sigma: Tensor, noise: Tensor, patch_size: int, radius: float) -> tuple[Tensor, int]:
    """Mean similarity of the pixels at most `radius` apart, and the number of edges (both directions counted).

    Shape:
        - images: `[B, C, H, W]`
        - sigma: `[B]`
        - noise: as for `diffuse_image`, but for maps
        - output: `[B]`
    """
    geometry = stencil_geometry(*images.shape[-2:], patch_size, radius, images.device, images.dtype)
    scale, bias = gaussian_exponent(sigma), _bias(noise, images, geometry, radius)[:, :, 0]
    function = CompiledSimilaritySum.apply if is_supported(images, scale, bias) else _similarity_sum
    sums = function(images, scale, bias, geometry)
    return sums / max(geometry.num_half_edges, 1), 2 * geometry.num_half_edges


class _Exponents(NamedTuple):
    """The parameters as they enter the kernels; kernels are powers of two.

    Attributes:
        bias: What noise is expected to add to a distance, `[B, M, 1]`, or `[B, M, n]` where noise is a map.
        similarity: a in S = 2^(a·D + within), `[B, 1, 1]`, or `[B, M, n]` where σ is a map.
        weight: b in W = 2^(b·D + spatial), `[B, 1, 1]`, or `[B, M, n]` where σ_f is a map.
        within: 0 for half offsets within reach, no similarity beyond, `[B, M]`.
        spatial: Of each half offset, `[B, M]`.
        tau: Step of each iteration, 0 after an image's own number of steps, `[B, k]`.
    """

    bias: Tensor
    similarity: Tensor
    weight: Tensor
    within: Tensor
    spatial: Tensor
    tau: Tensor

    @property
    def are_numbers(self) -> bool:
        """Whether none of them varies over the image."""
        return self.bias.shape[2] == 1 and self.similarity.shape[1:] == self.weight.shape[1:] == (1, 1)

    def numbers(self) -> tuple[Tensor, ...]:
        """What the compiled kernel takes: `[B, M]`, `[B]`, `[B]`, `[M]`, `[B, M]`, `[B, k]`."""
        within = self.within[0] if len(self.within) else self.within.new_zeros(self.within.shape[1])
        return self.bias[:, :, 0], self.similarity[:, 0, 0], self.weight[:, 0, 0], within, self.spatial, self.tau


def _exponents(parameters: DiffusionParameters, bias: Tensor, reach: float, geometry: StencilGeometry) -> _Exponents:
    steps, size = parameters.smooth_steps, len(bias)
    count = parameters.max_steps
    tau = parameters.tau[:, None].expand(-1, count)
    if torch.is_tensor(steps):
        tau = tau * (torch.arange(count, device=bias.device) < steps[:, None])
    cutoff = cosine_cutoff(geometry.length, parameters.radius[:, None])
    # Beyond the radius no weight at all, exactly: a logarithm that has no derivative there, nor an infinity.
    positive = cutoff > torch.finfo(bias.dtype).tiny
    log_cutoff = torch.where(positive, torch.where(positive, cutoff, 1.0).log2(), -FAR)
    spatial = gaussian_exponent(parameters.sigma_s)[:, None] * geometry.length**2 + log_cutoff
    similarity, weight = (_width_exponent(width, geometry) for width in (parameters.sigma, parameters.sigma_f))
    return _Exponents(bias, similarity, weight, geometry.within(reach).expand(size, -1), spatial, tau)


def _width_exponent(width: Tensor, geometry: StencilGeometry) -> Tensor:
    """`gaussian_exponent` of numbers `[B]` as `[B, 1, 1]`, of maps `[B, 1, H, W]` as `[B, M, n]`."""
    if width.ndim == 1:
        return gaussian_exponent(width)[:, None, None]
    # Pairs that are not valid have no width; any will do.
    square = pair_sum(width.square(), geometry) / 2
    return GAUSSIAN_EXPONENT / (square + (1 - geometry.valid)).clamp_min(MIN_SQUARED_WIDTH)


def _bias(noise: Tensor, guide: Tensor, geometry: StencilGeometry, radius: float) -> Tensor:
    """What noise adds to the squared distances, `[B, M, 1 or n]`; noise is as for `diffuse_image`."""
    count, channels = len(geometry.offsets), guide.shape[1]
    if noise.ndim == 4:
        variance = noise.square()
        total = variance.sum(1, keepdim=True) if noise.shape[1] == channels else channels * variance
        return window_sum(pair_sum(total, geometry), geometry)
    if noise.ndim == 1:
        bias = white_noise_bias(noise, channels * geometry.patch_size**2)
        return bias[:, None, None].expand(-1, count, 1)
    offsets = half_offsets(radius)
    if noise.shape != (len(guide), len(offsets)):
        raise ValueError(
            f"the bias of the distances must be [{len(guide)}, {len(offsets)}], one number for each image and each "
            f"offset within {radius:g} pixels, got {list(noise.shape)}"
        )
    # Small images have no pixels as far apart as some of them.
    return noise[:, [index for index, offset in enumerate(offsets) if offset in geometry.offsets], None]


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
    @first_derivatives
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        images, guide, *exponents = ctx.saved_tensors[:_INPUTS]
        smoothed = ctx.saved_tensors[_INPUTS:]
        geometry, needs, workspace = ctx.geometry, ctx.needs_input_grad[:_INPUTS], Workspace()
        grads: list[Tensor | None] = [None] * len(needs)
        for part, first in zip(_chunks(guide, geometry), smoothed, strict=True):
            own = _Exponents(*(exponent[part] for exponent in exponents))
            found = _diffuse_backward(
                grad_output[part], first, images[part], guide[part], own, geometry, workspace, needs
            )
            for index, value in enumerate(found):
                if needs[index] and value is not None:
                    total = grads[index]
                    if total is None:
                        total = grads[index] = torch.empty_like(ctx.saved_tensors[index])
                    total[part] = value
        return (*grads, None)


def _similarity_sum(images: Tensor, scale: Tensor, bias: Tensor, geometry: StencilGeometry) -> Tensor:
    """Sum of the similarities of all pairs, `[B]`: 2^(scale·D), offset by offset."""
    height, width, size = geometry.height, geometry.width, geometry.patch_size
    sums = torch.zeros_like(scale)
    for (a, b), noise in zip(geometry.offsets, bias.unbind(1), strict=True):
        here = images[..., : height - a, max(0, -b) : width - max(0, b)]
        difference = here - images[..., a:, max(0, b) : width - max(0, -b)]
        squared = difference.square().sum(1, keepdim=True)
        # The mean over the window's valid terms.
        distance = size**2 * F.avg_pool2d(squared, size, 1, size // 2, count_include_pad=False)[:, 0]
        distance = (distance - noise[:, None, None]).clamp_min(0)
        sums = sums + (distance * scale[:, None, None]).exp2().sum((1, 2))
    return sums


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
    distance = _distances(guide, exponents.bias, geometry, workspace)
    signal = _load(images, "signal", geometry, workspace)
    first = workspace.empty("first", images, *signal.core.shape)
    _similarity(distance, exponents, geometry, workspace)(signal, first)
    signal.core.copy_(first)
    if exponents.tau.shape[1]:
        average_of = _weights(distance, exponents, geometry, workspace)
        average = workspace.empty("average", images, *signal.core.shape)
        for tau in exponents.tau.unbind(1):
            signal.core.lerp_(average_of(signal, average), tau[:, None, None])
    return geometry.unflatten(signal.core), first


def _diffuse_backward(
    grad_output: Tensor,
    first: Tensor,
    images: Tensor,
    guide: Tensor,
    exponents: _Exponents,
    geometry: StencilGeometry,
    workspace: Workspace,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of images, guide and exponents, where needed."""
    needs_image, needs_guide, needs_bias, *_ = needs
    through_distance = needs_guide or needs_bias
    distance = _distances(guide, exponents.bias, geometry, workspace)
    grad_signal = _load(grad_output, "grad", geometry, workspace).core
    grad_distance: Tensor | None = None
    grad_image = grad_guide = grad_bias = grad_weight = grad_spatial = grad_tau = None
    if exponents.tau.shape[1]:
        average_of = _weights(distance, exponents, geometry, workspace)
        grad_tau, power = _steps_backward(grad_signal, first, exponents.tau, average_of)
        grad_spatial = power.sum(2)
        if through_distance:
            grad_distance = power * exponents.weight
        grad_weight = power.mul_(distance).sum_to_size(exponents.weight.shape)
        if grad_weight is power:  # of a map; the memory is used again below
            grad_weight = power.clone()
    average_of = _similarity(distance, exponents, geometry, workspace)
    cotangent, source = average_of.application_buffers(1, images.shape[1])
    _store(images, source[0], geometry)
    torch.mul(grad_signal, average_of.inverse_norm, out=cotangent[0].core)
    if needs_image:
        grad_image = geometry.unflatten(average_of.adjoint(cotangent[0], torch.empty_like(first)))
    power = average_of.backward([first])
    if through_distance:
        part = power * exponents.similarity
        grad_distance = (part if grad_distance is None else grad_distance.add_(part)).mul_(distance > 0)
        grad_bias = -grad_distance.sum_to_size(exponents.bias.shape)
    grad_similarity = power.mul_(distance).sum_to_size(exponents.similarity.shape)
    if needs_guide and grad_distance is not None:
        grad_guide = _distances_backward(grad_distance, guide, geometry, workspace)
    return grad_image, grad_guide, grad_bias, grad_similarity, grad_weight, None, grad_spatial, grad_tau


def _steps_backward(
    grad_signal: Tensor, first: Tensor, tau: Tensor, average_of: WindowAverage
) -> tuple[Tensor, Tensor]:
    """Gradient of τ and of the exponents of the weights; that of the first signal takes the place of `grad_signal`."""
    steps = tau.unbind(1)
    cotangents, signals = average_of.application_buffers(len(steps), grad_signal.shape[1])
    averages: list[Tensor] = []
    workspace = average_of.workspace
    for index in range(len(steps)):
        if index == 0:
            signals[0].core.copy_(first)
        else:
            torch.lerp(signals[index - 1].core, averages[-1], steps[index - 1][:, None, None], out=signals[index].core)
        averages.append(average_of(signals[index], workspace.empty(f"average {index}", first, *first.shape)))
    average = workspace.empty("average", first, *first.shape)
    grad_tau = []
    for index in reversed(range(len(steps))):
        step = steps[index][:, None, None]
        grad_tau.append((averages[index] - signals[index].core).mul_(grad_signal).sum((1, 2)))
        torch.mul(grad_signal, average_of.inverse_norm * step, out=cotangents[index].core)
        average_of.adjoint(cotangents[index], average)
        torch.addcmul(average, grad_signal, 1 - step, out=grad_signal)
    return torch.stack(grad_tau[::-1], 1), average_of.backward(averages)


def _load(images: Tensor, name: str, geometry: StencilGeometry, workspace: Workspace) -> Signal:
    signal = Signal(workspace.padded(name, images, images.shape[1], geometry), geometry)
    _store(images, signal, geometry)
    return signal


def _store(images: Tensor, signal: Signal, geometry: StencilGeometry) -> None:
    geometry.unflatten(signal.core).copy_(images)


def _distances(guide: Tensor, bias: Tensor, geometry: StencilGeometry, workspace: Workspace) -> Tensor:
    """Squared distances of the windows, `[B, M, n]`, without the part that noise is expected to add."""
    squared = squared_differences(_load(guide, "guide", geometry, workspace).padded, geometry, workspace)
    box_sum_(squared, geometry.patch_size, geometry.pitch, workspace)
    return squared.mul_(geometry.scale).add_(geometry.far).sub_(bias).clamp_min_(0)


def _distances_backward(grad: Tensor, guide: Tensor, geometry: StencilGeometry, workspace: Workspace) -> Tensor:
    """Gradient of the guide given that of the distances, which is overwritten."""
    through = box_sum_(grad.mul_(geometry.scale), geometry.patch_size, geometry.pitch, workspace)
    through.mul_(geometry.valid)
    signal = _load(guide, "guide", geometry, workspace)
    grad_guide = -incident_sum(through, through, geometry)[:, None] * signal.core
    add_products_(grad_guide, edge_views(through, through, geometry), signal.neighbors)
    return -2 * geometry.unflatten(grad_guide)


def _similarity(
    distance: Tensor, exponents: _Exponents, geometry: StencilGeometry, workspace: Workspace
) -> WindowAverage:
    weight = workspace.empty("weight", distance, *distance.shape)
    torch.addcmul(exponents.within[:, :, None], distance, exponents.similarity, out=weight).exp2_()
    return WindowAverage(weight, 1.0, geometry, workspace)


def _weights(distance: Tensor, exponents: _Exponents, geometry: StencilGeometry, workspace: Workspace) -> WindowAverage:
    weight = workspace.empty("weight", distance, *distance.shape)
    torch.addcmul(exponents.spatial[:, :, None], distance, exponents.weight, out=weight).exp2_()
    return WindowAverage(weight, SELF_WEIGHT, geometry, workspace)
