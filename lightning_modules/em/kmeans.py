"""K-means as pure functions: assignment, sums, centres; and Lloyd's algorithm on data in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_modules.em.gaussian_density import chunk_rows

# How many of the farthest rows a pass remembers, to restart centres that have lost all their rows.
FARTHEST_ROWS = 16
SUMS = ("weight", "first", "inertia", "count")


@dataclass
class KMeansStatistics:
    """What the assignment hands to the update, summed over the rows; the sums are about the centres, so no digits are
    lost.

    Shape: ``weight`` ``[S, K]``, ``first`` ``[S, K, D]``, ``inertia`` ``[S]``, ``count`` ``[]``; not summed but kept:
    the farthest rows of each start, ``far_rows`` ``[S, M, D]`` at squared distance ``far_squares`` ``[S, M]``,
    farthest first.
    """

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

    def flat(self) -> Tensor:
        """Every sum in one float64 vector."""
        return torch.cat([getattr(self, name).reshape(-1) for name in SUMS])

    def with_flat(self, vector: Tensor) -> KMeansStatistics:
        """Statistics with the sums of ``vector``."""
        parts: dict[str, Tensor] = {}
        position = 0
        for name in SUMS:
            like: Tensor = getattr(self, name)
            parts[name] = vector[position : position + like.numel()].view_as(like)
            position += like.numel()
        return replace(self, **parts)

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
        label = _scores(centers, chunk).argmin(dim=1)
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


@dataclass
class LloydResult:
    """Centres ``[K, D]``, labels ``[N]``, the sum of squared distances, passes used, and whether the labels came to
    rest.
    """

    centers: Tensor
    labels: Tensor
    inertia: float
    n_iter: int
    converged: bool


def lloyd(z: Tensor, centers: Tensor, max_iter: int = 300, tol: float = 0.0) -> LloydResult:
    r"""Lloyd's algorithm on rows in memory, exact, with Hamerly's bounds (2010): rows that cannot change their centre
    are not compared.

    Each row keeps an upper bound on the distance to its centre and a lower bound on the distance to any other; sums
    change only by the rows that moved. The result is that of the plain algorithm.

    Args:
        z: rows.
        centers: where to start.
        max_iter: iterations at most.
        tol: stop when the centres' squared movement, summed, is at most this.

    Shape: ``z`` ``[N, D]``, ``centers`` ``[K, D]``.
    """
    bounds = _Bounds(z, centers)
    converged, n_iter = False, 0
    for n_iter in range(1, max_iter + 1):
        changed = bounds.assign() if n_iter > 1 else -1
        if changed == 0:
            converged = True
            break
        if float(bounds.move().square().sum()) <= tol:
            converged = True
            break
    labels, squares = assign(bounds.centers[None], z)
    return LloydResult(bounds.centers, labels[0], float(squares.sum(dtype=torch.float64)), n_iter, converged)


class _Bounds:
    """The state of Hamerly's algorithm.

    Rows of float64 are compared in float32, which is twice as fast, with a bound on its error: where the two nearest
    centres are closer than that, the row is compared again in float64. So the assignment is that of float64.
    """

    def __init__(self, z: Tensor, centers: Tensor) -> None:
        self.z, self.centers = z, centers.clone()
        self.num_components = centers.shape[0]
        self.screen = z.float()
        self.norms = z.square().sum(dim=1)
        largest = float(self.norms.amax()) if z.numel() else 0.0
        self.slack = 4 * torch.finfo(z.dtype).eps * (z.shape[1] * largest) ** 0.5
        self.labels, self.upper, self.lower = self._nearest_two(None)
        self.weight = torch.bincount(self.labels, minlength=self.num_components).double()
        self.sums = torch.zeros(self.num_components, z.shape[1], dtype=torch.float64, device=z.device)
        self._add(self.labels, z, 1.0)

    def _add(self, labels: Tensor, rows: Tensor, sign: float) -> None:
        names = torch.arange(self.num_components, device=rows.device)[:, None]
        step = chunk_rows(self.num_components + rows.shape[1], rows.device)
        for first in range(0, rows.shape[0], step):
            one_hot = (labels[first : first + step] == names).to(rows.dtype)
            self.sums += sign * (one_hot @ rows[first : first + step]).double()

    def _nearest_two(self, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Label, upper bound on the distance to the nearest centre and lower bound on that to the second nearest.

        Shape: ``index`` of the rows ``[M]``, all where ``None``; result three times ``[M]``.
        """
        count = self.z.shape[0] if index is None else index.shape[0]
        labels = torch.empty(count, dtype=torch.long, device=self.z.device)
        upper, lower = self.z.new_empty(count), self.z.new_empty(count)
        exact = self.z.dtype == torch.float32
        # rounding of the products, of their sum and of the rows themselves
        error = 0.0 if exact else 2 * (self.z.shape[1] + 8) * torch.finfo(torch.float32).eps
        reach = self.centers.square().sum(dim=1).amax()
        centers = self.centers.float()
        step = chunk_rows(2 * self.num_components + self.z.shape[1], self.z.device)
        for first in range(0, count, step):
            chosen: Tensor | slice = slice(first, first + step) if index is None else index[first : first + step]
            part = slice(first, first + step)
            label, nearest, second = _two_smallest(_scores(centers[None], self.screen[chosen])[0])
            nearest, second, norms = nearest.to(self.z), second.to(self.z), self.norms[chosen]
            margin = error * (norms + reach)
            if not exact:
                close = (~(second - nearest > 2 * margin)).nonzero()[:, 0]
                if len(close):
                    rows = self.z[chosen][close]
                    label[close], nearest[close], second[close] = _two_smallest(_scores(self.centers[None], rows)[0])
            labels[part] = label
            upper[part] = (nearest + norms + margin).clamp_(min=0.0).sqrt_()
            lower[part] = (second + norms - margin).clamp_(min=0.0).sqrt_()
        return labels, upper, lower

    def assign(self) -> int:
        """Reassign the rows whose bounds allow a change; how many changed."""
        between = torch.cdist(self.centers, self.centers)
        between.fill_diagonal_(torch.inf)
        threshold = torch.maximum(self.lower, (between.amin(dim=1) / 2)[self.labels])
        index = (self.upper + self.slack > threshold).nonzero()[:, 0]
        if not len(index):
            return 0
        if 2 * len(index) > len(self.z):
            # to copy most of the rows costs more than to compare them all
            old = self.labels
            labels, self.upper, self.lower = self._nearest_two(None)
            index = torch.arange(len(old), device=old.device)
        else:
            old = self.labels[index]
            labels, self.upper[index], self.lower[index] = self._nearest_two(index)
        moved = labels != old
        index, old, labels = index[moved], old[moved], labels[moved]
        self.labels[index] = labels
        rows = self.z[index]
        self._add(old, rows, -1.0)
        self._add(labels, rows, 1.0)
        self.weight += torch.bincount(labels, minlength=self.num_components)
        self.weight -= torch.bincount(old, minlength=self.num_components)
        return len(index)

    def move(self) -> Tensor:
        """Centres to the means of their rows; how far each moved."""
        empty = self.weight == 0
        target = (self.sums / self.weight.clamp(min=1.0)[:, None]).to(self.z.dtype)
        target[empty] = self.centers[empty]
        if bool(empty.any()):
            self._restart_empty(target, empty)
        distance = (target - self.centers).square().sum(dim=1).sqrt()
        self.centers = target
        self.upper += distance[self.labels]
        largest = distance.topk(min(2, self.num_components))
        other = torch.where(self.labels == largest.indices[0], largest.values[-1], largest.values[0])
        self.lower -= other
        return distance

    def _restart_empty(self, target: Tensor, empty: Tensor) -> None:
        squares = (self.z - self.centers[self.labels]).square().sum(dim=1)
        far = squares.topk(min(int(empty.sum()), self.z.shape[0])).indices
        far = far[squares[far] > 0]
        where = empty.nonzero()[: len(far), 0]
        target[where] = self.z[far]


def _two_smallest(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index and value of the smallest of ``[K, N]`` over K, and the second smallest (infinite where K is 1);
    ``scores`` is used up.
    """
    smallest, label = scores.min(dim=0)
    scores.scatter_(0, label[None], torch.inf)
    return label, smallest, scores.amin(dim=0)
