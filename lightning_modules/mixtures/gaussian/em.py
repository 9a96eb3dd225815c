"""EM of Gaussian mixtures as pure functions: parameters, sufficient statistics, E-step, M-step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lightning_modules.mixtures.collectives import EMPTY_COUNT, SufficientStatistics
from lightning_modules.mixtures.gaussian.density import (
    CovarianceType,
    GaussianComponents,
    ill_defined_message,
    precision_factors,
)
from lightning_modules.mixtures.standardizer import Standardizer

# Moments about the origin carry rounding of about 1e-16 of the data's variance; below this floor they hold no digit.
UNCENTERED_VARIANCE_FLOOR = 1e-12


@dataclass
class MixtureParameters:
    """Parameters of one mixture, or of S mixtures that are fitted side by side.

    Attributes:
        covariance_type: Which of the covariances are free.
        weights: `[(S,) K]`.
        means: `[(S,) K, D]`.
        covariances: `[(S,) K, D, D]` (full), `[(S,) K, D]` (diag), `[(S,) D, D]` (tied) or `[(S,) K]` (spherical).
    """

    covariance_type: CovarianceType
    weights: Tensor
    means: Tensor
    covariances: Tensor

    @staticmethod
    def shapes(covariance_type: CovarianceType, num_components: int, num_features: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of each parameter of one mixture."""
        k, d = num_components, num_features
        covariances = {"full": (k, d, d), "tied": (d, d), "diag": (k, d), "spherical": (k,)}[covariance_type]
        return {"weights": (k,), "means": (k, d), "covariances": covariances}

    @classmethod
    def at(cls, centers: Tensor, covariance_type: CovarianceType) -> MixtureParameters:
        """Equal weights and unit covariances at given centers.

        Shape:
            - centers: `[S, K, D]`
        """
        restarts, k, d = centers.shape
        shape = restarts, *cls.shapes(covariance_type, k, d)["covariances"]
        unit = torch.eye(d).to(centers) if covariance_type in ("full", "tied") else centers.new_ones(())
        return cls(covariance_type, centers.new_full((restarts, k), 1 / k), centers, unit.expand(shape))

    def batched(self) -> MixtureParameters:
        """The same in float64 and with a leading dimension of restarts."""
        parts: dict[str, Any] = {n: value.double() for n, value in vars(self).items() if isinstance(value, Tensor)}
        if self.means.ndim < 3:
            parts = {name: value[None] for name, value in parts.items()}
        return replace(self, **parts)

    def select(self, restart: int | Tensor) -> MixtureParameters:
        """One restart (an integer) or some of them.

        Shape:
            - restart: a mask `[S]` or indices, where a tensor
        """
        parts: dict[str, Any] = {n: value[restart] for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **parts)

    def components(self, centered: bool | None = None) -> GaussianComponents:
        """The densities, prepared for an epoch; `centered` forces or forbids the slower, exact form."""
        theta = self.batched()
        kind = theta.covariance_type
        return GaussianComponents.prepare(kind, theta.weights, theta.means, theta.covariances, centered)

    @property
    def precisions(self) -> Tensor:
        """Inverses of the covariances."""
        matrices = self.covariance_type in ("full", "tied")
        return torch.linalg.inv(self.covariances) if matrices else 1 / self.covariances

    @property
    def precisions_cholesky(self) -> Tensor:
        """Upper triangular factors whose product with their transpose is the precision; of diagonals the roots."""
        if self.covariance_type == "spherical":
            return self.covariances.rsqrt()
        return precision_factors(self.covariance_type, self.covariances, self.means.shape[-1])

    def inverse_transform(self, standardizer: Standardizer) -> MixtureParameters:
        """One mixture of standardized data, for the data."""
        kind, scale = self.covariance_type, standardizer.scale
        factor = {"diag": scale.square(), "spherical": scale.square().mean()}.get(kind, scale[:, None] * scale)
        means = standardizer.inverse_transform(self.means)
        return replace(self, weights=self.weights.clone(), means=means, covariances=self.covariances * factor)


