"""What the second-order rules know of the objective, a gradient and its curvature, and the step that follows."""

from typing import NamedTuple

import torch
from torch import Tensor

from callbacks.rules.rule import RuleState
from lightning_modules.em import ParameterTable, Statistics

# Decay of the gradients' scale and noise from batch to batch, at the fastest: far away, older ones are worthless.
_DECAY = 0.8
# Degrees of freedom over which the noise is pooled where the last batches have fewer: far fewer tell little.
_MEMORY = 32
# Relative variance under which images count as alike: keeps a division by their noise finite.
_LEAST_NOISE = 1e-12
# Mean squared surprise, in units of its expectation, above which the model is taken to have been wrong.
_SURPRISE = 16.0
# Trust radii as multiples of the first: least and largest, and the change after agreement and after overshooting.
LEAST_RADIUS, _LARGEST, _GROWTH, _CUT = 0.2, 2.0, 1.5, 0.5
# Least curvature of a direction, in units of the curvature that is assumed before anything is known.
_FLOOR = 0.125
_SQUARE_ROOT_STEPS = 30
_VARIANCE_STEPS = 10
_TINY = 1e-60


class Model(NamedTuple):
    """Gradient and curvature at the place of the last evaluation, for the global set (row 0) and each row.

    Attributes:
        gradient: Filtered gradient, `[K + 1, P]`.
        curvature: Symmetric curvature, `[K + 1, P, P]`.
        covariance: Covariance of the filtered gradient, `[K + 1, P, P]`.
        doubt: Variance of each entry of the curvature, `[K + 1, P, P]`.
        scale: Root mean square of the images' gradients, `[K + 1, P]`; 0 where nothing has a gradient.
        radius: Trust radius, in log units, `[K + 1, P]`.
    """

    gradient: Tensor
    curvature: Tensor
    covariance: Tensor
    doubt: Tensor
    scale: Tensor
    radius: Tensor


def initial_state(table: ParameterTable, radius: float) -> RuleState:
    """Tensors of the filter before the first evaluation."""
    rows, size = len(table.row_names) + 1, len(table.names)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros((rows, *shape), dtype=torch.float64, device=table.shared.device)

    return {
        "images": zeros(1),
        "place": zeros(size),
        "centre": zeros(size),
        "mean": zeros(size, size + 1),
        "covariance": zeros(size, size + 1, size + 1),
        "square": zeros(size),
        "within": zeros(size, size),
        "freedom": zeros(1),
        "radius": zeros(size) + radius,
    }


