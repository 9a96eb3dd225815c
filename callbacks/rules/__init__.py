"""M-steps: one file for each rule; a rule of your own is a subclass of `Rule` and its class path in a configuration."""

from callbacks.rules.bayesian import BayesianRule
from callbacks.rules.gradient import GradientRule
from callbacks.rules.newton import NewtonRule
from callbacks.rules.rule import Rule, RuleState
from callbacks.rules.sign import SignRule

__all__ = ["BayesianRule", "GradientRule", "NewtonRule", "Rule", "RuleState", "SignRule"]
