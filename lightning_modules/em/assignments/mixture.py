"""Rows by regime: an unobserved latent variable, learned by expectation-maximisation."""

import math

import torch
from torch import Tensor

from lightning_modules.em.assignments.assignment import Assignment
from lightning_modules.em.image_features import ImageFeature, ImageFeatures, NoiseLevel
from lightning_modules.mixtures.gaussian.density import GaussianComponents
from lightning_modules.mixtures.gaussian.em import (
    GaussianStatistics,
    MixtureParameters,
    m_step,
    statistics_of,
)
from lightning_modules.mixtures.standardizer import CONSTANT_FEATURE_ULPS, Standardizer

# A regime with less than this part of an equal share starves.
STARVING_SHARE = 0.02
# Images, for each regime, that the start is made from.
START_IMAGES = 16
# 2^7 power iterations for the direction of the largest spread: an eigenvalue solver would make the host wait.
SQUARINGS = 7
# Steps that a new regime has to find images before it can count as starving.
GRACE_STEPS = 20.0


class MixtureAssignment(Assignment):
    r"""Regimes that nobody labels: posteriors of a Gaussian mixture over features of the images, learned on the way.

    E-step: :math:`r_{ik} \propto \pi_k N(f_i; \mu_k, \Sigma_k)`. M-step: weights, means and covariances in closed form
    from running means of the sufficient statistics (stepwise EM; Cappé & Moulines, JRSS B 71, 2009, section 2), one
    update for each optimiser step. It needs no label, neither in training nor later.

    The first images, 16 for each regime, give the features' mean and spread, the frame in which the mixture lives, and
    the start: means at equal quantiles of a normal along the direction of the largest spread. Until then every regime
    has the same responsibility. A batch with fewer images than regimes is no obstacle, because the running means
    remember. A regime that starves is re-seeded by splitting the largest one; its row of the table stays and learns on.
    A feature that is the same for all of the first images tells nothing apart and is left out of account from then on.

    Args:
        num_regimes: Regimes K, as many as the table has rows.
        features: What the regimes are told apart by; the noise level by default. They are used as they are, and do not
            learn.
        step_exponent: How fast the running means forget: step t weighs `(t + 2)^-step_exponent`; above 0.5, at most 1.
        reg_covar: Added to the variances, in units of each feature's variance over the first images.
        channels: Channels of the images, for one look at how many numbers the features give.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> assignment = MixtureAssignment(num_regimes=2)
        >>> images, labels, noise = torch.rand(4, 3, 8, 8), torch.full((4,), -1), torch.tensor([0.02, 0.02, 0.2, 0.2])
        >>> for _ in range(10):
        ...     r = assignment(images, labels, noise, num_rows=2)
        ...     assignment.m_step(assignment.e_step(images, labels, noise, r).sum(0), torch.tensor(True))
        >>> assignment(images, labels, noise, num_rows=2).argmax(1).tolist()
        [0, 0, 1, 1]
    """

    #: [K]
    weights: Tensor
    #: in the frame, [K, F]
    means: Tensor
    #: in the frame, [K, F, F]
    covariances: Tensor
    #: features = offset + scale · frame, [F] each
    offset: Tensor
    scale: Tensor
    #: 0 for features that told nothing apart at the start, else 1, [F]
    informative: Tensor
    #: running mean of the statistics, flat
    average: Tensor
    #: sums of the features' moments, and their number, before the start
    gathered: Tensor
    #: mean log-likelihood of an image, forgetting as the average does
    log_likelihood: Tensor
    #: M-steps since the start, and those since a regime was re-seeded
    steps: Tensor
    age: Tensor
    #: how often a regime was re-seeded
    reseeded: Tensor

    def __init__(
        self,
        num_regimes: int = 4,
        features: list[ImageFeature] | None = None,
        step_exponent: float = 0.6,
        reg_covar: float = 1e-3,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self._seen: tuple[Tensor, Tensor] | None = None  # what `forward` has worked out and `e_step` asks for
        if num_regimes < 1:
            raise ValueError(f"num_regimes must be at least 1, got {num_regimes}")
        if not 0.5 < step_exponent <= 1:
            raise ValueError(f"step_exponent must be in (0.5, 1] for stepwise EM to converge, got {step_exponent}")
        if not reg_covar > 0:
            raise ValueError(f"reg_covar must be positive, got {reg_covar}")
        self.features = ImageFeatures([NoiseLevel()] if features is None else features)
        self.num_regimes, self.step_exponent, self.reg_covar = num_regimes, step_exponent, reg_covar
        width = self.features.width(channels)

        def number(*shape: int, value: float = 0.0) -> Tensor:
            return torch.full(shape, value, dtype=torch.float64)

        for name, tensor in {
            "weights": number(num_regimes, value=1 / num_regimes),
            "means": number(num_regimes, width),
            "covariances": torch.eye(width, dtype=torch.float64).repeat(num_regimes, 1, 1),
            "offset": number(width),
            "scale": number(width, value=1.0),
            "informative": number(width, value=1.0),
            "gathered": number(width + width**2 + 1),
            "log_likelihood": number(),
            "average": number(num_regimes * (1 + width + width**2) + 3),
            "steps": number(),
            "age": number(),
            "reseeded": number(),
        }.items():
            self.register_buffer(name, tensor)

    # E-step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, images: Tensor, labels: Tensor, noise_std: Tensor, num_rows: int) -> Tensor:
        """Posterior of each regime; see `Assignment.forward`."""
        if num_rows != self.num_regimes:
            raise ValueError(
                f"the parameter table has {num_rows} rows, the assignment num_regimes={self.num_regimes}: give the "
                "table one row name for each regime (em_parameters.row_names) or change num_regimes"
            )
        features = self.features(images, noise_std)
        if self.training:
            self._seen = (images, features)
        joint = self._log_joint(self._enter(features))
        return torch.where(self.steps > 0, torch.softmax(joint, dim=1), 1 / self.num_regimes)

    @torch.no_grad()
    def e_step(self, images: Tensor, labels: Tensor, noise_std: Tensor, responsibilities: Tensor) -> Tensor:
        """Moments of the features, then those of each regime in the frame; see `Assignment.e_step`."""
        seen, self._seen = self._seen, None
        features = seen[1] if seen is not None and seen[0] is images else self.features(images, noise_std)
        z = self._enter(features)
        log_norm = torch.logsumexp(self._log_joint(z), dim=1, keepdim=True)
        entropy = torch.special.entr(responsibilities).sum(1, keepdim=True)
        one = torch.ones_like(log_norm)
        square = (z[:, :, None] * z[:, None, :]).flatten(1)
        regimes = [
            responsibilities,
            (responsibilities[:, :, None] * z[:, None, :]).flatten(1),
            (responsibilities[:, :, None] * square[:, None, :]).flatten(1),
        ]
        outer = (features[:, :, None] * features[:, None, :]).flatten(1)
        return torch.cat([features, outer, *regimes, log_norm, entropy, one], dim=1)

    def _enter(self, features: Tensor) -> Tensor:
        return Standardizer(self.offset, self.scale).transform(features) * self.informative

    def _log_joint(self, z: Tensor) -> Tensor:
        theta = self._theta()
        components = GaussianComponents.prepare(
            "full", theta.weights, theta.means, theta.covariances, centered=True, check=False
        )
        return components.log_joint(components.encode(z))[0].T

    def _theta(self) -> MixtureParameters:
        return MixtureParameters("full", self.weights, self.means, self.covariances).batched()

    # M-step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def m_step(self, sums: Tensor, accepted: Tensor) -> None:
        """Weights, means and covariances from the running statistics; see `Assignment.m_step`."""
        width = len(self.offset)
        moments, flat = sums[: width + width**2], sums[width + width**2 :]
        count = flat[-1]
        started = self.steps > 0
        rate = (self.steps + 2) ** -self.step_exponent
        average = torch.lerp(self.average, flat / count.clamp_min(1), rate)
        reg_covar = torch.full_like(self.scale, self.reg_covar)
        theta = m_step(self._from_flat(average), reg_covar, self._theta())
        theta, average, rescued = self._rescue(theta, average)
        # the mixture of the start has not seen a likelihood: the first step's is taken whole
        likelihood = torch.lerp(
            self.log_likelihood, flat[-3] / count.clamp_min(1), torch.where(self.steps > 1, rate, 1.0)
        )

        gathered = self.gathered + torch.cat([moments, count[None]])
        enough = gathered[-1] >= START_IMAGES * self.num_regimes
        offset, scale, informative, first = self._start(gathered[:-1], gathered[-1])
        taken = accepted & (count > 0)
        for name, later, at_start in (
            ("weights", theta.weights[0], first.weights),
            ("means", theta.means[0], first.means),
            ("covariances", theta.covariances[0], first.covariances),
            ("average", average, statistics_of(first).flat()),
            ("offset", self.offset, offset),
            ("scale", self.scale, scale),
            ("informative", self.informative, informative),
            ("log_likelihood", likelihood, self.log_likelihood),
            ("reseeded", self.reseeded + rescued, self.reseeded),
            ("age", torch.where(rescued, 0.0, self.age + 1), self.age),
            ("steps", self.steps + 1, self.steps + 1),
        ):
            buffer: Tensor = getattr(self, name)
            before = torch.where(enough, at_start, buffer)
            buffer.copy_(torch.where(taken, torch.where(started, later, before), buffer))
        self.gathered.copy_(torch.where(taken & ~started, gathered, self.gathered))

    def _start(self, moments: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor, MixtureParameters]:
        """Frame and first mixture from the moments of the first images' features."""
        width = len(self.offset)
        count = count.clamp_min(1)
        mean = moments[:width] / count
        covariance = moments[width:].view(width, width) / count - mean[:, None] * mean
        deviation = covariance.diagonal().clamp_min(0).sqrt()
        # The root of a difference of two numbers of size mean² carries their rounding.
        rounding = CONSTANT_FEATURE_ULPS * (torch.finfo(torch.float64).eps * mean.square()).sqrt()
        informative = (deviation > rounding).double()
        scale = torch.where(informative > 0, deviation, 1.0)
        correlation = covariance / (scale[:, None] * scale) * informative[:, None] * informative
        axis, spread = _largest_spread(correlation)
        places = (torch.arange(self.num_regimes, dtype=torch.float64, device=mean.device) + 0.5) / self.num_regimes
        means = math.sqrt(2) * torch.erfinv(2 * places - 1)[:, None] * spread * axis
        # What lies along the axis is shared out among the regimes; across it they are as wide as the data.
        along = spread.square() * (1 - 1 / self.num_regimes**2) * axis[:, None] * axis
        within = correlation - along + self.reg_covar * torch.eye(width, dtype=torch.float64, device=mean.device)
        weights = torch.full_like(self.weights, 1 / self.num_regimes)
        return mean, scale, informative, MixtureParameters("full", weights, means, within.expand_as(self.covariances))

    def _rescue(self, theta: MixtureParameters, average: Tensor) -> tuple[MixtureParameters, Tensor, Tensor]:
        """The mixture with its most starving regime, if any, made one half of the largest."""
        weights, means, covariances = theta.weights[0], theta.means[0], theta.covariances[0]
        regimes = torch.arange(self.num_regimes, device=weights.device)
        is_poor, is_rich = regimes == weights.argmin(), regimes == weights.argmax()
        rescued = (weights.amin() < STARVING_SHARE / self.num_regimes) & (self.age >= GRACE_STEPS)
        # sums with a mask, because an index on the device would have to come to the host
        rich_mean = (means * is_rich[:, None]).sum(0)
        rich_covariance = (covariances * is_rich[:, None, None]).sum(0)
        axis, spread = _largest_spread(rich_covariance)
        either = rescued & (is_poor | is_rich)
        side = is_poor.double() - is_rich.double()
        split = MixtureParameters(
            "full",
            torch.where(either, weights.amax() / 2, weights) / torch.where(rescued, 1 - weights.amin(), 1.0),
            torch.where(either[:, None], rich_mean + side[:, None] * axis * spread / 2, means),
            torch.where(either[:, None, None], rich_covariance, covariances),
        )
        return split.batched(), torch.where(rescued, statistics_of(split).flat(), average), rescued

    def _from_flat(self, flat: Tensor) -> GaussianStatistics:
        width = len(self.offset)
        zero = flat.new_zeros(1)
        like = GaussianStatistics(
            "full",
            weight=flat.new_zeros(1, self.num_regimes),
            first=flat.new_zeros(1, self.num_regimes, width),
            second=flat.new_zeros(1, self.num_regimes, width, width),
            log_likelihood=zero,
            entropy=zero,
            count=zero[0],
            center=flat.new_zeros(1, self.num_regimes, width),
            centered=False,
        )
        return like.with_flat(flat)

    # For the eye -------------------------------------------------------------------------------------------------

    def diagnostics(self) -> dict[str, float]:
        """Weights and means of the regimes, in units of the features, and how many were re-seeded."""
        means = Standardizer(self.offset, self.scale).inverse_transform(self.means).tolist()
        numbers = {f"weight/{k}": weight for k, weight in enumerate(self.weights.tolist())}
        for k, row in enumerate(means):
            numbers |= {f"mean_{f}/{k}": value for f, value in enumerate(row)}
        if float(self.steps) > 1:
            # columns left out of account have the density of reg_covar at its peak, which says nothing
            left_out = 0.5 * float((1 - self.informative).sum()) * math.log(2 * math.pi * self.reg_covar)
            numbers["log_likelihood"] = float(self.log_likelihood - self.scale.log().sum()) + left_out
        return numbers | {"reseeded": float(self.reseeded)}

    def warnings(self, ended: bool = False) -> list[str]:
        """Features that tell nothing apart, regimes that had to be re-seeded, and a run too short for any regime."""
        warnings = []
        if ended and not self.steps:
            warnings.append(
                f"the regimes never started: they wait for {START_IMAGES * self.num_regimes} images, and the run had "
                f"{int(self.gathered[-1])}, so every row learned from all images alike. Train longer, or take fewer "
                "regimes"
            )
        if constant := (self.informative == 0).nonzero()[:, 0].tolist():
            warnings.append(
                f"feature column(s) {constant} had one value for all of the first images and tell no regimes apart; "
                "they are left out of account. Remove them from `features`, or give data in which they vary"
            )
        if count := int(self.reseeded):
            warnings.append(
                f"{count} starving regime(s) so far were re-seeded by splitting the largest one. If this goes on, the "
                "data hold fewer regimes than the table has rows: take fewer, or add a feature that tells them apart"
            )
        return warnings


def _largest_spread(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Direction of the largest spread `[F]` and the standard deviation along it.

    Repeated squares of the matrix tend to the projection on its first eigenvector. What they are applied to, and the
    direction's sign, come from a fixed vector without symmetries: standardised features are so alike that anything read
    off the matrix itself would be a matter of rounding, and differ from process to process.
    """
    tiny = torch.finfo(covariance.dtype).tiny
    power = covariance
    for _ in range(SQUARINGS):
        power = power / power.norm().clamp_min(tiny)
        power = power @ power
    reference = torch.arange(1, len(covariance) + 1, dtype=covariance.dtype, device=covariance.device).sqrt()
    axis = power @ reference
    axis = axis / axis.norm().clamp_min(tiny)
    axis = axis * torch.where(axis @ reference < 0, -1.0, 1.0)
    return axis, (axis @ covariance @ axis).clamp_min(0).sqrt()
