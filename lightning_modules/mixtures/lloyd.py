"""Nearest centers, and Lloyd's algorithm in memory: exact, and compared again only where a label may change."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.mixtures.chunks import chunk_size

# Each of the few dozen small calls on a chunk costs some microseconds: chunks are longer than a cache would like.
CHUNKS_AT_ONCE = 8


def assign(centers: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    r"""Nearest center of each sample, :math:`\arg\min_k \|z_n - c_k\|^2`, and that squared distance.

    Shape:
        - centers: `[S, K, D]`
        - z: `[N, D]`
        - output: `[S, N]` twice
    """
    restarts, num_components, _ = centers.shape
    labels = torch.empty(restarts, z.shape[0], dtype=torch.long, device=z.device)
    squares = z.new_empty(restarts, z.shape[0])
    step = chunk_size(restarts * num_components + z.shape[1], z.device)
    for first in range(0, z.shape[0], step):
        chunk = z[first : first + step]
        label = _scores(centers, chunk).min(dim=1).indices
        labels[:, first : first + step] = label
        for restart in range(restarts):
            squares[restart, first : first + step] = (chunk - centers[restart, label[restart]]).square_().sum(dim=1)
    return labels, squares


def _scores(centers: Tensor, z: Tensor) -> Tensor:
    """Squared distances `[S, K, N]` up to a term of the sample only."""
    flat = centers.flatten(0, 1)
    scores = torch.addmm(flat.square().sum(dim=1, keepdim=True), flat, z.T, alpha=-2.0)
    return scores.view(centers.shape[0], centers.shape[1], -1)


@dataclass
class LloydResult:
    """What Lloyd's algorithm came to.

    Attributes:
        centers: `[K, D]`.
        labels: `[N]`.
        inertia: Sum of squared distances.
        n_iter: Iterations taken.
        converged: Whether the labels (or, within `tol`, the centers) no longer changed.
    """

    centers: Tensor
    labels: Tensor
    inertia: float
    n_iter: int
    converged: bool


def lloyd(z: Tensor, centers: Tensor, max_iter: int = 300, tol: float = 0.0) -> LloydResult:
    r"""Lloyd's algorithm, with the idea of Hamerly ("Making k-means even faster", SDM 2010): samples that cannot
    change their center are not compared.

    Each sample keeps a lower bound on how much farther any other center is than its own; sums change only by the
    samples that moved. The result is that of the plain algorithm.

    Args:
        z: Samples.
        centers: Where to start.
        max_iter: Iterations at most.
        tol: Stop when the centers' squared movement, summed, is at most this.

    Shape:
        - z: `[N, D]`
        - centers: `[K, D]`
    """
    unit = _unit(z)
    z, tol = z / unit if unit != 1 else z, tol / unit**2
    search = _NearestCenters(z, centers / unit)
    converged, n_iter = False, 0
    for n_iter in range(1, max_iter + 1):
        changed = search.assign() if n_iter > 1 else -1
        if changed == 0 or float(search.move().square().sum()) <= tol:
            converged = True
            break
    labels, squares = assign(search.centers[None], z)
    inertia = float(squares.sum(dtype=torch.float64)) * unit**2
    return LloydResult(search.centers * unit, labels[0], inertia, n_iter, converged)


def _unit(z: Tensor) -> float:
    """A power of two (division by it is exact) that brings samples far from 1 within float32's reach; 1 for others."""
    largest = max(-float(z.min()), float(z.max())) if z.numel() else 1.0  # |z| would be a copy of all the data
    if largest == 0 or 1e-3 < largest < 1e3:
        return 1.0
    return 2.0 ** round(math.log2(largest))


