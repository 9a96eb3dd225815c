"""Normalisation of edge weights, in any layout: the same three Laplacians for dense and sparse graphs."""

import warnings
from typing import Literal

import torch
from torch import Tensor

from lightning_modules._eager import eager

Laplacian = Literal["symmetric", "random_walk", "unnormalized"]

# At or under this sum of edge weights a node counts as isolated: it keeps its value and gives nothing to others, and no
# gradient is divided by nothing.
DEGREE_FLOOR = 1e-12


def normalized_weight(weight: Tensor, degree_target: Tensor, degree_source: Tensor, laplacian: Laplacian) -> Tensor:
    r"""Off-diagonal part of :math:`I - L` for a normalised Laplacian L.

    .. math:: D^{-1/2} W D^{-1/2} \;\text{(symmetric)} \qquad D^{-1} W \;\text{(random walk)}

    Args:
        weight: Edge weights W.
        degree_target: Sum of the weights at the receiving node of each edge.
        degree_source: The same at the sending node.
        laplacian: Which normalisation; `unnormalized` returns the weights.

    Shape:
        - weight, degree_target, degree_source: broadcastable to each other
        - output: as weight
    """
    if laplacian == "unnormalized":
        return weight
    if laplacian == "random_walk":
        return weight * (is_joined(degree_target) / degree_target.clamp_min(DEGREE_FLOOR))
    roots = (is_joined(degree) * degree.clamp_min(DEGREE_FLOOR).rsqrt() for degree in (degree_target, degree_source))
    return weight * next(roots) * next(roots)


def is_joined(degree: Tensor) -> Tensor:
    """Whether nodes with these sums of edge weights are joined to any other.

    Shape:
        - degree: any
        - output: as degree
    """
    return degree > DEGREE_FLOOR


def stable_step(tau: Tensor, max_degree: Tensor) -> Tensor:
    r"""Diffusion step of the unnormalised Laplacian, scaled down where it would diverge.

    Gershgorin's circles bound the largest eigenvalue of D − W by twice the largest degree, so every
    :math:`\tau \le 1 / \max_i d_i` is stable, and keeps :math:`I - \tau L` non-negative. Warns when it scales.

    Args:
        tau: Requested step τ.
        max_degree: Largest degree of each graph.

    Shape:
        - tau, max_degree: broadcastable to each other
        - output: their broadcast shape
    """
    bound = 1 / max_degree.clamp_min(DEGREE_FLOOR)
    step = torch.minimum(tau, bound)
    _warn_once(step, tau)
    return step


_WARNING = (
    "tau={tau:.4g} exceeds the stable step {step:.4g} of the unnormalised Laplacian (1 / largest degree) and was "
    "scaled down to it, here and wherever it happens again: lower tau, or choose laplacian='random_walk' or "
    "'symmetric', which are stable for every tau ≤ 1"
)
_warned = False


@eager
def _warn_once(step: Tensor, tau: Tensor) -> None:
    global _warned
    if _warned:  # the comparison below waits for the device: once is enough
        return
    scaled = step < tau
    if bool(scaled.any()):
        _warned = True
        requested = tau.expand_as(step)[scaled][0]
        warnings.warn(_WARNING.format(tau=float(requested), step=float(step[scaled][0])), stacklevel=4)
