"""EM of mixtures of t distributions as pure functions: parameters, sufficient statistics, E-step, M-step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_modules.mixtures.gaussian.density import LOG_2PI, GaussianComponents
from lightning_modules.mixtures.gaussian.em import GaussianStatistics, MixtureParameters, e_step_in_chunks
from lightning_modules.mixtures.gaussian.em import m_step as gaussian_m_step

# Where degrees of freedom are looked for: below, a component has hardly a location; above, it is a Gaussian.
DEGREES_OF_FREEDOM = (0.1, 1e3)
# Halvings of that interval on the scale of logarithms: more than float64 has digits.
BISECTIONS = 60


@dataclass
class StudentTParameters(MixtureParameters):
    """Parameters of one mixture, or of S mixtures that are fitted side by side.

    `covariances` are the scale matrices; the covariance of a component is ν / (ν − 2) times its own.

    Attributes:
        degrees_of_freedom: ν, `[(S,) K]`.
    """

    degrees_of_freedom: Tensor


@dataclass
class StudentTStatistics(GaussianStatistics):
    r"""Those of the Gaussian with :math:`r_{nk} u_{nk}` in the place of :math:`r_{nk}` in the moments, where
    :math:`u_{nk}` is the expected precision of the sample in that component.

    Attributes:
        scaled: :math:`\sum_n r_{nk} u_{nk}`, `[S, K]`.
        log_scale: :math:`\sum_n r_{nk} (E \log u_{nk} - u_{nk})`, `[S, K]`.
    """

    SUMS = (*GaussianStatistics.SUMS, "scaled", "log_scale")

    scaled: Tensor
    log_scale: Tensor

    @property
    def mass(self) -> Tensor:
        """What the moments were weighted with, summed.

        Shape:
            - output: `[S, K]`
        """
        return self.scaled


@dataclass
class StudentTComponents:
    """S mixtures of K components, prepared for one pass over the data.

    Attributes:
        gaussian: Gaussians of the same places and scale matrices.
        degrees_of_freedom: `[S, K]`.
    """

    gaussian: GaussianComponents
    degrees_of_freedom: Tensor

    def log_joint(self, code: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`\log \pi_k t(z_n; \mu_k, \Sigma_k, \nu_k)`, and :math:`u_{nk} = (\nu_k + D) / (\nu_k + \delta_{nk})`
        with the squared Mahalanobis distance :math:`\delta`.

        Shape:
            - code: as the Gaussians encode samples
            - output: `[S, K, N]` twice
        """
        num_features = self.gaussian.means.shape[-1]
        nu, constant = self.degrees_of_freedom[..., None], self.gaussian.log_constant[..., None]
        square = (constant - self.gaussian.log_joint(code)).mul_(2.0).clamp_(min=0.0)
        half = (nu + num_features) / 2
        normalizer = torch.lgamma(half) - torch.lgamma(nu / 2) + num_features / 2 * (LOG_2PI - torch.log(nu * math.pi))
        return constant + normalizer - half * torch.log1p(square / nu), 2 * half / (nu + square)

    def log_densities(self, z: Tensor) -> Tensor:
        """`log_joint` of samples, however many.

        Shape:
            - z: `[N, D]`
            - output: `[S, K, N]`
        """
        parts = z.split(self.gaussian.samples_per_chunk)
        return torch.cat([self.log_joint(self.gaussian.encode(part))[0] for part in parts], dim=2)


def expected_log_scale(nu: Tensor) -> Tensor:
    r""":math:`E \log u - E u` of :math:`u \sim \Gamma(\nu/2, \nu/2)`.

    Shape:
        - nu: `[…]`
        - output: `[…]`
    """
    return torch.digamma(nu / 2) - torch.log(nu / 2) - 1


