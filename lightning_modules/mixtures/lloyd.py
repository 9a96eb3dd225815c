"""Nearest centers, and Lloyd's algorithm in memory: exact, and compared again only where a label may change."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_modules.mixtures.chunks import chunk_size
from lightning_modules.mixtures.passes import Passes, library, library_for
from lightning_modules.mixtures.rows import (
    FramedRows,
    Rows,
    SparseRows,
    dense,
    distinct,
    products,
    screened,
    squared_norms,
    squares_to,
    sums_by_label,
    width_of,
)

# Each of the few dozen small calls on a chunk costs some microseconds: chunks are longer than a cache would like.
CHUNKS_AT_ONCE = 2


def assign(centers: Tensor, z: Rows) -> tuple[Tensor, Tensor]:
    r"""Nearest center of each sample, :math:`\arg\min_k \|z_n - c_k\|^2`, and that squared distance.

    Shape:
        - centers: `[S, K, D]`
        - z: `[N, D]`
        - output: `[S, N]` twice
    """
    restarts, num_components, _ = centers.shape
    labels = torch.empty(restarts, z.shape[0], dtype=torch.long, device=z.device)
    squares = torch.empty(restarts, z.shape[0], dtype=centers.dtype, device=z.device)
    step = chunk_size(restarts * num_components + width_of(z), z.device)
    for first in range(0, z.shape[0], step):
        chunk = z[first : first + step].to(centers.dtype)
        label = _scores(centers, chunk).min(dim=1).indices
        labels[:, first : first + step] = label
        for restart in range(restarts):
            squares[restart, first : first + step] = squares_to(chunk, centers[restart], label[restart])
    return labels, squares


def _scores(centers: Tensor, z: Rows) -> Tensor:
    """Squared distances `[S, K, N]` up to a term of the sample only."""
    flat = centers.flatten(0, 1)
    # two scalings are two roundings less than one of the sum: that of -2 is exact
    scores = products(-2.0 * flat, z).add_(flat.square().sum(dim=1, keepdim=True))
    return scores.view(centers.shape[0], centers.shape[1], -1)


@dataclass
class LloydResult:
    """What Lloyd's algorithm came to.

    Attributes:
        centers: Float64, `[K, D]`.
        labels: `[N]`.
        inertia: Sum of squared distances, weighted.
        n_iter: Iterations taken.
        converged: Whether the labels (or, within `tol`, the centers) no longer changed.
    """

    centers: Tensor
    labels: Tensor
    inertia: float
    n_iter: int
    converged: bool


def lloyd(
    z: Rows,
    centers: Tensor,
    max_iter: int = 300,
    tol: float = 0.0,
    weights: Tensor | None = None,
    report: Callable[[str], None] | None = None,
) -> LloydResult:
    r"""Lloyd's algorithm, with the idea of Hamerly ("Making k-means even faster", SDM 2010): samples that cannot
    change their center are not compared.

    Each sample keeps a lower bound on how much farther any other center is than its own; sums change only by the
    samples that moved. The result is that of the plain algorithm.

    Args:
        z: Samples.
        centers: Where to start.
        max_iter: Iterations at most.
        tol: Stop when the centers' squared movement, summed, is at most this.
        weights: Weights of the samples.
        report: Is given a line for each iteration.

    Shape:
        - z: `[N, D]`
        - centers: `[K, D]`
        - weights: `[N]`
    """
    unit = _unit(z)
    centers = centers.double()
    if unit != 1:
        z = SparseRows(z.matrix / unit) if isinstance(z, SparseRows) else dense(z) / unit
    tol /= unit**2
    search = _search(z, centers / unit, weights)
    converged, n_iter, reason = False, 0, ""
    for n_iter in range(1, max_iter + 1):
        changed = search.assign() if n_iter > 1 else -1
        if report:
            report(f"Iteration {n_iter - 1}, inertia {search.inertia() * unit**2}.")
        if changed == 0:
            converged, reason = True, "strict convergence"
            break
        shift = float(search.move().square().sum())
        if shift <= tol:
            converged, reason = True, f"center shift {shift * unit**2} within tolerance {tol * unit**2}"
            break
    if report and converged:
        report(f"Converged at iteration {n_iter - 1}: {reason}.")
    if not converged or reason != "strict convergence":
        search.assign(last=True)
    return LloydResult(search.centers * unit, search.labels, search.inertia() * unit**2, n_iter, converged)


def _unit(z: Rows) -> float:
    """A power of two (division by it is exact) that brings samples far from 1 within float32's reach; 1 for others."""
    if isinstance(z, FramedRows):
        return 1.0  # standardized
    values = torch.from_numpy(z.matrix.data) if isinstance(z, SparseRows) else z
    # |z| would be a copy of all the data
    largest = max(-float(values.min()), float(values.max())) if values.numel() else 1.0
    if largest == 0 or 1e-3 < largest < 1e3:
        return 1.0
    return 2.0 ** round(math.log2(largest))


