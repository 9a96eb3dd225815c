"""M-steps of a parameter table, one file for each rule; your own is a subclass of `Rule`, named in a YAML file."""

from lightning_modules.em.rules.bayesian import BayesianRule
from lightning_modules.em.rules.gradient import GradientRule
from lightning_modules.em.rules.newton import NewtonRule
from lightning_modules.em.rules.rule import Rule, RuleState
from lightning_modules.em.rules.sign import SignRule
from lightning_modules.em.rules.spsa import SPSARule

__all__ = ["BayesianRule", "GradientRule", "NewtonRule", "Rule", "RuleState", "SPSARule", "SignRule"]
