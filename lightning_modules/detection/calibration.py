"""From logits to probabilities that mean what they say."""

import torch
from torch import Tensor

from lightning_modules.em._float64 import Float64Buffers

# Beyond these a temperature says no more than "certain" or "no idea".
_COLDEST, _HOTTEST = 1e-3, 1e3
_HALVINGS = 80


class Calibration(Float64Buffers):
    r"""Temperature scaling of a logit z, :math:`p = 1 / (1 + e^{-z/T})` (Guo et al., *On calibration of modern neural
    networks*, 2017), and the probability above which to call an image generated.

    Example:
        >>> calibration = Calibration()
        >>> calibration.fit(torch.tensor([-8.0, -4.0, 4.0, 8.0]), torch.tensor([0, 1, 0, 1]))
        >>> [round(probability, 2) for probability in calibration(torch.tensor([0.0, 8.0])).tolist()]
        [0.5, 0.6]
    """

    # T and the threshold in logits before scaling, float64 []: equal on every process, part of the checkpoint.
    temperature: Tensor
    boundary: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.ones((), dtype=torch.float64))
        self.register_buffer("boundary", torch.zeros((), dtype=torch.float64))

    def forward(self, logit: Tensor) -> Tensor:
        """Calibrated probability of each logit, of the same shape; in float32 at least."""
        logit = logit.to(torch.promote_types(logit.dtype, torch.float32))
        return torch.sigmoid(logit / self.temperature.to(logit.dtype))

    @property
    def fitted(self) -> bool:
        """Whether there has been a fit."""
        return bool((self.temperature != 1) | (self.boundary != 0))

    @property
    def threshold(self) -> Tensor:
        """Probability above which calling an image generated was most accurate where this was fitted."""
        return torch.sigmoid(self.boundary / self.temperature)

    @torch.no_grad()
    def fit(self, logit: Tensor, label: Tensor) -> None:
        """Fit temperature and threshold.

        Shape:
            - logit: `[N]`
            - label: `[N]`, 0 or 1
        """
        self.temperature.copy_(fit_temperature(logit, label))
        self.boundary.copy_(most_accurate_boundary(logit, label))


def fit_temperature(logit: Tensor, label: Tensor) -> Tensor:
    r"""The temperature that minimises the negative log-likelihood of the labels.

    The likelihood is convex in :math:`1/T`, so bisection on its derivative finds the minimum, without a step size and
    alike on every process. The labels are taken as :math:`(N_1 + 1)/(N_1 + 2)` and :math:`1/(N_0 + 2)` (Platt,
    *Probabilistic outputs for support vector machines*, 1999): with plain ones, a validation set without a mistake
    would ask for T = 0, that is for certainty.

    Shape:
        - logit: `[N]`
        - label: `[N]`, 0 or 1
        - output: float64 scalar
    """
    z, target = logit.double(), platt_targets(label)
    low, high = (z.new_tensor(1 / bound).log() for bound in (_HOTTEST, _COLDEST))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        rising = (z * (torch.sigmoid(middle.exp() * z) - target)).sum() > 0
        low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
    return (-(low + high) / 2).exp()


def platt_targets(label: Tensor) -> Tensor:
    """What the labels `[N]` are taken as, float64 `[N]`; see `fit_temperature`."""
    positive = label.double()
    ones, zeros = positive.sum(), (1 - positive).sum()
    return torch.where(label > 0, (ones + 1) / (ones + 2), 1 / (zeros + 2))


def most_accurate_boundary(logit: Tensor, label: Tensor) -> Tensor:
    """The logit above which calling an image generated is most accurate; the one nearest to 0 where several are.

    Shape:
        - logit: `[N]`
        - label: `[N]`, 0 or 1
        - output: float64 scalar
    """
    z, order = logit.double().sort()
    value = 2 * label.double()[order] - 1
    edges = torch.cat([z[:1] - 1, z, z[-1:] + 1])
    # right calls less wrong ones if the first k images are called photographs
    score = torch.cat([value.new_zeros(1), -2 * value.cumsum(0)])
    score = torch.where(edges[1:] > edges[:-1], score, -torch.inf)  # no boundary between equal logits
    low, high = edges[:-1], edges[1:]
    # halfway between its neighbours, unless 0 lies between them
    candidates = torch.where((low < 0) & (high > 0), 0.0, (low + high) / 2)
    best = candidates[score == score.max()]
    return best[best.abs().argmin()]