def _search(z: Rows, centers: Tensor, weights: Tensor | None) -> _NearestCenters:
    """By compiled passes, where there are any."""
    weights = None if weights is None else weights.double()
    passes = _passes(z, weights)
    if passes is None:
        return _TorchNearestCenters(z, centers, weights)
    return _CompiledNearestCenters(z, centers, weights, passes)


def _passes(z: Rows, weights: Tensor | None) -> Passes | None:
    """The compiled passes over samples, where there are any."""
    if isinstance(z, SparseRows):
        compiled = library(z.dtype)
        return None if compiled is None else Passes(compiled, z.to(z.dtype).matrix, None, weights)
    x, frame = z.x if isinstance(z, FramedRows) else z, None
    if isinstance(z, FramedRows):
        offset, scale = (numbers.double() for numbers in (z.standardizer.offset, z.standardizer.scale))
        if z.dtype == x.dtype and bool((torch.frexp(scale).mantissa == 0.5).all()):
            frame = (offset.expand(x.shape[1]), (1 / scale).expand(x.shape[1]))
        else:
            # to divide by these is not to multiply by their inverses, and division is slow
            x = dense(z)
    compiled = library_for(x)
    return None if compiled is None else Passes(compiled, x, frame, weights)


def _gap(scores: Tensor, label: Tensor, norms: Tensor, margin: Tensor) -> Tensor:
    """A lower bound on the distance to the second nearest center less that to the nearest; NaN where the margin, an
    error of the scores, leaves open which it is. The scores of the labels are lost.
    """
    nearest = scores.gather(0, label[None])[0].to(norms.dtype)
    second = scores.scatter_(0, label[None], torch.inf).amin(dim=0).to(norms.dtype)
    is_close = ~(second - nearest > 2 * margin)
    upper = nearest.add_(norms).add_(margin).clamp_(min=0.0).sqrt_()
    gap = second.add_(norms).sub_(margin).clamp_(min=0.0).sqrt_().sub_(upper)
    return gap.masked_fill_(is_close, torch.nan)


