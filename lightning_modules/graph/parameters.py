"""The six numbers that steer a diffusion, one each for every image of a batch."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.operators.operator import per_image


class DiffusionParameters(NamedTuple):
    """Parameters of graph diffusion, a tensor `[B]` each with one number for every image or graph.

    Attributes:
        sigma: Width σ of the similarity, patch L2 distance; for the image signal also a map `[B, 1, H, W]`.
        tau: Diffusion step τ.
        radius: Cut-off radius ρ in pixels.
        sigma_s: Spatial width σ_s in pixels.
        sigma_f: Patch-distance width σ_f of the edge weights; for the image signal also a map.
        smooth_steps: Number k of diffusion steps; an integer for all images spares an accelerator the waiting.
    """

    sigma: Tensor
    tau: Tensor
    radius: Tensor
    sigma_s: Tensor
    sigma_f: Tensor
    smooth_steps: Tensor | int

    @classmethod
    def of_each(
        cls,
        images: Tensor,
        sigma: Tensor | float,
        tau: Tensor | float,
        radius: Tensor | float,
        sigma_s: Tensor | float,
        sigma_f: Tensor | float,
        smooth_steps: Tensor | int,
    ) -> "DiffusionParameters":
        """Parameters in the precision and on the device of the images, each a number for all of them or one for each.

        Shape:
            - images: `[B, ...]`
            - sigma, sigma_f: scalar, `[1]`, `[B]` or a map `[B, 1, H, W]`
            - tau, radius, sigma_s, smooth_steps: scalar, `[1]` or `[B]`

        Raises:
            ValueError: If one has another shape, a width, radius or step is negative or not finite, or steps are not
                whole.
        """
        named = {"sigma": sigma, "tau": tau, "radius": radius, "sigma_s": sigma_s, "sigma_f": sigma_f}
        tensors = {name: _map_or_number(name, value, images) for name, value in named.items()}
        for name, tensor in tensors.items():
            _check(name, tensor)
        steps: Tensor | int = smooth_steps
        if torch.is_tensor(smooth_steps) or not isinstance(smooth_steps, int):
            steps = per_image("smooth_steps", smooth_steps, images)
            if steps.is_floating_point():
                raise ValueError(f"smooth_steps must be whole numbers, got {steps.dtype}")
            _check("smooth_steps", steps)
        elif smooth_steps < 0:
            raise ValueError(f"smooth_steps must not be negative, got {smooth_steps}")
        return cls(**tensors, smooth_steps=steps)

    @property
    def max_steps(self) -> int:
        """Largest number of steps; reads a tensor of them on the host."""
        steps = self.smooth_steps
        if not torch.is_tensor(steps):
            return steps
        return int(steps.max()) if steps.numel() else 0

    def map(self, function: Callable[[Tensor], Tensor]) -> "DiffusionParameters":
        """The same parameters with `function` applied to those that are tensors."""
        return DiffusionParameters._make(function(value) if torch.is_tensor(value) else value for value in self)


def _map_or_number(name: str, value: Tensor | float, images: Tensor) -> Tensor:
    if torch.is_tensor(value) and value.ndim == 4:
        if name not in ("sigma", "sigma_f") or value.shape != (len(images), 1, *images.shape[2:]):
            raise ValueError(
                f"{name} must be one number or one for each of {len(images)} images, or, if it is sigma or sigma_f, a "
                f"map [B, 1, H, W] of the images' size, got {list(value.shape)}"
            )
        return value.to(images)
    return per_image(name, value, images).to(images.dtype)


def _check(name: str, value: Tensor) -> None:
    # On an accelerator a look would stall every step.
    if value.device.type != "cpu" or not value.numel() or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return
    least, largest = (float(bound) for bound in value.detach().aminmax())
    if least < 0 or math.isinf(largest):
        raise ValueError(f"{name} must be finite and not negative, got {least if least < 0 else largest:g}")


def repeat_step(
    step: Callable[[Tensor], Tensor],
    signal: Tensor,
    smooth_steps: Tensor | int,
) -> Tensor:
    """Apply `step` to the signal `smooth_steps` times, each image its own number of times.

    A tensor of counts is read on the host once (one synchronisation on an accelerator); an integer is not.

    Args:
        step: One diffusion step.
        signal: What to diffuse.
        smooth_steps: One count for all, or counts that broadcast against the signal.

    Shape:
        - signal: any; `step` keeps it
        - output: as signal
    """
    if not torch.is_tensor(smooth_steps):
        for _ in range(smooth_steps):
            signal = step(signal)
        return signal
    for index in range(int(smooth_steps.max())):
        signal = torch.where(index < smooth_steps, step(signal), signal)
    return signal
