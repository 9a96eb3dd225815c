"""Expectation–maximisation as tensor mathematics: no Lightning here."""

from lightning_modules.em.brute_force import best_clustering, enumerated_log_likelihood
from lightning_modules.em.evidence_lower_bound import evidence_lower_bound, log_likelihood, posterior
from lightning_modules.em.gaussian_mixture import MixtureParameters, MixtureStatistics

__all__ = [
    "MixtureParameters",
    "MixtureStatistics",
    "best_clustering",
    "enumerated_log_likelihood",
    "evidence_lower_bound",
    "log_likelihood",
    "posterior",
]
