"""Scores of a detector's probabilities, and the parts of the images that are scored."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightning_modules.detection.calibration import best_threshold
from lightning_modules.detection.scores import accuracy, probability_scores

_SHORTER_SIDES = (64, 128, 256, 512, 1024)  # pixels; limits of the bins


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
