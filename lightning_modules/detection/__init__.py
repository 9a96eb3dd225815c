"""Parts of a detector of generated images: inputs, crops, calibration, class densities. No Lightning here."""

from lightning_modules._renamed import renamed
from lightning_modules.detection.calibration import Calibration
from lightning_modules.detection.class_densities import ClassDensities
from lightning_modules.detection.inputs import DetectorInput, DetectorInputs, NeighborDifferences, RawPixels
from lightning_modules.detection.prediction_buffer import BufferedPredictions, PredictionBuffer
from lightning_modules.detection.restoration_residual import RestorationResidual
from lightning_modules.detection.scores import cross_fit, evaluate, probability_scores, scores
from lightning_modules.detection.verdicts import CHANGES, UNSURE, changed_views, decide
from lightning_modules.imaging import fixed_crops, to_pixels

__all__ = [
    "CHANGES",
    "UNSURE",
    "BufferedPredictions",
    "Calibration",
    "ClassDensities",
    "DetectorInput",
    "DetectorInputs",
    "NeighborDifferences",
    "PredictionBuffer",
    "RawPixels",
    "RestorationResidual",
    "changed_views",
    "cross_fit",
    "decide",
    "evaluate",
    "fixed_crops",
    "probability_scores",
    "scores",
    "to_pixels",
]

__getattr__ = renamed(
    __name__,
    {
        "Colours": "lightning_modules.detection.RawPixels",
        "Evaluated": "lightning_modules.detection.BufferedPredictions",
        "Predictions": "lightning_modules.detection.PredictionBuffer",
        "cross_judge": "lightning_modules.detection.cross_fit",
        "judge": "lightning_modules.detection.evaluate",
    },
)
