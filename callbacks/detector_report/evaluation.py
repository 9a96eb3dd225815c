"""Evaluation of a detector under each condition: predictions, scores, top losses, and the DataModule that it needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from callbacks._tables import Line
from lightning_modules.detection.calibration import best_threshold
from lightning_modules.detection.scores import accuracy, probability_scores

_SHORTER_SIDES = (64, 128, 256, 512, 1024)  # pixels; limits of the bins


class Files(Protocol):
    """Image files of a split, in the order of the batches' `index`."""

    paths: list[Path]
    names: list[str]
    labels: Tensor  # [N], int64
    sources: list[str]


class DetectorData(Protocol):
    """A DataModule with images of two classes, tested under one or more conditions."""

    class_names: list[str]
    conditions: list[str]  # one test loader each, all over the same images

    def files(self, split: str) -> Files:
        """Returns the files of `train` or `test`."""

    def read(self, path: Path, condition: str = "clean") -> Tensor:
        """Returns a whole image as it is under a condition, `[3, H, W]`, uint8."""

    def mirrors(self, height: int, width: int, condition: str = "clean") -> bool:
        """Returns whether an image of a size is smaller than a crop under a condition, and continued by its mirror."""


@dataclass(frozen=True)
class Evaluation:
    """Predictions of images under one condition.

    Attributes:
        index: Positions in the list of test files, `[N]`, int64.
        probability: Of the second class, `[N]`, float64.
        label: `[N]`, int64.
        verdict: 0, 1, or −1 for unsure, `[N]`, int64; None where the module gives none.
    """

    index: Tensor
    probability: Tensor
    label: Tensor
    verdict: Tensor | None = None


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
                torch.tensor([line["verdict"] for line in found]) if "verdict" in found[0] else None,
            )
    return result


def top_losses(evaluation: Evaluation, threshold: float, max_count: int) -> list[int]:
    """Returns positions of the images on the wrong side of the threshold, the farthest from their label first."""
    wrong = (evaluation.probability > threshold) != (evaluation.label == 1)
    distance = (evaluation.probability - evaluation.label).abs().where(wrong, -1.0)
    return distance.argsort(descending=True, stable=True)[: min(max_count, int(wrong.sum()))].tolist()


def score(probability: Tensor, label: Tensor, threshold: float = 0.5) -> dict[str, float]:
    """Scores one set of images; what needs both classes is NaN where there is but one, and all is NaN of no images.

    `accuracy` is that at one half, `accuracy_at_threshold` that at the threshold which the detector has chosen
    elsewhere, `accuracy_best` the highest that any threshold reaches on these very images: a bound, and optimistic.

    Shape:
        - probability: `[N]`
        - label: `[N]`, int64, 0 or 1
    """
    none = torch.tensor([float("nan")] * 2)
    best, where = best_threshold(probability, label, neutral=0.5) if len(label) else none
    return {
        "n": len(label),
        "positive": int(label.sum()),
        **{name: float(value) for name, value in probability_scores(probability, label).items()},
        "accuracy_at_threshold": float(accuracy(probability, label, threshold)),
        "accuracy_best": float(best),
        "best_threshold": float(where.clamp(0, 1)),
    }


def verdict_scores(verdict: Tensor, label: Tensor) -> dict[str, float]:
    """Scores verdicts: `unsure`, the share of those that are; accuracy of the others, and of all, unsure as wrong.

    Shape:
        - verdict: `[N]`, int64: 0, 1, or −1 for unsure
        - label: `[N]`, int64, 0 or 1
    """
    right, sure = (verdict == label).double(), verdict >= 0
    return {
        "unsure": float((~sure).double().mean()),
        "accuracy_sure": float(right[sure].mean()),
        "accuracy_verdict": float(right.mean()),
    }


def slices(sizes: Sequence[tuple[int, int]], formats: Sequence[str]) -> dict[str, Tensor]:
    """Returns masks of parts of the images by name: `all`, then by shorter side in pixels, then by file format.

    Shape:
        - output: `[N]` each, bool
    """
    shorter = torch.tensor([min(size) for size in sizes])
    parts = {"all": torch.ones(len(sizes), dtype=torch.bool)}
    for low, high in pairwise((0, *_SHORTER_SIDES, 2**31)):
        name = f"side {low} to {high - 1}" if high < 2**31 else f"side {low} and more"
        parts[name] = (shorter >= low) & (shorter < high)
    for file_format in sorted(set(formats)):
        parts[f"format {file_format}"] = torch.tensor([other == file_format for other in formats])
    return {name: part for name, part in parts.items() if part.any()}
