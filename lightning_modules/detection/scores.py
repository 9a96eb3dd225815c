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
from lightning_modules.detection.prediction_buffer import Evaluated

# Bins of the expected calibration error, as Guo et al. (2017) have them.
_BINS = 15


class Judgement(NamedTuple):
    """What a calibrated detector says about N images; NaN where nothing has been fitted that could say it.

    Attributes:
        ranking: Probability of "generated" by one calibration of all the images, `[N]`: their order.
        probability: Calibrated probability of "generated", `[N]`.
        called: 1 where the probability is above the threshold and 0 elsewhere, `[N]`.
        densities: Log density under each class, `[N, 2]`.
        novelty: `[N]`.
    """

    ranking: Tensor
    probability: Tensor
    called: Tensor
    densities: Tensor
    novelty: Tensor


def judge(seen: Evaluated, calibration: Calibration, densities: ClassDensities) -> Judgement:
    """Judges images by what has been fitted."""
    probability = calibration(seen.logit)
    return Judgement(
        probability,
        probability,
        (seen.logit > calibration.boundary).double(),
        densities.log_densities(seen.features),
        densities.novelty(seen.features),
    )


def cross_judge(seen: Evaluated, calibration: Calibration, densities: ClassDensities) -> Judgement:
    """Judges each half of the images by a fit to the other, so that nothing is judged by a fit to itself.

    What a half has too few images to fit is NaN in the other: an earlier fit has seen these very images. Images of one
    class can be fitted to by nothing, and are judged by what there is.
    """
    whole = judge(seen, calibration, densities)
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
        for target, values in zip(crossed, judge(seen.select(own), *fitted), strict=True):
            target[own] = values
    return Judgement(*crossed)._replace(ranking=whole.ranking)


def scores(seen: Evaluated, judgement: Judgement) -> dict[str, Tensor]:
    """Every score by its name; NaN where it is not defined, as the area under a curve of one class.

    `loss` is the negative log-likelihood of the calibrated probabilities; `novel`, the share of images that neither
    class explains.
    """
    label = seen.label
    nothing = seen.logit.new_tensor(torch.nan)
    if not len(label):
        return {}
    both, ranking, probability = seen.has_both_classes, judgement.ranking, judgement.probability
    generative = judgement.densities.argmax(1) == label
    calibrated, fitted = (bool(values.isfinite().all()) for values in (probability, judgement.novelty))
    return {
        "loss": F.binary_cross_entropy(probability, label.double()) if calibrated else nothing,
        "accuracy": binary_accuracy(ranking, label),
        "accuracy_at_threshold": (judgement.called == label).double().mean() if calibrated else nothing,
        "average_precision": binary_average_precision(ranking, label) if both else nothing,
        "auroc": binary_auroc(ranking, label) if both else nothing,
        "ece": binary_calibration_error(probability, label, n_bins=_BINS) if calibrated else nothing,
        "generative_accuracy": generative.double().mean() if fitted else nothing,
        "novel": (judgement.novelty > 0).double().mean() if fitted else nothing,
    }
