"""K-means for data in memory, with scikit-learn's interface."""

import math
import warnings
from collections.abc import Iterator
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from lightning_modules.mixtures.batches import as_tensor
from lightning_modules.mixtures.collectives import Collectives
from lightning_modules.mixtures.estimator import checked_weights, is_stream, stream_of
from lightning_modules.mixtures.initialization import (
    Samples,
    Stream,
    kmeans_plus_plus,
    random_samples,
    scalable_kmeans_plus_plus,
)
from lightning_modules.mixtures.kmeans.model import KMeansModel
from lightning_modules.mixtures.lloyd import assign, lloyd
from lightning_modules.mixtures.model import TIE, fit_stream
from lightning_modules.mixtures.rows import FramedRows, Rows, SparseRows, dense, squares_to
from lightning_modules.mixtures.standardizer import Standardizer, StreamMoments

Array = NDArray[Any]

# Restarts where `n_init="auto"` and a start may be a bad one.
AUTO_STARTS = 10


class KMeansEstimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """`lightning_modules.KMeans` for data in memory, with scikit-learn's interface.

    The data being in memory, samples whose bounds forbid a change of cluster are skipped (Hamerly 2010); the result is
    that of plain K-means. Sparse samples in SciPy's CSR format stay sparse. Every method that takes samples for
    fitting takes a `DataLoader` or a `LightningDataModule` as well, through which it goes once in each iteration.

    Args:
        n_clusters: Clusters.
        init: `k-means++`, `k-means||`, `random` samples, centers to start from, `[n_clusters, n_features]`, or a
            function of samples, number of clusters and `random_state` that returns those.
        n_init: Restarts; the best is kept. `auto` is 1 for k-means++, k-means|| and given centers, else 10.
        max_iter: Iterations at most.
        tol: The fit has converged when the squared movement of the centers, summed, is at most this many mean variances
            of a feature.
        algorithm: `exact` (of which `lloyd` and `elkan` are scikit-learn's names) moves the centers once an iteration;
            `stepwise` once a batch (mini-batch K-means, Sculley 2010).
        batch_size: Samples of a batch, where `stepwise`.
        reassignment_ratio: Centers that have seen less than this part of the samples of the largest one start again
            elsewhere, where `stepwise`.
        standardize: Scale the features to variance 1 inside; reported centers are in the units of the data.
        verbose: Whether to print each iteration.
        random_state: Seed.
        device: Where to compute, such as `cpu` or `cuda`.

    Example:
        >>> X = np.array([[1.0, 2], [1, 4], [1, 0], [10, 2], [10, 4], [10, 0]])
        >>> kmeans = KMeansEstimator(n_clusters=2, random_state=0).fit(X)
        >>> sorted(kmeans.cluster_centers_.tolist())
        [[1.0, 2.0], [10.0, 2.0]]
    """

    _parameter_constraints: dict[str, list[Any]] = {  # noqa: RUF012  (scikit-learn's protocol)
        "n_clusters": [Interval(Integral, 1, None, closed="left")],
        "init": [StrOptions({"k-means++", "k-means||", "random"}), callable, "array-like"],
        "n_init": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0.0, None, closed="left")],
        "algorithm": [StrOptions({"exact", "lloyd", "elkan", "stepwise"})],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "reassignment_ratio": [Interval(Real, 0.0, 1.0, closed="both")],
        "standardize": ["boolean"],
        "verbose": ["verbose"],
        "random_state": ["random_state"],
        "device": [str],
    }

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Literal["k-means++", "k-means||", "random"] | Any = "k-means++",
        n_init: int | Literal["auto"] = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        algorithm: Literal["exact", "lloyd", "elkan", "stepwise"] = "exact",
        batch_size: int = 1024,
        reassignment_ratio: float = 0.01,
        standardize: bool = False,
        verbose: bool | int = False,
        random_state: Any = None,
        device: str = "cpu",
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.algorithm = algorithm
        self.batch_size = batch_size
        self.reassignment_ratio = reassignment_ratio
        self.standardize = standardize
        self.verbose = verbose
        self.random_state = random_state
        self.device = device

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = not self.standardize
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    cluster_centers_: Array

    # --------------------------------------------------------------------------------------- fitting

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Finds the clusters.

        Args:
            X: Samples, `[n_samples, n_features]`, dense or sparse; or a `DataLoader` or `LightningDataModule`.
            y: Unused.
            sample_weight: How often each sample counts, `[n_samples]`; once by default.
        """
        state = check_random_state(self.random_state)
        self.__dict__.pop("_model", None)
        if is_stream(X):
            self._fit_stream(stream_of(X), self._model_options(None, state))
            self.n_features_in_, self._dtype = self._model.num_features, torch.float64
            return self
        X, weights = self._check_samples(X, sample_weight, reset=True)
        if self.algorithm == "stepwise":
            options, seed = self._model_options(X, state), int(state.randint(np.iinfo(np.int32).max))
            self._fit_stream(partial(self._batches, X, weights, seed), options)
            centers, samples = self._standardized(self.cluster_centers_, X)
            labels, squares = assign(centers[None], samples)
            squares = squares[0].double()
            inertia = float(squares.sum() if weights is None else squares @ weights)
            self._publish(self.cluster_centers_, labels[0], inertia, X)
            return self
        self._standardizer, tol = self._frame(X, weights)
        if issparse(X):
            (samples,) = self._standardized(X)
        else:
            samples = FramedRows(as_tensor(X, device=self.device), self._standardizer, self._dtype)
            # a start that is chosen looks at all of them again and again
            samples = dense(samples) if isinstance(self.init, str) else samples
        report = print if self.verbose else None
        results = []
        for centers in self._starts(X, samples, weights, state):
            if report:
                report("Initialization complete")
            results.append(lloyd(samples, centers, self.max_iter, tol, weights, report))
        least = min(result.inertia for result in results)
        # restarts that reached the same optimum differ by rounding: the first of them
        best = next(result for result in results if result.inertia <= least * (1 + TIE))
        self.n_iter_ = best.n_iter
        found = self._standardizer.inverse_transform(best.centers).cpu().numpy()
        self._publish(found, best.labels, best.inertia, X)
        return self

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Goes on learning from one more batch (mini-batch K-means), from a fit or from nothing.

        Each center is the mean of all the samples that it has been given; those of a fit count.

        Args:
            X: Samples, `[n_samples, n_features]`; of the first batch at least `n_clusters`.
            y: Unused.
            sample_weight: How often each sample counts, `[n_samples]`; once by default.
        """
        first = not hasattr(self, "cluster_centers_")
        X, weights = self._check_samples(X, sample_weight, reset=first, at_least=self.n_clusters if first else 1)
        state = check_random_state(self.random_state)
        if first:
            self._model = KMeansModel(self.n_clusters, X.shape[1], **self._model_options(X, state)).to(self.device)
            self._model.initialize(lambda: self._batches(X, weights, None))
        elif not hasattr(self, "_model"):
            self._resume_from_fit(state)
        self._model.algorithm = "stepwise"
        self._model.start_epoch()
        for samples, weight, _ in self._batches(X, weights, None):
            self._model.add_batch(samples, weight)
        self._model.end_batch()
        result = self._model.end_epoch()
        self.n_iter_ = result.iteration
        self._standardizer = self._model.standardizer
        found = self._model.best_parameters().centers.cpu().numpy()
        centers, samples = self._standardized(found, X)
        labels, squares = assign(centers[None], samples)
        self._publish(found, labels[0], float(squares.sum()), X)
        return self

    def _resume_from_fit(self, state: Any) -> None:
        """A model at the fitted centers, each of which has been given the samples of its cluster."""
        options = self._model_options(None, state) | {"init": "random", "n_init": 1, "centers_init": None}
        self._model = model = KMeansModel(self.n_clusters, self.n_features_in_, **options).to(self.device)
        model._set_standardizer(self._standardizer)
        model.centers[0] = self._standardized(self.cluster_centers_)[0].double()
        model.counts[0] = self._cluster_weights.to(model.counts)
        model.initialized.fill_(True)

    def _check_samples(self, X: Any, sample_weight: Any, reset: bool, at_least: int | None = None) -> tuple[Any, Any]:
        X = self._check_data(X, reset=reset)
        weights = None if sample_weight is None else checked_weights(sample_weight, X, self.device)
        if reset:
            self._dtype = torch.float32 if X.dtype == np.float32 else torch.float64
        count = X.shape[0] if weights is None else int((weights > 0).sum())
        if count < (self.n_clusters if at_least is None else at_least):
            raise ValueError(f"n_samples={count} should be >= n_clusters={self.n_clusters}.")
        return X, weights

    def _check_data(self, X: Any, reset: bool = False) -> Any:
        X = validate_data(self, X, reset=reset, accept_sparse="csr", dtype=[np.float64, np.float32])
        if issparse(X) and self.standardize:
            raise ValueError(
                "standardize=True would make sparse data dense: use standardize=False, after "
                "sklearn.preprocessing.MaxAbsScaler or StandardScaler(with_mean=False)."
            )
        return X

    def _num_starts(self) -> int:
        given = not isinstance(self.init, str) and not callable(self.init)
        if self.n_init == "auto":
            return 1 if given or self.init in ("k-means++", "k-means||") else AUTO_STARTS
        if given and self.n_init > 1:
            warnings.warn(
                "Explicit initial center position passed: performing only one init in "
                f"{type(self).__name__} instead of n_init={self.n_init}.",
                RuntimeWarning,
                stacklevel=4,
            )
            return 1
        return int(self.n_init)

    def _given_centers(self, X: Any, state: Any) -> Array:
        centers = self.init(X, self.n_clusters, random_state=state) if callable(self.init) else self.init
        centers = check_array(centers, dtype=[np.float64, np.float32])
        for number, expected, what in (
            (centers.shape[0], self.n_clusters, "number of clusters"),
            (centers.shape[1], X.shape[1], "number of features of the data"),
        ):
            if number != expected:
                raise ValueError(
                    f"The shape of the initial centers {centers.shape} does not match the {what} {expected}."
                )
        return centers

    def _starts(self, X: Any, samples: Rows, weights: Tensor | None, state: Any) -> list[Tensor]:
        self._n_init = self._num_starts()
        if not isinstance(self.init, str):
            given = [self._given_centers(X, state) for _ in range(self._n_init)]
            return [centers.to(samples.dtype) for centers in self._standardized(*given)]
        seeds = [int(state.randint(np.iinfo(np.int32).max)) for _ in range(self._n_init)]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if self.init == "k-means||":
            index = torch.arange(samples.shape[0], device=samples.device)
            stream = [(samples, weights, index)]
            found = scalable_kmeans_plus_plus(
                samples, lambda: stream, self.n_clusters, generators, seeds[0], Collectives(), weights
            )
            return list(found.to(samples.dtype))
        choose = kmeans_plus_plus if self.init == "k-means++" else random_samples
        return [choose(samples, self.n_clusters, generator, weights) for generator in generators]

    # ------------------------------------------------------------------------------------ by streams

    def _model_options(self, X: Any, state: Any) -> dict[str, Any]:
        self._n_init = self._num_starts()
        options = {name: getattr(self, name) for name in ("tol", "max_iter", "standardize", "reassignment_ratio")}
        options["algorithm"] = "stepwise" if self.algorithm == "stepwise" else "exact"
        options["seed"] = int(state.randint(np.iinfo(np.int32).max))
        if isinstance(self.init, str):
            return options | {"init": str(self.init), "n_init": self._n_init}
        if callable(self.init) and X is None:
            raise ValueError("A function as init needs the samples in memory: give centers, or the name of a method.")
        centers = np.asarray(self.init) if X is None else self._given_centers(X, state)
        return options | {"centers_init": as_tensor(centers, torch.float64), "n_init": 1}

    def _fit_stream(self, stream: Stream, options: dict[str, Any]) -> None:
        self._model = KMeansModel(self.n_clusters, **options).to(self.device)
        report = (
            (lambda result: print(f"Iteration {result.iteration - 1}, inertia {result.objective}."))
            if self.verbose
            else None
        )
        result = fit_stream(self._model, stream, report)[-1]
        self._standardizer = self._model.standardizer
        self.cluster_centers_ = self._model.best_parameters().centers.cpu().numpy()
        self.inertia_, self.n_iter_ = result.objective, int(self._model.iterations[self._model.best])

    def _batches(self, X: Any, weights: Tensor | None, seed: int | None) -> Iterator[Samples]:
        """Batches of samples in an order drawn with `seed`, in their own order without one; sparse ones dense."""
        count = X.shape[0]
        order = np.arange(count) if seed is None else np.random.RandomState(seed).permutation(count)
        for first in range(0, count, self.batch_size):
            index = order[first : first + self.batch_size]
            part = X[index].toarray() if issparse(X) else X[index]
            weight = None if weights is None else weights[torch.from_numpy(index).to(weights.device)]
            yield as_tensor(part, device=self.device), weight, torch.from_numpy(index).to(self.device)

    # --------------------------------------------------------------------------------------- results

    def _publish(self, centers: Array, labels: Tensor, inertia: float, X: Any) -> None:
        self.cluster_centers_ = centers.astype(X.dtype)
        self.labels_ = labels.cpu().numpy().astype(np.int32)
        self.inertia_ = inertia * self._unit() ** 2
        self._cluster_weights = torch.bincount(labels, minlength=self.n_clusters).double()
        found = int((self._cluster_weights > 0).sum())
        if found < self.n_clusters:
            warnings.warn(
                f"Number of distinct clusters ({found}) found smaller than n_clusters ({self.n_clusters}). Possibly "
                "due to duplicate points in X.",
                ConvergenceWarning,
                stacklevel=3,
            )

    @property
    def _n_features_out(self) -> int:
        return self.cluster_centers_.shape[0]

    def _unit(self) -> float:
        """Units of the data in one of the standardized data; with `standardize` the latter are kept."""
        return 1.0 if self.standardize else float(self._standardizer.scale[0])

    def _frame(self, X: Any, weights: Tensor | None) -> tuple[Standardizer, float]:
        """Where distances are computed, and `tol` there: about the mean unless sparse, in a unit of a power of two, by
        which division is exact.
        """
        if self.standardize:
            return StreamMoments.of(as_tensor(X, device=self.device), weights).standardizer("feature"), self.tol
        frame = self._common_frame(X, weights)
        deviation = float(frame.scale[0])
        unit = 2.0 ** round(math.log2(deviation))
        return Standardizer(frame.offset, torch.full_like(frame.scale, unit)), self.tol * (deviation / unit) ** 2

    def _common_frame(self, X: Any, weights: Tensor | None) -> Standardizer:
        if not issparse(X):
            return StreamMoments.of(as_tensor(X, device=self.device), weights).standardizer("common")
        share = np.ones(X.shape[0]) if weights is None else weights.numpy()
        mean, square = (share @ power / share.sum() for power in (X, X.multiply(X)))
        variance = float(np.clip(square - mean**2, 0.0, None).mean())
        scale = torch.full((X.shape[1],), math.sqrt(variance) if variance > 0 else 1.0, dtype=torch.float64)
        return Standardizer(torch.zeros_like(scale), scale)

    def _standardized(self, *arrays: Any) -> list[Any]:
        """Samples and centers as they are compared, in the type of those that were fitted; where one of them is sparse,
        about the origin, so that it stays so.
        """
        standardizer: Standardizer = self._standardizer
        if any(issparse(array) for array in arrays):
            standardizer = Standardizer(torch.zeros_like(standardizer.offset), standardizer.scale)
        return [
            SparseRows((array / float(standardizer.scale[0])).tocsr()).to(self._dtype)
            if issparse(array)
            else standardizer.transform(as_tensor(array, device=self.device)).to(self._dtype)
            for array in arrays
        ]

    def _nearest(self, X: Any) -> tuple[Tensor, Tensor]:
        check_is_fitted(self, "cluster_centers_")
        samples, centers = self._standardized(self._check_data(X), self.cluster_centers_)
        labels, squares = assign(centers[None], samples)
        return labels[0], squares[0]

    def predict(self, X: Any) -> Array:
        """Returns the nearest cluster of each sample of `X`."""
        return self._nearest(X)[0].cpu().numpy().astype(np.int32)

    def transform(self, X: Any) -> Array:
        """Returns the distance of each sample of `X` to each center."""
        check_is_fitted(self, "cluster_centers_")
        X = self._check_data(X)
        samples, centers = self._standardized(X, self.cluster_centers_)
        columns = [
            squares_to(samples, centers, torch.full((samples.shape[0],), k, device=samples.device))
            for k in range(len(centers))
        ]
        return (torch.stack(columns, dim=1).sqrt_() * self._unit()).cpu().numpy().astype(X.dtype)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Returns minus the sum of squared distances of the samples of `X` to their centers."""
        _, squares = self._nearest(X)
        if sample_weight is not None:
            squares = squares * checked_weights(sample_weight, X, self.device)
        return -float(squares.double().sum()) * self._unit() ** 2
