"""Which row of the parameter table speaks for an image: one file for each way to decide."""

from lightning_modules.em.assignments.assignment import Assignment, GlobalAssignment
from lightning_modules.em.assignments.label import LabelAssignment
from lightning_modules.em.assignments.mixture import MixtureAssignment
from lightning_modules.em.assignments.similarity import SimilarityAssignment

__all__ = ["Assignment", "GlobalAssignment", "LabelAssignment", "MixtureAssignment", "SimilarityAssignment"]
