"""Lightning callbacks: the M-step and its rules."""

from callbacks.em_parameter import EMParameterCallback
from callbacks.rules import GradientRule, Rule, SignRule

__all__ = ["EMParameterCallback", "GradientRule", "Rule", "SignRule"]
