"""Modules trained by expectation-maximisation in Lightning.

Names are loaded when they are first used, so that `import lightning_modules.graph` does not load Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.em import EStep, ParameterTable
    from lightning_modules.gaussian_mixture import GaussianMixture
    from lightning_modules.gaussian_mixture_estimator import GaussianMixtureEstimator
    from lightning_modules.graph import GraphDiffusion
    from lightning_modules.kmeans import KMeans
    from lightning_modules.kmeans_estimator import KMeansEstimator
    from lightning_modules.networks import ConvAutoencoder, PatchPrior, PerceptualLoss, ResidualDenoiser
    from lightning_modules.patch_mixture import PatchMixture
    from lightning_modules.reconstruction import GraphDiffusionReconstruction

_HOME = {
    "ConvAutoencoder": "networks",
    "EStep": "em",
    "GaussianMixture": "gaussian_mixture",
    "GaussianMixtureEstimator": "gaussian_mixture_estimator",
    "GraphDiffusion": "graph",
    "GraphDiffusionReconstruction": "reconstruction",
    "KMeans": "kmeans",
    "KMeansEstimator": "kmeans_estimator",
    "ParameterTable": "em",
    "PatchMixture": "patch_mixture",
    "PatchPrior": "networks",
    "PerceptualLoss": "networks",
    "ResidualDenoiser": "networks",
}

__all__ = [
    "ConvAutoencoder",
    "EStep",
    "GaussianMixture",
    "GaussianMixtureEstimator",
    "GraphDiffusion",
    "GraphDiffusionReconstruction",
    "KMeans",
    "KMeansEstimator",
    "ParameterTable",
    "PatchMixture",
    "PatchPrior",
    "PerceptualLoss",
    "ResidualDenoiser",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