def e_step(
    components: StudentTComponents, z: Tensor, weight: Tensor | None = None, labels: Tensor | None = None
) -> StudentTStatistics:
    r"""E-step (Peel and McLachlan 2000, section 3): responsibilities :math:`r_{nk}` and expected precisions
    :math:`u_{nk}`, kept as sums. Given labels stand for responsibilities, with precisions of 1.

    Shape:
        - z: `[N, D]`
        - weight: `[N]`
        - labels: `[S, N]`
    """
    gaussian, nu = components.gaussian, components.degrees_of_freedom
    if labels is not None:
        gaussian = GaussianComponents.at(gaussian.covariance_type, gaussian.means)
    base = GaussianStatistics.zeros_for(gaussian)
    zero = torch.zeros_like(base.weight)
    statistics = StudentTStatistics(**vars(base), scaled=zero, log_scale=zero.clone())
    half = (nu + z.shape[1]) / 2
    # E log u = log u_nk + this
    correction = (torch.digamma(half) - half.log())[..., None]
    at_start = expected_log_scale(nu)[..., None]

    def scales(responsibilities: Tensor, u: Tensor | None) -> Tensor:
        log_scale = at_start if u is None else u.log() + correction - u
        statistics.weight.add_(responsibilities.sum(dim=2))
        statistics.log_scale.add_((responsibilities * log_scale).sum(dim=2))
        return responsibilities if u is None else responsibilities * u

    sums = e_step_in_chunks(statistics, gaussian, components.log_joint, scales, z, weight, labels)
    scaled, first, second = gaussian.read_moments(sums)
    statistics.scaled += scaled
    statistics.first += first
    statistics.second += second
    return statistics


def m_step(
    statistics: StudentTStatistics,
    reg_covar: Tensor,
    previous: StudentTParameters | None,
    degrees_of_freedom: Tensor | None,
) -> StudentTParameters:
    r"""M-step: :math:`\mu_k = c_k + F_k / \sum_n r u`, :math:`\Sigma_k = \sum_n r u (z - \mu_k)(z - \mu_k)^\top / N_k +
    \varepsilon I`, and :math:`\nu_k` where :math:`\log(\nu/2) - \psi(\nu/2) + 1 + \overline{E \log u - u} = 0`.

    Args:
        statistics: Sums over all samples and all processes.
        reg_covar: What is added to the variances of the standardized data.
        previous: The parameters that the statistics were taken under.
        degrees_of_freedom: Those that are known, `[S, K]`; None where they are learned.

    Shape:
        - reg_covar: `[D]`
    """
    mass = statistics.scaled.clamp(min=torch.finfo(torch.float64).tiny)
    delta = statistics.first / mass[..., None]
    if statistics.covariance_type in ("diag", "spherical"):
        second = statistics.second - mass[..., None] * delta.square()
    else:
        outer = mass[..., None, None] * delta[..., :, None] * delta[..., None, :]
        second = statistics.second - (outer.sum(dim=1) if statistics.covariance_type == "tied" else outer)
    # moments about the new means, which are divided by the responsibilities' sum
    about_means = GaussianStatistics(
        **{name: getattr(statistics, name) for name in vars(statistics) if name not in ("scaled", "log_scale")}
    )
    about_means = replace(about_means, first=torch.zeros_like(delta), second=second, center=statistics.center + delta)
    theta = gaussian_m_step(about_means, reg_covar, previous)
    if degrees_of_freedom is None:
        degrees_of_freedom = solve_degrees_of_freedom(statistics.log_scale / statistics.weight)
        if previous is not None:
            found = torch.isfinite(degrees_of_freedom)
            degrees_of_freedom = torch.where(found, degrees_of_freedom, previous.degrees_of_freedom)
    return StudentTParameters(**vars(theta), degrees_of_freedom=degrees_of_freedom)


def solve_degrees_of_freedom(mean_log_scale: Tensor) -> Tensor:
    r"""The :math:`\nu` with :math:`E \log u - E u` of :math:`\Gamma(\nu/2, \nu/2)` as given: the left side grows with
    :math:`\nu`, so halving an interval finds it. Bounds where there is none between; NaN stays.

    Shape:
        - mean_log_scale: `[…]`
        - output: `[…]`
    """
    low, high = (torch.full_like(mean_log_scale, math.log(bound)) for bound in DEGREES_OF_FREEDOM)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = expected_log_scale(middle.exp()) < mean_log_scale
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(mean_log_scale.isnan(), torch.nan, ((low + high) / 2).exp())
