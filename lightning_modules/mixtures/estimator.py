"""Mixtures for data in memory, with scikit-learn's interface."""

import math
import warnings
from dataclasses import fields
from inspect import Parameter, Signature, signature
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, DensityMixin, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from lightning_modules.mixtures.model import EpochResult, MixtureModel, fit_in_memory

Array = NDArray[Any]


class MixtureEstimator(DensityMixin, BaseEstimator):
    """Base of the mixtures' estimators: a family names its model, and takes the arguments of its own.

    A subclass hands further arguments on, as `**options`; they count as its own, for scikit-learn as well. After a fit
    there is an attribute for each of the model's parameters, in units of the data, such as `means_`.

    Args:
        n_components: Components of the mixture.
        tol: The fit has converged when the mean log-likelihood changes by no more.
        max_iter: Iterations at most.
        n_init: Restarts, side by side; the best is kept.
        init_params: `k-means++` (refined by K-means), `k-means||` or `random` samples.
        standardize: Scale the features to variance 1 inside; reported parameters are in the units of the data.
        random_state: Seed.
        device: Where to compute, such as `cpu` or `cuda`.
    """

    model_class: ClassVar[type[MixtureModel[Any]]]
    _parameter_constraints: dict[str, list[Any]] = {  # noqa: RUF012  (scikit-learn's protocol)
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0.0, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "n_init": [Interval(Integral, 1, None, closed="left")],
        "init_params": [StrOptions({"k-means++", "k-means||", "random"})],
        "standardize": ["boolean"],
        "random_state": ["random_state"],
        "device": [str],
    }

    def __init__(
        self,
        n_components: int = 1,
        *,
        tol: float = 1e-3,
        max_iter: int = 100,
        n_init: int = 1,
        init_params: Literal["k-means++", "k-means||", "random"] = "k-means++",
        standardize: bool = False,
        random_state: Any = None,
        device: str = "cpu",
    ) -> None:
        self.n_components = n_components
        self.tol = tol
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.standardize = standardize
        self.random_state = random_state
        self.device = device

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Writes the arguments that a constructor hands on into its signature, where scikit-learn reads them."""
        super().__init_subclass__(**keywords)
        if "__init__" in vars(cls):
            own = [p for p in signature(cls.__init__).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
            handed_on = signature(super(cls, cls).__init__).parameters.values()
            names = {parameter.name for parameter in own}
            merged = Signature([*own, *(parameter for parameter in handed_on if parameter.name not in names)])
            setattr(cls.__init__, "__signature__", merged)  # noqa: B010  (mypy knows no such attribute)

    def fit(self, X: Any, y: Any = None) -> Self:
        """Estimates the mixture by exact EM.

        Args:
            X: Samples, `[n_samples, n_features]`.
            y: Unused.
        """
        self.fit_predict(X, y)
        return self

    @_fit_context(prefer_skip_nested_validation=True)
    def fit_predict(self, X: Any, y: Any = None) -> Array:
        """Estimates the mixture and returns the most probable component of each sample.

        Args:
            X: Samples, `[n_samples, n_features]`.
            y: Unused.
        """
        X = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=2)
        if X.shape[0] < self.n_components:
            raise ValueError(
                f"Expected n_samples >= n_components but got n_components = {self.n_components}, "
                f"n_samples = {X.shape[0]}"
            )
        options = self.get_params(deep=False)
        device, state = options.pop("device"), check_random_state(options.pop("random_state"))
        options |= {"init": options.pop("init_params"), "seed": state.randint(np.iinfo(np.int32).max)}
        self._model = self.model_class(options.pop("n_components"), X.shape[1], **options).to(device)
        self._publish(fit_in_memory(self._model, torch.tensor(X, device=device)))
        return self._joint(X).argmax(axis=1)

    def _publish(self, results: list[EpochResult]) -> None:
        theta = self._model.best_parameters()
        for field in fields(theta):
            value = getattr(theta, field.name)
            if isinstance(value, Tensor):
                setattr(self, f"{field.name}_", value.cpu().numpy())
        self.n_iter_ = int(self._model.iterations[self._model.best])
        self.lower_bound_ = float(self._model.objective[self._model.best])
        self.converged_ = self.n_iter_ < self.max_iter
        if not self.converged_:
            warnings.warn(
                f"The mixture did not converge in {self.n_iter_} iterations: log-likelihood {self.lower_bound_:.6g}, "
                f"last change {abs(results[-1].change):.3g}, tol {self.tol:.3g}. Raise max_iter or tol, or check for "
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
        """Returns the most probable component of each sample of `X`."""
        return self._checked_joint(X).argmax(axis=1)

    def predict_proba(self, X: Any) -> Array:
        """Returns the responsibilities, `[n_samples, n_components]`."""
        return torch.softmax(torch.from_numpy(self._checked_joint(X)), dim=1).numpy()

    def score_samples(self, X: Any) -> Array:
        """Returns the log-likelihood of each sample of `X`."""
        return torch.logsumexp(torch.from_numpy(self._checked_joint(X)), dim=1).numpy()

    def score(self, X: Any, y: Any = None) -> float:
        """Returns the mean log-likelihood of the samples of `X`."""
        return float(self.score_samples(X).mean())

    def bic(self, X: Any) -> float:
        """Returns the Bayesian information criterion on `X`; lower is better."""
        values = self.score_samples(X)
        return -2 * float(values.sum()) + self._model.num_free_parameters() * math.log(len(values))

    def aic(self, X: Any) -> float:
        """Returns Akaike's information criterion on `X`; lower is better."""
        return -2 * float(self.score_samples(X).sum()) + 2 * self._model.num_free_parameters()
