"""Mixtures for data in memory, with scikit-learn's interface."""

import math
import warnings
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
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
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules.mixtures.batches import as_tensor, read_batch
from lightning_modules.mixtures.initialization import Samples, Stream
from lightning_modules.mixtures.model import EpochResult, MixtureModel, fit_in_memory, fit_stream

Array = NDArray[Any]


def checked_weights(sample_weight: Any, X: Any, device: str) -> Tensor:
    """Weights of samples, or scikit-learn's kind of error with what to change.

    Shape:
        - output: float64 `[N]`
    """
    weights = _check_sample_weight(sample_weight, X, dtype=np.float64)
    if (weights < 0).any():
        raise ValueError("Negative values in data passed to `sample_weight`: give how often each sample counts.")
    if not weights.any():
        raise ValueError("Sample weights must contain at least one non-zero number: all of `sample_weight` are 0.")
    return as_tensor(weights, device=device)


def is_stream(X: Any) -> bool:
    """Whether data come from a `DataLoader` or a `LightningDataModule`."""
    return isinstance(X, DataLoader) or hasattr(X, "train_dataloader")


def stream_of(X: Any) -> Stream:
    """The training samples of a `DataLoader` or a `LightningDataModule`, once more at each call."""
    convert = getattr(X, "on_after_batch_transfer", lambda batch, _: batch)
    if not isinstance(X, DataLoader):
        X.prepare_data()
        X.setup("fit")
        X = X.train_dataloader()
    return lambda: (read_batch(convert(batch, 0)) for batch in X)


# scikit-learn's names for two of the starts.
_SAME_START = {"kmeans": "k-means++", "random_from_data": "random"}


