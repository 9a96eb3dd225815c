"""Mixture of multivariate t distributions with known degrees of freedom (Peel & McLachlan, Stat. Comput. 10, 2000).

A family as users write it, in a file of their own: its mathematics, and nothing of streams, ranks or restarts.
"""

from dataclasses import dataclass
from functools import partial
from math import lgamma, log, pi
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_modules.mixtures import MixtureEstimator, MixtureModel, MixtureModule, MixtureParameters
from lightning_modules.mixtures.collectives import SufficientStatistics
from lightning_modules.mixtures.gaussian.density import GaussianComponents
from lightning_modules.mixtures.gaussian.em import (
    GaussianStatistics,
    check_positive_definite,
    m_step,
    num_free_parameters,
)


@dataclass
class StudentTStatistics(SufficientStatistics):
    """Sums of responsibilities r, of r times the latent scale u, and of r u z and r u z zᵀ."""

    SUMS = ("weight", "scaled", "first", "second", "log_likelihood", "count")
    weight: Tensor
    scaled: Tensor
    first: Tensor
    second: Tensor
    log_likelihood: Tensor
    count: Tensor


class StudentTMixtureModel(MixtureModel[MixtureParameters]):
    """EM in which u = (ν + D) / (ν + δ), with the squared Mahalanobis distance δ, takes outliers out of account."""

    def __init__(
        self,
        num_components: int,
        num_features: int | None = None,
        *,
        degrees_of_freedom: float = 4.0,
        covariance_type: Literal["full", "diag"] = "full",
        reg_covar: float = 1e-6,
        **options: Any,
    ) -> None:
        if not degrees_of_freedom > 0:
            raise ValueError(f"degrees_of_freedom must be above 0, got {degrees_of_freedom!r}")
        self.degrees_of_freedom, self.covariance_type, self.reg_covar = degrees_of_freedom, covariance_type, reg_covar
        self.make_parameters = partial(MixtureParameters, covariance_type)
        super().__init__(num_components, num_features, **options)

    def parameter_shapes(self, num_features: int) -> dict[str, tuple[int, ...]]:
        return MixtureParameters.shapes(self.covariance_type, self.num_components, num_features)

    def start(self, centers: Tensor) -> MixtureParameters:
        return MixtureParameters.at(centers, self.covariance_type)

    def prepare(self, theta: MixtureParameters) -> GaussianComponents:
        return theta.components(centered=True)

    def _joint(self, prepared: GaussianComponents, z: Tensor) -> tuple[Tensor, Tensor]:
        nu, d = self.degrees_of_freedom, z.shape[1]
        gaussian, constant = prepared.log_densities(z), prepared.log_constant[..., None]
        square = 2 * (constant - gaussian)
        normalizer = lgamma((nu + d) / 2) - lgamma(nu / 2) - d / 2 * log(nu * pi) + d / 2 * log(2 * pi)
        return constant + normalizer - (nu + d) / 2 * torch.log1p(square / nu), (nu + d) / (nu + square)

    def log_densities(self, prepared: GaussianComponents, z: Tensor) -> Tensor:
        return self._joint(prepared, z)[0]

    def e_step(
        self, prepared: GaussianComponents, z: Tensor, weight: Tensor | None = None, labels: Tensor | None = None
    ) -> StudentTStatistics:
        weight = z.new_ones(len(z)) if weight is None else weight
        joint, scale = self._joint(prepared, z)
        r = torch.softmax(joint, dim=1) if labels is None else one_hot(labels, self.num_components).mT.double()
        r = r * weight
        ru = r * scale
        second = torch.einsum("skn,nd,ne->skde", ru, z, z) if self.covariance_type == "full" else ru @ z.square()
        total, count = torch.logsumexp(joint, dim=1) @ weight, weight.sum()
        return StudentTStatistics(r.sum(dim=2), ru.sum(dim=2), ru @ z, second, total, count)

    def m_step(self, statistics: StudentTStatistics, previous: MixtureParameters | None = None) -> MixtureParameters:
        s, kind, unused = statistics, self.covariance_type, statistics.log_likelihood
        means = s.first / s.scaled.clamp(min=torch.finfo(torch.float64).tiny)[..., None]
        outer = s.first[..., :, None] * means[..., None, :] if kind == "full" else s.first * means
        zero, second = torch.zeros_like(means), s.second - outer  # moments about the new means
        moments = GaussianStatistics(kind, s.weight, zero, second, unused, unused, s.count, means, centered=False)
        return m_step(moments, self.standardized_variance(self.reg_covar), previous)

    def check_parameters(self, theta: MixtureParameters) -> None:
        check_positive_definite(theta, self.reg_covar)

    def inverse_transform(self, theta: MixtureParameters) -> MixtureParameters:
        return theta.inverse_transform(self.standardizer)

    def num_free_parameters(self) -> int:
        return num_free_parameters(self.covariance_type, self.num_components, self.num_features)


class StudentTMixture(MixtureModule):
    def __init__(self, num_components: int, **options: Any) -> None:
        super().__init__(StudentTMixtureModel(num_components, **options))


class StudentTMixtureEstimator(MixtureEstimator):
    model_class = StudentTMixtureModel

    def __init__(
        self, n_components: int = 1, *, degrees_of_freedom: float = 4.0, covariance_type: str = "full", **options: Any
    ) -> None:
        super().__init__(n_components, **options)
        self.degrees_of_freedom, self.covariance_type = degrees_of_freedom, covariance_type
