"""The bound that expectation-maximisation climbs."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_modules.mixtures.gaussian.em import MixtureParameters, log_joint


def evidence_lower_bound(q: Tensor, theta: MixtureParameters, x: Tensor) -> Tensor:
    r"""Jensen's lower bound on the log-likelihood of a mixture, equal to it exactly where `q` is the posterior.

    .. math:: J(q, \theta) = \sum_n \sum_k q_{nk} \log \frac{p(x_n, z_n = k; \theta)}{q_{nk}}
        \le \sum_n \log p(x_n; \theta)

    Dempster, Laird and Rubin 1977; Neal and Hinton 1998.

    Args:
        q: A distribution over the components for each sample.
        theta: One mixture.
        x: Data.

    Shape:
        - q: `[N, K]`
        - x: `[N, D]`
        - output: float64 `[]`

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> theta = MixtureParameters("diag", torch.tensor([0.5, 0.5]), torch.tensor([[0.0], [1.0]]), torch.ones(2, 1))
        >>> uniform = torch.full((2, 2), 0.5)
        >>> bool(evidence_lower_bound(uniform, theta, x) < log_likelihood(theta, x))
        True
    """
    q = q.double()
    total = q.sum(dim=1)
    expected_shape = (x.shape[0], theta.weights.shape[-1])
    if q.shape != expected_shape or bool((q < 0).any()) or bool(((total - 1).abs() > 1e-6).any()):
        raise ValueError(
            f"q must hold, for each of the {x.shape[0]} samples, {theta.weights.shape[-1]} probabilities that sum to 1;"
            f" got shape {tuple(q.shape)} with sums from {total.min():.6g} to {total.max():.6g}"
        )
    joint = log_joint(theta, x)
    # 0 log p = 0, also where p = 0
    expected = torch.where(q > 0, q * joint, 0.0).sum()
    return expected - torch.special.xlogy(q, q).sum()


def posterior(theta: MixtureParameters, x: Tensor) -> Tensor:
    r""":math:`p(z_n = k \mid x_n; \theta)`, the `q` for which the bound is tight.

    Shape:
        - x: `[N, D]`
        - output: `[N, K]`
    """
    return torch.softmax(log_joint(theta, x), dim=1)


def log_likelihood(theta: MixtureParameters, x: Tensor) -> Tensor:
    r""":math:`\sum_n \log p(x_n; \theta)`.

    Shape:
        - x: `[N, D]`
        - output: float64 `[]`
    """
    return torch.logsumexp(log_joint(theta, x), dim=1).sum()
