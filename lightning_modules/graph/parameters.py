"""The six numbers that steer a diffusion, one each for every image of a batch."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.operators.operator import is_readable, per_image


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
        check_numbers(tensors)
        steps: Tensor | int = smooth_steps
        if torch.is_tensor(smooth_steps) or not isinstance(smooth_steps, int):
            steps = per_image("smooth_steps", smooth_steps, images)
            if steps.is_floating_point():
                raise ValueError(f"smooth_steps must be whole numbers, got {steps.dtype}")
            check_numbers({"smooth_steps": steps})
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
    if torch.is_tensor(value) and images.ndim == 4 == value.ndim and value.shape[1:] != (1, 1, 1):
        if name not in ("sigma", "sigma_f") or value.shape != (images.shape[0], 1, *images.shape[2:]):
            raise ValueError(
                f"{name} must be one number or one for each of {len(images)} images, or, if it is sigma or sigma_f, a "
                f"map [B, 1, H, W] of the images' size, got {list(value.shape)}"
            )
        return value.to(images)
    return per_image(name, value, images).to(images.dtype)


def check_numbers(tensors: dict[str, Tensor]) -> None:
    """Raise `ValueError` if one is negative or not finite, where a look is possible."""
    flat = [tensor.detach().flatten() for tensor in tensors.values()]
    if not all(tensor.numel() and is_readable(tensor) for tensor in tensors.values()):
        return
    # One look at all of them, unless there are maps.
    together = all(len(tensor) == len(flat[0]) for tensor in flat)
    extremes = [torch.stack(flat).aminmax(dim=1)] if together else [row[None].aminmax(dim=1) for row in flat]
    bounds = zip(*(torch.cat(side).tolist() for side in zip(*extremes, strict=True)), strict=True)
    for name, (least, largest) in zip(tensors, bounds, strict=True):
        if not (least >= 0 and math.isfinite(largest)):
            raise ValueError(f"{name} must be finite and not negative, got {largest if least >= 0 else least:g}")


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
