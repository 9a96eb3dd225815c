"""Mixture of t distributions that learns from epochs over a stream."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_modules.mixtures.gaussian.em import MixtureParameters
from lightning_modules.mixtures.gaussian.model import GaussianMixtureModel
from lightning_modules.mixtures.student_t.em import (
    DEGREES_OF_FREEDOM,
    StudentTComponents,
    StudentTParameters,
    StudentTStatistics,
    e_step,
    expected_log_scale,
    m_step,
)

# Where degrees of freedom that are learned begin.
START = 10.0


class StudentTMixtureModel(GaussianMixtureModel):
    """The state of a mixture of t distributions; arguments as `lightning_modules.StudentTMixture` has them."""

    #: [S, K]
    degrees_of_freedom: Tensor

    def __init__(
        self,
        num_components: int,
        num_features: int | None = None,
        *,
        degrees_of_freedom: float | None = None,
        **options: Any,
    ) -> None:
        low, high = DEGREES_OF_FREEDOM
        if degrees_of_freedom is not None and not low <= degrees_of_freedom <= high:
            raise ValueError(
                f"degrees_of_freedom must be from {low:g} to {high:g}, or None to learn them; got "
                f"{degrees_of_freedom!r}"
            )
        self.known_degrees_of_freedom = degrees_of_freedom
        super().__init__(num_components, num_features, **options)
        self.make_parameters = partial(StudentTParameters, self.covariance_type)

    # --------------------------------------------------------------- EM

    def parameter_shapes(self, num_features: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of each parameter of one restart."""
        return super().parameter_shapes(num_features) | {"degrees_of_freedom": (self.num_components,)}

    def start(self, centers: Tensor) -> StudentTParameters:
        """Equal weights and unit scale matrices at given centers.

        Shape:
            - centers: `[S, K, D]`
        """
        theta = super().start(centers)
        known = self.known_degrees_of_freedom
        nu = torch.full_like(theta.weights, START if known is None else known)
        return StudentTParameters(**vars(theta), degrees_of_freedom=nu)

    def prepare(self, theta: MixtureParameters) -> Any:
        """The densities, factorised."""
        assert isinstance(theta, StudentTParameters)
        return StudentTComponents(super().prepare(theta), theta.degrees_of_freedom)

    def e_step(
        self, prepared: Any, z: Tensor, weight: Tensor | None = None, labels: Tensor | None = None
    ) -> StudentTStatistics:
        """Moments under the posterior, or under given labels.

        Shape:
            - z: `[N, D]`
            - weight: `[N]`
            - labels: `[S, N]`
        """
        return e_step(prepared, z, weight, labels)

    def m_step(self, statistics: Any, previous: Any = None) -> StudentTParameters:
        """Weights, places and scale matrices in closed form, degrees of freedom by an equation each."""
        known = self.known_degrees_of_freedom
        nu = None if known is None else torch.full_like(statistics.weight, known)
        return m_step(statistics, self.standardized_variance(self.reg_covar), previous, nu)

    def expected_statistics(self, theta: MixtureParameters) -> StudentTStatistics:
        """Statistics of one sample drawn from the mixtures."""
        assert isinstance(theta, StudentTParameters)
        base = super().expected_statistics(theta)
        scale = base.weight * expected_log_scale(theta.degrees_of_freedom)
        return StudentTStatistics(**vars(base), scaled=base.weight.clone(), log_scale=scale)

    def numbers(self, statistics: Any, theta: Any, restart: int) -> dict[str, float]:
        """Entropy of the responsibilities, mean of a sample, and the range of the degrees of freedom."""
        nu = theta.degrees_of_freedom[restart]
        entropy = float(statistics.entropy[restart] / statistics.count)
        return {"entropy": entropy, "smallest_nu": float(nu.min()), "largest_nu": float(nu.max())}

    def num_free_parameters(self) -> int:
        """Free parameters, as BIC and AIC count them."""
        learned = self.num_components if self.known_degrees_of_freedom is None else 0
        return super().num_free_parameters() + learned

    def known_start(self) -> MixtureParameters | None:
        """The mixture, where all of it is known."""
        theta = super().known_start()
        return theta and self.start(theta.means)

    def _spread(self, samples: Tensor, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        seed = int(torch.randint(2**62, (1,), generator=generator))
        half = self.degrees_of_freedom[self.best][labels] / 2
        u = np.random.default_rng(seed).standard_gamma(half.cpu().numpy())
        return samples * (half / torch.from_numpy(u).to(half)).sqrt()[:, None]
