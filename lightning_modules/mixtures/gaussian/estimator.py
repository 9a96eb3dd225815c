"""Gaussian mixture for data in memory, with scikit-learn's interface."""

import warnings
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from lightning_modules.mixtures.estimator import Array, MixtureEstimator
from lightning_modules.mixtures.gaussian.model import GaussianMixtureModel
from lightning_modules.mixtures.model import EpochResult


class GaussianMixtureEstimator(MixtureEstimator):
    """`lightning_modules.GaussianMixture` for data in memory, with scikit-learn's interface.

    Args:
        n_components: Components of the mixture.
        covariance_type: `full`, `tied`, `diag` or `spherical`.
        reg_covar: Added to the variances.
        weights_init: Weights to start from, `[n_components]`.
        means_init: Means to start from, `[n_components, n_features]`.
        precisions_init: Precisions to start from, shaped as the covariance type has it.
        **options: Those of `MixtureEstimator`, which describes them.

    Example:
        >>> X = np.array([[0.0, 0], [0, 1], [1, 0], [10, 10], [10, 11], [11, 10]])
        >>> mixture = GaussianMixtureEstimator(n_components=2, random_state=0).fit(X)
        >>> sorted(mixture.means_[:, 0].round(3).tolist())
        [0.333, 10.333]
    """

    model_class = GaussianMixtureModel
    _model: GaussianMixtureModel
    _parameter_constraints = {  # noqa: RUF012  (scikit-learn's protocol)
        **MixtureEstimator._parameter_constraints,
        "covariance_type": [StrOptions({"full", "tied", "diag", "spherical"})],
        "reg_covar": [Interval(Real, 0.0, None, closed="left")],
        "weights_init": ["array-like", None],
        "means_init": ["array-like", None],
        "precisions_init": ["array-like", None],
    }

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: Literal["full", "tied", "diag", "spherical"] = "full",
        reg_covar: float = 1e-6,
        weights_init: Any = None,
        means_init: Any = None,
        precisions_init: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(n_components, **options)
        self.covariance_type = covariance_type
        self.reg_covar = reg_covar
        self.weights_init = weights_init
        self.means_init = means_init
        self.precisions_init = precisions_init

    def _options(self) -> dict[str, Any]:
        options = super()._options()
        if self.means_init is not None and self.n_init > 1:
            warnings.warn(
                f"All of n_init={self.n_init} restarts would begin at the given means_init: performing only one.",
                RuntimeWarning,
                stacklevel=4,
            )
            options["n_init"] = 1
        return options

    def _publish(self, results: list[EpochResult], warn: bool = True) -> None:
        theta = self._model.best_parameters()
        self.precisions_ = self._array(theta.precisions)
        self.precisions_cholesky_ = self._array(theta.precisions_cholesky)
        super()._publish(results, warn)

    def sample(self, n_samples: int = 1) -> tuple[Array, Array]:
        """Draws samples from the mixture, and the components they came from."""
        check_is_fitted(self)
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        samples, labels = self._model.sample(n_samples, torch.Generator().manual_seed(seed))
        return samples.cpu().numpy(), labels.cpu().numpy()
