"""Expectation-maximisation without Lightning: parameters with bounds and rows, and responsibilities."""

from lightning_modules._renamed import renamed
from lightning_modules.em.assignments import (
    Assignment,
    GlobalAssignment,
    LabelAssignment,
    MixtureAssignment,
    SimilarityAssignment,
)
from lightning_modules.em.e_step import EStep, SufficientStatistics
from lightning_modules.em.parameter_table import ParameterPair, ParameterTable, TableValues

__all__ = [
    "Assignment",
    "EStep",
    "GlobalAssignment",
    "LabelAssignment",
    "MixtureAssignment",
    "ParameterPair",
    "ParameterTable",
    "SimilarityAssignment",
    "SufficientStatistics",
    "TableValues",
]

__getattr__ = renamed(
    __name__,
    {
        "MixtureParameters": "lightning_modules.mixtures.MixtureParameters",
        "MixtureStatistics": "lightning_modules.mixtures.GaussianStatistics",
        "Statistics": "lightning_modules.em.SufficientStatistics",
        "best_clustering": "lightning_modules.mixtures.best_clustering",
        "enumerated_log_likelihood": "lightning_modules.mixtures.enumerated_log_likelihood",
        "evidence_lower_bound": "lightning_modules.mixtures.evidence_lower_bound",
        "log_likelihood": "lightning_modules.mixtures.log_likelihood",
        "posterior": "lightning_modules.mixtures.posterior",
    },
)