@dataclass
class GaussianStatistics(SufficientStatistics):
    r"""What the E-step hands to the M-step, summed over samples :math:`n` with :math:`u_{nk} = z_n - c_k`:

    .. math:: N_k = \sum_n r_{nk}, \quad F_k = \sum_n r_{nk} u_{nk}, \quad S_k = \sum_n r_{nk} u_{nk} u_{nk}^\top

    Attributes:
        covariance_type: Which second moments are kept.
        weight: N, `[S, K]`.
        first: F, `[S, K, D]`.
        second: S, `[S, K, D, D]` (full), `[S, D, D]` (tied) or `[S, K, D]` (diag, spherical).
        log_likelihood: `[S]`.
        entropy: Of the responsibilities, `[S]`.
        count: Weight of the samples, `[]`.
        center: c, `[S, K, D]`, which comes from the parameters, is the same on every process, and is never summed.
        centered: Whether it is the means, or the origin.
    """

    SUMS: ClassVar[tuple[str, ...]] = ("weight", "first", "second", "log_likelihood", "entropy", "count")

    covariance_type: CovarianceType
    weight: Tensor
    first: Tensor
    second: Tensor
    log_likelihood: Tensor
    entropy: Tensor
    count: Tensor
    center: Tensor
    centered: bool

    @classmethod
    def zeros_for(cls, components: GaussianComponents) -> GaussianStatistics:
        """Empty statistics, about the center that `components` computes them about."""
        means = components.means
        restarts, num_components, num_features = means.shape
        kind = components.covariance_type
        second = (restarts, num_components, num_features)
        if kind in ("full", "tied"):
            second = (*second, num_features) if kind == "full" else (restarts, num_features, num_features)  # type: ignore[assignment]
        return cls(
            covariance_type=kind,
            weight=means.new_zeros(restarts, num_components),
            first=torch.zeros_like(means),
            second=means.new_zeros(second),
            log_likelihood=means.new_zeros(restarts),
            entropy=means.new_zeros(restarts),
            count=means.new_zeros(()),
            center=means.clone() if components.centered else torch.zeros_like(means),
            centered=components.centered,
        )

    def add_moments(self, weight: Tensor, first: Tensor, second: Tensor) -> None:
        """Add zeroth, first and second moments, in place.

        Shape:
            - weight: `[S, K]`
            - first: `[S, K, D]`
            - second: as the attribute
        """
        self.weight += weight
        self.first += first
        self.second += second

    @property
    def mass(self) -> Tensor:
        """What the moments were weighted with, summed.

        Shape:
            - output: `[S, K]`
        """
        return self.weight

    def about_origin(self) -> Self:
        """The same sums about the origin."""
        c, mass, first = self.center, self.mass, self.first + self.mass[..., None] * self.center
        if self.covariance_type in ("diag", "spherical"):
            second = self.second + 2 * c * self.first + mass[..., None] * c.square()
        else:
            cross = self.first[..., :, None] * c[..., None, :]
            shift = cross + cross.transpose(-1, -2) + mass[..., None, None] * c[..., :, None] * c[..., None, :]
            second = self.second + (shift.sum(dim=1) if self.covariance_type == "tied" else shift)
        return replace(self, first=first, second=second, center=torch.zeros_like(c), centered=False)


def e_step(components: GaussianComponents, z: Tensor, weight: Tensor | None = None) -> GaussianStatistics:
    r"""E-step: :math:`r_{nk} = \pi_k N(z_n; \mu_k, \Sigma_k) / \sum_j \pi_j N(z_n; \mu_j, \Sigma_j)`, kept as sums.

    Args:
        components: The densities of this epoch.
        z: Standardized samples, float64.
        weight: How often each of them counts; once where absent.

    Shape:
        - z: `[N, D]`
        - weight: `[N]`
    """
    statistics = GaussianStatistics.zeros_for(components)
    sums = e_step_in_chunks(statistics, components, lambda code: (components.log_joint(code), None), None, z, weight)
    statistics.add_moments(*components.read_moments(sums))
    return statistics


