"""Gaussian mixture that learns from epochs over a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_modules.mixtures.batches import as_tensor
from lightning_modules.mixtures.gaussian.density import CovarianceType, GaussianComponents
from lightning_modules.mixtures.gaussian.em import (
    GaussianStatistics,
    MixtureParameters,
    check_positive_definite,
    e_step,
    expected_log_joint,
    hard_statistics,
    m_step,
    num_free_parameters,
    statistics_of,
)
from lightning_modules.mixtures.model import MixtureModel
from lightning_modules.mixtures.standardizer import Standardizer


class GaussianMixtureModel(MixtureModel[MixtureParameters]):
    """The state of a Gaussian mixture; arguments as `lightning_modules.GaussianMixture` has them.

    Shape:
        - weights_init: `[K]`
        - means_init: `[K, D]`
        - precisions_init: that of the covariance type, `[K, D, D]` for `full`
    """

    chunks_itself = True
    #: [S, K]
    weights: Tensor
    #: standardized, [S, K, D]
    means: Tensor
    #: standardized; the shape is that of the covariance type, after S
    covariances: Tensor

    def __init__(
        self,
        num_components: int,
        num_features: int | None = None,
        *,
        covariance_type: CovarianceType = "full",
        reg_covar: float = 1e-6,
        weights_init: Sequence[Any] | Tensor | None = None,
        means_init: Sequence[Any] | Tensor | None = None,
        precisions_init: Sequence[Any] | Tensor | None = None,
        **options: Any,
    ) -> None:
        if covariance_type not in ("full", "diag", "tied", "spherical"):
            raise ValueError(f"covariance_type must be 'full', 'diag', 'tied' or 'spherical', got {covariance_type!r}")
        if not reg_covar >= 0:
            raise ValueError(f"reg_covar must be at least 0, got {reg_covar!r}")
        self.covariance_type, self.reg_covar = covariance_type, reg_covar
        self.make_parameters = partial(MixtureParameters, covariance_type)
        super().__init__(num_components, num_features, **options)
        if not self.standardize and covariance_type == "spherical":
            self.scaling = "common"
        self._initial = self._check_initial(weights_init, means_init, precisions_init, num_features)

    # --------------------------------------------------------------- EM

    def parameter_shapes(self, num_features: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of each parameter of one restart."""
        return MixtureParameters.shapes(self.covariance_type, self.num_components, num_features)

    def start(self, centers: Tensor) -> MixtureParameters:
        """Equal weights and unit covariances at given centers.

        Shape:
            - centers: `[S, K, D]`
        """
        return MixtureParameters.at(centers, self.covariance_type)

    def prepare(self, theta: MixtureParameters) -> GaussianComponents:
        """The densities, factorised."""
        return theta.components()

    def e_step(
        self, prepared: GaussianComponents, z: Tensor, weight: Tensor | None = None, labels: Tensor | None = None
    ) -> GaussianStatistics:
        """Moments under the posterior, or under given labels.

        Shape:
            - z: `[N, D]`
            - weight: `[N]`
            - labels: `[S, N]`
        """
        if labels is not None:
            return hard_statistics(self.covariance_type, prepared.means, labels, z, weight)
        return e_step(prepared, z, weight)

    def m_step(self, statistics: GaussianStatistics, previous: MixtureParameters | None = None) -> MixtureParameters:
        """Weights, means and covariances in closed form."""
        return m_step(statistics, self.standardized_variance(self.reg_covar), previous)

    def log_densities(self, prepared: GaussianComponents, z: Tensor) -> Tensor:
        r""":math:`\log \pi_k N(z_n; \mu_k, \Sigma_k)`.

        Shape:
            - z: `[N, D]`, standardized
            - output: `[S, K, N]`
        """
        return prepared.log_densities(z)

    def expected_statistics(self, theta: MixtureParameters) -> GaussianStatistics:
        """Statistics of one sample drawn from the mixtures."""
        return statistics_of(theta)

    def inverse_transform(self, theta: MixtureParameters) -> MixtureParameters:
        """One mixture in units of the data.

        A spherical mixture of standardized features is diagonal there, and is reported as such.
        """
        if self.covariance_type == "spherical" and self.standardize:
            wide = theta.covariances[:, None].expand_as(theta.means)
            theta = replace(theta, covariance_type="diag", covariances=wide)
        return theta.inverse_transform(self.standardizer)

    def check_parameters(self, theta: MixtureParameters) -> None:
        """Raise where a covariance is not positive definite."""
        check_positive_definite(theta, self.reg_covar)

    def numbers(self, statistics: GaussianStatistics, theta: MixtureParameters, restart: int) -> dict[str, float]:
        """Entropy of the responsibilities and, where the M-step was exact, the bound after it; means of a sample."""
        count = float(statistics.count)
        numbers = {"entropy": float(statistics.entropy[restart]) / count}
        if self.algorithm == "exact":
            bound = expected_log_joint(statistics, theta)[restart] + statistics.entropy[restart]
            numbers["bound"] = float(bound / count - self.standardizer.log_volume)
        return numbers

    def num_free_parameters(self) -> int:
        """Free parameters, as BIC and AIC count them."""
        return num_free_parameters(self.covariance_type, self.num_components, self.num_features)

    # ----------------------------------------------------- known parameters

    def _check_initial(self, weights: Any, means: Any, precisions: Any, num_features: int | None) -> dict[str, Tensor]:
        initial = {}
        for name, value in (("weights", weights), ("means", means), ("precisions", precisions)):
            if value is not None:
                initial[name] = as_tensor(value, dtype=torch.float64)
                if not bool(torch.isfinite(initial[name]).all()):
                    raise ValueError(f"{name}_init must be finite")
        width = num_features or next((initial[n].shape[-1] for n in ("means", "precisions") if n in initial), 0)
        shapes = self.parameter_shapes(width)
        shapes["precisions"] = shapes["covariances"]
        for name, value in initial.items():
            if value.shape != shapes[name]:
                raise ValueError(
                    f"The parameter '{name}_init' should have the shape of {shapes[name]}, but got {tuple(value.shape)}"
                )
        given = initial.get("weights")
        if given is not None and (bool((given < 0).any()) or abs(float(given.sum()) - 1) > 1e-6):
            raise ValueError(f"weights_init must be non-negative and sum to 1, got sum {float(given.sum()):.6g}")
        if "precisions" in initial:
            self._check_precisions(initial["precisions"])
        if "means" in initial and self.n_init > 1:
            raise ValueError(f"n_init={self.n_init} restarts would all be the given means_init: use n_init=1")
        return initial

    def _check_precisions(self, precisions: Tensor) -> None:
        if self.covariance_type in ("diag", "spherical"):
            good = bool((precisions > 0).all())
        else:
            good = bool((precisions - precisions.mT).abs().max() <= 1e-8 * precisions.abs().max())
            good = good and bool((torch.linalg.cholesky_ex(precisions)[1] == 0).all())
        if not good:
            raise ValueError(
                f"precisions_init should be symmetric, positive-definite for covariance_type={self.covariance_type!r}"
            )

    def _initial_covariances(self) -> Tensor:
        precisions = self._initial["precisions"].to(self.offset.device)
        return torch.linalg.inv(precisions) if self.covariance_type in ("full", "tied") else 1 / precisions

    def known_start(self) -> MixtureParameters | None:
        """The mixture, where all of it is known."""
        if len(self._initial) < 3 or self.standardize:
            return None
        weights, means = (self._initial[name].to(self.offset.device) for name in ("weights", "means"))
        self._allocate(means.shape[1])
        covariances = self._initial_covariances()
        within = {  # type: ignore[no-untyped-call]
            "full": lambda: weights @ covariances.diagonal(dim1=-2, dim2=-1),
            "tied": covariances.diagonal,
            "diag": lambda: weights @ covariances,
            "spherical": lambda: (weights @ covariances).expand(means.shape[1]),
        }[self.covariance_type]()
        offset = weights @ means
        scale = (within + weights @ (means - offset).square()).sqrt()
        scale = scale.square().mean().sqrt().expand_as(scale) if self.scaling == "common" else scale
        self._set_standardizer(Standardizer(offset, scale))
        return self.current_parameters()

    def initial_centers(self) -> Tensor | None:
        """Known means, standardized.

        Shape:
            - output: `[1, K, D]`
        """
        means = self._initial.get("means")
        return None if means is None else self.standardizer.transform(means.to(self.offset.device))[None]

    def with_initial(self, theta: MixtureParameters) -> MixtureParameters:
        """The start, with the parameters that are known in place of those that were found."""
        if "weights" in self._initial:
            theta = replace(theta, weights=self._initial["weights"].to(theta.weights).expand_as(theta.weights))
        means = self.initial_centers()
        if means is not None:
            theta = replace(theta, means=means.expand_as(theta.means))
        if "precisions" in self._initial:
            scale = self.scale
            factor = {"diag": scale.square(), "spherical": scale.square().mean()}
            covariances = self._initial_covariances() / factor.get(self.covariance_type, scale[:, None] * scale)
            theta = replace(theta, covariances=covariances.expand_as(theta.covariances))
        return theta

    # ------------------------------------------------------------ sampling

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Samples drawn from the mixture, in units of the data, and the components they came from.

        Shape:
            - output: `[count, D]` and `[count]`
        """
        self.require_initialized()
        if count < 1:
            raise ValueError(f"Invalid value for 'n_samples': {count}. The sampling requires at least one sample.")
        theta, device = self.current_parameters(int(self.best)), self.offset.device
        labels = torch.multinomial(theta.weights.cpu(), count, replacement=True, generator=generator).sort().values
        labels = labels.to(device)
        noise = torch.randn(count, self.num_features, generator=generator, dtype=torch.float64).to(device)
        covariances = theta.covariances
        if self.covariance_type == "full":
            samples = torch.zeros_like(noise)
            for k, factor in enumerate(torch.linalg.cholesky(covariances)):
                samples[labels == k] = noise[labels == k] @ factor.T
        elif self.covariance_type == "tied":
            samples = noise @ torch.linalg.cholesky(covariances).T
        else:
            deviations = covariances.sqrt()
            samples = noise * (deviations[labels] if self.covariance_type == "diag" else deviations[labels, None])
        samples = self._spread(samples, labels, generator)
        return self.standardizer.inverse_transform(samples + theta.means[labels]), labels

    def _spread(self, samples: Tensor, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        """What makes samples of another family of those of a Gaussian about 0."""
        return samples
