"""Which row of the parameter table speaks for an image: one file for each way to decide."""

from lightning_modules.em.assignments.assignment import Assignment, GlobalAssignment
from lightning_modules.em.assignments.label import LabelAssignment

__all__ = ["Assignment", "GlobalAssignment", "LabelAssignment"]