def observe(
    state: RuleState, statistics: Statistics, place: Tensor, centre: Tensor, radius: float, reach: float, cautious: bool
) -> tuple[Model, RuleState]:
    r"""Takes the gradients of one step into the filter.

    Each component i of the gradient has a Kalman filter of its own over :math:`(g_i, A_{i1}, \dots, A_{iP})`: the
    gradient at the present place and its derivatives. A move d carries it along, and curvature drifts on the way,

    .. math:: g_i \leftarrow g_i + \sum_j A_{ij} d_j, \qquad
        \operatorname{Var} A_{ij} \leftarrow \operatorname{Var} A_{ij}
        + (1 - e^{-|d|^2 / \ell^2})\, \kappa_{ij}^2 s_i^2,

    with the scale s of the images' gradients and the reach ℓ. Half of what the drift does to the gradient over the
    move is added to the gradient's variance. The measurement is the mean gradient of the images, whose noise is known
    from how far the images differ: :math:`\nu_i = V_i / n` for n of them, and :math:`V_i \sum r^2 / (\sum r)^2` where
    responsibilities r share them among the rows (White, Econometrica 48, 1980). A single image does not tell; there it
    is judged by the filter's surprise (Mehra, IEEE TAC 15, 1970). Where the measured gradients surprise the filter much
    more than it expects (the objective is no quadratic), all its variances grow by that factor (strong tracking; Zhou &
    Frank, IFAC 1991). Secant pairs of noisy gradients are thereby weighed by what they are worth (Hennig & Kiefel,
    "Quasi-Newton methods: a new direction", JMLR 14, 2013).

    Args:
        state: State of the filter.
        statistics: Sums over the images of the step.
        place: Coordinates at which the gradients were taken.
        centre: Coordinates about which the places are chosen: curvature drifts as this moves, not as they stray.
        radius: First trust radius; before anything is known a step has this length.
        reach: Distance ℓ in log units over which curvature changes.
        cautious: Take a single image's gradient for noise until later ones agree with it. That keeps variances honest
            where steps have one image each, and makes such steps slow where there is no noise.

    Shape:
        - place, centre: `[K + 1, P]`
    """
    count, gradient = statistics.count[:, None], statistics.mean_gradient
    square = statistics.mean_square_gradient
    seen, first = count > 0, state["images"] == 0
    # Components that have had no gradient yet: a network may begin without using what the parameter acts on.
    fresh = state["square"] == 0
    square = torch.where(fresh, square, torch.lerp(square, state["square"], _DECAY))
    unit = square.clamp_min(_TINY)
    move = torch.where(first, 0.0, place - state["place"])
    eye = torch.eye(place.shape[1], dtype=place.dtype, device=place.device)

    known, curvature = state["mean"][:, :, 0], state["mean"][:, :, 1:]
    curvature = torch.where(fresh[..., None], eye * unit.sqrt()[:, :, None] / radius, curvature)
    predicted = known + (curvature @ move[..., None])[..., 0]
    covariance = _carried(state["covariance"], move, centre - state["centre"], unit, fresh, radius, reach)
    surprise = gradient - predicted
    within, freedom = _scatter(state, statistics, surprise, covariance[:, :, 0, 0], fresh, cautious)
    # A variance that few degrees of freedom tell is taken for larger, as Student's t is wider than the normal.
    images = statistics.effective_count[:, None]
    factor = 1 / (freedom * count).clamp_min(_TINY) + 2 / (freedom.square() * images).clamp_min(_TINY)
    noise = within.diagonal(dim1=1, dim2=2).clamp_min(0) * factor + _LEAST_NOISE * unit
    alive = square > 0
    excess = torch.where(alive, surprise.square() / (covariance[:, :, 0, 0] + noise), 0.0).sum(1, keepdim=True)
    excess = excess / alive.sum(1, keepdim=True).clamp_min(1)
    covariance = covariance * torch.where(~first & (excess > _SURPRISE), excess, 1.0)[..., None, None]
    gain = covariance[:, :, :, 0] / (covariance[:, :, 0, 0] + noise)[..., None]
    mean = torch.cat([predicted[..., None], curvature], 2) + gain * surprise[..., None]
    covariance = covariance - gain[..., :, None] * covariance[:, :, None, 0, :]

    # The gradient still points along the last move: the radius was too small. It has turned: too large.
    along = torch.where(first, 0.0, move * mean[:, :, 0])
    radii = torch.where(along < 0, (state["radius"] * _GROWTH).clamp_max(_LARGEST * radius), state["radius"])
    radii = torch.where(along > 0, (radii * _CUT).clamp_min(LEAST_RADIUS * radius), radii)
    found = {
        "images": state["images"] + count,
        "place": place.clone(),  # a view of the table would move with it
        "centre": centre.clone(),
        "mean": mean,
        "covariance": covariance,
        "square": square,
        "within": within,
        "freedom": freedom,
        "radius": radii,
    }
    state = {
        name: torch.where(seen.view(-1, *[1] * (tensor.ndim - 1)), tensor, state[name])
        for name, tensor in found.items()
    }
    return model_of(state), state


def step_within(model: Model, lower: Tensor, upper: Tensor, radius: float) -> Tensor:
    r"""Newton's step inside a box.

    With :math:`S` the scales and :math:`B = S^{-1/2} A S^{-1/2}`, curvature counts by its size,
    :math:`|B| = (B^2 + \mu^2 I)^{1/2}`, so that a saddle repels (Dauphin et al., NeurIPS 2014). Coordinates that leave
    the box are held at its side and the others solved again.

    Args:
        model: Gradient and curvature.
        lower, upper: Most that each coordinate may move down (≤ 0) and up (≥ 0).
        radius: First trust radius; sets the least curvature μ.

    Shape:
        - lower, upper: `[K + 1, P]`
        - output: `[K + 1, P]`; 0 where nothing has a gradient
    """
    root = model.scale.clamp_min(_TINY**0.5).sqrt()
    bowl = magnitude(model.curvature / (root[:, :, None] * root[:, None, :]), _FLOOR / radius)
    slope, lower, upper = model.gradient / root, lower * root, upper * root
    held, step = torch.zeros_like(slope, dtype=torch.bool), torch.zeros_like(slope)
    for _ in range(slope.shape[1] + 1):
        # Rows and columns of the held coordinates become those of the identity.
        free = ~held
        system = torch.where(free[:, :, None] & free[:, None, :], bowl, 0.0) + torch.diag_embed(held.double())
        pull = slope + (bowl @ torch.where(held, step, 0.0)[..., None])[..., 0]
        # `solve` would make the host wait for an accelerator, to check what cannot fail here.
        solved = torch.linalg.solve_ex(system, torch.where(free, -pull, step)[..., None])[0][..., 0]
        step = torch.minimum(torch.maximum(solved, lower), upper)
        held = held | (step != solved)
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
    r"""Variance v of the place where the gradient vanishes: the sandwich :math:`A^{-1} \Sigma A^{-1}`.

    A curvature that is not well known leaves the place uncertain too: Σ is the covariance of the gradient plus
    :math:`\sum_j \operatorname{Var}(A_{ij}) v_j`, by iteration from the largest v.

    Args:
        model: Gradient and curvature with their variances.
        width: Distance between the bounds: no variance exceeds that of the uniform distribution between them.

    Shape:
        - width: `[P]`
        - output: `[K + 1, P]`
    """
    root = model.scale.clamp_min(_TINY**0.5).sqrt()
    pair = root[:, :, None] * root[:, None, :]
    alive = (model.scale > 0).double()
    curvature = model.curvature / pair * alive[:, :, None] * alive[:, None, :]
    covariance, doubt = model.covariance / pair, model.doubt / pair.square()
    # Coordinates that cannot move have no distance between their bounds, and no variance.
    prior = (width * root).square().clamp_min(_TINY) / 12
    variance = prior
    for _ in range(_VARIANCE_STEPS):
        extra = (doubt * variance[:, None, :]).sum(2) + _LEAST_NOISE * covariance.diagonal(dim1=1, dim2=2) + _TINY
        information = curvature @ torch.linalg.inv_ex(covariance + torch.diag_embed(extra))[0] @ curvature
        precision = information + torch.diag_embed(1 / prior)
        variance = torch.linalg.inv_ex(precision)[0].diagonal(dim1=1, dim2=2).clamp_min(0)
    return variance / root.square()


