"""What the second-order rules know of the objective: a gradient and its curvature, filtered from noisy gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.em.e_step import SufficientStatistics
from lightning_modules.em.parameter_table import ParameterTable
from lightning_modules.em.rules.rule import RuleState

# Decay of the gradients' scale and noise from batch to batch, at the fastest: far away, older ones are worthless.
_DECAY = 0.8
# Degrees of freedom over which the noise is pooled where the last batches have fewer: far fewer tell little.
_MEMORY = 32
# Relative variance under which images count as alike: keeps a division by their noise finite.
LEAST_NOISE = 1e-12
# Mean squared surprise, in units of its expectation, above which the model is taken to have been wrong.
_SURPRISE = 16.0
# Trust radii as multiples of the first: least and largest, and the change after agreement and after overshooting.
LEAST_RADIUS, _LARGEST, _GROWTH, _CUT = 0.2, 2.0, 1.5, 0.5
TINY = 1e-60


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


def check_distances(radius: float, reach: float) -> None:
    """Raises a `ValueError` for a trust radius or a reach that is no distance."""
    for name, value in (("radius", radius), ("reach", reach)):
        if not value > 0:
            raise ValueError(f"{name} must be a positive distance in log units, got {value}")


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
    state: RuleState,
    statistics: SufficientStatistics,
    place: Tensor,
    centre: Tensor,
    radius: float,
    reach: float,
    cautious: bool,
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
    unit = square.clamp_min(TINY)
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
    factor = 1 / (freedom * count).clamp_min(TINY) + 2 / (freedom.square() * images).clamp_min(TINY)
    noise = within.diagonal(dim1=1, dim2=2).clamp_min(0) * factor + LEAST_NOISE * unit
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


def model_of(state: RuleState) -> Model:
    """What the filter's state says."""
    rows, covariance = state["mean"][:, :, 1:], state["covariance"].diagonal(dim1=2, dim2=3)
    # Of A_ij and A_ji, the one that is known better counts for more: the scales may lie orders of magnitude apart.
    precision = 1 / (covariance[:, :, 1:] + TINY)
    curvature = (precision * rows + precision.mT * rows.mT) / (precision + precision.mT)
    # The filters of the components know their variances; the images know how the components vary together.
    noise = state["within"].diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    correlation = state["within"] / (noise[:, :, None] * noise[:, None, :]).clamp_min(TINY)
    spread = covariance[:, :, 0].clamp_min(0).sqrt()
    return Model(
        gradient=state["mean"][:, :, 0],
        curvature=curvature,
        covariance=correlation * spread[:, :, None] * spread[:, None, :],
        doubt=1 / (precision + precision.mT),
        scale=state["square"].sqrt(),
        radius=state["radius"],
    )


def _scatter(
    state: RuleState,
    statistics: SufficientStatistics,
    surprise: Tensor,
    explained: Tensor,
    fresh: Tensor,
    cautious: bool,
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
        believed = within.diagonal(dim1=1, dim2=2) / (freedom * count).clamp_min(TINY)
        believed = torch.where(fresh, statistics.mean_square_gradient, believed)
        share = believed / (explained + believed).clamp_min(TINY)
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
