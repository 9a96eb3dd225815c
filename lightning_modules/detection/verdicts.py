"""Verdicts: a class where an image keeps it when it is saved again, and "unsure" elsewhere."""

import torch
from torch import Tensor

from lightning_modules.detection.calibration import Calibration
from lightning_modules.imaging import Degradation, degrade

#: What an image is put through; a verdict that it changes is none.
CHANGES = ("jpeg 90", "jpeg 75", "rescale 0.75", "blur 0.7")
#: The verdict on an image that is not taken for either class.
UNSURE = -1

#: Probability of its label, as calibrated, below which a verdict is none.
SURE = 0.75

_STRANGE = "unlike either class"
_TOO_CLOSE = "too close to the threshold"


def changed_views(crops: Tensor) -> list[Tensor]:
    """The crops of an image after each of `CHANGES`.

    Shape:
        - crops: `[V, 3, S, S]`, uint8
        - output: `[V, 3, S', S']` each, uint8
    """
    return [
        torch.stack([degrade(crop, degradation) for crop in crops]) for degradation in map(Degradation.parse, CHANGES)
    ]


def decide(logits: Tensor, calibration: Calibration, ood_score: Tensor) -> tuple[Tensor, list[str]]:
    """Verdicts, and for each that is unsure the reasons; the others have none.

    A detector that is at chance where it is calibrated has a temperature at which no verdict is sure.

    Args:
        logits: Of each image as it is, and after each of `CHANGES`.
        calibration: What the threshold is taken from.
        ood_score: Above 0 for images that the class densities explain by neither class; NaN where it is unknown.

    Shape:
        - logits: `[B, 1 + changes]`
        - ood_score: `[B]`
        - output: `[B]`, int64: 0, 1 or `UNSURE`
    """
    above = logits.double() - calibration.boundary
    generated = above > 0
    flips, strange = generated[:, 1:] != generated[:, :1], ood_score > 0
    close = torch.sigmoid(above[:, 0].abs() / calibration.temperature) < SURE
    reasons = [
        "; ".join(
            [_TOO_CLOSE] * is_close
            + [f"changes under {change}" for change, flipped in zip(CHANGES, row, strict=True) if flipped]
            + [_STRANGE] * is_strange
        )
        for is_close, row, is_strange in zip(close.tolist(), flips.tolist(), strange.tolist(), strict=True)
    ]
    return torch.where(close | flips.any(1) | strange, UNSURE, generated[:, 0].long()), reasons
