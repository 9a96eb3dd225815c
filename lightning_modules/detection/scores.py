"""Scores of a detector, and cross-fitted evaluation of the images that it is calibrated on."""

from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_calibration_error,
)

from lightning_modules.detection.calibration import Calibration
from lightning_modules.detection.class_densities import ClassDensities
from lightning_modules.detection.prediction_buffer import BufferedPredictions

# Bins of the expected calibration error, as Guo et al. (2017) have them.
_BINS = 15


class Evaluation(NamedTuple):
    """Results of a calibrated detector on N images; NaN where nothing has been fitted that they would follow from.

    Attributes:
        ranking: Probability of "generated" by one calibration of all the images, `[N]`: their order.
        probability: Calibrated probability of "generated", `[N]`.
        predicted: 1 where the probability is above the threshold and 0 elsewhere, `[N]`.
        densities: Log density under each class, `[N, 2]`.
        ood_score: How far out of distribution, `[N]`.
    """

    ranking: Tensor
    probability: Tensor
    predicted: Tensor
    densities: Tensor
    ood_score: Tensor


def evaluate(seen: BufferedPredictions, calibration: Calibration, densities: ClassDensities) -> Evaluation:
    """Evaluates images by what has been fitted."""
    probability = calibration(seen.logit)
    return Evaluation(
        probability,
        probability,
        (seen.logit > calibration.boundary).double(),
        densities.log_densities(seen.features),
        densities.ood_score(seen.features),
    )


def cross_fit(seen: BufferedPredictions, calibration: Calibration, densities: ClassDensities) -> Evaluation:
    """Evaluates each half of the images by a fit to the other, so that none is evaluated by a fit to itself.

    What a half has too few images to fit is NaN in the other: an earlier fit has seen these very images. Images of one
    class can be fitted to by nothing, and are evaluated by what there is.
    """
    whole = evaluate(seen, calibration, densities)
    if not seen.has_both_classes:
        return whole
    crossed = [torch.full_like(values, torch.nan) for values in whole]
    first, second = seen.halves()
    for own, other in ((first, second), (second, first)):
        rest = seen.select(other)
        if not rest.has_both_classes:
            continue
        fitted = deepcopy(calibration), deepcopy(densities)
        fitted[1].fitted.fill_(False)
        fitted[0].fit(rest.logit, rest.label)
        fitted[1].fit(rest.features, rest.label)
        for target, values in zip(crossed, evaluate(seen.select(own), *fitted), strict=True):
            target[own] = values
    return Evaluation(*crossed)._replace(ranking=whole.ranking)


def scores(seen: BufferedPredictions, evaluation: Evaluation) -> dict[str, Tensor]:
    """Every score by its name; NaN where it is not defined, as the area under a curve of one class.

    `loss` is the negative log-likelihood of the calibrated probabilities; `ood_fraction`, the share of images that are
    out of distribution.

    Shape:
        - output: `[]` each
    """
    label, probability = seen.label, evaluation.probability
    nothing = seen.logit.new_tensor(torch.nan)
    if not len(label):
        return {}
    calibrated, fitted = (bool(values.isfinite().all()) for values in (probability, evaluation.ood_score))
    return {
        **probability_scores(evaluation.ranking, label),
        "loss": F.binary_cross_entropy(probability, label.double()) if calibrated else nothing,
        "accuracy_at_threshold": accuracy(evaluation.predicted, label) if calibrated else nothing,
        "ece": binary_calibration_error(probability, label, n_bins=_BINS) if calibrated else nothing,
        "generative_accuracy": accuracy(evaluation.densities.argmax(1), label) if fitted else nothing,
        "ood_fraction": (evaluation.ood_score > 0).double().mean() if fitted else nothing,
    }


def probability_scores(probability: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Scores of probabilities and nothing else; NaN where they are not defined.

    Shape:
        - probability: `[N]`
        - label: `[N]`, 0 or 1
        - output: `[]` each
    """
    both = 0 < int(label.sum()) < len(label)
    nothing = probability.new_tensor(torch.nan)
    return {
        "accuracy": accuracy(probability, label),
        "average_precision": binary_average_precision(probability, label) if both else nothing,
        "auroc": binary_auroc(probability, label) if both else nothing,
        "ece": binary_calibration_error(probability, label, n_bins=_BINS) if len(label) else nothing,
    }


def accuracy(probability: Tensor, label: Tensor, threshold: float = 0.5) -> Tensor:
    """Part of the images that are on the right side of a threshold; NaN of none.

    Shape:
        - probability: `[N]`
        - label: `[N]`, 0 or 1
        - output: `[]`, float64
    """
    return ((probability > threshold) == (label == 1)).double().mean()
