"""Class densities: one Gaussian mixture for each class on the network's features."""

import torch
from torch import Tensor, nn

from lightning_modules.em._float64 import Float64Buffers
from lightning_modules.mixtures.gaussian.model import GaussianMixtureModel
from lightning_modules.mixtures.model import fit_in_memory

# Of the variance that the directions kept are scaled to: no component collapses onto a handful of images.
_REGULARISATION = 1e-2
# Starts of a mixture of several components, which ends at the nearest rest.
_STARTS = 5
# What varies less is taken for constant: a feature beside its own mean (float32 has seven digits), a direction
# of standardised features by its variance.
_CONSTANT = 1e-6


class ClassDensities(Float64Buffers):
    r"""One Gaussian mixture a class, by EM, on the leading principal components of standardised features.

    It classifies by likelihood ratio, :math:`\log p(f \mid \text{generated}) - \log p(f \mid \text{photographic})`, and
    scores how far an image is out of distribution by :math:`q - \max_c \log p(f \mid c)`, where q is the log-likelihood
    that a given share of the images exceeded. Above 0 the image is unlike those of either class.

    Args:
        num_features: Width F of the network's features.
        num_directions: Principal components that are kept; all where there are fewer features.
        num_components: Components of each mixture.
        inlier_quantile: Share of the images it is fitted to that count as in distribution.

    Raises:
        ValueError: If a number is impossible.
    """

    # Mean and spread of the features, float64 [F], and the directions kept, [F, D].
    offset: Tensor
    scale: Tensor
    directions: Tensor
    # q, float64 [], and whether there is a fit, bool [].
    floor: Tensor
    fitted: Tensor

    def __init__(
        self, num_features: int, num_directions: int = 8, num_components: int = 1, inlier_quantile: float = 0.99
    ) -> None:
        super().__init__()
        if num_directions < 1:
            raise ValueError(f"num_directions must be at least 1, got {num_directions}")
        if not 0 < inlier_quantile < 1:
            raise ValueError(f"inlier_quantile must lie between 0 and 1, got {inlier_quantile}")
        self.num_directions = min(num_directions, num_features)
        self.inlier_quantile = inlier_quantile
        self.mixtures = nn.ModuleList(_mixture(num_components, self.num_directions) for _ in range(2))
        self.register_buffer("offset", torch.zeros(num_features, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(num_features, dtype=torch.float64))
        self.register_buffer("directions", torch.zeros(num_features, self.num_directions, dtype=torch.float64))
        self.register_buffer("floor", torch.zeros((), dtype=torch.float64))
        self.register_buffer("fitted", torch.tensor(False))

    @property
    def images_needed(self) -> int:
        """Images of each class below which there is no fit: as many as keep a covariance from degenerating."""
        return max(mixture.num_components for mixture in self._mixtures) * (self.num_directions + 1)

    @torch.no_grad()
    def log_densities(self, features: Tensor) -> Tensor:
        """Log density of features under each class, up to one constant.

        Shape:
            - features: `[N, F]`
            - output: `[N, 2]`, float64; NaN before the fit
        """
        if not bool(self.fitted):
            return features.new_full((len(features), 2), torch.nan, dtype=torch.float64)
        projected = ((features.double() - self.offset) / self.scale) @ self.directions
        return torch.stack([mixture.log_joint(projected).logsumexp(1) for mixture in self._mixtures], dim=1)

    def ood_score(self, features: Tensor) -> Tensor:
        """Out-of-distribution score of features, above 0 for those unlike either class.

        Shape:
            - features: `[N, F]`
            - output: `[N]`, float64; NaN before the fit
        """
        return self.floor - self.log_densities(features).amax(1)

    @torch.no_grad()
    def fit(self, features: Tensor, label: Tensor) -> bool:
        """Fit by EM; alike on every process that is given the same images.

        Returns:
            Whether there were enough images of each class; if not, everything stays as it was.

        Shape:
            - features: `[N, F]`
            - label: `[N]`, 0 or 1
        """
        if int(torch.bincount(label, minlength=2).min()) < self.images_needed:
            return False
        features = features.double()
        self.offset.copy_(features.mean(0))
        deviation = features.std(0)
        self.scale.copy_(torch.where(deviation > _CONSTANT * self.offset.abs(), deviation, 1.0))
        standard = (features - self.offset) / self.scale
        variance, directions = torch.linalg.eigh(standard.T @ standard / len(standard))
        variance, directions = (part[..., -self.num_directions :] for part in (variance, directions))
        # to variance 1; a direction in which nothing varies is dropped, whatever it may vary elsewhere
        self.directions.copy_(directions * torch.where(variance > _CONSTANT, variance, torch.inf).rsqrt())
        projected = standard @ self.directions
        for number, mixture in enumerate(self._mixtures):
            starts = range(_STARTS if mixture.num_components > 1 else 1)
            fresh = [_mixture(mixture.num_components, mixture.num_features, s).to(projected.device) for s in starts]
            for candidate in fresh:
                fit_in_memory(candidate, projected[label == number])
            best_one = max(fresh, key=lambda candidate: float(candidate.objective))
            mixture.load_state_dict(best_one.state_dict())
        self.fitted.fill_(True)
        best = self.log_densities(features).amax(1)
        self.floor.copy_(torch.quantile(best, 1 - self.inlier_quantile))
        return True

    @property
    def _mixtures(self) -> list[GaussianMixtureModel]:
        return list(self.mixtures)  # type: ignore[arg-type]


class _Mixture(Float64Buffers, GaussianMixtureModel):
    """A mixture that keeps its digits in a module of lower precision."""


def _mixture(num_components: int, num_features: int, seed: int = 0) -> _Mixture:
    return _Mixture(num_components, num_features, reg_covar=_REGULARISATION, seed=seed)