class _NearestCenters(ABC):
    """Samples, centers, the nearest center of each sample, and by how much it is the nearest.

    Samples are compared in float32, which for float64 is twice as fast, with a bound on the error: where the two
    nearest centers are closer than that, the sample is compared again in float64. So the labels are those of the plain
    algorithm.
    """

    def __init__(self, z: Rows, centers: Tensor, weights: Tensor | None) -> None:
        self.z, self.centers, self.weights = z, centers.double(), weights
        self.num_components = centers.shape[0]
        # of each center: the sum of its samples, that of their weights, and their number
        self.members = torch.zeros(self.num_components, z.shape[1] + 2, dtype=torch.float64, device=z.device)
        self.sums, self.weight, self.count = self.members[:, :-2], self.members[:, -2], self.members[:, -1]
        # numpy: torch would fill them on all its threads, which then wait for more on the cores that the passes want
        self.labels = torch.from_numpy(np.full(z.shape[0], -1)).to(z.device)
        self.gap = torch.empty(z.shape[0], dtype=z.dtype, device=z.device)
        # how far each center may have come nearer to, or moved away from, a sample of its own
        self.moved = torch.zeros(self.num_components, dtype=torch.float64, device=z.device)
        self.largest = 0.0  # squared norm of a sample
        self._compare(None)
        self.slack = 8 * torch.finfo(z.dtype).eps * (width_of(z) * self.largest) ** 0.5

    @abstractmethod
    def inertia(self) -> float:
        """Sum of squared distances of the samples to the centers of their labels, weighted."""

    def assign(self, last: bool = False) -> int:
        """Reassign the samples whose bound allows a change; how many changed. Where it is the `last` time, the centers'
        members are of no more use.
        """
        index = self._candidates()
        if not len(index):
            return 0
        # to copy most of the samples costs more than to compare them all
        return self._compare(None if 2 * len(index) > self.z.shape[0] else index, last)

    def move(self) -> Tensor:
        """Centers to the means of their samples; how far each moved, `[K]`."""
        if bool((self.count == 0).any()):
            self._give_samples(self.count == 0)
        empty = self.count == 0
        # what is left of weights that were added and taken away again is rounding
        self.weight[empty], self.sums[empty] = 1.0, 0.0
        target = self.sums / self.weight[:, None]
        self.weight[empty] = 0.0
        target[empty] = self.centers[empty]
        distance = (target - self.centers).square().sum(dim=1).sqrt()
        self.centers = target
        # a sample's own center may have moved away, and the fastest of the others towards it
        fastest = distance.topk(min(2, self.num_components))
        others = torch.full_like(distance, float(fastest.values[0]))
        others[fastest.indices[0]] = fastest.values[-1]
        self.moved = distance + others
        return distance

    @abstractmethod
    def _candidates(self) -> Tensor:
        """Samples whose bound, less what the centers have moved, allows another label, `[M]`."""

    @abstractmethod
    def _compare(self, index: Tensor | None, last: bool = False) -> int:
        """Set label and bound of samples, and the members of the centers unless it is the last time; how many changed
        their label.

        Shape:
            - index: `[M]`, all samples where None
        """

    @abstractmethod
    def _add(self, index: Tensor, labels: Tensor, old: Tensor) -> None:
        """Add samples to the members of their centers, and take them from their old ones', where these are not -1.

        Shape:
            - index: `[M]`
            - labels, old: `[M]`
        """

    def _give_samples(self, empty: Tensor) -> None:
        """Give each center without samples a point that is far from its own, as scikit-learn does."""
        squares = squares_to(self.z, self.centers, self.labels)
        if self.weights is not None:
            squares = torch.where(self.weights > 0, squares, 0.0)
        far = squares.argsort(descending=True, stable=True)[: 64 * int(empty.sum())]
        far = far[squares[far] > 0]
        if not len(far):
            return
        samples, where = dense(self.z, far), empty.nonzero()[:, 0]
        chosen = distinct(samples)[: len(where)]
        # all that are at one point go together
        same = (samples[:, None] == samples[chosen]).all(dim=2)
        index, new = far[same.any(dim=1)], where[: len(chosen)][same.int().argmax(dim=1)[same.any(dim=1)]]
        old = self.labels[index]
        self.labels[index], self.gap[index] = new, -torch.inf
        self._add(index, new, old)


