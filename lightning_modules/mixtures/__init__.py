"""Mixtures and K-means by exact, streaming, multi-process EM.

Names are loaded when they are first used: only the modules need Lightning, and only the estimators scikit-learn.
"""

from importlib import import_module
from typing import Any

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
    "StudentTMixture": "student_t.module",
    "StudentTMixtureEstimator": "student_t.estimator",
    "StudentTMixtureModel": "student_t.model",
    "SufficientStatistics": "collectives",
    "best_clustering": "brute_force",
    "choose_num_components": "model_selection",
    "enumerated_log_likelihood": "brute_force",
    "evidence_lower_bound": "gaussian.bound",
    "fit_in_memory": "model",
    "log_likelihood": "gaussian.bound",
    "posterior": "gaussian.bound",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