def model_of(state: RuleState) -> Model:
    """What the filter's state says."""
    rows, covariance = state["mean"][:, :, 1:], state["covariance"].diagonal(dim1=2, dim2=3)
    # Of A_ij and A_ji, the one that is known better counts for more: the scales may lie orders of magnitude apart.
    precision = 1 / (covariance[:, :, 1:] + _TINY)
    curvature = (precision * rows + precision.mT * rows.mT) / (precision + precision.mT)
    # The filters of the components know their variances; the images know how the components vary together.
    noise = state["within"].diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    correlation = state["within"] / (noise[:, :, None] * noise[:, None, :]).clamp_min(_TINY)
    spread = covariance[:, :, 0].clamp_min(0).sqrt()
    return Model(
        gradient=state["mean"][:, :, 0],
        curvature=curvature,
        covariance=correlation * spread[:, :, None] * spread[:, None, :],
        doubt=1 / (precision + precision.mT),
        scale=state["square"].sqrt(),
        radius=state["radius"],
    )


def places(shared: Tensor, offsets: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Coordinates of the global set and of each row as they are read, `[K + 1, P]`."""
    return torch.cat([shared[None], (shared + offsets).clamp(lower, upper)])


def _scatter(
    state: RuleState, statistics: Statistics, surprise: Tensor, explained: Tensor, fresh: Tensor, cautious: bool
) -> tuple[Tensor, Tensor]:
    r"""How far the images' gradients differ, pooled over the last steps, and how many degrees of freedom tell it.

    One image alone does not tell. What does is what of the surprise z the filter's variance c does not explain, z² − c;
    and, by caution, how much of it would be noise if the noise V were what it was thought to be, the first image all
    noise: the step of EM :math:`V \leftarrow z^2 V^2 / (c + V)^2 + c V / (c + V)`.
    """
    count, within, freedom = statistics.count[:, None], state["within"], state["freedom"]
    alone = (2 - statistics.effective_count[:, None]).clamp(0, 1) * count
    left = (surprise.square() - explained).clamp_min(0).sqrt()
    spread = torch.zeros_like(left)
    if cautious:
        believed = within.diagonal(dim1=1, dim2=2) / (freedom * count).clamp_min(_TINY)
        believed = torch.where(fresh, statistics.mean_square_gradient, believed)
        share = believed / (explained + believed).clamp_min(_TINY)
        left, spread = torch.maximum(left, share * surprise.abs()), share * explained
    left = left * surprise.sign()
    told = left[:, :, None] * left[:, None, :] + spread.diag_embed()
    kept = (1 - statistics.freedom[:, None] / _MEMORY - (1 - _DECAY) * alone).clamp_min(_DECAY)
    within = kept[..., None] * within + statistics.gradient_scatter + (alone * count)[..., None] * told
    return within, kept * freedom + statistics.freedom[:, None] + alone


def _carried(
    covariance: Tensor, move: Tensor, travelled: Tensor, unit: Tensor, fresh: Tensor, radius: float, reach: float
) -> Tensor:
    """Covariances of the filter after a move."""
    rows, size = move.shape
    eye = torch.eye(size, dtype=move.dtype, device=move.device)
    transition = torch.eye(size + 1, dtype=move.dtype, device=move.device).repeat(rows, 1, 1, 1)
    transition[:, 0, 0, 1:] = move
    covariance = transition @ covariance @ transition.mT
    # Curvatures are of the order of scale over radius; those between two coordinates half as large.
    spread = ((0.5 + 0.5 * eye) / radius).square() * unit[:, :, None]
    drift = _lost(travelled, reach)[..., None]
    drift = torch.where(fresh[..., None], 1.0, drift)
    bend = 0.5 * _lost(move, reach) * (move.square()[:, None, :] * spread).sum(2)
    # Before the first evaluation nothing is known of the gradient.
    bend = torch.where(fresh, 1e6 * unit, bend)
    return covariance + torch.diag_embed(torch.cat([bend[..., None], drift * spread], 2))


def _lost(move: Tensor, reach: float) -> Tensor:
    """Share of what was known of the curvature that a move makes worthless."""
    return 1 - torch.exp(-(move / reach).square().sum(1, keepdim=True))