class _TorchNearestCenters(_NearestCenters):
    """In torch, on any device: chunks of samples, which are kept in float32 as well."""

    def __init__(self, z: Rows, centers: Tensor, weights: Tensor | None) -> None:
        self.screen, self.norms = screened(z)
        self.names = torch.arange(centers.shape[0], dtype=torch.int32, device=z.device)[:, None]
        super().__init__(z, centers, weights)

    def inertia(self) -> float:
        total, step = 0.0, chunk_size(2 * width_of(self.z), self.z.device)
        for first in range(0, self.z.shape[0], step):
            part = slice(first, first + step)
            squares = squares_to(self.z[part], self.centers, self.labels[part])
            total += float(squares.sum() if self.weights is None else squares @ self.weights[part])
        return total

    def _candidates(self) -> Tensor:
        self.gap -= self.moved.to(self.gap).index_select(0, self.labels)
        return (self.gap <= self.slack).nonzero()[:, 0]

    def _compare(self, index: Tensor | None, last: bool = False) -> int:
        labels, gap = self._screened(index)
        if index is None:
            self.largest = float(self.norms.amax()) if len(labels) else 0.0
        close = gap.isnan().nonzero()[:, 0]
        labels[close], gap[close] = self._look_closer(close if index is None else index[close])
        if index is None:
            old, self.labels, self.gap = self.labels, labels, gap
            index = (labels != old).nonzero()[:, 0]
            old, labels = old[index], labels.index_select(0, index)
        else:
            self.gap.index_copy_(0, index, gap)
            old = self.labels.index_select(0, index)
            changed = (labels != old).nonzero()[:, 0]
            index, old, labels = index[changed], old[changed], labels[changed]
            self.labels[index] = labels
        if not last:
            self._add(index, labels, old)
        return len(index)

    def _add(self, index: Tensor, labels: Tensor, old: Tensor) -> None:
        if not len(index):
            return
        # at the start they are all, in order: elsewhere as many may come in another
        is_start = int(old[0]) < 0
        samples = self.z if is_start else self.z.index_select(0, index)
        weights = self.weights if is_start or self.weights is None else self.weights[index]
        for now, sign in ((labels, 1),) if is_start else ((labels, 1), (old, -1)):
            # samples of weight 0 are no members: a center that has only those is without samples
            counted = None if weights is None else (weights > 0).double()
            for target, value in ((self.weight, weights), (self.count, counted)):
                target += sign * torch.bincount(now, value, minlength=self.num_components)
            self.sums += sign * sums_by_label(samples, now, self.num_components, weights)

    def _look_closer(self, close: Tensor) -> tuple[Tensor, Tensor]:
        """Label and bound by comparison in float64.

        Shape:
            - close: `[M]`, samples
            - output: `[M]` twice
        """
        found = torch.empty(len(close), dtype=torch.long, device=self.z.device)
        gap = torch.empty(len(close), dtype=self.gap.dtype, device=self.z.device)
        squares = self.centers.square().sum(dim=1, keepdim=True)
        error = 2 * (self.z.shape[1] + 8) * torch.finfo(torch.float64).eps
        step = chunk_size(2 * self.num_components + width_of(self.z), self.z.device)
        for first in range(0, len(close), step):
            samples = self.z.index_select(0, close[first : first + step]).to(torch.float64)
            norms = squared_norms(samples)
            scores = products(-2 * self.centers, samples).add_(squares)
            label = scores.argmin(dim=0)
            found[first : first + step] = label
            bound = _gap(scores, label, norms, (norms + squares.amax()) * error).to(gap.dtype)
            # a tie is compared every time
            gap[first : first + step] = bound.nan_to_num_(nan=-torch.inf, posinf=torch.inf)
        return found, gap

    def _screened(self, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Label, and a lower bound on the distance to the second nearest center less that to the nearest: NaN where
        float32 does not tell the two apart.

        Shape:
            - index: `[M]`, all samples where None
            - output: `[M]` twice
        """
        count = self.z.shape[0] if index is None else index.shape[0]
        labels = torch.empty(count, dtype=torch.long, device=self.z.device)
        gap = torch.empty(count, dtype=self.z.dtype, device=self.z.device)
        squares = self.centers.square().sum(dim=1, keepdim=True)
        centers, constants = (-2 * self.centers).float(), squares.float()
        # rounding of the products, of their sum and of the samples themselves, and the bits that carry the label
        bits, single = (self.num_components - 1).bit_length(), torch.finfo(torch.float32)
        error = (2 * (self.z.shape[1] + 8) + 2**bits) * single.eps
        step = CHUNKS_AT_ONCE * chunk_size(2 * self.num_components + width_of(self.z), self.z.device)
        for first in range(0, count, step):
            part = slice(first, first + step)
            if index is None:
                screen, norms = self.screen[part], self.norms[part]
            else:
                # index_select: plain indexing is several times slower here
                screen, norms = self.screen.index_select(0, index[part]), self.norms.index_select(0, index[part])
            scores = products(centers, screen).add_(constants)
            # the label rides in the last bits: a reduction that returns indices takes one number at a time
            scores.view(torch.int32).bitwise_and_(-(2**bits)).bitwise_or_(self.names)
            nearest = scores.amin(dim=0)
            # a center out of float32's reach scores NaN, whose bits are no label: its samples are compared again
            label = nearest.view(torch.int32).bitwise_and(2**bits - 1).long().clamp_(max=self.num_components - 1)
            margin = norms.add(squares.amax().to(norms)).mul_(error).add_((self.z.shape[1] + 8) * single.tiny)
            labels[part], gap[part] = label, _gap(scores, label, norms, margin)
        return labels, gap


class _CompiledNearestCenters(_NearestCenters):
    """By compiled passes. What goes through all samples is among them: threads of torch that have just done something
    wait for more on the cores that the passes want.
    """

    def __init__(self, z: Rows, centers: Tensor, weights: Tensor | None, passes: Passes) -> None:
        self.passes = passes
        super().__init__(z, centers, weights)

    def inertia(self) -> float:
        return self.passes.inertia(self.labels, self.centers)

    def _candidates(self) -> Tensor:
        return self.passes.loosen(self.labels, self.moved, self.slack, self.gap)

    def _compare(self, index: Tensor | None, last: bool = False) -> int:
        members = None if last else self.members
        changed, largest = self.passes.nearest(index, self.centers, self.labels, self.gap, members)
        self.largest = largest if index is None else self.largest
        return changed

    def _add(self, index: Tensor, labels: Tensor, old: Tensor) -> None:
        self.passes.add(index, labels, old, self.members)
