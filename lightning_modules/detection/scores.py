"""How good a detector's judgements are, and an honest way to judge the images that it is calibrated on."""

from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_auroc,
    binary_average_precision,
    binary_calibration_error,
)

from lightning_modules.detection.calibration import Calibration
from lightning_modules.detection.class_densities import ClassDensities
from lightning_modules.detection.predictions import Evaluated

# Bins of the expected calibration error, as Guo et al. (2017) have them.
_BINS = 15


class Judgement(NamedTuple):
    """What a calibrated detector says about N images.

    Attributes:
        probability: Calibrated probability of "generated", `[N]`.
        called: Whether the probability is above the threshold, bool `[N]`.
        densities: Log density under each class, `[N, 2]`; NaN without a fit.
        novelty: `[N]`; NaN without a fit.
    """

    probability: Tensor
    called: Tensor
    densities: Tensor
    novelty: Tensor


def judge(seen: Evaluated, calibration: Calibration, densities: ClassDensities) -> Judgement:
    """Judges images by what has been fitted."""
    return Judgement(
        calibration(seen.logit),
        seen.logit > calibration.boundary,
        densities.log_densities(seen.features),
        densities.novelty(seen.features),
    )


def cross_judge(seen: Evaluated, calibration: Calibration, densities: ClassDensities) -> Judgement:
    """Judges each half of the images by a fit to the other, so that nothing is judged by a fit to itself.

    Where a half has too few images for a fit, it is judged by what has been fitted before.
    """
    first, second = seen.halves()
    parts = []
    for own, other in ((first, second), (second, first)):
        fitted = deepcopy(calibration), deepcopy(densities)
        rest = seen.select(other)
        if rest.has_both_classes:
            fitted[0].fit(rest.logit, rest.label)
            fitted[1].fit(rest.features, rest.label)
        parts.append((own, judge(seen.select(own), *fitted)))
    result = judge(seen, calibration, densities)
    for own, part in parts:
        for whole, values in zip(result, part, strict=True):
            whole[own] = values
    return result


def scores(seen: Evaluated, judgement: Judgement) -> dict[str, Tensor]:
    """Every score by its name; NaN where it is not defined, as the area under a curve of one class.

    `loss` is the negative log-likelihood of the calibrated probabilities; `novel`, the share of images that neither
    class explains.
    """
    label = seen.label
    nothing = seen.logit.new_tensor(torch.nan)
    if not len(label):
        return {}
    both, probability = seen.has_both_classes, judgement.probability
    generative = judgement.densities.argmax(1) == label
    fitted = bool(judgement.novelty.isfinite().all())
    return {
        "loss": F.binary_cross_entropy(probability, label.double()),
        "accuracy": binary_accuracy(seen.logit.sigmoid(), label),
        "accuracy_at_threshold": (judgement.called == (label > 0)).double().mean(),
        "average_precision": binary_average_precision(seen.logit.sigmoid(), label) if both else nothing,
        "auroc": binary_auroc(seen.logit.sigmoid(), label) if both else nothing,
        "ece": binary_calibration_error(probability, label, n_bins=_BINS),
        "generative_accuracy": generative.double().mean() if fitted else nothing,
        "novel": (judgement.novelty > 0).double().mean() if fitted else nothing,
    }
