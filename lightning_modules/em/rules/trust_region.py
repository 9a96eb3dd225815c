"""Newton's step within a trust region, and the variance of the optimum it leads to."""

import torch
from torch import Tensor

from lightning_modules.em.parameter_table import ParameterTable
from lightning_modules.em.rules.kalman_curvature import LEAST_NOISE, TINY, Model, to_groups

# Least curvature of a direction, in units of the curvature that is assumed before anything is known.
_FLOOR = 0.125
_SQUARE_ROOT_STEPS = 30
_VARIANCE_STEPS = 10


def bounded_step(
    table: ParameterTable,
    count: Tensor,
    model: Model,
    theta: Tensor,
    trust: Tensor,
    trust_radius: float,
) -> Tensor:
    """Newton's step of the global set and of each row that has images, within bounds and a distance.

    Args:
        table: The table, for its bounds and for what has rows.
        count: Images of the step.
        model: Gradient and curvature at θ.
        theta: Coordinates to step from.
        trust: Most that each coordinate may move; several such boxes may be given side by side.
        trust_radius: First trust radius.

    Shape:
        - count: `[G]`
        - theta: `[G, S]`
        - trust, output: `[..., G, S]`
    """
    # What has no rows moves with the global set alone.
    rows, has_rows = len(table.row_names), table.mask(table.learned_per_row).double()
    own = to_groups(torch.stack([torch.ones_like(has_rows), *[has_rows] * rows]))
    least, most = (to_groups(bound.expand(rows + 1, -1)) for bound in (table.lower, table.upper))
    lower = own * torch.maximum(-trust, least - theta)
    upper = own * torch.minimum(trust, most - theta)
    return torch.where(count[:, None] > 0, step_within(model, lower, upper, trust_radius), 0.0)


def step_within(model: Model, lower: Tensor, upper: Tensor, trust_radius: float) -> Tensor:
    r"""Newton's step inside a box.

    With :math:`S` the scales and :math:`B = S^{-1/2} A S^{-1/2}`, curvature counts by its size,
    :math:`|B| = (B^2 + \mu^2 I)^{1/2}`, so that a saddle repels (Dauphin et al., NeurIPS 2014). Coordinates that leave
    the box are clamped to its side and the others solved again.

    Args:
        model: Gradient and curvature.
        lower, upper: Most that each coordinate may move down (≤ 0) and up (≥ 0).
        trust_radius: First trust radius; sets the least curvature μ.

    Shape:
        - lower, upper: `[..., G, S]`
        - output: `[..., G, S]`; 0 where nothing has a gradient
    """
    root = model.scale.clamp_min(TINY**0.5).sqrt()
    abs_hessian = magnitude(model.curvature / (root[:, :, None] * root[:, None, :]), _FLOOR / trust_radius)
    lower, upper = lower * root, upper * root
    slope = (model.gradient / root).expand_as(lower)
    clamped, step = torch.zeros_like(slope, dtype=torch.bool), torch.zeros_like(slope)
    for _ in range(slope.shape[-1] + 1):
        # Lines and columns of the clamped coordinates become those of the identity.
        free = ~clamped
        system = torch.where(free[..., :, None] & free[..., None, :], abs_hessian, 0.0) + torch.diag_embed(
            clamped.double()
        )
        right_hand_side = -slope - (abs_hessian @ torch.where(clamped, step, 0.0)[..., None])[..., 0]
        # `solve` would make the host wait for an accelerator, to check what cannot fail here.
        solved = torch.linalg.solve_ex(system, torch.where(free, right_hand_side, step)[..., None])[0][..., 0]
        step = torch.minimum(torch.maximum(solved, lower), upper)
        clamped = clamped | (step != solved)
    return torch.where(model.scale > 0, step / root, 0.0)


def magnitude(matrix: Tensor, floor: float) -> Tensor:
    """`(B² + floor²)^½` of symmetric matrices `[..., P, P]`, by Newton and Schulz's products.

    An eigendecomposition would make the host wait for an accelerator.
    """
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    square = matrix @ matrix + floor**2 * eye
    total = square.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    root, inverse = square / total, eye.expand_as(square)
    for _ in range(_SQUARE_ROOT_STEPS):
        factor = 1.5 * eye - 0.5 * inverse @ root
        root, inverse = root @ factor, factor @ inverse
    return root * total.sqrt()


def optimum_variance(model: Model, width: Tensor) -> Tensor:
    r"""Variance v of the θ at which the gradient vanishes: the sandwich :math:`A^{-1} \Sigma A^{-1}`.

    A curvature that is not well known leaves that θ uncertain too: Σ is the covariance of the gradient plus
    :math:`\sum_j \operatorname{Var}(A_{ij}) v_j`, by iteration from the largest v.

    Args:
        model: Gradient and curvature with their variances.
        width: Distance between the bounds: no variance exceeds that of the uniform distribution between them.

    Shape:
        - width: `[S]` or `[G, S]`
        - output: `[G, S]`
    """
    root = model.scale.clamp_min(TINY**0.5).sqrt()
    pair = root[:, :, None] * root[:, None, :]
    has_gradient = (model.scale > 0).double()
    curvature = model.curvature / pair * has_gradient[:, :, None] * has_gradient[:, None, :]
    covariance, hessian_variance = model.covariance / pair, model.hessian_variance / pair.square()
    # Coordinates that cannot move have no distance between their bounds, and no variance.
    prior = (width * root).square().clamp_min(TINY) / 12
    variance = prior
    for _ in range(_VARIANCE_STEPS):
        extra = (hessian_variance * variance[:, None, :]).sum(2)
        extra = extra + LEAST_NOISE * covariance.diagonal(dim1=1, dim2=2) + TINY
        information = curvature @ torch.linalg.inv_ex(covariance + torch.diag_embed(extra))[0] @ curvature
        precision = information + torch.diag_embed(1 / prior)
        variance = torch.linalg.inv_ex(precision)[0].diagonal(dim1=1, dim2=2).clamp_min(0)
    return variance / root.square()


def theta_of(shared: Tensor, offsets: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Coordinates of the global set and of each row as they are read, `[K + 1, P]`."""
    return torch.cat([shared[None], (shared + offsets).clamp(lower, upper)])
