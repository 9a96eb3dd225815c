"""K-means that learns from epochs over a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_modules.mixtures.batches import as_tensor
from lightning_modules.mixtures.kmeans.em import KMeansStatistics, e_step, m_step, mean_of, restart
from lightning_modules.mixtures.lloyd import assign
from lightning_modules.mixtures.model import ClusteringModel
from lightning_modules.mixtures.standardizer import Scaling


@dataclass
class KMeansParameters:
    """Centers `[(S,) K, D]`."""

    centers: Tensor


class KMeansModel(ClusteringModel[KMeansParameters]):
    """The state of K-means; arguments as `lightning_modules.KMeans` has them.

    Shape:
        - centers_init: `[K, D]`
    """

    # distances must stay distances: one scale for all features, unless they are to be standardized
    scaling: Scaling = "common"
    direction: float = -1.0
    chunks_itself = True
    make_parameters = KMeansParameters
    #: standardized, [S, K, D]
    centers: Tensor
    #: weight of the samples that each center has seen (stepwise), [S, K]
    counts: Tensor
    #: weight of the samples since centers were last reassigned (stepwise), [S]
    since_reassignment: Tensor

    def __init__(
        self,
        num_components: int,
        num_features: int | None = None,
        *,
        centers_init: Sequence[Any] | Tensor | None = None,
        tol: float = 1e-4,
        reassignment_ratio: float = 0.01,
        **options: Any,
    ) -> None:
        if not 0 <= reassignment_ratio <= 1:
            raise ValueError(f"reassignment_ratio must be from 0 to 1, got {reassignment_ratio!r}")
        super().__init__(num_components, num_features, tol=tol, **options)
        self.reassignment_ratio = reassignment_ratio
        self.register_buffer("counts", torch.zeros(self.n_init, num_components, dtype=torch.float64))
        self.register_buffer("since_reassignment", torch.zeros(self.n_init, dtype=torch.float64))
        self._initial: Tensor | None = None
        if centers_init is not None:
            initial = as_tensor(centers_init, dtype=torch.float64)
            width = num_features or initial.shape[-1]
            if initial.shape != (num_components, width):
                raise ValueError(
                    f"The shape of the initial centers {tuple(initial.shape)} does not match the number of clusters "
                    f"and features {(num_components, width)}."
                )
            if not bool(torch.isfinite(initial).all()):
                raise ValueError("centers_init must be finite")
            if self.n_init > 1:
                raise ValueError(f"n_init={self.n_init} restarts would all be the given centers_init: use n_init=1")
            self._initial = initial

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # of a version that did not reassign
        state_dict.setdefault(prefix + "since_reassignment", torch.zeros_like(self.since_reassignment))
        super()._load_from_state_dict(state_dict, prefix, *args)

    # --------------------------------------------------------------- EM

    def parameter_shapes(self, num_features: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of the centers of one restart."""
        return {"centers": (self.num_components, num_features)}

    def start(self, centers: Tensor) -> KMeansParameters:
        """The centers themselves.

        Shape:
            - centers: `[S, K, D]`
        """
        return KMeansParameters(centers)

    def e_step(self, prepared: KMeansParameters, z: Tensor, weight: Tensor | None = None) -> KMeansStatistics:
        """Sums of the samples nearest to each center.

        Shape:
            - z: `[N, D]`
            - weight: `[N]`
        """
        return e_step(prepared.centers, z, weight)

    def m_step(self, statistics: KMeansStatistics, previous: KMeansParameters | None = None) -> KMeansParameters:
        """Centers to the means of their samples."""
        assert previous is not None
        return KMeansParameters(m_step(statistics, previous.centers))

    def stepwise_m_step(self, statistics: KMeansStatistics) -> KMeansParameters:
        """Mini-batch K-means (Sculley 2010): each center moves to the mean of all the samples it has been given.

        Centers that have seen less than `reassignment_ratio` of what the largest has are reassigned to the samples of
        the batch that are farthest from all centers: scikit-learn's rule, which draws them.
        """
        self.counts += statistics.weight
        self.since_reassignment += statistics.count
        centers = self.centers + mean_of(statistics.first, self.counts)
        smallest, largest = self.counts.aminmax(dim=1)
        dead = self.counts < self.reassignment_ratio * largest[:, None]
        # no more often than the smallest can be expected to have been seen ten times
        due = (self.since_reassignment >= 10 * smallest) & dead.any(dim=1)
        moved = restart(centers, dead & due[:, None], statistics)
        reassigned = (moved != centers).any(dim=2)
        # from here on they count as much as the smallest of the others
        others = torch.where(dead, torch.inf, self.counts).amin(dim=1, keepdim=True)
        self.counts.copy_(torch.where(reassigned, others, self.counts))
        self.since_reassignment.copy_(torch.where(due, 0.0, self.since_reassignment))
        return KMeansParameters(moved)

    def objective_of(self, statistics: KMeansStatistics) -> Tensor:
        """Inertia, in squared units of the data.

        Shape:
            - output: `[S]`
        """
        return statistics.inertia * self._unit()

    def change(self, objective: Tensor) -> Tensor:
        """Squared movement of the centers in units of the mean variance of the features: scikit-learn's rule.

        Shape:
            - objective: `[S]`
            - output: `[S]`
        """
        return (self.centers[self._selected] - self._before.centers).square().sum(dim=(1, 2))

    def numbers(self, statistics: KMeansStatistics, theta: KMeansParameters, restart: int) -> dict[str, float]:
        """Squared movement of the centers."""
        return {"movement": float(self.change(statistics.inertia)[restart])}

    def inverse_transform(self, theta: KMeansParameters) -> KMeansParameters:
        """Centers in units of the data."""
        return KMeansParameters(self.standardizer.inverse_transform(theta.centers))

    def initial_centers(self) -> Tensor | None:
        """Known centers, standardized.

        Shape:
            - output: `[1, K, D]`
        """
        if self._initial is None:
            return None
        if self._initial.shape[1] != self.num_features:
            raise ValueError(
                f"The shape of the initial centers {tuple(self._initial.shape)} does not match the number of features "
                f"of the data {self.num_features}."
            )
        return self.standardizer.transform(self._initial.to(self.offset.device))[None]

    # --------------------------------------------------------- inference

    def _unit(self) -> Tensor:
        """Squared units of the data in one of the standardized data; with `standardize` there is none in common, and
        the latter are kept.
        """
        return torch.ones_like(self.scale[0]) if self.standardize else self.scale[0].square()

    @torch.no_grad()
    def assign(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest center of each sample under the best restart, and the squared distance to it.

        Shape:
            - x: `[N, D]`
            - output: `[N]` twice
        """
        self.require_initialized()
        labels, squares = assign(self.centers[self.best][None], self.standardizer.transform(self.check_samples(x)))
        return labels[0], squares[0] * self._unit()

    @torch.no_grad()
    def distances(self, x: Tensor) -> Tensor:
        """Distances to the centers of the best restart.

        Shape:
            - x: `[N, D]`
            - output: `[N, K]`
        """
        self.require_initialized()
        z = self.standardizer.transform(self.check_samples(x))
        return torch.cdist(z, self.centers[self.best]) * self._unit().sqrt()
