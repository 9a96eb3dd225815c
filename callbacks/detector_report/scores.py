"""How good probabilities are, in all and in parts of the images."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_calibration_error,
)

Scores = dict[str, float]

_CALIBRATION_BINS = 15
_SHORTER_SIDES = (64, 128, 256, 512, 1024)  # pixels; limits of the bins


def score(probability: Tensor, label: Tensor, threshold: float = 0.5) -> Scores:
    """Scores of one set of images; what needs both classes is NaN where there is but one.

    `accuracy` is that at one half, `accuracy_at_threshold` that at the threshold which the detector has chosen
    elsewhere, `accuracy_best` the highest that any threshold reaches on these very images: a bound, and optimistic.

    Shape:
        - probability: [N], float
        - label: [N], int64, 0 or 1
    """
    positive = label == 1
    best, where = best_threshold(probability, label)
    nan = float("nan")
    both = 0 < int(positive.sum()) < len(label)
    return {
        "n": len(label),
        "positive": int(positive.sum()),
        "accuracy": accuracy(probability, label),
        "accuracy_at_threshold": accuracy(probability, label, threshold),
        "accuracy_best": best,
        "best_threshold": where,
        "average_precision": float(binary_average_precision(probability, label)) if both else nan,
        "auroc": float(binary_auroc(probability, label)) if both else nan,
        "ece": float(binary_calibration_error(probability, label, n_bins=_CALIBRATION_BINS)) if len(label) else nan,
    }


def accuracy(probability: Tensor, label: Tensor, threshold: float = 0.5) -> float:
    """Part of the images that lie on the right side of a threshold; NaN of none."""
    return float(((probability > threshold) == (label == 1)).double().mean())


def best_threshold(probability: Tensor, label: Tensor) -> tuple[float, float]:
    """Returns the highest accuracy that a threshold can reach, and of the thresholds that do the one nearest 0.5.

    Shape:
        - probability, label: [N]
    """
    if not len(label):
        return float("nan"), float("nan")
    values, order = probability.double().sort()
    positive = (label[order] == 1).long()
    # what is right when the first k images are called photographs: those among them, and the others after them
    right = positive.sum() + torch.cat([positive.new_zeros(1), (1 - 2 * positive).cumsum(0)])
    edges = torch.cat([values.new_tensor([-1e-12]), values, values.new_ones(1)])
    right[1:-1][values[1:] == values[:-1]] = -1  # what is equal cannot be parted
    middles = (edges[1:] + edges[:-1]) / 2
    best = middles[right == right.max()]
    return int(right.max()) / len(label), float(best[(best - 0.5).abs().argmin()])


def slices(sizes: Sequence[tuple[int, int]], formats: Sequence[str]) -> dict[str, Tensor]:
    """Returns parts of the images by name: `all`, then by shorter side in pixels, then by file format.

    Shape:
        - values of the result: [N], bool
    """
    shorter = torch.tensor([min(size) for size in sizes])
    parts = {"all": torch.ones(len(sizes), dtype=torch.bool)}
    for low, high in pairwise((0, *_SHORTER_SIDES, 2**31)):
        name = f"side {low} to {high - 1}" if high < 2**31 else f"side {low} and more"
        parts[name] = (shorter >= low) & (shorter < high)
    for file_format in sorted(set(formats)):
        parts[f"format {file_format}"] = torch.tensor([other == file_format for other in formats])
    return {name: part for name, part in parts.items() if part.any()}
