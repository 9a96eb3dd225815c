"""Restoration operators: the protocol, and those that need no graph."""

from lightning_modules.operators.operator import ParameterSpec, RestorationOperator, Smoothness

__all__ = ["ParameterSpec", "RestorationOperator", "Smoothness"]
