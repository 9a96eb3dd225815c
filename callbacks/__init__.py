"""Lightning callbacks: the M-step and its rules, and what shows a run to its user."""

from callbacks.detector_report import DetectorReport
from callbacks.em_dashboard import EMDashboard
from callbacks.em_health import EMHealth
from callbacks.em_parameter import EMParameterCallback
from callbacks.em_report import EMReport
from callbacks.image_grid import ImageGrid
from callbacks.mixture_dashboard import MixtureDashboard
from callbacks.point_cloud_view import PointCloudView
from callbacks.point_cloud_writer import PointCloudWriter
from callbacks.prediction_writer import PredictionWriter
from callbacks.pretrained_writer import PretrainedWriter
from callbacks.restored_image_writer import RestoredImageWriter
from lightning_modules.em.rules import BayesianRule, GradientRule, NewtonRule, Rule, SignRule, SPSARule

__all__ = [
    "BayesianRule",
    "DetectorReport",
    "EMDashboard",
    "EMHealth",
    "EMParameterCallback",
    "EMReport",
    "GradientRule",
    "ImageGrid",
    "MixtureDashboard",
    "NewtonRule",
    "PointCloudView",
    "PointCloudWriter",
    "PredictionWriter",
    "PretrainedWriter",
    "RestoredImageWriter",
    "Rule",
    "SPSARule",
    "SignRule",
]
