"""Modules trained by expectation-maximization in Lightning.

Names are loaded when they are first used, so that `import lightning_modules.graph` does not load Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_modules._renamed import renamed
from lightning_modules._version import __version__ as __version__

if TYPE_CHECKING:
    from lightning_modules.checkpoints.module import AtomicCheckpointIO
    from lightning_modules.detection import NeighborDifferences, RawPixels, RestorationResidual
    from lightning_modules.em import EStep, ParameterTable
    from lightning_modules.generated_image_detector import GeneratedImageDetector
    from lightning_modules.graph import GraphDiffusion
    from lightning_modules.graph_denoiser import GraphDenoiser
    from lightning_modules.learning import learn_parameters
    from lightning_modules.mixtures.gaussian.estimator import GaussianMixtureEstimator
    from lightning_modules.mixtures.gaussian.module import GaussianMixture
    from lightning_modules.mixtures.kmeans.estimator import KMeansEstimator
    from lightning_modules.mixtures.kmeans.module import KMeans
    from lightning_modules.mixtures.student_t.estimator import StudentTMixtureEstimator
    from lightning_modules.mixtures.student_t.module import StudentTMixture
    from lightning_modules.networks import (
        ConvAutoencoder,
        FullResolutionResNet,
        GatedUNet,
        PatchPrior,
        PerceptualLoss,
        ResidualDenoiser,
        TraceNetwork,
    )
    from lightning_modules.noise import NoiseModel
    from lightning_modules.operators import (
        BilateralFilter,
        FieldOfExperts,
        FunctionOperator,
        ParameterSpec,
        RestorationOperator,
        TotalVariation,
    )
    from lightning_modules.patch_mixture import PatchMixture
    from lightning_modules.point_cloud_reconstruction import PointCloudReconstruction
    from lightning_modules.point_clouds import PointCloudDiffusion
    from lightning_modules.reconstruction import GraphDiffusionReconstruction, Reconstruction
    from lightning_modules.restoration import restore

_HOME = {
    "AtomicCheckpointIO": "checkpoints.module",
    "BilateralFilter": "operators",
    "ConvAutoencoder": "networks",
    "EStep": "em",
    "FieldOfExperts": "operators",
    "FullResolutionResNet": "networks",
    "FunctionOperator": "operators",
    "GatedUNet": "networks",
    "GaussianMixture": "mixtures",
    "GaussianMixtureEstimator": "mixtures",
    "GeneratedImageDetector": "generated_image_detector",
    "GraphDenoiser": "graph_denoiser",
    "GraphDiffusion": "graph",
    "GraphDiffusionReconstruction": "reconstruction",
    "KMeans": "mixtures",
    "KMeansEstimator": "mixtures",
    "NeighborDifferences": "detection",
    "NoiseModel": "noise",
    "ParameterSpec": "operators",
    "ParameterTable": "em",
    "PatchMixture": "patch_mixture",
    "PatchPrior": "networks",
    "PerceptualLoss": "networks",
    "PointCloudDiffusion": "point_clouds",
    "PointCloudReconstruction": "point_cloud_reconstruction",
    "RawPixels": "detection",
    "Reconstruction": "reconstruction",
    "ResidualDenoiser": "networks",
    "RestorationOperator": "operators",
    "RestorationResidual": "detection",
    "StudentTMixture": "mixtures",
    "StudentTMixtureEstimator": "mixtures",
    "TotalVariation": "operators",
    "TraceNetwork": "networks",
    "learn_parameters": "learning",
    "restore": "restoration",
}

__all__ = [
    "AtomicCheckpointIO",
    "BilateralFilter",
    "ConvAutoencoder",
    "EStep",
    "FieldOfExperts",
    "FullResolutionResNet",
    "FunctionOperator",
    "GatedUNet",
    "GaussianMixture",
    "GaussianMixtureEstimator",
    "GeneratedImageDetector",
    "GraphDenoiser",
    "GraphDiffusion",
    "GraphDiffusionReconstruction",
    "KMeans",
    "KMeansEstimator",
    "NeighborDifferences",
    "NoiseModel",
    "ParameterSpec",
    "ParameterTable",
    "PatchMixture",
    "PatchPrior",
    "PerceptualLoss",
    "PointCloudDiffusion",
    "PointCloudReconstruction",
    "RawPixels",
    "Reconstruction",
    "ResidualDenoiser",
    "RestorationOperator",
    "RestorationResidual",
    "StudentTMixture",
    "StudentTMixtureEstimator",
    "TotalVariation",
    "TraceNetwork",
    "learn_parameters",
    "restore",
]


_renamed = renamed(__name__, {"Colours": "lightning_modules.RawPixels"})


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        return _renamed(name)
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
