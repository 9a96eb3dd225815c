"""Choice of the number of components: the Bayesian information criterion over a range, and its curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_modules.mixtures.gaussian.model import GaussianMixtureModel
from lightning_modules.mixtures.model import fit_in_memory


@dataclass
class ComponentChoice:
    """The criterion for each number of components, and the number that minimises it."""

    candidates: list[int]
    criterion: list[float]
    best: int

    def figure(self) -> Figure:
        """Draw the curve, the minimum marked."""
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.candidates, self.criterion, marker="o", color="tab:blue")
        axes.axvline(self.best, color="tab:orange", linestyle="--", label=f"minimum at {self.best}")
        axes.set(xlabel="components", ylabel="BIC (lower is better)")
        axes.legend()
        return figure


def choose_num_components(x: Tensor, candidates: Sequence[int] = range(1, 11), **options: Any) -> ComponentChoice:
    r"""Fit a mixture for each number of components and compare :math:`-2 \log L + p \log N` (Schwarz 1978).

    Args:
        x: Samples.
        candidates: Numbers of components to try.
        options: Further arguments of `lightning_modules.GaussianMixture`, such as `covariance_type` or `n_init`.

    Shape:
        - x: `[N, D]`

    Example:
        >>> samples = torch.cat([torch.randn(200, 2) - 5, torch.randn(200, 2) + 5])
        >>> choose_num_components(samples, [1, 2, 3], covariance_type="spherical").best
        2
    """
    if not candidates:
        raise ValueError("candidates must name at least one number of components")
    criterion = []
    for num_components in candidates:
        model = GaussianMixtureModel(num_components, **options)
        fit_in_memory(model, x)
        likelihood = float(torch.logsumexp(model.log_joint(x), dim=1).sum())
        criterion.append(-2 * likelihood + model.num_free_parameters() * math.log(x.shape[0]))
    best = list(candidates)[min(range(len(criterion)), key=criterion.__getitem__)]
    return ComponentChoice(list(candidates), criterion, best)
