"""Samples, weights and indices out of whatever a loader yields."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_modules.mixtures.initialization import Samples

# What a dictionary may call its samples.
NAMES = ("image", "x", "data", "features")


def read_batch(batch: Any) -> Samples:
    """Samples `[B, D]` of a batch, their weights and their indices, where the batch holds them.

    A batch is a tensor, a tuple or list whose first entry is one, or a dictionary with one of `NAMES` and optionally
    `weight` and `index`. In a batch of the project's DataModules, which are known by their random `key`, the weights
    are those of a mean over processes, and only tell samples from padding.
    """
    weight = index = None
    if isinstance(batch, dict):
        names = [name for name in NAMES if name in batch]
        if not names:
            raise ValueError(f"A batch must hold one of {', '.join(NAMES)}; it holds {sorted(batch)}.")
        x, weight, index = batch[names[0]], batch.get("weight"), batch.get("index")
        if weight is not None and "key" in batch:
            weight = weight > 0
    else:
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(x, Tensor):
        raise ValueError(f"A batch must be a tensor, or begin with one; got {type(x).__name__}.")
    x = x.reshape(x.shape[0], -1)
    if weight is not None:
        weight = torch.as_tensor(weight, dtype=torch.float64, device=x.device)
        if weight.shape != x.shape[:1]:
            raise ValueError(f"weight must hold one number for each of {x.shape[0]} samples, got {tuple(weight.shape)}")
    return x if x.is_floating_point() else x.double(), weight, index


def as_tensor(value: Any, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
    """A tensor of any array; a view where torch can make one, which is not of negative strides nor of other bytes.

    Shape:
        - output: that of `value`
    """
    if isinstance(value, np.ndarray):
        usual = value.dtype.newbyteorder("=")
        if value.dtype != usual or not value.flags.writeable or any(stride < 0 for stride in value.strides):
            value = value.astype(usual)
    return torch.as_tensor(value, dtype=dtype, device=device)
