"""Exhaustive clustering of a dozen points: the oracle of K-means and of the mixtures."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_modules.mixtures.gaussian.em import MixtureParameters, log_joint

MAX_POINTS = 12


def all_clusterings(num_points: int, num_components: int) -> Tensor:
    """Every way to put `num_points` points into at most `num_components` clusters, up to renaming them.

    Shape:
        - output: `[M, N]`, in each line of which a new label is always the smallest unused one
    """
    _check(num_points)
    labels = torch.zeros(1, 1, dtype=torch.int8)
    for _ in range(1, num_points):
        ceiling = (labels.amax(dim=1) + 1).clamp(max=num_components - 1)
        parts = []
        for label in range(int(ceiling.max()) + 1):
            grown = labels[ceiling >= label]
            parts.append(torch.cat([grown, grown.new_full((len(grown), 1), label)], dim=1))
        labels = torch.cat(parts)
    return labels


def best_clustering(x: Tensor, num_components: int) -> tuple[Tensor, float]:
    """The clustering with the smallest sum of squared distances to its means, over all there are, and that sum.

    Shape:
        - x: `[N, D]` with N at most 12
        - output: `[N]`, and a number

    Example:
        >>> best_clustering(torch.tensor([[0.0], [1.0], [9.0]]), 2)
        (tensor([0, 0, 1]), 0.5)
    """
    x = x.double()
    x = x - x.mean(dim=0)
    labels = all_clusterings(x.shape[0], num_components)
    between = torch.zeros(len(labels), dtype=torch.float64)
    for label in range(num_components):
        member = (labels == label).double()
        between += (member @ x).square().sum(dim=1) / member.sum(dim=1).clamp(min=1.0)
    inertia = x.square().sum() - between
    best = int(inertia.argmin())
    return labels[best].long(), max(float(inertia[best]), 0.0)


def enumerated_log_likelihood(theta: MixtureParameters, x: Tensor) -> float:
    r""":math:`\log \sum_z p(x, z; \theta)` over all :math:`K^N` assignments `z` of the points, one by one.

    Shape:
        - x: `[N, D]` with N at most 12
    """
    _check(x.shape[0])
    joint = log_joint(theta, x)
    total = joint[0]
    for point in joint[1:]:
        total = (total[:, None] + point[None]).reshape(-1)
    return float(torch.logsumexp(total, dim=0))


def _check(num_points: int) -> None:
    if not 1 <= num_points <= MAX_POINTS:
        raise ValueError(f"exhaustive clustering takes 1 to {MAX_POINTS} points, got {num_points}")
