"""Expectation-maximisation without Lightning: parameters with bounds and rows, responsibilities, mixtures."""

from lightning_modules._renamed import renamed
from lightning_modules.em.assignments import (
    Assignment,
    GlobalAssignment,
    LabelAssignment,
    MixtureAssignment,
    SimilarityAssignment,
)
from lightning_modules.em.e_step import EStep, SufficientStatistics
from lightning_modules.em.parameter_table import ParameterTable, TableValues
from lightning_modules.mixtures.brute_force import best_clustering, enumerated_log_likelihood
from lightning_modules.mixtures.gaussian.bound import evidence_lower_bound, log_likelihood, posterior
from lightning_modules.mixtures.gaussian.em import MixtureParameters, MixtureStatistics

__all__ = [
    "Assignment",
    "EStep",
    "GlobalAssignment",
    "LabelAssignment",
    "MixtureAssignment",
    "MixtureParameters",
    "MixtureStatistics",
    "ParameterTable",
    "SimilarityAssignment",
    "SufficientStatistics",
    "TableValues",
    "best_clustering",
    "enumerated_log_likelihood",
    "evidence_lower_bound",
    "log_likelihood",
    "posterior",
]

__getattr__ = renamed(__name__, {"Statistics": "lightning_modules.em.SufficientStatistics"})
