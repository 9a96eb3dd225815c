"""Mixtures and K-means by exact, streaming, multi-process EM.

Names are loaded when they are first used: only the modules need Lightning, and only the estimators scikit-learn.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.mixtures.brute_force import best_clustering, enumerated_log_likelihood
    from lightning_modules.mixtures.collectives import Collectives, SufficientStatistics
    from lightning_modules.mixtures.estimator import MixtureEstimator
    from lightning_modules.mixtures.gaussian.bound import evidence_lower_bound, log_likelihood, posterior
    from lightning_modules.mixtures.gaussian.em import GaussianStatistics, MixtureParameters
    from lightning_modules.mixtures.gaussian.estimator import GaussianMixtureEstimator
    from lightning_modules.mixtures.gaussian.model import GaussianMixtureModel
    from lightning_modules.mixtures.gaussian.model_selection import choose_num_components
    from lightning_modules.mixtures.gaussian.module import GaussianMixture
    from lightning_modules.mixtures.kmeans.em import KMeansStatistics
    from lightning_modules.mixtures.kmeans.estimator import KMeansEstimator
    from lightning_modules.mixtures.kmeans.model import KMeansModel
    from lightning_modules.mixtures.kmeans.module import KMeans
    from lightning_modules.mixtures.model import ClusteringModel, MixtureModel, fit_in_memory
    from lightning_modules.mixtures.module import ClusteringModule, MixtureModule

_HOME = {
    "ClusteringModel": "model",
    "ClusteringModule": "module",
    "Collectives": "collectives",
    "GaussianMixture": "gaussian.module",
    "GaussianMixtureEstimator": "gaussian.estimator",
    "GaussianMixtureModel": "gaussian.model",
    "GaussianStatistics": "gaussian.em",
    "KMeans": "kmeans.module",
    "KMeansEstimator": "kmeans.estimator",
    "KMeansModel": "kmeans.model",
    "KMeansStatistics": "kmeans.em",
    "MixtureEstimator": "estimator",
    "MixtureModel": "model",
    "MixtureModule": "module",
    "MixtureParameters": "gaussian.em",
    "SufficientStatistics": "collectives",
    "best_clustering": "brute_force",
    "choose_num_components": "gaussian.model_selection",
    "enumerated_log_likelihood": "brute_force",
    "evidence_lower_bound": "gaussian.bound",
    "fit_in_memory": "model",
    "log_likelihood": "gaussian.bound",
    "posterior": "gaussian.bound",
}

__all__ = [
    "ClusteringModel",
    "ClusteringModule",
    "Collectives",
    "GaussianMixture",
    "GaussianMixtureEstimator",
    "GaussianMixtureModel",
    "GaussianStatistics",
    "KMeans",
    "KMeansEstimator",
    "KMeansModel",
    "KMeansStatistics",
    "MixtureEstimator",
    "MixtureModel",
    "MixtureModule",
    "MixtureParameters",
    "SufficientStatistics",
    "best_clustering",
    "choose_num_components",
    "enumerated_log_likelihood",
    "evidence_lower_bound",
    "fit_in_memory",
    "log_likelihood",
    "posterior",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
