"""K-means that learns from epochs over a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_modules.mixtures.kmeans.em import KMeansStatistics, e_step, m_step
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
    #: samples that each center has seen (stepwise), [S, K]
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
        self.register_buffer("counts", torch.zeros(self.n_init, num_components, dtype=torch.float64))
        self._initial: Tensor | None = None
        if centers_init is not None:
            initial = torch.as_tensor(centers_init, dtype=torch.float64)
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

    def e_step(self, prepared: KMeansParameters, z: Tensor, mask: Tensor | None = None) -> KMeansStatistics:
        """Sums of the samples nearest to each center.

        Shape:
            - z: `[N, D]`
            - mask: `[N]`
        """
        return e_step(prepared.centers, z, mask)

    def m_step(self, statistics: KMeansStatistics, previous: KMeansParameters | None = None) -> KMeansParameters:
        """Centers to the means of their samples."""
        assert previous is not None
        return KMeansParameters(m_step(statistics, previous.centers))

    def stepwise_m_step(self, statistics: KMeansStatistics) -> KMeansParameters:
        """Mini-batch K-means (Sculley 2010): each center moves to the mean of all the samples it has been given."""
        self.counts += statistics.weight
        return KMeansParameters(self.centers + statistics.first / self.counts.clamp(min=1.0)[..., None])

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
