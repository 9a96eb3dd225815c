"""The six numbers that steer a diffusion, for one image or one each for many."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class DiffusionParameters(NamedTuple):
    """Parameters of graph diffusion: a number for all images, or a tensor `[B]` with one number for each.

    Attributes:
        sigma: Width σ of the similarity, patch L2 distance.
        tau: Diffusion step τ.
        radius: Cut-off radius ρ in pixels.
        sigma_s: Spatial width σ_s in pixels.
        sigma_f: Patch-distance width σ_f of the edge weights.
        smooth_steps: Number k of diffusion steps.
    """

    sigma: Tensor | float
    tau: Tensor | float
    radius: Tensor | float
    sigma_s: Tensor | float
    sigma_f: Tensor | float
    smooth_steps: Tensor | int

    def map(self, function: Callable[[Tensor], Tensor]) -> "DiffusionParameters":
        """The same parameters with `function` applied to those that are tensors."""
        return DiffusionParameters._make(function(value) if torch.is_tensor(value) else value for value in self)


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
