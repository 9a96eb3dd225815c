"""Graph diffusion of an image whose every pixel is a node, as one operator of torch.

`torch.compile`, `torch.export`, autograd and `torch.func` see `torch.ops.lightning_em.diffuse_image` and not what is
inside: the kernel in C (`cpu.kernel`) where it takes the tensors, torch (`stencil_diffusion`) elsewhere.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Sequence  # noqa: UP035  (as torch 2.6 reads the operators' annotations)

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_modules.graph import stencil_diffusion
from lightning_modules.graph.cpu import kernel
from lightning_modules.graph.cpu.kernel import is_supported
from lightning_modules.graph.exponents import Exponents, Values, bias_of, exponents_backward, exponents_of
from lightning_modules.graph.parameters import DiffusionParameters
from lightning_modules.graph.patches import check_patch_fits
from lightning_modules.graph.stencil import StencilGeometry, stencil_geometry
from lightning_modules.graph.tiles import Tile, tiles
from lightning_modules.graph.topology import within_image
from lightning_modules.graph.weights import gaussian_exponent


def diffuse_image(
    images: Tensor,
    guide: Tensor,
    parameters: DiffusionParameters,
    noise: Tensor,
    patch_size: int,
    reach: float,
    max_radius: float | None = None,
    tile_size: int | None = None,
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
            one of `reach` and `max_radius`, which must be given then.
        patch_size: Side p of the windows, odd.
        reach: Largest distance of similar pixels.
        max_radius: Bound of the radius of W, by which the topology is chosen. None reads the radii, for which an
            accelerator must be waited for; on a CPU a bound that is too small is raised.
        tile_size: Side of the tiles in which larger images are computed; None computes them whole.

    Shape:
        - images: `[B, C, H, W]`; guide: `[B, F, H, W]`
        - parameters: `[B]`; σ and σ_f `[B]` or `[B, 1, H, W]`
        - noise: `[B]`, `[B, 1 or F, H, W]` or `[B, M]`
        - output: `[B, C, H, W]`
    """
    sigma, tau, radius, sigma_s, sigma_f, steps = parameters
    counts, count = (steps, 0) if torch.is_tensor(steps) else (None, steps)
    values = (noise, sigma, tau, radius, sigma_s, sigma_f)
    # The way back needs what S makes of the images. Where a transform hides who asks for it, it is made again there.
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (images, guide, *values))
    options = (patch_size, float(reach), max_radius, tile_size)
    output, _ = _apply(_diffuse_image, images, guide, *values, counts, count, *options, keep)
    return output


def mean_similarity(images: Tensor, sigma: Tensor, noise: Tensor, patch_size: int, radius: float) -> tuple[Tensor, int]:
    """Mean similarity of the pixels at most `radius` apart, and the number of edges (both directions counted).

    The noise has no gradient.

    Shape:
        - images: `[B, C, H, W]`
        - sigma, noise: `[B]`
        - output: `[B]`
    """
    num_half_edges = stencil_geometry(
        *images.shape[-2:], patch_size, radius, images.device, images.dtype
    ).num_half_edges
    sums = _apply(_similarity_sum, images, gaussian_exponent(sigma), noise, patch_size, radius)
    return sums / max(num_half_edges, 1), 2 * num_half_edges