class _NearestCenters:
    """Samples, centers, the nearest center of each sample, and by how much it is the nearest.

    Samples are compared in float32, which for float64 is twice as fast, with a bound on the error: where the two
    nearest centers are closer than that, the sample is compared again in its own precision. So the labels are those of
    the plain algorithm.
    """

    def __init__(self, z: Tensor, centers: Tensor) -> None:
        self.z, self.centers = z, centers.clone()
        self.num_components = centers.shape[0]
        # the column of ones takes the centers' squared norms into the product
        self.screen = torch.cat([z.float(), z.new_ones(z.shape[0], 1, dtype=torch.float32)], dim=1)
        self.norms = torch.linalg.vector_norm(z, dim=1).square_()
        largest = float(self.norms.amax()) if z.numel() else 0.0
        self.slack = 8 * torch.finfo(z.dtype).eps * (z.shape[1] * largest) ** 0.5
        self.names = torch.arange(self.num_components, dtype=torch.int32, device=z.device)[:, None]
        self.labels, self.gap = self._nearest(None)
        self.weight = torch.bincount(self.labels, minlength=self.num_components).double()
        self.sums = torch.zeros(self.num_components, z.shape[1], dtype=torch.float64, device=z.device)
        self._add(z, self.labels)

    def _add(self, samples: Tensor, labels: Tensor, old: Tensor | None = None) -> None:
        """Add samples to the sums of their centers, and take them from their old ones'."""
        step = chunk_size(self.num_components + samples.shape[1], samples.device)
        for first in range(0, samples.shape[0], step):
            part = slice(first, first + step)
            share = (labels[part] == self.names).to(samples.dtype)
            if old is not None:
                share -= (old[part] == self.names).to(samples.dtype)
            self.sums += (share @ samples[part]).double()

    def _nearest(self, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Label, and a lower bound on the distance to the second nearest center less that to the nearest.

        Shape:
            - index: `[M]`, all samples where None
            - output: `[M]` twice
        """
        count = self.z.shape[0] if index is None else index.shape[0]
        labels = torch.empty(count, dtype=torch.long, device=self.z.device)
        gap = self.z.new_empty(count)
        squares = self.centers.square().sum(dim=1, keepdim=True)
        centers = torch.cat([-2 * self.centers, squares], dim=1).float()
        # rounding of the products, of their sum and of the samples themselves, and the bits that carry the label
        bits = (self.num_components - 1).bit_length()
        error = (2 * (self.z.shape[1] + 8) + 2**bits) * torch.finfo(torch.float32).eps
        step = CHUNKS_AT_ONCE * chunk_size(2 * self.num_components + self.z.shape[1], self.z.device)
        for first in range(0, count, step):
            part = slice(first, first + step)
            if index is None:
                screen, norms = self.screen[part], self.norms[part]
            else:
                # index_select: plain indexing is several times slower here
                screen, norms = self.screen.index_select(0, index[part]), self.norms.index_select(0, index[part])
            scores = centers @ screen.T
            # the label rides in the last bits: a reduction that returns indices takes one number at a time
            scores.view(torch.int32).bitwise_and_(-(2**bits)).bitwise_or_(self.names)
            nearest = scores.amin(dim=0)
            # a center out of float32's reach scores NaN, whose bits are no label: its samples are compared again below
            label = nearest.view(torch.int32).bitwise_and(2**bits - 1).long().clamp_(max=self.num_components - 1)
            second = scores.scatter_(0, label[None], torch.inf).amin(dim=0).to(self.z)
            nearest = nearest.to(self.z)
            margin = norms.add(squares.amax()).mul_(error)
            close = (~(second - nearest > 2 * margin)).nonzero()[:, 0]
            if len(close):
                samples = self.z.index_select(0, close + first if index is None else index[part][close])
                exact = torch.addmm(squares, self.centers, samples.T, alpha=-2.0)
                nearest[close], label[close] = exact.min(dim=0)
                second[close] = exact.scatter_(0, label[close][None], torch.inf).amin(dim=0)
            labels[part] = label
            upper = nearest.add_(norms).add_(margin).clamp_(min=0.0).sqrt_()
            gap[part] = second.add_(norms).sub_(margin).clamp_(min=0.0).sqrt_().sub_(upper)
        return labels, gap

    def assign(self) -> int:
        """Reassign the samples whose bound allows a change; how many changed."""
        index = (self.gap <= self.slack).nonzero()[:, 0]
        if not len(index):
            return 0
        if 2 * len(index) > len(self.z):
            # to copy most of the samples costs more than to compare them all
            old = self.labels
            self.labels, self.gap = self._nearest(None)
            index = (self.labels != old).nonzero()[:, 0]
            old, labels = old[index], self.labels[index]
        else:
            old = self.labels.index_select(0, index)
            labels, gap = self._nearest(index)
            self.gap.index_copy_(0, index, gap)
            moved = (labels != old).nonzero()[:, 0]
            index, old, labels = index[moved], old[moved], labels[moved]
            self.labels[index] = labels
        self._add(self.z.index_select(0, index), labels, old)
        self.weight += torch.bincount(labels, minlength=self.num_components)
        self.weight -= torch.bincount(old, minlength=self.num_components)
        return len(index)

    def move(self) -> Tensor:
        """Centers to the means of their samples; how far each moved, `[K]`."""
        empty = self.weight == 0
        target = (self.sums / self.weight.clamp(min=1.0)[:, None]).to(self.z.dtype)
        target[empty] = self.centers[empty]
        if bool(empty.any()):
            self._restart_empty(target, empty)
        distance = (target - self.centers).square().sum(dim=1).sqrt()
        self.centers = target
        # a sample's own center may have moved away, and the fastest of the others towards it
        fastest = distance.topk(min(2, self.num_components))
        others = torch.full_like(distance, float(fastest.values[0]))
        others[fastest.indices[0]] = fastest.values[-1]
        self.gap -= (distance + others).index_select(0, self.labels)
        return distance

    def _restart_empty(self, target: Tensor, empty: Tensor) -> None:
        squares = (self.z - self.centers[self.labels]).square().sum(dim=1)
        far = squares.topk(min(int(empty.sum()), self.z.shape[0])).indices
        far = far[squares[far] > 0]
        where = empty.nonzero()[: len(far), 0]
        target[where] = self.z[far]
