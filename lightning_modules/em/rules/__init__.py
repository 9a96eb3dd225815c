"""M-steps: one file for each rule; a rule of your own is a subclass of `Rule` and its class path in a configuration."""

from lightning_modules.em.rules.bayesian import BayesianRule
from lightning_modules.em.rules.gradient import GradientRule
from lightning_modules.em.rules.newton import NewtonRule
from lightning_modules.em.rules.rule import Rule, RuleState
from lightning_modules.em.rules.sign import SignRule

__all__ = ["BayesianRule", "GradientRule", "NewtonRule", "Rule", "RuleState", "SignRule"]
