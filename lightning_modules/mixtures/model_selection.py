"""Choice of the number of components of any mixture: a criterion over a range, and its curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_modules.mixtures.gaussian.model import GaussianMixtureModel
from lightning_modules.mixtures.model import MixtureModel, fit_in_memory

Criterion = Literal["bic", "icl", "held-out"]
LABELS = {
    "bic": "BIC (lower is better)",
    "icl": "ICL (lower is better)",
    "held-out": "−2 × held-out log-likelihood of a sample (lower is better)",
}


@dataclass
class ComponentChoice:
    """The criterion for each number of components, and the number that minimises it."""

    candidates: list[int]
    criterion: list[float]
    best: int
    name: Criterion = "bic"

    def figure(self) -> Figure:
        """Draw the curve, the minimum marked."""
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.candidates, self.criterion, marker="o", color="tab:blue")
        axes.axvline(self.best, color="tab:orange", linestyle="--", label=f"minimum at {self.best}")
        axes.set(xlabel="components", ylabel=LABELS[self.name])
        axes.legend()
        return figure

    def log(self, writer: Any, tag: str = "mixture/num_components") -> None:
        """Write the curve to TensorBoard: a scalar whose step is the number of components, and the picture.

        Args:
            writer: A `SummaryWriter`, such as the `experiment` of Lightning's `TensorBoardLogger`.
            tag: What it is called there.
        """
        for count, value in zip(self.candidates, self.criterion, strict=True):
            writer.add_scalar(f"{tag}/{self.name}", value, count)
        writer.add_figure(f"{tag}/curve", self.figure())


def choose_num_components(
    x: Tensor,
    candidates: Sequence[int] = range(1, 11),
    *,
    family: type[MixtureModel[Any]] = GaussianMixtureModel,
    criterion: Criterion = "bic",
    weight: Tensor | None = None,
    folds: int = 5,
    **options: Any,
) -> ComponentChoice:
    r"""Fit a mixture for each number of components, restarts side by side, and compare.

    `bic` is :math:`-2 \log L + p \log N` (Schwarz 1978), and counts densities: two components that overlap are two.
    `icl` adds twice the entropy of the responsibilities (Biernacki, Celeux and Govaert 2000), and counts clusters that
    are apart. `held-out` is :math:`-2` times the mean log-likelihood of samples that were left out, in so many folds:
    slower, and free of assumptions about N.

    Args:
        x: Samples.
        candidates: Numbers of components to try.
        family: The mixture's model, such as `StudentTMixtureModel`.
        criterion: What is compared.
        weight: How often each sample counts; once where absent.
        folds: Parts of the data, each left out once, for `held-out`.
        options: Further arguments of the model, such as `covariance_type` or `n_init`.

    Shape:
        - x: `[N, D]`
        - weight: `[N]`

    Example:
        >>> samples = torch.cat([torch.randn(200, 2) - 5, torch.randn(200, 2) + 5])
        >>> choose_num_components(samples, [1, 2, 3], covariance_type="spherical").best
        2
    """
    if not candidates:
        raise ValueError("candidates must name at least one number of components")
    if criterion not in LABELS:
        raise ValueError(f"criterion must be one of {tuple(LABELS)}, got {criterion!r}")
    if criterion == "held-out" and not 2 <= folds <= len(x):
        raise ValueError(f"folds must be from 2 to the number of samples, {len(x)}; got {folds!r}")
    weights = torch.ones(len(x), dtype=torch.float64, device=x.device) if weight is None else weight.double()
    values = []
    for count in candidates:
        if criterion == "held-out":
            values.append(_held_out(x, weights, lambda k=count: family(k, **options), folds))
        else:
            values.append(_penalized(x, weights, family(count, **options), criterion == "icl"))
    best = list(candidates)[min(range(len(values)), key=values.__getitem__)]
    return ComponentChoice(list(candidates), values, best, criterion)


def _penalized(x: Tensor, weights: Tensor, model: MixtureModel[Any], with_entropy: bool) -> float:
    fit_in_memory(model, x, weight=weights)
    joint = model.log_joint(x)
    norm = torch.logsumexp(joint, dim=1)
    value = -2 * float(norm @ weights) + model.num_free_parameters() * math.log(float(weights.sum()))
    if with_entropy:
        posterior = (joint - norm[:, None]).exp()
        value -= 2 * float(torch.special.xlogy(posterior, posterior).sum(dim=1) @ weights)
    return value


def _held_out(x: Tensor, weights: Tensor, make: Any, folds: int) -> float:
    total = 0.0
    part = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device) % folds
    for fold in range(folds):
        model, left_out = make(), part == fold
        fit_in_memory(model, x[~left_out], weight=weights[~left_out])
        norm = torch.logsumexp(model.log_joint(x[left_out]), dim=1)
        total -= 2 * float(norm @ weights[left_out])
    return total / float(weights.sum())
