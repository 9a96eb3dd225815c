"""K-means as pure functions: assignment, sums, centres."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_modules.mixtures.collectives import FlatSums
from lightning_modules.mixtures.gaussian.density import chunk_rows

# How many of the farthest rows a pass remembers, to restart centres that have lost all their rows.
FARTHEST_ROWS = 16


@dataclass
class KMeansStatistics(FlatSums):
    """What the assignment hands to the update, summed over the rows; the sums are about the centres, so no digits are
    lost.

    Shape: ``weight`` ``[S, K]``, ``first`` ``[S, K, D]``, ``inertia`` ``[S]``, ``count`` ``[]``; not summed but kept:
    the farthest rows of each start, ``far_rows`` ``[S, M, D]`` at squared distance ``far_squares`` ``[S, M]``,
    farthest first.
    """

    SUMS = ("weight", "first", "inertia", "count")

    weight: Tensor
    first: Tensor
    inertia: Tensor
    count: Tensor
    far_rows: Tensor
    far_squares: Tensor

    @classmethod
    def zeros_for(cls, centers: Tensor) -> KMeansStatistics:
        """Empty statistics for ``centers`` ``[S, K, D]``."""
        starts, num_components, num_features = centers.shape
        size = min(num_components, FARTHEST_ROWS)
        return cls(
            weight=centers.new_zeros(starts, num_components),
            first=torch.zeros_like(centers),
            inertia=centers.new_zeros(starts),
            count=centers.new_zeros(()),
            far_rows=centers.new_zeros(starts, size, num_features),
            far_squares=centers.new_full((starts, size), -1.0),
        )

    def keep_farthest(self, rows: Tensor, squares: Tensor) -> None:
        """Merge more rows ``[S, N, D]`` at ``squares`` ``[S, N]`` into the farthest ones, in place.

        Ties are broken by the rows' own values, so that the result does not depend on the order of the stream.
        """
        size = self.far_squares.shape[1]
        rows = torch.cat([self.far_rows, rows], dim=1)
        squares = torch.cat([self.far_squares, squares], dim=1)
        for start in range(rows.shape[0]):
            order = torch.arange(rows.shape[1], device=rows.device)
            for feature in range(min(rows.shape[2], 4)):
                order = order[rows[start, order, feature].argsort(stable=True)]
            order = order[squares[start, order].argsort(stable=True, descending=True)][:size]
            self.far_rows[start], self.far_squares[start] = rows[start, order], squares[start, order]


def assign(centers: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    r"""Nearest centre of each row, :math:`\arg\min_k \|z_n - c_k\|^2`, and that squared distance.

    Shape: ``centers`` ``[S, K, D]``, ``z`` ``[N, D]``; result ``[S, N]`` twice.
    """
    starts, num_components, _ = centers.shape
    labels = torch.empty(starts, z.shape[0], dtype=torch.long, device=z.device)
    squares = z.new_empty(starts, z.shape[0])
    step = chunk_rows(starts * num_components + z.shape[1], z.device)
    for first in range(0, z.shape[0], step):
        chunk = z[first : first + step]
        label = _scores(centers, chunk).min(dim=1).indices
        labels[:, first : first + step] = label
        for start in range(starts):
            squares[start, first : first + step] = (chunk - centers[start, label[start]]).square_().sum(dim=1)
    return labels, squares


def _scores(centers: Tensor, z: Tensor) -> Tensor:
    """Squared distances ``[S, K, N]`` up to a term of the row alone."""
    flat = centers.flatten(0, 1)
    scores = torch.addmm(flat.square().sum(dim=1, keepdim=True), flat, z.T, alpha=-2.0)
    return scores.view(centers.shape[0], centers.shape[1], -1)


def accumulate(
    centers: Tensor, z: Tensor, mask: Tensor | None = None, into: KMeansStatistics | None = None
) -> KMeansStatistics:
    """E-step: assign each row to its nearest centre and keep the sums.

    Shape: ``centers`` ``[S, K, D]``, ``z`` ``[N, D]``, ``mask`` ``[N]``.
    """
    statistics = KMeansStatistics.zeros_for(centers) if into is None else into
    if mask is not None:
        z = z[mask]
    names = torch.arange(centers.shape[1], device=z.device)[:, None]
    labels, squares = assign(centers, z)
    step = chunk_rows(centers.shape[1] + z.shape[1], z.device)
    size = statistics.far_squares.shape[1]
    for start in range(centers.shape[0]):
        for first in range(0, z.shape[0], step):
            chunk, label = z[first : first + step], labels[start, first : first + step]
            one_hot = (label == names).to(z.dtype)
            statistics.weight[start] += one_hot.sum(dim=1)
            statistics.first[start] += one_hot @ (chunk - centers[start, label])
        statistics.inertia[start] += squares[start].sum()
    if z.shape[0]:
        # every row that ties with the last place is a candidate, or the choice would depend on the order
        floor = squares.topk(min(size, z.shape[0]), dim=1).values[:, -1:]
        for start in range(centers.shape[0]):
            index = (squares[start] >= floor[start]).nonzero()[: 64 * size, 0]
            far = replace(
                statistics,
                far_rows=statistics.far_rows[start : start + 1],
                far_squares=statistics.far_squares[start : start + 1],
            )
            far.keep_farthest(z[index][None], squares[start : start + 1, index])
    statistics.count += z.shape[0]
    return statistics


def update(statistics: KMeansStatistics, centers: Tensor) -> Tensor:
    r"""M-step: :math:`c_k + F_k / N_k`; centres without rows restart at the rows farthest from theirs, which lowers
    the inertia.

    Shape: ``centers`` and result ``[S, K, D]``.
    """
    weight, first = statistics.weight.clone(), statistics.first
    moved = torch.where(weight[..., None] > 0, centers + first / weight.clamp(min=1.0)[..., None], centers)
    for start in range(centers.shape[0]):
        empty = (weight[start] == 0).nonzero()[:, 0]
        useful = statistics.far_squares[start] > 0
        rows = (
            torch.unique(statistics.far_rows[start][useful], dim=0) if bool(useful.any()) else centers.new_zeros(0, 1)
        )
        if len(empty) and len(rows):
            # farthest first, distinct
            distance = torch.cdist(rows, centers[start]).amin(dim=1)
            rows = rows[distance.argsort(descending=True, stable=True)]
            count = min(len(empty), len(rows))
            moved[start, empty[:count]] = rows[:count]
    return moved
