"""Buffer of an epoch's predictions, gathered over the processes."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class BufferedPredictions(NamedTuple):
    """Images in the order of their index, the same on every process.

    Attributes:
        logit: `[N]`, float64.
        label: `[N]`, 0 or 1.
        features: `[N, F]`, float64.
        unseen: `[N]`, bool: whether an image is of a source that is not trained on.
    """

    logit: Tensor
    label: Tensor
    features: Tensor
    unseen: Tensor

    def select(self, chosen: Tensor) -> "BufferedPredictions":
        """Some of the images.

        Shape:
            - chosen: `[N]`, a mask, or `[M]`, positions
        """
        return BufferedPredictions(*(column[chosen] for column in self))

    def halves(self) -> tuple[Tensor, Tensor]:
        """Masks of two halves, each with every other image of each class.

        Shape:
            - output: `[N]` and `[N]`, bool
        """
        count = torch.where(self.label == 1, self.label.cumsum(0), (1 - self.label).cumsum(0))
        return count % 2 == 1, count % 2 == 0

    @property
    def calibrating(self) -> "BufferedPredictions":
        """Those of sources that are not trained on, or all where they have not both classes."""
        unseen = self.select(self.unseen)
        return unseen if unseen.has_both_classes else self

    @property
    def has_both_classes(self) -> bool:
        """Whether there are photographs and generated images among them."""
        return 0 < int(self.label.sum()) < len(self.label)


class PredictionBuffer(Metric):
    """Logits, labels, features and kind of source of an epoch's labelled images, without the padded repeats.

    Example:
        >>> buffer = PredictionBuffer()
        >>> index, label, weight = torch.tensor([1, 0, 0]), torch.tensor([1, 0, 0]), torch.tensor([1.0, 1.0, 0.0])
        >>> buffer.update(index, torch.tensor([2.0, -1.0, -1.0]), label, torch.zeros(3, 4), weight)
        >>> buffer.compute().logit.tolist()
        [-1.0, 2.0]
    """

    full_state_update = False
    index: list[Tensor]
    logit: list[Tensor]
    label: list[Tensor]
    features: list[Tensor]
    unseen: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("index", *BufferedPredictions._fields):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self,
        index: Tensor,
        logit: Tensor,
        label: Tensor,
        features: Tensor,
        weight: Tensor,
        unseen: Tensor | None = None,
    ) -> None:
        """Adds a batch; its sources are all trained on where nothing else is said.

        Shape:
            - index, logit, label, weight, unseen: `[B]`
            - features: `[B, F]`
        """
        counted = (weight > 0) & (label >= 0)
        for kept, values in (
            (self.index, index),
            (self.logit, logit),
            (self.label, label),
            (self.features, features),
            (self.unseen, torch.zeros_like(label) if unseen is None else unseen.long()),
        ):
            kept.append(values[counted])

    def compute(self) -> BufferedPredictions:
        """The images of all processes."""
        order = dim_zero_cat(self.index).argsort(stable=True)
        logit, label, features, unseen = (dim_zero_cat(getattr(self, n))[order] for n in BufferedPredictions._fields)
        return BufferedPredictions(logit.double(), label.long(), features.double(), unseen.bool())
