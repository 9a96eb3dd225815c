"""Restoration operators: the protocol, and those that need no graph."""

from lightning_modules.operators.bilateral import BilateralFilter
from lightning_modules.operators.field_of_experts import FieldOfExperts
from lightning_modules.operators.function import FunctionOperator
from lightning_modules.operators.operator import ParameterSpec, RestorationOperator, Smoothness
from lightning_modules.operators.total_variation import TotalVariation

__all__ = [
    "BilateralFilter",
    "FieldOfExperts",
    "FunctionOperator",
    "ParameterSpec",
    "RestorationOperator",
    "Smoothness",
    "TotalVariation",
]
