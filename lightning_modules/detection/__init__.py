"""What a detector of generated images is made of: inputs, crops, calibration, class densities. No Lightning here."""

from lightning_modules.detection.calibration import Calibration
from lightning_modules.detection.class_densities import ClassDensities
from lightning_modules.detection.inputs import Colours, DetectorInput, DetectorInputs, NeighborDifferences
from lightning_modules.detection.prediction_buffer import Evaluated, Predictions
from lightning_modules.detection.restoration_residual import RestorationResidual
from lightning_modules.detection.scores import cross_judge, judge, scores
from lightning_modules.imaging import fixed_crops, to_pixels

__all__ = [
    "Calibration",
    "ClassDensities",
    "Colours",
    "DetectorInput",
    "DetectorInputs",
    "Evaluated",
    "NeighborDifferences",
    "Predictions",
    "RestorationResidual",
    "cross_judge",
    "fixed_crops",
    "judge",
    "scores",
    "to_pixels",
]
