"""K-means for data in memory, with scikit-learn's interface."""

import warnings
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data

from lightning_modules.mixtures.initialization import kmeans_plus_plus, random_samples
from lightning_modules.mixtures.lloyd import LloydResult, assign, lloyd
from lightning_modules.mixtures.standardizer import Standardizer, StreamMoments

Array = NDArray[Any]


class KMeansEstimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """`lightning_modules.KMeans` for data in memory, with scikit-learn's interface.

    The data being in memory, samples whose bounds forbid a change of cluster are skipped (Hamerly 2010); the result is
    that of plain K-means.

    Args:
        n_clusters: Clusters.
        init: `k-means++`, `random` samples, or centers to start from, `[n_clusters, n_features]`.
        n_init: Restarts; the best is kept.
        max_iter: Iterations at most.
        tol: The fit has converged when the squared movement of the centers, summed, is at most this many mean variances
            of a feature.
        standardize: Scale the features to variance 1 inside; reported centers are in the units of the data.
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
        "init": [StrOptions({"k-means++", "random"}), "array-like"],
        "n_init": [Interval(Integral, 1, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0.0, None, closed="left")],
        "standardize": ["boolean"],
        "random_state": ["random_state"],
        "device": [str],
    }

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Literal["k-means++", "random"] | Any = "k-means++",
        n_init: int = 1,
        max_iter: int = 300,
        tol: float = 1e-4,
        standardize: bool = False,
        random_state: Any = None,
        device: str = "cpu",
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.standardize = standardize
        self.random_state = random_state
        self.device = device

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None) -> "KMeansEstimator":
        """Finds the clusters.

        Args:
            X: Samples, `[n_samples, n_features]`.
            y: Unused.
        """
        X = validate_data(self, X, dtype=[np.float64, np.float32])
        if X.shape[0] < self.n_clusters:
            raise ValueError(f"n_samples={X.shape[0]} should be >= n_clusters={self.n_clusters}.")
        # a view where numpy allows one: nothing writes to it
        samples = (torch.from_numpy(X) if X.flags.writeable else torch.tensor(X)).to(self.device)
        self._standardizer = StreamMoments.of(samples).standardizer("feature" if self.standardize else "common")
        z = self._standardizer.transform(samples).to(samples.dtype)
        restarts = [lloyd(z, centers, self.max_iter, self.tol) for centers in self._starts(z, X.shape[1])]
        best = min(restarts, key=lambda result: result.inertia)
        self._publish(best, X)
        return self

    def _starts(self, z: torch.Tensor, num_features: int) -> list[torch.Tensor]:
        if not isinstance(self.init, str):
            initial = torch.tensor(np.asarray(self.init, dtype=np.float64), device=self.device)
            if initial.shape != (self.n_clusters, num_features):
                raise ValueError(
                    f"The shape of the initial centers {tuple(initial.shape)} does not match the number of clusters "
                    f"and features {(self.n_clusters, num_features)}."
                )
            return [self._standardizer.transform(initial).to(z.dtype)]
        choose = kmeans_plus_plus if self.init == "k-means++" else random_samples
        state = check_random_state(self.random_state)
        seeds = [int(state.randint(np.iinfo(np.int32).max)) for _ in range(self.n_init)]
        return [choose(z, self.n_clusters, torch.Generator().manual_seed(seed)) for seed in seeds]

    def _publish(self, result: LloydResult, X: Array) -> None:
        unit = 1.0 if self.standardize else float(self._standardizer.scale[0]) ** 2
        self.cluster_centers_ = self._standardizer.inverse_transform(result.centers).cpu().numpy().astype(X.dtype)
        self.labels_ = result.labels.cpu().numpy().astype(np.int32)
        self.inertia_ = result.inertia * unit
        self.n_iter_ = result.n_iter
        found = len(np.unique(self.labels_))
        if found < self.n_clusters:
            warnings.warn(
                f"Number of distinct clusters ({found}) found smaller than n_clusters ({self.n_clusters}). Possibly "
                "due to duplicate points in X.",
                ConvergenceWarning,
                stacklevel=3,
            )

    @property
    def _n_features_out(self) -> int:
        return self.n_clusters

    def _nearest(self, X: Any) -> tuple[torch.Tensor, torch.Tensor]:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        samples, centers = self._standardized(X, self.cluster_centers_)
        labels, squares = assign(centers[None], samples)
        return labels[0], squares[0]

    def _standardized(self, *arrays: Array) -> list[torch.Tensor]:
        standardizer: Standardizer = self._standardizer
        return [standardizer.transform(torch.tensor(array, device=self.device)) for array in arrays]

    def predict(self, X: Any) -> Array:
        """Returns the nearest cluster of each sample of `X`."""
        return self._nearest(X)[0].cpu().numpy().astype(np.int32)

    def transform(self, X: Any) -> Array:
        """Returns the distance of each sample of `X` to each center."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        unit = 1.0 if self.standardize else float(self._standardizer.scale[0])
        samples, centers = self._standardized(X, self.cluster_centers_)
        return (torch.cdist(samples, centers) * unit).cpu().numpy().astype(X.dtype)

    def score(self, X: Any, y: Any = None) -> float:
        """Returns minus the sum of squared distances of the samples of `X` to their centers."""
        unit = 1.0 if self.standardize else float(self._standardizer.scale[0]) ** 2
        return -float(self._nearest(X)[1].sum()) * unit