class MixtureEstimator(DensityMixin, BaseEstimator):
    """Base of the mixtures' estimators: a family names its model, and takes the arguments of its own.

    A subclass hands further arguments on, as `**options`; they count as its own, for scikit-learn as well. After a fit
    there is an attribute for each of the model's parameters, in units of the data, such as `means_`, in the type of the
    samples (sums are float64). Samples may come from a `DataLoader` or a `LightningDataModule` as well, through which
    `fit` goes once in each iteration.

    Args:
        n_components: Components of the mixture.
        tol: The fit has converged when the mean log-likelihood changes by no more.
        max_iter: Iterations at most; 0 keeps the start.
        n_init: Restarts, side by side; the best is kept.
        init_params: `k-means++`, refined by K-means (`kmeans` to scikit-learn); `k-means||`; or `random` samples
            (`random_from_data`).
        algorithm: `exact` updates once an iteration, `stepwise` once a batch (Cappé and Moulines 2009).
        batch_size: Samples that go to the device at a time, all by default; of a batch, where `stepwise`, 1024.
        step_exponent: How fast stepwise EM and `partial_fit` forget: step t has weight `(t + 2)^-step_exponent`.
        warm_start: Whether another fit goes on from the last one, the best restart alone.
        standardize: Scale the features to variance 1 inside; reported parameters are in the units of the data.
        verbose: Whether to print each iteration.
        random_state: Seed.
        device: Where to compute, such as `cpu` or `cuda`.
    """

    model_class: ClassVar[type[MixtureModel[Any]]]
    _parameter_constraints: dict[str, list[Any]] = {  # noqa: RUF012  (scikit-learn's protocol)
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0.0, None, closed="left")],
        "max_iter": [Interval(Integral, 0, None, closed="left")],
        "n_init": [Interval(Integral, 1, None, closed="left")],
        "init_params": [StrOptions({"k-means++", "k-means||", "random", *_SAME_START})],
        "algorithm": [StrOptions({"exact", "stepwise"})],
        "batch_size": [Interval(Integral, 1, None, closed="left"), None],
        "step_exponent": [Interval(Real, 0.5, 1.0, closed="right")],
        "warm_start": ["boolean"],
        "standardize": ["boolean"],
        "verbose": ["verbose"],
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
        init_params: Literal["k-means++", "k-means||", "random", "kmeans", "random_from_data"] = "k-means++",
        algorithm: Literal["exact", "stepwise"] = "exact",
        batch_size: int | None = None,
        step_exponent: float = 0.7,
        warm_start: bool = False,
        standardize: bool = False,
        verbose: bool | int = False,
        random_state: Any = None,
        device: str = "cpu",
    ) -> None:
        self.n_components = n_components
        self.tol = tol
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.algorithm = algorithm
        self.batch_size = batch_size
        self.step_exponent = step_exponent
        self.warm_start = warm_start
        self.standardize = standardize
        self.verbose = verbose
        self.random_state = random_state
        self.device = device

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Writes the arguments that a constructor hands on into its signature, where scikit-learn reads them; others
        are refused in the name of the class that was called, not of the base that they would have reached.
        """
        super().__init_subclass__(**keywords)
        if "__init__" not in vars(cls):
            return
        constructor: Callable[..., None] = vars(cls)["__init__"]
        own = [p for p in signature(constructor).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        handed_on = signature(super(cls, cls).__init__).parameters.values()
        names = {parameter.name for parameter in own}
        merged = Signature([*own, *(parameter for parameter in handed_on if parameter.name not in names)])

        @wraps(constructor)
        def checked(self: Any, *values: Any, **options: Any) -> None:
            if unknown := [name for name in options if name not in merged.parameters]:
                raise TypeError(f"{type(self).__name__}.__init__() got an unexpected keyword argument {unknown[0]!r}")
            constructor(self, *values, **options)

        setattr(checked, "__signature__", merged)  # noqa: B010  (mypy knows no such attribute)
        setattr(cls, "__init__", checked)  # noqa: B010  (nor that a method may be put in place of another)

    # --------------------------------------------------------------------------------------- fitting

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Estimates the mixture.

        Args:
            X: Samples, `[n_samples, n_features]`; or a `DataLoader` or `LightningDataModule`.
            y: Unused.
            sample_weight: How often each sample counts, `[n_samples]`; once by default.
        """
        if is_stream(X):
            stream = stream_of(X)
            first: Samples = next(iter(stream()))
            self._model, self._dtype = self._model_for(first[0].shape[1]), np.dtype(np.float64)
            self.n_features_in_ = first[0].shape[1]
            self._publish(fit_stream(self._model, self._on_device(stream), self._reporter()))
            return self
        X, weights = self._check_samples(X, sample_weight)
        self._check_count(X, weights)
        model = self._model_for(X.shape[1])
        size = self.batch_size or (1024 if self.algorithm == "stepwise" else None)
        samples = as_tensor(X)
        if self.algorithm == "stepwise":
            order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(model.seed))
            samples, weights = samples[order], None if weights is None else weights[order]
        results = fit_in_memory(model, samples, size, weights, self._reporter())
        self._model = model
        self._publish(results)
        return self

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Array:
        """Estimates the mixture and returns the most probable component of each sample.

        Args:
            X: Samples, `[n_samples, n_features]`.
            y: Unused.
            sample_weight: How often each sample counts, `[n_samples]`; once by default.
        """
        return self.fit(X, y, sample_weight).predict(X)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Goes on learning from one more batch (stepwise EM), from a fit or from nothing.

        What was learned is forgotten as `step_exponent` has it; a fit counts as so many batches of this size as its
        samples would have filled.

        Args:
            X: Samples, `[n_samples, n_features]`; of the first batch at least `n_components`.
            y: Unused.
            sample_weight: How often each sample counts, `[n_samples]`; once by default.
        """
        first = not hasattr(self, "_model")
        X, weights = self._check_samples(X, sample_weight, reset=first)
        samples = as_tensor(X, device=self.device)
        weights = None if weights is None else weights.to(self.device)
        if first:
            self._check_count(X, weights)
            model = self._model_for(X.shape[1])
            model.initialize(lambda: [(samples, weights, None)])
            self._model = model
        model = self._model
        if model.algorithm == "exact":
            model.remember(len(X))
        model.start_epoch()
        model.add_batch(samples, weights)
        model.end_batch()
        self._publish([model.end_epoch()], warn=False)
        return self

    def _check_samples(self, X: Any, sample_weight: Any, reset: bool = True) -> tuple[Array, Tensor | None]:
        X = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32])
        if reset:
            self._dtype = X.dtype
        return X, None if sample_weight is None else checked_weights(sample_weight, X, "cpu")

    def _check_count(self, X: Array, weights: Tensor | None) -> None:
        count = len(X) if weights is None else int((weights > 0).sum())
        if count < max(self.n_components, 2):
            raise ValueError(
                f"Expected n_samples >= n_components but got n_components = {self.n_components}, n_samples = {count}: "
                f"a minimum of {max(self.n_components, 2)} is required. Found array with {count} sample(s)."
            )

    def _options(self) -> dict[str, Any]:
        """Arguments of the model."""
        options = self.get_params(deep=False)
        for name in ("n_components", "device", "batch_size", "warm_start", "verbose"):
            del options[name]
        state, start = check_random_state(options.pop("random_state")), options.pop("init_params")
        return options | {"init": _SAME_START.get(start, start), "seed": state.randint(np.iinfo(np.int32).max)}

    def _model_for(self, num_features: int) -> MixtureModel[Any]:
        """A new model, or with `warm_start` the fitted one."""
        model = self.model_class(self.n_components, num_features, **self._options()).to(self.device)
        if not (self.warm_start and hasattr(self, "_model")):
            return model
        fitted = self._model.parameter_shapes(self._model.num_features)
        if fitted != model.parameter_shapes(num_features):
            raise ValueError(
                f"warm_start goes on with the mixture that was fitted, whose parameters have the shapes {fitted}; the "
                f"shapes asked for are {model.parameter_shapes(num_features)}. Set warm_start=False, or set the "
                "parameters back."
            )
        self._model.tol, self._model.max_iter, self._model.algorithm = self.tol, self.max_iter, self.algorithm
        return self._model

    def _on_device(self, stream: Stream) -> Stream:
        return lambda: (
            (x.to(self.device), None if weight is None else weight.to(self.device), index)
            for x, weight, index in stream()
        )

    def _reporter(self) -> Callable[[EpochResult], None] | None:
        if not self.verbose:
            return None
        return lambda result: print(
            f"Iteration {result.iteration}: log-likelihood {result.objective:.6g}, change {result.change:.3g}"
        )

    def _publish(self, results: list[EpochResult], warn: bool = True) -> None:
        theta = self._model.best_parameters()
        for field in fields(theta):
            value = getattr(theta, field.name)
            if isinstance(value, Tensor):
                setattr(self, f"{field.name}_", self._array(value))
        best = int(self._model.best)
        self.n_iter_ = int(self._model.iterations[best])
        self.lower_bounds_ = [float(result.objectives[best]) for result in results[: self.n_iter_]]
        self.lower_bound_ = self.lower_bounds_[-1] if self.lower_bounds_ else -math.inf
        self.converged_ = self._model.converged
        if warn and results and not self.converged_:
            warnings.warn(
                "Best performing initialization did not converge. Try different init parameters, or increase max_iter, "
                f"tol, or check for degenerate data. It did not converge in {self.n_iter_} iterations: log-likelihood "
                f"{self.lower_bound_:.6g}, last change {abs(results[-1].change):.3g}, tol {self.tol:.3g}.",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _array(self, values: Tensor) -> Array:
        """In the type of the samples that were fitted."""
        return values.cpu().numpy().astype(self._dtype, copy=False)

    # ------------------------------------------------------------------------------------- inference

    def _checked_joint(self, X: Any) -> Tensor:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        return self._model.log_joint(as_tensor(X, device=self.device))

    def _n_parameters(self) -> int:
        return self._model.num_free_parameters()

    def predict(self, X: Any) -> Array:
        """Returns the most probable component of each sample of `X`."""
        return self._checked_joint(X).argmax(dim=1).cpu().numpy()

    def predict_proba(self, X: Any) -> Array:
        """Returns the responsibilities, `[n_samples, n_components]`."""
        return self._array(torch.softmax(self._checked_joint(X), dim=1))

    def score_samples(self, X: Any) -> Array:
        """Returns the log-likelihood of each sample of `X`."""
        return self._array(torch.logsumexp(self._checked_joint(X), dim=1))

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Returns the mean log-likelihood of the samples of `X`."""
        total, count = self._log_likelihood(X, sample_weight)
        return total / count

    def bic(self, X: Any, sample_weight: Any = None) -> float:
        """Returns the Bayesian information criterion on `X`; lower is better."""
        total, count = self._log_likelihood(X, sample_weight)
        return -2 * total + self._model.num_free_parameters() * math.log(count)

    def aic(self, X: Any, sample_weight: Any = None) -> float:
        """Returns Akaike's information criterion on `X`; lower is better."""
        return -2 * self._log_likelihood(X, sample_weight)[0] + 2 * self._model.num_free_parameters()

    def _log_likelihood(self, X: Any, sample_weight: Any) -> tuple[float, float]:
        """Of all samples, and their weight."""
        values = torch.logsumexp(self._checked_joint(X), dim=1)
        if sample_weight is None:
            return float(values.sum()), len(values)
        weights = checked_weights(sample_weight, X, self.device)
        return float(values @ weights), float(weights.sum())
