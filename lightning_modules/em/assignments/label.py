"""Rows by class label: an observed latent variable."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.em.assignments.assignment import Assignment


class LabelAssignment(Assignment):
    """The row of the image's class label; the global set where there is no label (−1).

    Args:
        evaluate_with_labels: Use the labels in validation and test as well. Off by default: a score that peeks at the
            label is not a score of a model that will be used without.

    Example:
        >>> import torch
        >>> assignment = LabelAssignment().train()
        >>> assignment(torch.rand(2, 3, 8, 8), torch.tensor([1, -1]), torch.zeros(2), num_rows=2).tolist()
        [[0.0, 1.0], [0.0, 0.0]]
    """

    def __init__(self, evaluate_with_labels: bool = False) -> None:
        super().__init__()
        self.evaluate_with_labels = evaluate_with_labels

    def check_labels(self, labels: Tensor, num_rows: int) -> None:
        """Refuse labels outside the table; see `Assignment.check_labels`."""
        outside = (labels < -1) | (labels >= num_rows)
        if outside.any():
            raise ValueError(
                f"label {int(labels[outside][0])} has no row: the parameter table has {num_rows} rows, so labels run "
                f"from 0 to {num_rows - 1}, and −1 means 'no label'. Give the table one row name for each class (the "
                "command line takes them from the data's class_names), or choose GlobalAssignment"
            )

    def forward(self, images: Tensor, labels: Tensor, noise_std: Tensor, num_rows: int) -> Tensor:
        """One-hot labels; see `Assignment.forward`."""
        if not (self.training or self.evaluate_with_labels):
            labels = torch.full_like(labels, -1)
        if labels.device.type == "cpu":  # on an accelerator the look would stall every step; it was taken before
            self.check_labels(labels, num_rows)
        return F.one_hot(labels + 1, num_rows + 1)[:, 1:].double()
