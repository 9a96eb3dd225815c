"""A Gaussian mixture in scikit-learn's manner."""

import math
import warnings
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, DensityMixin, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data

from lightning_modules.mixtures.gaussian.model import GaussianMixtureModel
from lightning_modules.mixtures.model import PassReport, fit_in_memory

Array = NDArray[Any]


class GaussianMixtureEstimator(DensityMixin, BaseEstimator):
    """:class:`lightning_modules.GaussianMixture` for data in memory, with scikit-learn's interface.

    Args:
        n_components: Components of the mixture.
        covariance_type: `full`, `tied`, `diag` or `spherical`.
        tol: The fit has converged when the mean log-likelihood changes by no more.
        reg_covar: Added to the variances.
        max_iter: Iterations at most.
        n_init: Starts, side by side; the best is kept.
        init_params: `k-means++` (refined by K-means), `k-means||` or `random` rows.
        weights_init: Weights to start from, [n_components].
        means_init: Means to start from, [n_components, n_features].
        precisions_init: Precisions to start from, shaped as the covariance type has it.
        standardize: Scale the features to variance 1 inside; reported parameters are in the units of the data.
        random_state: Seed.
        device: Where to compute, such as `cpu` or `cuda`.

    Example:
        >>> X = np.array([[0.0, 0], [0, 1], [1, 0], [10, 10], [10, 11], [11, 10]])
        >>> mixture = GaussianMixtureEstimator(n_components=2, random_state=0).fit(X)
        >>> sorted(mixture.means_[:, 0].round(3).tolist())
        [0.333, 10.333]
    """

    _parameter_constraints: dict[str, list[Any]] = {  # noqa: RUF012  (scikit-learn's protocol)
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "covariance_type": [StrOptions({"full", "tied", "diag", "spherical"})],
        "tol": [Interval(Real, 0.0, None, closed="left")],
        "reg_covar": [Interval(Real, 0.0, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "n_init": [Interval(Integral, 1, None, closed="left")],
        "init_params": [StrOptions({"k-means++", "k-means||", "random"})],
        "weights_init": ["array-like", None],
        "means_init": ["array-like", None],
        "precisions_init": ["array-like", None],
        "standardize": ["boolean"],
        "random_state": ["random_state"],
        "device": [str],
    }

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: Literal["full", "tied", "diag", "spherical"] = "full",
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int = 1,
        init_params: Literal["k-means++", "k-means||", "random"] = "k-means++",
        weights_init: Any = None,
        means_init: Any = None,
        precisions_init: Any = None,
        standardize: bool = False,
        random_state: Any = None,
        device: str = "cpu",
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.weights_init = weights_init
        self.means_init = means_init
        self.precisions_init = precisions_init
        self.standardize = standardize
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: Any = None) -> "GaussianMixtureEstimator":
        """Estimates the mixture by exact EM.

        Args:
            X: Rows, `[n_samples, n_features]`.
            y: Unused.
        """
        self.fit_predict(X, y)
        return self

    @_fit_context(prefer_skip_nested_validation=True)
    def fit_predict(self, X: Any, y: Any = None) -> Array:
        """Estimates the mixture and returns the most probable component of each row.

        Args:
            X: Rows, `[n_samples, n_features]`.
            y: Unused.
        """
        X = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=2)
        if X.shape[0] < self.n_components:
            raise ValueError(
                f"Expected n_samples >= n_components but got n_components = {self.n_components}, "
                f"n_samples = {X.shape[0]}"
            )
        rows = torch.tensor(X, device=self.device)
        self._model = GaussianMixtureModel(
            self.n_components,
            X.shape[1],
            covariance_type=self.covariance_type,
            tol=self.tol,
            reg_covar=self.reg_covar,
            max_iter=self.max_iter,
            n_init=self.n_init,
            init=self.init_params,
            weights_init=self.weights_init,
            means_init=self.means_init,
            precisions_init=self.precisions_init,
            standardize=self.standardize,
            seed=check_random_state(self.random_state).randint(np.iinfo(np.int32).max),
        ).to(self.device)
        reports = fit_in_memory(self._model, rows)
        self._publish(reports)
        return self._joint(X).argmax(axis=1)

    def _publish(self, reports: list[PassReport]) -> None:
        model = self._model
        theta = model.reported()
        self.weights_, self.means_ = theta.weights.cpu().numpy(), theta.means.cpu().numpy()
        self.covariances_ = theta.covariances.cpu().numpy()
        if theta.covariance_type in ("full", "tied"):
            self.precisions_ = np.linalg.inv(self.covariances_)
        else:
            self.precisions_ = 1 / self.covariances_
        self.n_iter_ = int(model.iterations[model.best])
        self.lower_bound_ = float(model.objective[model.best])
        self.converged_ = self.n_iter_ < self.max_iter
        if not self.converged_:
            warnings.warn(
                f"The mixture did not converge in {self.n_iter_} iterations: log-likelihood {self.lower_bound_:.6g}, "
                f"last change {abs(reports[-1].change):.3g}, tol {self.tol:.3g}. Raise max_iter or tol, or check for "
                "degenerate data.",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _joint(self, X: Array) -> Array:
        return self._model.log_joint(torch.tensor(X, device=self.device)).cpu().numpy()

    def _checked_joint(self, X: Any) -> Array:
        check_is_fitted(self)
        return self._joint(validate_data(self, X, reset=False, dtype=[np.float64, np.float32]))

    def predict(self, X: Any) -> Array:
        """Returns the most probable component of each row of `X`."""
        return self._checked_joint(X).argmax(axis=1)

    def predict_proba(self, X: Any) -> Array:
        """Returns the responsibilities, `[n_samples, n_components]`."""
        return torch.softmax(torch.from_numpy(self._checked_joint(X)), dim=1).numpy()

    def score_samples(self, X: Any) -> Array:
        """Returns the log-likelihood of each row of `X`."""
        return torch.logsumexp(torch.from_numpy(self._checked_joint(X)), dim=1).numpy()

    def score(self, X: Any, y: Any = None) -> float:
        """Returns the mean log-likelihood of the rows of `X`."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1) -> tuple[Array, Array]:
        """Draws rows from the mixture, and the components they came from."""
        check_is_fitted(self)
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        rows, labels = self._model.sample(n_samples, torch.Generator().manual_seed(seed))
        return rows.cpu().numpy(), labels.cpu().numpy()

    def bic(self, X: Any) -> float:
        """Returns the Bayesian information criterion on `X`; lower is better."""
        values = self.score_samples(X)
        return -2 * float(values.sum()) + self._model.num_free_parameters() * math.log(len(values))

    def aic(self, X: Any) -> float:
        """Returns Akaike's information criterion on `X`; lower is better."""
        return -2 * float(self.score_samples(X).sum()) + 2 * self._model.num_free_parameters()
