"""The image operator in torch, on any device, some images of a batch at a time."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.graph.exponents import Exponents
from lightning_modules.graph.stencil import (
    Signal,
    StencilGeometry,
    Workspace,
    add_products_,
    box_sum_,
    edge_views,
    incident_sum,
    squared_differences,
)
from lightning_modules.graph.weights import SELF_WEIGHT
from lightning_modules.graph.window_average import WindowAverage

# Bytes of the map of the images that are worked on at once; the working set is about six such maps. On a CPU few enough
# that it stays in the caches, and many enough that each kernel has work to pay for its call.
CHUNK_BYTES = {"cpu": 4 * 2**20}
ACCELERATOR_CHUNK_BYTES = 256 * 2**20


def restore(
    images: Tensor, guide: Tensor, exponents: Exponents, geometry: StencilGeometry, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Restored images, and S·y if it is to be kept for the way back.

    Shape:
        - images: `[B, C, H, W]`; guide: `[B, F, H, W]`
        - output: as images
    """
    output = torch.empty_like(images, memory_format=torch.contiguous_format)
    smoothed = torch.empty_like(output) if keep else None
    workspace = Workspace()
    for part in _chunks(guide, geometry):
        output[part], first = _diffuse(images[part], guide[part], exponents.of(part), geometry, workspace)
        if smoothed is not None:
            smoothed[part] = geometry.unflatten(first)
    return output, smoothed


def restore_backward(
    grad_output: Tensor,
    smoothed: Tensor,
    images: Tensor,
    guide: Tensor,
    exponents: Exponents,
    geometry: StencilGeometry,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Exponents]:
    """Gradients of images and guide, where they are needed, and of the exponents; computes the rest again.

    Args:
        grad_output: Gradient of the output.
        smoothed: S·y.
        images: As for `restore`.
        guide: As for `restore`.
        exponents: As for `restore`.
        geometry: As for `restore`.
        needs: Whether the gradients of images, guide and bias are needed.

    Shape:
        - grad_output, smoothed, images: `[B, C, H, W]`; guide: `[B, F, H, W]`
        - output: as images, as guide
    """
    grads: list[Tensor | None] = [None] * (2 + len(exponents))
    workspace = Workspace()
    for part in _chunks(guide, geometry):
        own = exponents.of(part)
        found = _diffuse_backward(
            grad_output[part], smoothed[part], images[part], guide[part], own, geometry, workspace, needs
        )
        for index, (value, like) in enumerate(zip(found, (images, guide, *exponents), strict=True)):
            if value is not None:
                total = grads[index]
                if total is None:
                    total = grads[index] = like.new_empty(like.shape)
                total[part] = value
    of_exponents = (
        torch.zeros_like(like) if grad is None else grad for like, grad in zip(exponents, grads[2:], strict=True)
    )
    return grads[0], grads[1], Exponents(*of_exponents)


def similarity_sum(images: Tensor, scale: Tensor, bias: Tensor, geometry: StencilGeometry) -> Tensor:
    """Sum of the similarities 2^(scale·D) of all pairs, offset by offset.

    Shape:
        - images: `[B, C, H, W]`
        - scale: `[B]`
        - bias: `[B, M]`
        - output: `[B]`
    """
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


def similarity_sum_backward(
    grad: Tensor, images: Tensor, scale: Tensor, bias: Tensor, geometry: StencilGeometry, needs_images: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the images, where they are needed, and of the scale.

    Shape:
        - grad, scale: `[B]`
        - images: `[B, C, H, W]`
        - bias: `[B, M]`
        - output: as images, as scale
    """
    grad_images, grad_scale = images.new_empty(images.shape) if needs_images else None, scale.new_empty(scale.shape)
    workspace = Workspace()
    for part in _chunks(images, geometry):
        slope, factor = scale[part, None, None], grad[part, None, None] * math.log(2)
        distance = _distances(images[part], bias[part, :, None], geometry, workspace)
        power = (distance * slope).exp2_().mul_(geometry.valid).mul_(factor)
        grad_scale[part] = (power * distance).sum((1, 2))
        if grad_images is not None:
            through = power.mul_(slope).mul_(distance > 0)
            grad_images[part] = _distances_backward(through, images[part], geometry, workspace)
    return grad_images, grad_scale


def _chunks(guide: Tensor, geometry: StencilGeometry) -> list[slice]:
    """Equal parts of the batch whose maps are about as large as the device likes them."""
    each = guide.element_size() * max(geometry.valid.numel(), 1)
    limit = CHUNK_BYTES.get(guide.device.type, ACCELERATOR_CHUNK_BYTES)
    count = -(-len(guide) // max(1, limit // each))
    size = max(1, -(-len(guide) // max(count, 1)))
    return [slice(first, first + size) for first in range(0, len(guide), size)]


def _diffuse(
    images: Tensor, guide: Tensor, exponents: Exponents, geometry: StencilGeometry, workspace: Workspace
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
    smoothed: Tensor,
    images: Tensor,
    guide: Tensor,
    exponents: Exponents,
    geometry: StencilGeometry,
    workspace: Workspace,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of images, guide and exponents, where needed."""
    needs_image, needs_guide, needs_bias = needs
    first = _load(smoothed, "first", geometry, workspace).core
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
    distance: Tensor, exponents: Exponents, geometry: StencilGeometry, workspace: Workspace
) -> WindowAverage:
    weight = workspace.empty("weight", distance, *distance.shape)
    torch.addcmul(exponents.within[:, None], distance, exponents.similarity, out=weight).exp2_()
    return WindowAverage(weight, 1.0, geometry, workspace)


def _weights(distance: Tensor, exponents: Exponents, geometry: StencilGeometry, workspace: Workspace) -> WindowAverage:
    weight = workspace.empty("weight", distance, *distance.shape)
    torch.addcmul(exponents.spatial[:, :, None], distance, exponents.weight, out=weight).exp2_()
    return WindowAverage(weight, SELF_WEIGHT, geometry, workspace)
