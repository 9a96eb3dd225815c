"""Evaluation of a detector under each condition, and the DataModule that it needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from callbacks._tables import Line


class Files(Protocol):
    """Image files of a split, in the order of the batches' `index`."""

    paths: list[Path]
    names: list[str]
    labels: Tensor  # [N], int64


class DetectorData(Protocol):
    """A DataModule with images of two classes, tested under one or more conditions."""

    class_names: list[str]
    conditions: list[str]  # one test loader each, all over the same images

    def files(self, split: str) -> Files:
        """Returns the files of `train` or `test`."""

    def read(self, path: Path, condition: str = "clean") -> Tensor:
        """Returns a whole image as it is under a condition.

        Shape:
            - output: `[3, H, W]`, uint8
        """

    def mirrors(self, height: int, width: int, condition: str = "clean") -> bool:
        """Returns whether an image of a size is smaller than a crop under a condition, and continued by its mirror."""


@dataclass(frozen=True)
class Evaluation:
    """Predictions of images under one condition.

    Attributes:
        index: Positions in the list of test files, `[N]`, int64.
        probability: Of the second class, `[N]`, float64.
        label: `[N]`, int64.
    """

    index: Tensor
    probability: Tensor
    label: Tensor


def evaluations(lines: list[Line], conditions: list[str]) -> dict[str, Evaluation]:
    """Sorts predictions by condition, that is by loader; `limit_test_batches` may leave some without any."""
    result = {}
    for number, condition in enumerate(conditions):
        found = [line for line in lines if line["order"][0] == number]
        if found:
            result[condition] = Evaluation(
                torch.tensor([line["order"][1] for line in found]),
                torch.tensor([line["probability"] for line in found], dtype=torch.float64),
                torch.tensor([line["label"] for line in found]),
            )
    return result


def top_losses(evaluation: Evaluation, threshold: float, max_count: int) -> list[int]:
    """Returns positions of the images on the wrong side of the threshold, the farthest from their label first."""
    wrong = (evaluation.probability > threshold) != (evaluation.label == 1)
    distance = (evaluation.probability - evaluation.label).abs().where(wrong, -1.0)
    return distance.argsort(descending=True, stable=True)[: min(max_count, int(wrong.sum()))].tolist()
