"""EM of Gaussian mixtures as pure functions: parameters, sufficient statistics, E-step, M-step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_modules.mixtures.collectives import EMPTY_COUNT, SufficientStatistics
from lightning_modules.mixtures.gaussian.density import CovarianceType, GaussianComponents, ill_defined_message
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
        weights, means, covariances = self.weights.double(), self.means.double(), self.covariances.double()
        if means.ndim == 3:
            return MixtureParameters(self.covariance_type, weights, means, covariances)
        return MixtureParameters(self.covariance_type, weights[None], means[None], covariances[None])

    def select(self, restart: int | Tensor) -> MixtureParameters:
        """One restart (an integer) or some of them.

        Shape:
            - restart: a mask `[S]` or indices, where a tensor
        """
        parts = (self.weights[restart], self.means[restart], self.covariances[restart])
        return MixtureParameters(self.covariance_type, *parts)

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

    def inverse_transform(self, standardizer: Standardizer) -> MixtureParameters:
        """One mixture of standardized data, for the data."""
        kind, scale = self.covariance_type, standardizer.scale
        factor = {"diag": scale.square(), "spherical": scale.square().mean()}.get(kind, scale[:, None] * scale)
        means = standardizer.inverse_transform(self.means)
        return MixtureParameters(kind, self.weights.clone(), means, self.covariances * factor)


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
        count: Samples, `[]`.
        center: c, `[S, K, D]`, which comes from the parameters, is the same on every process, and is never summed.
        centered: Whether it is the means, or the origin.
    """

    SUMS = ("weight", "first", "second", "log_likelihood", "entropy", "count")

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

    def about_origin(self) -> GaussianStatistics:
        """The same sums about the origin."""
        c, first = self.center, self.first + self.weight[..., None] * self.center
        if self.covariance_type in ("diag", "spherical"):
            second = self.second + 2 * c * self.first + self.weight[..., None] * c.square()
        else:
            cross = self.first[..., :, None] * c[..., None, :]
            shift = cross + cross.transpose(-1, -2) + self.weight[..., None, None] * c[..., :, None] * c[..., None, :]
            second = self.second + (shift.sum(dim=1) if self.covariance_type == "tied" else shift)
        return replace(self, first=first, second=second, center=torch.zeros_like(c), centered=False)


def e_step(components: GaussianComponents, z: Tensor, mask: Tensor | None = None) -> GaussianStatistics:
    r"""E-step: :math:`r_{nk} = \pi_k N(z_n; \mu_k, \Sigma_k) / \sum_j \pi_j N(z_n; \mu_j, \Sigma_j)`, kept as sums.

    Args:
        components: The densities of this epoch.
        z: Standardized samples, float64.
        mask: Samples that count; all where absent.

    Shape:
        - z: `[N, D]`
        - mask: `[N]`
    """
    statistics = GaussianStatistics.zeros_for(components)
    weights = None if mask is None else mask.to(z.dtype)
    sums, step = components.new_moments(), components.samples_per_chunk
    for first in range(0, z.shape[0], step):
        code = components.encode(z[first : first + step])
        joint = components.log_joint(code)
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
        components.add_moments(sums, responsibilities, code)
        log_likelihood = log_norm.sum(dim=1)
        statistics.log_likelihood += log_likelihood
        statistics.entropy += log_likelihood - (responsibilities.flatten(1) * joint.flatten(1)).sum(dim=1)
    statistics.add_moments(*components.read_moments(sums))
    statistics.count += z.shape[0] if weights is None else weights.sum()
    return statistics


def hard_statistics(
    covariance_type: CovarianceType, centers: Tensor, labels: Tensor, z: Tensor, mask: Tensor | None = None
) -> GaussianStatistics:
    """Statistics under a hard assignment: how a clustering becomes the start of a mixture.

    Shape:
        - centers: `[S, K, D]`
        - labels: `[S, N]`
        - z: `[N, D]`
        - mask: `[N]`
    """
    num_components = centers.shape[1]
    components = GaussianComponents(
        covariance_type, centers, centers.new_empty(0), centers.new_empty(0), centered=True, coefficients=None
    )
    statistics = GaussianStatistics.zeros_for(components)
    sums, step = components.new_moments(), components.samples_per_chunk
    names = torch.arange(num_components, device=z.device)[None, :, None]
    for first in range(0, z.shape[0], step):
        one_hot = (labels[:, None, first : first + step] == names).to(z.dtype)
        if mask is not None:
            one_hot *= mask[first : first + step]
        components.add_moments(sums, one_hot, components.encode(z[first : first + step]))
    statistics.add_moments(*components.read_moments(sums))
    statistics.count += z.shape[0] if mask is None else mask.sum()
    return statistics


def m_step(
    statistics: GaussianStatistics, reg_covar: Tensor, previous: MixtureParameters | None = None
) -> MixtureParameters:
    r"""M-step: :math:`\pi_k = N_k / N`, :math:`\mu_k = c_k + F_k / N_k`,
    :math:`\Sigma_k = S_k / N_k - \delta_k \delta_k^\top + \varepsilon I`.

    The regularised covariance is not the maximum of the bound, so by itself it could lower the likelihood. Where it
    would lower the bound against the `previous` covariance, that one stays (a generalised M-step), and the
    likelihood never falls. Components without points keep their mean and covariance.

    Args:
        statistics: Sums over all samples and all processes.
        reg_covar: What is added to the variances of the standardized data.
        previous: The parameters that the statistics were taken under.

    Shape:
        - reg_covar: `[D]`
    """
    count = statistics.weight + EMPTY_COUNT
    empty = statistics.weight <= EMPTY_COUNT
    delta = torch.where(empty[..., None], 0.0, statistics.first / count[..., None])
    means = statistics.center + delta
    if previous is not None:
        means = torch.where(empty[..., None], previous.means, means)
    scatter = _scatter(statistics, count, delta)
    if not statistics.centered:
        reg_covar = reg_covar.clamp(min=UNCENTERED_VARIANCE_FLOOR)
    covariances = _regularised(statistics.covariance_type, scatter, reg_covar)
    if previous is not None:
        keep = _bound_would_fall(statistics.covariance_type, scatter, covariances, previous.covariances)
        keep = keep if statistics.covariance_type == "tied" else keep | empty
        covariances = torch.where(_expand(keep, covariances), previous.covariances, covariances)
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


def _bound_would_fall(covariance_type: CovarianceType, scatter: Tensor, new: Tensor, old: Tensor) -> Tensor:
    r"""Where :math:`\log\det\Sigma + \operatorname{tr}(\Sigma^{-1} S)` of the new covariance exceeds that of the old
    one.
    """
    if covariance_type == "spherical":
        trace, num_features = scatter.sum(dim=-1), scatter.shape[-1]
        return num_features * new.log() + trace / new > num_features * old.log() + trace / old
    if covariance_type == "diag":
        return (new.log() + scatter / new).sum(dim=-1) > (old.log() + scatter / old).sum(dim=-1)
    values = []
    for covariances in (new, old):
        factors, info = torch.linalg.cholesky_ex(covariances)
        trace = torch.cholesky_solve(scatter, factors).diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        value = 2 * factors.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1) + trace
        # a failed factorisation must reach the user as an error, not vanish as a kept covariance
        values.append(torch.where(info > 0, -torch.inf, value))
    return values[0] > values[1]


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