@torch.library.custom_op("lightning_em::diffuse_image", mutates_args=())
def _diffuse_image(
    images: Tensor,
    guide: Tensor,
    noise: Tensor,
    sigma: Tensor,
    tau: Tensor,
    radius: Tensor,
    sigma_s: Tensor,
    sigma_f: Tensor,
    smooth_steps: Tensor | None,
    num_steps: int,
    patch_size: int,
    reach: float,
    max_radius: float | None,
    tile_size: int | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Restored images, and S·y if it is to be kept; `smooth_steps` is one count for each image, or else `num_steps`."""
    values = Values(noise, sigma, tau, radius, sigma_s, sigma_f)
    output, smoothed = images.new_empty(images.shape), images.new_empty(images.shape if keep else 0)
    for part in _parts(images, guide, values, smooth_steps, num_steps, patch_size, reach, max_radius, tile_size):
        restored, first = part.backend.restore(part.images, part.guide, part.exponents, part.geometry, keep)
        if part.tile is None:
            return restored, smoothed if first is None else first
        output[part.tile.core] = restored[part.tile.inner]
        if first is not None:
            smoothed[part.tile.core] = first[part.tile.inner]
    return output, smoothed


@torch.library.custom_op("lightning_em::diffuse_image_backward", mutates_args=())
def _diffuse_image_backward(
    grad_output: Tensor,
    smoothed: Tensor,
    images: Tensor,
    guide: Tensor,
    noise: Tensor,
    sigma: Tensor,
    tau: Tensor,
    radius: Tensor,
    sigma_s: Tensor,
    sigma_f: Tensor,
    smooth_steps: Tensor | None,
    num_steps: int,
    patch_size: int,
    reach: float,
    max_radius: float | None,
    tile_size: int | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the tensors; empty ones of images, guide and noise where `needs` says so."""
    values = Values(noise, sigma, tau, radius, sigma_s, sigma_f)
    options = (smooth_steps, num_steps, patch_size, reach, max_radius, tile_size)
    if not smoothed.numel():
        smoothed = _diffuse_image(images, guide, *values, *options, True)[1]
    grads: list[Tensor | None] = [None] * (2 + len(values))
    for part in _parts(images, guide, values, *options):
        if part.tile is None:
            grads = part.backward(grad_output, smoothed, needs)
            break
        grad = part.images.new_zeros(part.images.shape)  # a pixel of the halo is another tile's
        grad[part.tile.inner] = grad_output[part.tile.core]
        for index, own in enumerate(part.backward(grad, smoothed[part.tile.around], needs)):
            total, like = grads[index], (images, guide, *values)[index]
            if own is not None:
                total = grads[index] = like.new_zeros(like.shape) if total is None else total
                total[part.tile.around if like.ndim == 4 else ...] += own
    return tuple(images.new_empty(0) if grad is None else grad for grad in grads)  # type: ignore[return-value]


@_diffuse_image.register_fake
def _(images: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, keep = others
    return images.new_empty(images.shape), images.new_empty(images.shape if keep else 0)


@_diffuse_image_backward.register_fake
def _(grad_output: Tensor, smoothed: Tensor, *others: Any) -> tuple[Tensor, ...]:
    inputs, needs = others[:8], (*others[-1], *(True,) * 5)
    return tuple(like.new_empty(like.shape if need else 0) for like, need in zip(inputs, needs, strict=True))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, num_steps, patch_size, reach, max_radius, tile_size, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.options = (num_steps, patch_size, reach, max_radius, tile_size)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 15
    *tensors, smoothed = ctx.saved_tensors
    needs = ctx.needs_input_grad[:8]
    grads = _apply(_diffuse_image_backward, grad_output, smoothed, *tensors, *ctx.options, list(needs[:3]))
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 7)


@torch.library.custom_op("lightning_em::similarity_sum", mutates_args=())
def _similarity_sum(images: Tensor, scale: Tensor, noise: Tensor, patch_size: int, radius: float) -> Tensor:
    """Sum of the similarities 2^(scale·D) of all pairs of each image, `[B]`."""
    backend, bias, geometry = _similarity_parts(images, scale, noise, patch_size, radius)
    return backend.similarity_sum(images, scale, bias, geometry)


@torch.library.custom_op("lightning_em::similarity_sum_backward", mutates_args=())
def _similarity_sum_backward(
    grad: Tensor, images: Tensor, scale: Tensor, noise: Tensor, patch_size: int, radius: float, needs_images: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the images, empty where nobody needs it, and of the scale."""
    backend, bias, geometry = _similarity_parts(images, scale, noise, patch_size, radius)
    grad_images, grad_scale = backend.similarity_sum_backward(grad, images, scale, bias, geometry, needs_images)
    return images.new_empty(0) if grad_images is None else grad_images, grad_scale


def _similarity_parts(
    images: Tensor, scale: Tensor, noise: Tensor, patch_size: int, radius: float
) -> tuple[Any, Tensor, StencilGeometry]:
    geometry = stencil_geometry(*images.shape[-2:], patch_size, radius, images.device, images.dtype)
    bias = bias_of(noise, images.shape[1], geometry)[:, :, 0]
    return (kernel if is_supported(images, scale, bias) else stencil_diffusion), bias, geometry


@_similarity_sum.register_fake
def _(images: Tensor, scale: Tensor, *others: Any) -> Tensor:
    return scale.new_empty(scale.shape)


@_similarity_sum_backward.register_fake
def _(grad: Tensor, images: Tensor, scale: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return images.new_empty(images.shape if others[-1] else 0), scale.new_empty(scale.shape)


def _keep_for_similarity(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _similarity_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_images = ctx.needs_input_grad[0]
    grad_images, grad_scale = _apply(_similarity_sum_backward, grad, *ctx.saved_tensors, *ctx.options, needs_images)
    return grad_images if needs_images else None, grad_scale, None, None, None


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        "the fast image operator has first derivatives only: for second ones use "
        "GraphDiffusion(implementation='message_passing')"
    )


def _refuse_forward(ctx: Any, *tangents: Any) -> Any:
    raise RuntimeError("the fast image operator has derivatives backward only: use torch.func.grad, vjp or jacrev")


def _one_batch(operator: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """The rule of `torch.vmap`: a dimension that is mapped over makes the batch longer."""
    size = info.batch_size
    merged = (
        (value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)).flatten(0, 1)
        if isinstance(value, Tensor)
        else value
        for value, dim in zip(arguments, in_dims, strict=True)
    )
    result = operator(*merged)
    if isinstance(result, Tensor):
        return result.unflatten(0, (size, -1)), 0
    return tuple(part.unflatten(0, (size, len(part) // size)) for part in result), (0,) * len(result)


# The operators once more, for what does not reach into those of `torch.library` (torch 2.14): `torch.func.grad` and its
# kind, which those refuse, and derivatives forward, which those lose in silence.
_functions: dict[Any, Any] = {}

for _operator, _setup, _way_back in (
    (_diffuse_image, _keep_for_backward, _backward),
    (_diffuse_image_backward, _keep_nothing, _refuse),
    (_similarity_sum, _keep_for_similarity, _similarity_backward),
    (_similarity_sum_backward, _keep_nothing, _refuse),
):
    _operator.register_autograd(_way_back, setup_context=_setup)
    _operator.register_vmap(partial(_one_batch, _operator))
    members = {"forward": _operator.__call__, "setup_context": _setup, "backward": _way_back, "jvp": _refuse_forward}
    _functions[_operator] = type(
        f"_{_operator._name}",
        (torch.autograd.Function,),
        {"generate_vmap_rule": True, **{name: staticmethod(member) for name, member in members.items()}},
    )


def _apply(operator: Any, *arguments: Any) -> Any:
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _functions[operator].apply(*arguments)
    # The first call of an operator of `torch.library` loads the compiler, which takes as long as torch.
    return operator._init_fn(*arguments) if _is_plain(arguments) else operator(*arguments)


def _is_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether the result is all that is asked for: no derivative, and no record of the call."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or torch._C._len_torch_dispatch_stack():
        return False
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    return bool(tensors) and all(
        type(tensor) in (Tensor, torch.nn.Parameter) and not (tensor.requires_grad and torch.is_grad_enabled())
        for tensor in tensors
    )


class _Part(NamedTuple):
    """What is computed at once: all of the images, or one tile of them."""

    tile: Tile | None
    images: Tensor
    guide: Tensor
    values: Values
    exponents: Exponents
    geometry: StencilGeometry
    backend: Any
    counts: Tensor | None
    radius: float

    def backward(self, grad: Tensor, smoothed: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of images, guide and values; None of images, guide and noise where they are not needed."""
        grad_images, grad_guide, grads = self.backend.restore_backward(
            grad, smoothed, self.images, self.guide, self.exponents, self.geometry, needs
        )
        own = exponents_backward(
            grads, self.exponents, self.values, self.counts, self.guide.shape[1], self.radius, self.geometry
        )
        return [grad_images, grad_guide, own.noise if needs[2] else None, *own[1:]]


def _parts(
    images: Tensor,
    guide: Tensor,
    values: Values,
    counts: Tensor | None,
    num_steps: int,
    patch_size: int,
    reach: float,
    max_radius: float | None,
    tile_size: int | None,
) -> Iterator[_Part]:
    height, width = images.shape[-2:]
    check_patch_fits(height, width, patch_size)
    if counts is not None:
        num_steps = int(counts.max()) if len(counts) else 0
    largest = largest_radius(values.radius, max_radius)
    radius = within_image(max(reach, largest), height, width)
    # S looks as far as `reach`, each step one radius further. The weights of a pixel look a window beyond that.
    halo = num_steps * int(largest) + int(radius) + 2 * (patch_size // 2)
    places = [] if tile_size is None else tiles(height, width, tile_size, halo)
    for tile in places if len(places) > 1 else [None]:
        own_images, own_guide, *own = (
            tensor[tile.around].contiguous() if tile is not None and tensor.ndim == 4 else tensor
            for tensor in (images, guide, *values)
        )
        own_values, channels = Values(*own), guide.shape[1]
        geometry = stencil_geometry(*own_guide.shape[-2:], patch_size, radius, guide.device, guide.dtype)
        exponents = exponents_of(own_values, counts, num_steps, channels, reach, radius, geometry)
        supported = exponents.are_numbers and is_supported(own_images, own_guide, *exponents)
        backend = kernel if supported else stencil_diffusion
        yield _Part(tile, own_images, own_guide, own_values, exponents, geometry, backend, counts, radius)


def largest_radius(radius: Tensor, bound: float | None) -> float:
    """A bound of the radii; the result does not depend on it."""
    if bound is not None and radius.device.type != "cpu":
        return bound
    largest = float(radius.detach().max()) if len(radius) else 1.0
    # Few different ones, for what is computed once for each.
    return bound if bound is not None and largest <= bound else math.ceil(largest)
