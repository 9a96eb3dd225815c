"""Calibration of logits: temperature and decision threshold."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from lightning_modules.em._float64 import Float64Buffers

# Beyond these a temperature means no more than "certain" or "no idea".
_COLDEST, _HOTTEST = 1e-3, 1e3
_HALVINGS = 80
# Area under the ROC curve below which a detector is as good as a coin.
_CHANCE = 0.6


class Calibration(Float64Buffers):
    r"""Temperature scaling of a logit z, :math:`p = 1 / (1 + e^{-z/T})` (Guo et al., *On calibration of modern neural
    networks*, 2017), and the probability above which an image is predicted to be generated.

    Example:
        >>> calibration = Calibration()
        >>> calibration.fit(torch.tensor([-8.0, -4.0, 4.0, 8.0]), torch.tensor([0, 1, 0, 1]))
        >>> [round(probability, 2) for probability in calibration(torch.tensor([0.0, 8.0])).tolist()]
        [0.5, 0.6]
    """

    # T and the threshold in logits before scaling, float64 []: equal on every process, part of the checkpoint.
    temperature: Tensor
    boundary: Tensor
    # Area under the ROC curve of the images that it was fitted to, float64 []; NaN before a fit.
    auroc: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.ones((), dtype=torch.float64))
        self.register_buffer("boundary", torch.zeros((), dtype=torch.float64))
        self.register_buffer("auroc", torch.full((), torch.nan, dtype=torch.float64))

    def forward(self, logit: Tensor) -> Tensor:
        """Calibrated probability of each logit, in float32 at least.

        Shape:
            - logit: `[...]`
            - output: `[...]`
        """
        logit = logit.to(torch.promote_types(logit.dtype, torch.float32))
        return torch.sigmoid(logit / self.temperature.to(logit.dtype))

    @property
    def fitted(self) -> bool:
        """Whether there has been a fit."""
        return bool((self.temperature != 1) | (self.boundary != 0))

    @property
    def at_chance(self) -> bool:
        """Whether it was fitted to images that the logits hardly tell apart."""
        return bool(self.auroc < _CHANCE)

    @property
    def threshold(self) -> Tensor:
        """Probability above which predicting "generated" was most accurate where this was fitted."""
        return torch.sigmoid(self.boundary / self.temperature)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # checkpoints of the version before have none
        state_dict.setdefault(f"{prefix}auroc", torch.full_like(self.auroc, torch.nan))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def fit(self, logit: Tensor, label: Tensor) -> None:
        """Fit temperature and threshold.

        Shape:
            - logit: `[N]`
            - label: `[N]`, 0 or 1
        """
        self.temperature.copy_(fit_temperature(logit, label))
        self.boundary.copy_(best_threshold(logit, label)[1])
        # scaled, so that no two of them become equal as probabilities
        self.auroc.copy_(binary_auroc(torch.sigmoid(logit.double() / logit.abs().max().clamp_min(1)), label))


def fit_temperature(logit: Tensor, label: Tensor) -> Tensor:
    r"""The temperature that minimises the negative log-likelihood of the labels.

    The likelihood is convex in :math:`1/T`, so bisection on its derivative finds the minimum, without a step size and
    alike on every process. The labels are taken as :math:`(N_1 + 1)/(N_1 + 2)` and :math:`1/(N_0 + 2)` (Platt,
    *Probabilistic outputs for support vector machines*, 1999): with plain ones, a validation set without a mistake
    would ask for T = 0, that is for certainty.

    Shape:
        - logit: `[N]`
        - label: `[N]`, 0 or 1
        - output: `[]`, float64
    """
    z, positive = logit.double(), label.double()
    ones, zeros = positive.sum(), (1 - positive).sum()
    target = torch.where(label > 0, (ones + 1) / (ones + 2), 1 / (zeros + 2))
    low, high = (z.new_tensor(1 / bound).log() for bound in (_HOTTEST, _COLDEST))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        rising = (z * (torch.sigmoid(middle.exp() * z) - target)).sum() > 0
        low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
    return (-(low + high) / 2).exp()


def best_threshold(score: Tensor, label: Tensor, neutral: float = 0.0) -> tuple[Tensor, Tensor]:
    """The highest accuracy that a threshold reaches, and of the thresholds that do the one nearest to the neutral one.

    Args:
        score: Logits or probabilities; an image above the threshold is predicted to be of class 1.
        label: Classes.
        neutral: Threshold that is preferred: 0 for logits, one half for probabilities.

    Shape:
        - score: `[N]`, N at least 1
        - label: `[N]`, 0 or 1
        - output: `[]`, the accuracy, and `[]`, the threshold, float64
    """
    values, order = score.double().sort()
    positive = label.double()[order]
    edges = torch.cat([values[:1] - 1, values, values[-1:] + 1])
    # right where the first k images are predicted to be of class 0: those among them, and the others after them
    right = positive.sum() + torch.cat([positive.new_zeros(1), (1 - 2 * positive).cumsum(0)])
    right = torch.where(edges[1:] > edges[:-1], right, -torch.inf)  # no threshold between equal scores
    low, high = edges[:-1], edges[1:]
    # halfway between its neighbours, unless the neutral one is between them
    thresholds = torch.where((low < neutral) & (high > neutral), neutral, (low + high) / 2)
    best = thresholds[right == right.max()]
    return right.max() / len(values), best[(best - neutral).abs().argmin()]