def e_step_in_chunks(
    statistics: GaussianStatistics,
    components: GaussianComponents,
    log_joint: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    scale: Callable[[Tensor, Tensor | None], Tensor] | None,
    z: Tensor,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Add likelihood, entropy and count of some samples to `statistics`, and return their moments.

    Args:
        statistics: What is added to, in place.
        components: Encodes samples and sums their moments.
        log_joint: Log joint densities of an encoded chunk `[S, K, N]`, and further numbers of each.
        scale: From responsibilities and those numbers to the shares in the moments; the former where absent.
        z: Standardized samples.
        weight: How often each of them counts; once where absent.
        labels: Components that take the place of the posterior.

    Shape:
        - z: `[N, D]`
        - weight: `[N]`
        - labels: `[S, N]`
        - output: as `GaussianComponents.new_moments` gives them
    """
    weights = None if weight is None else weight.to(z.dtype)
    names = torch.arange(components.means.shape[1], device=z.device)[None, :, None]
    sums, step = components.new_moments(), components.samples_per_chunk
    statistics.count += z.shape[0] if weights is None else weights.sum()
    for first in range(0, z.shape[0], step):
        code = components.encode(z[first : first + step])
        if labels is not None:
            responsibilities = (labels[:, None, first : first + step] == names).to(z.dtype)
            if weights is not None:
                responsibilities *= weights[first : first + step]
            components.add_moments(sums, responsibilities if scale is None else scale(responsibilities, None), code)
            continue
        joint, numbers = log_joint(code)
        peak = joint.amax(dim=1, keepdim=True)
        # exp in place of the shifted joint keeps one [S, K, N] array of the two that are needed in cache
        responsibilities = torch.sub(joint, peak).exp_()
        total = responsibilities.sum(dim=1, keepdim=True)
        responsibilities /= total
        log_norm = (peak + total.log())[:, 0]
        if weights is not None:
            chunk = weights[first : first + step]
            responsibilities *= chunk
            log_norm = log_norm * chunk
        log_likelihood = log_norm.sum(dim=1)
        statistics.log_likelihood += log_likelihood
        statistics.entropy += log_likelihood - (responsibilities.flatten(1) * joint.flatten(1)).sum(dim=1)
        components.add_moments(sums, responsibilities if scale is None else scale(responsibilities, numbers), code)
    return sums


def hard_statistics(
    covariance_type: CovarianceType, centers: Tensor, labels: Tensor, z: Tensor, weight: Tensor | None = None
) -> GaussianStatistics:
    """Statistics under a hard assignment: how a clustering becomes the start of a mixture.

    Shape:
        - centers: `[S, K, D]`
        - labels: `[S, N]`
        - z: `[N, D]`
        - weight: `[N]`
    """
    components = GaussianComponents.at(covariance_type, centers)
    statistics = GaussianStatistics.zeros_for(components)
    sums = e_step_in_chunks(
        statistics, components, lambda code: (components.log_joint(code), None), None, z, weight, labels
    )
    statistics.add_moments(*components.read_moments(sums))
    return statistics


def m_step(
    statistics: GaussianStatistics, reg_covar: Tensor, previous: MixtureParameters | None = None
) -> MixtureParameters:
    r"""M-step: :math:`\pi_k = N_k / N`, :math:`\mu_k = c_k + F_k / N_k`,
    :math:`\Sigma_k = S_k / N_k - \delta_k \delta_k^\top + \varepsilon I`.

    This is the maximum of the bound less :math:`\tfrac12 \varepsilon \sum_k N_k \operatorname{tr} \Sigma_k^{-1}`
    (of the bound for data smeared by :math:`N(0, \varepsilon I)`), which therefore never falls in an M-step. So the
    mean log-likelihood of a sample falls in an iteration by no more than
    :math:`\tfrac12 \varepsilon \sum_k \pi_k (\operatorname{tr} \Sigma_k^{-1} - \operatorname{tr} \Sigma_k'^{-1})`,
    with the new weights :math:`\pi` and the covariances before and after; and not at all without regularisation.
    Components without points keep their mean and covariance.

    Args:
        statistics: Sums over all samples and all processes.
        reg_covar: What is added to the variances of the standardized data.
        previous: The parameters that the statistics were taken under.

    Shape:
        - reg_covar: `[D]`
    """
    # a share of the samples, so that the scale of their weights does not matter
    floor = EMPTY_COUNT * statistics.weight.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    empty = statistics.weight <= floor
    count = torch.maximum(statistics.weight, floor)
    delta = torch.where(empty[..., None], 0.0, statistics.first / count[..., None])
    means = statistics.center + delta
    if previous is not None:
        means = torch.where(empty[..., None], previous.means, means)
    scatter = _scatter(statistics, count, delta)
    if not statistics.centered:
        reg_covar = reg_covar.clamp(min=UNCENTERED_VARIANCE_FLOOR)
    covariances = _regularised(statistics.covariance_type, scatter, reg_covar)
    if previous is not None and statistics.covariance_type != "tied":
        covariances = torch.where(_expand(empty, covariances), previous.covariances, covariances)
    elif statistics.covariance_type != "tied":
        pooled = (scatter * count.view(*count.shape, *[1] * (scatter.ndim - 2))).sum(dim=1, keepdim=True)
        pooled = pooled / count.sum(dim=1).view(-1, *[1] * (scatter.ndim - 1))
        spread = _regularised(statistics.covariance_type, pooled, reg_covar).expand_as(covariances)
        covariances = torch.where(_expand(empty, covariances), spread, covariances)
    return MixtureParameters(statistics.covariance_type, count / count.sum(dim=1, keepdim=True), means, covariances)


def _expand(flag: Tensor, like: Tensor) -> Tensor:
    return flag.view(*flag.shape, *[1] * (like.ndim - flag.ndim))


def _scatter(statistics: GaussianStatistics, count: Tensor, delta: Tensor) -> Tensor:
    """Maximum-likelihood covariances (diagonals for diag and spherical) about the new means, without regularisation."""
    if statistics.covariance_type in ("diag", "spherical"):
        return (statistics.second / count[..., None] - delta.square()).clamp(min=0.0)
    outer = delta[..., :, None] * delta[..., None, :]
    if statistics.covariance_type == "full":
        return statistics.second / count[..., None, None] - outer
    pooled = statistics.second - (count[..., None, None] * outer).sum(dim=1)
    return pooled / count.sum(dim=1)[:, None, None]


def _regularised(covariance_type: CovarianceType, scatter: Tensor, reg_covar: Tensor) -> Tensor:
    if covariance_type == "spherical":
        return scatter.mean(dim=-1) + reg_covar.mean()
    return scatter + (reg_covar if covariance_type == "diag" else torch.diag(reg_covar))


def check_positive_definite(parameters: MixtureParameters, reg_covar: float) -> None:
    """Raise the error that names components, `reg_covar` and remedies where a covariance is not positive definite."""
    covariances = parameters.batched().covariances
    if parameters.covariance_type == "spherical":
        bad = ~(covariances > 0)
    elif parameters.covariance_type == "diag":
        bad = ~(covariances > 0).all(dim=-1)
    else:
        bad = torch.linalg.cholesky_ex(covariances)[1] > 0
        bad |= ~torch.isfinite(covariances).all(dim=-1).all(dim=-1)
    if bool(bad.any()):
        raise ValueError(ill_defined_message(bad, reg_covar))


def expected_log_joint(statistics: GaussianStatistics, parameters: MixtureParameters) -> Tensor:
    r""":math:`\sum_n \sum_k r_{nk} \log \pi_k N(z_n; \mu_k, \Sigma_k)` in closed form from the statistics; plus their
    entropy it is the bound.

    Shape:
        - output: `[S]`
    """
    theta, kind = parameters.batched(), statistics.covariance_type
    components = theta.components(centered=True)
    moved = replace(statistics, center=statistics.center - theta.means).about_origin()
    if kind in ("diag", "spherical"):
        squares = (moved.second * components.factors.square()).sum(dim=(1, 2))
    else:
        precisions = components.factors @ components.factors.transpose(-1, -2)
        squares = (moved.second * precisions).flatten(1).sum(dim=1)
    return (statistics.weight * components.log_constant).sum(dim=1) - 0.5 * squares


def statistics_of(parameters: MixtureParameters, count: float = 1.0) -> GaussianStatistics:
    """Expected statistics of `count` samples drawn from the mixture itself: where stepwise EM's running mean begins."""
    theta = parameters.batched()
    kind, covariances = theta.covariance_type, theta.covariances
    weight = theta.weights * count
    if kind == "spherical":
        covariances = covariances[..., None].expand_as(theta.means)
    second = covariances * count if kind == "tied" else covariances * _expand(weight, covariances)
    zero = weight.new_zeros(weight.shape[0])
    first, total = torch.zeros_like(theta.means), weight.new_tensor(count)
    return GaussianStatistics(kind, weight, first, second, zero, zero.clone(), total, theta.means, True).about_origin()


def num_free_parameters(covariance_type: CovarianceType, num_components: int, num_features: int) -> int:
    """What BIC and AIC count."""
    covariances = {
        "full": num_components * num_features * (num_features + 1) // 2,
        "tied": num_features * (num_features + 1) // 2,
        "diag": num_components * num_features,
        "spherical": num_components,
    }[covariance_type]
    return covariances + num_components * num_features + num_components - 1


def log_joint(parameters: MixtureParameters, x: Tensor) -> Tensor:
    r""":math:`\log \pi_k + \log N(x_n; \mu_k, \Sigma_k)` of one mixture, by the exact form.

    Shape:
        - x: `[N, D]`
        - output: `[N, K]`
    """
    return parameters.components(centered=True).log_densities(x.double())[0].T
