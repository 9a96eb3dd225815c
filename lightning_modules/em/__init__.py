"""Expectation-maximisation without Lightning: parameters with bounds and rows, responsibilities, statistics."""

from lightning_modules.em.assignments import Assignment, GlobalAssignment, LabelAssignment
from lightning_modules.em.e_step import EStep, Statistics
from lightning_modules.em.parameter_table import ParameterTable, TableValues

__all__ = [
    "Assignment",
    "EStep",
    "GlobalAssignment",
    "LabelAssignment",
    "ParameterTable",
    "Statistics",
    "TableValues",
]
