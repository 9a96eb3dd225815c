"""K-means that learns from passes over a stream: state and flow around the pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.mixtures.collectives import Collectives
from lightning_modules.mixtures.initialization import Stream
from lightning_modules.mixtures.kmeans.em import KMeansStatistics, accumulate, assign, update
from lightning_modules.mixtures.model import ClusteringModel, PassReport
from lightning_modules.mixtures.standardizer import Scaling


class KMeansModel(ClusteringModel):
    """The state of K-means; arguments as :class:`lightning_modules.KMeans` has them."""

    # distances must stay distances: one scale for all features, unless they are to be standardised
    scaling: Scaling = "common"
    direction: float = -1.0
    #: in the frame, [S, K, D]
    centers: Tensor
    #: rows that each centre has seen (stepwise), [S, K]
    counts: Tensor

    def __init__(
        self,
        num_components: int,
        num_features: int | None = None,
        *,
        centers_init: Sequence[Any] | Tensor | None = None,
        tol: float = 1e-4,
        **options: Any,
    ) -> None:
        super().__init__(num_components, num_features, tol=tol, **options)
        self._given: Tensor | None = None
        if centers_init is not None:
            given = torch.as_tensor(centers_init, dtype=torch.float64)
            width = num_features or given.shape[-1]
            if given.shape != (num_components, width):
                raise ValueError(
                    f"The shape of the initial centers {tuple(given.shape)} does not match the number of clusters "
                    f"and features {(num_components, width)}."
                )
            if not bool(torch.isfinite(given).all()):
                raise ValueError("centers_init must be finite")
            if self.n_init > 1:
                raise ValueError(f"n_init={self.n_init} starts would all be the given centers_init: use n_init=1")
            self._given = given
        self._statistics: KMeansStatistics | None = None

    def _shapes(self, num_features: int) -> dict[str, tuple[tuple[int, ...], Tensor]]:
        zero = torch.tensor(0.0, dtype=torch.float64)
        return super()._shapes(num_features) | {
            "centers": ((self.n_init, self.num_components, num_features), zero),
            "counts": ((self.n_init, self.num_components), zero),
        }

    def reported(self) -> Tensor:
        """Centres of the best start in units of the data, ``[K, D]``."""
        self.require_initialized()
        return self.frame.leave(self.centers[self.best])

    def _start_without_data(self) -> bool:
        return False

    def _given_centers(self) -> Tensor | None:
        if self._given is None:
            return None
        if self._given.shape[1] != self.num_features:
            raise ValueError(
                f"The shape of the initial centers {tuple(self._given.shape)} does not match the number of features "
                f"of the data {self.num_features}."
            )
        return self.frame.enter(self._given.to(self.offset.device))[None]

    def _start_from(self, centers: Tensor, rows: Tensor | None, stream: Stream, collectives: Collectives) -> None:
        self.centers.copy_(centers)

    @torch.no_grad()
    def begin_pass(self) -> None:
        """Forget the sums; the starts that still move take part."""
        self._active = self._active_starts()
        self._tally = self.centers.new_zeros(int(self._active.sum()) + 1)
        self._first = self.centers.clone()
        self._prepare()

    def _prepare(self) -> None:
        self._current = self.centers[self._active]
        self._statistics = KMeansStatistics.zeros_for(self._current)
        self._invalid = self.centers.new_zeros(())

    @torch.no_grad()
    def accumulate(self, x: Tensor, mask: Tensor | None = None) -> None:
        """E-step: assign the rows of ``x`` ``[N, D]`` and add their sums."""
        for z, part in self._blocks(x, mask):
            accumulate(self._current, z, part, into=self._statistics)

    def _reduced(self, collectives: Collectives | None) -> KMeansStatistics:
        """The sums over all processes, and the farthest rows of all, by one reduction in which each process has its
        own slot.
        """
        collectives = collectives or Collectives()
        statistics, invalid = self._statistics, self._invalid
        assert statistics is not None
        assert invalid is not None
        far = torch.cat([statistics.far_rows, statistics.far_squares[..., None]], dim=2)
        slots = far.new_zeros(collectives.world, far.numel())
        slots[collectives.rank] = far.flatten()
        flat = statistics.flat()
        flat = collectives.reduce(torch.cat([invalid.view(1), flat, slots.flatten()]))
        if int(flat[0]):
            self._check_count(self.num_components, int(flat[0]))
        size = flat.numel() - slots.numel()
        total = statistics.with_flat(flat[1:size])
        if not bool(total.count > 0):
            raise ValueError("Found array with 0 sample(s) while a minimum of 1 is required: the data is empty.")
        slots = flat[size:].view(collectives.world, *far.shape)
        merged = KMeansStatistics.zeros_for(self._current)
        for part in slots:
            merged.keep_farthest(part[..., :-1], part[..., -1])
        total.far_rows, total.far_squares = merged.far_rows, merged.far_squares
        return total

    @torch.no_grad()
    def end_step(self, collectives: Collectives | None = None) -> None:
        """Mini-batch K-means (Sculley 2010): each centre moves to the mean of all the rows it has been given so far."""
        statistics = self._reduced(collectives)
        self._tally += torch.cat([statistics.inertia, statistics.count[None]])
        self.counts[self._active] += statistics.weight
        rate = statistics.first / self.counts[self._active].clamp(min=1.0)[..., None]
        self.centers[self._active] = self._current + rate
        self._prepare()

    @torch.no_grad()
    def end_pass(self, collectives: Collectives | None = None) -> PassReport:
        """M-step, after one reduction over the processes."""
        if self.algorithm == "stepwise":
            inertia, count = self._tally[:-1], int(self._tally[-1])
            empty = (self.counts[self._active] == 0).any(dim=0).nonzero()[:, 0].tolist()
        else:
            statistics = self._reduced(collectives)
            inertia, count = statistics.inertia, int(statistics.count)
            self._check_count(count, 0)
            empty = (statistics.weight == 0).any(dim=0).nonzero()[:, 0].tolist()
            self.centers[self._active] = update(statistics, self._current)
        # scikit-learn's rule: the centres' movement in units of the mean variance of the features
        change = (self.centers - self._first)[self._active].square().sum(dim=(1, 2))
        converged, moved = self._settle(inertia * self._unit(), change, count, self._active)
        numbers = {"movement": float(change.max())}
        best = float(self.objective[self.best])
        return PassReport(int(self.iterations.max()), best, moved, converged, count, numbers, empty)

    def _unit(self) -> Tensor:
        """Squared units of the data in one of the frame; standardised features have no common unit, and keep the
        frame's.
        """
        return torch.ones_like(self.scale[0]) if self.standardize else self.scale[0].square()

    @torch.no_grad()
    def assign(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Labels ``[N]`` and squared distances ``[N]`` of rows ``x`` ``[N, D]`` under the best start."""
        self.require_initialized()
        labels, squares = assign(self.centers[self.best][None], self.frame.enter(self.check_rows(x)))
        return labels[0], squares[0] * self._unit()

    @torch.no_grad()
    def distances(self, x: Tensor) -> Tensor:
        """Distances ``[N, K]`` to the centres."""
        self.require_initialized()
        return torch.cdist(self.frame.enter(self.check_rows(x)), self.centers[self.best]) * self._unit().sqrt()
