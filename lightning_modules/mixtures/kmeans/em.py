"""EM of K-means as pure functions: sums of the nearest samples, and the centers that they move to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lightning_modules.mixtures.chunks import chunk_size
from lightning_modules.mixtures.collectives import Collectives, SufficientStatistics
from lightning_modules.mixtures.lloyd import assign
from lightning_modules.mixtures.rows import distinct

# How many of the farthest samples an epoch remembers, to restart centers that have lost all their samples.
FARTHEST_SAMPLES = 16


@dataclass
class KMeansStatistics(SufficientStatistics):
    """What the E-step hands to the M-step; the sums are about the centers, so that no digits are lost.

    Attributes:
        weight: Weight of the samples of each center, `[S, K]`.
        first: Sum of their differences from it, `[S, K, D]`.
        inertia: Sum of squared distances, `[S]`.
        count: Weight of the samples, `[]`.
        farthest: The farthest samples of each restart, farthest first, which are kept and not summed, `[S, M, D]`.
        farthest_squares: Their squared distances, `[S, M]`.
    """

    SUMS = ("weight", "first", "inertia", "count")

    weight: Tensor
    first: Tensor
    inertia: Tensor
    count: Tensor
    farthest: Tensor
    farthest_squares: Tensor

    @classmethod
    def zeros_for(cls, centers: Tensor) -> KMeansStatistics:
        """Empty statistics.

        Shape:
            - centers: `[S, K, D]`
        """
        restarts, num_components, num_features = centers.shape
        size = min(num_components, FARTHEST_SAMPLES)
        return cls(
            weight=centers.new_zeros(restarts, num_components),
            first=torch.zeros_like(centers),
            inertia=centers.new_zeros(restarts),
            count=centers.new_zeros(()),
            farthest=centers.new_zeros(restarts, size, num_features),
            farthest_squares=centers.new_full((restarts, size), -1.0),
        )

    def add(self, other: Self) -> None:
        """Add the sums of more samples, and keep the farthest of all, in place."""
        super().add(other)
        for restart in range(len(self.weight)):
            self.keep_farthest(restart, other.farthest[restart], other.farthest_squares[restart])

    def keep_farthest(self, restart: int, samples: Tensor, squares: Tensor) -> None:
        """Merge more samples of one restart into the farthest ones, in place.

        Ties are broken by the samples' own values, so that the result does not depend on the order of the stream.

        Shape:
            - samples: `[N, D]`
            - squares: `[N]`
        """
        samples = torch.cat([self.farthest[restart], samples])
        squares = torch.cat([self.farthest_squares[restart], squares])
        order = torch.arange(samples.shape[0], device=samples.device)
        for feature in range(min(samples.shape[1], 4)):
            order = order[samples[order, feature].argsort(stable=True)]
        order = order[squares[order].argsort(stable=True, descending=True)][: self.farthest.shape[1]]
        self.farthest[restart], self.farthest_squares[restart] = samples[order], squares[order]

    def pack(self, collectives: Collectives) -> Tensor:
        """The sums, and the farthest samples in a slot that each process has to itself.

        Shape:
            - output: `[M]`
        """
        farthest = torch.cat([self.farthest, self.farthest_squares[..., None]], dim=2)
        slots = farthest.new_zeros(collectives.world, farthest.numel())
        slots[collectives.rank] = farthest.flatten()
        return torch.cat([self.flat(), slots.flatten()])

    def unpack(self, vector: Tensor, collectives: Collectives) -> KMeansStatistics:
        """Statistics of all processes from the sum of their packed vectors.

        Shape:
            - vector: `[M]`
        """
        size = self.flat().numel()
        total = self.with_flat(vector[:size])
        total.farthest = torch.zeros_like(self.farthest)
        total.farthest_squares = torch.full_like(self.farthest_squares, -1.0)
        restarts, kept, num_features = self.farthest.shape
        for part in vector[size:].view(collectives.world, restarts, kept, num_features + 1):
            for restart in range(restarts):
                total.keep_farthest(restart, part[restart, :, :-1], part[restart, :, -1])
        return total


def e_step(centers: Tensor, z: Tensor, weight: Tensor | None = None) -> KMeansStatistics:
    """E-step: assign each sample to its nearest center, kept as sums.

    Shape:
        - centers: `[S, K, D]`
        - z: `[N, D]`
        - weight: `[N]`, how often each sample counts; once where absent
    """
    statistics = KMeansStatistics.zeros_for(centers)
    names = torch.arange(centers.shape[1], device=z.device)[:, None]
    labels, squares = assign(centers, z)
    step = chunk_size(centers.shape[1] + z.shape[1], z.device)
    size = statistics.farthest_squares.shape[1]
    for restart in range(centers.shape[0]):
        for first in range(0, z.shape[0], step):
            chunk, label = z[first : first + step], labels[restart, first : first + step]
            one_hot = (label == names).to(z.dtype)
            if weight is not None:
                one_hot *= weight[first : first + step]
            statistics.weight[restart] += one_hot.sum(dim=1)
            statistics.first[restart] += one_hot @ (chunk - centers[restart, label])
        far = squares[restart]
        statistics.inertia[restart] += far.sum() if weight is None else far @ weight.to(far)
        if weight is not None:
            far = torch.where(weight > 0, far, -1.0)
        if z.shape[0]:
            # every sample that ties with the last place is a candidate, or the choice would depend on the order
            floor = far.topk(min(size, z.shape[0])).values[-1]
            index = (far >= floor).nonzero()[: 64 * size, 0]
            statistics.keep_farthest(restart, z[index], far[index])
    statistics.count += z.shape[0] if weight is None else weight.sum()
    return statistics


def m_step(statistics: KMeansStatistics, centers: Tensor) -> Tensor:
    r"""M-step: :math:`c_k + F_k / N_k`; centers without samples restart at the samples farthest from theirs, which
    lowers the inertia.

    Shape:
        - centers: `[S, K, D]`
        - output: `[S, K, D]`
    """
    return restart(centers + mean_of(statistics.first, statistics.weight), statistics.weight == 0, statistics)


def restart(centers: Tensor, lost: Tensor, statistics: KMeansStatistics) -> Tensor:
    """Put lost centers to the samples that are farthest from all centers.

    Shape:
        - centers: `[S, K, D]`
        - lost: `[S, K]`
        - output: `[S, K, D]`
    """
    moved = centers.clone()
    for number in range(centers.shape[0]):
        where = lost[number].nonzero()[:, 0]
        samples = statistics.farthest[number][statistics.farthest_squares[number] > 0]
        samples = samples[distinct(samples)][: len(where)]
        moved[number, where[: len(samples)]] = samples
    return moved


def mean_of(first: Tensor, weight: Tensor) -> Tensor:
    """Sums over weights; 0 where there are none.

    Shape:
        - first: `[S, K, D]`
        - weight: `[S, K]`
        - output: `[S, K, D]`
    """
    return torch.where(weight[..., None] > 0, first / weight[..., None], 0.0)
