"""Gradient and curvature of the objective, by Kalman filters over noisy gradients."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.em.e_step import SufficientStatistics, in_blocks
from lightning_modules.em.parameter_table import ParameterTable
from lightning_modules.em.rules.rule import RuleState

# Decay of the gradients' scale and noise from batch to batch, at the fastest: far away, older ones are worthless.
_DECAY = 0.8
# Degrees of freedom over which the noise is pooled where the last batches have fewer: far fewer are no estimate.
_MEMORY = 32
# Relative variance under which images count as alike: keeps a division by their noise finite.
LEAST_NOISE = 1e-12
# Mean squared surprise, in units of its expectation, above which the model is taken to have been wrong.
_SURPRISE = 16.0
# Trust radii as multiples of the first: least and largest, and the change after agreement and after overshooting.
LEAST_RADIUS, _LARGEST, _GROWTH, _CUT = 0.2, 2.0, 1.5, 0.5
TINY = 1e-60


class Model(NamedTuple):
    """Gradient and curvature where the gradients were taken last, for each group.

    A group is a row of the table, the global set first, or a block of one.

    Attributes:
        gradient: Filtered gradient, `[G, S]`.
        curvature: Symmetric curvature, `[G, S, S]`.
        covariance: Covariance of the filtered gradient, `[G, S, S]`.
        hessian_variance: Variance of each entry of the curvature, `[G, S, S]`.
        scale: Root mean square of the images' gradients, `[G, S]`; 0 where nothing has a gradient.
        trust_radius: In log units, `[G, S]`.
    """

    gradient: Tensor
    curvature: Tensor
    covariance: Tensor
    hessian_variance: Tensor
    scale: Tensor
    trust_radius: Tensor


def checked_distances(
    trust_radius: float, curvature_length_scale: float, radius: float | None, reach: float | None
) -> tuple[float, float]:
    """The two distances of a second-order rule; raises a `ValueError` for one that is not positive.

    Args:
        trust_radius: First trust radius in log units.
        curvature_length_scale: Distance in log units over which curvature changes.
        radius: The first of them by its name of the version before.
        reach: The second likewise.
    """
    for old, new, value in (("radius", "trust_radius", radius), ("reach", "curvature_length_scale", reach)):
        if value is not None:
            warnings.warn(f"the argument {old} is now called {new}", FutureWarning, stacklevel=3)
    trust_radius = trust_radius if radius is None else radius
    curvature_length_scale = curvature_length_scale if reach is None else reach
    for name, value in (("trust_radius", trust_radius), ("curvature_length_scale", curvature_length_scale)):
        if not value > 0:
            raise ValueError(f"{name} must be a positive distance in log units, got {value}")
    return trust_radius, curvature_length_scale


class Observations(NamedTuple):
    """What a step has observed of each group of parameters that are filtered together: of each row of the table, and
    within it of each block; see `SufficientStatistics`, whose properties these are.

    Shape:
        - count, effective_count, freedom: `[G]` for G groups
        - mean_gradient, mean_square_gradient: `[G, S]` for S parameters in a group
        - gradient_scatter: `[G, S, S]`
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    effective_count: Tensor
    freedom: Tensor
    mean_gradient: Tensor
    mean_square_gradient: Tensor
    gradient_scatter: Tensor


def grouped(statistics: SufficientStatistics) -> Observations:
    """The statistics of a step by groups: the rows' blocks, row by row."""
    blocks = statistics.num_blocks
    return Observations(
        statistics.count.repeat_interleave(blocks),
        statistics.effective_count.repeat_interleave(blocks),
        statistics.freedom.repeat_interleave(blocks),
        to_groups(statistics.mean_gradient),
        to_groups(statistics.mean_square_gradient),
        statistics.block_scatter.flatten(0, 1),
    )


def to_groups(values: Tensor) -> Tensor:
    """Numbers of each row of the table by groups.

    Shape:
        - values: `[K + 1, P]`
        - output: `[G, S]`
    """
    return in_blocks(values).flatten(0, 1)


def from_groups(values: Tensor, rows: int, num_parameters: int) -> Tensor:
    """Inverse of `to_groups`.

    Shape:
        - values: `[..., G, S]`
        - output: `[..., K + 1, P]`
    """
    return values.unflatten(-2, (rows, -1)).flatten(-2)[..., :num_parameters]


def initial_state(table: ParameterTable, trust_radius: float) -> RuleState:
    """Tensors of the filter before the first evaluation."""
    radii = to_groups(torch.full_like(table.shared, trust_radius).expand(len(table.row_names) + 1, -1))
    groups, size = radii.shape

    def zeros(*shape: int) -> Tensor:
        return radii.new_zeros((groups, *shape))

    return {
        "images": zeros(1),
        "theta": zeros(size),
        "mean": zeros(size),
        "filter_mean": zeros(size, size + 1),
        "filter_covariance": zeros(size, size + 1, size + 1),
        "square": zeros(size),
        "scatter": zeros(size, size),
        "freedom": zeros(1),
        "trust_radius": radii.clone(),
    }


def observe(
    state: RuleState,
    statistics: Observations,
    theta: Tensor,
    mean: Tensor,
    trust_radius: float,
    curvature_length_scale: float,
    cautious: bool,
) -> tuple[Model, RuleState]:
    r"""Takes the gradients of one step into the filter.

    Each component i of the gradient has a Kalman filter of its own over :math:`(g_i, A_{i1}, \dots, A_{iP})`: the
    gradient at the present θ and its derivatives. A move d carries it along, and curvature drifts on the way,

    .. math:: g_i \leftarrow g_i + \sum_j A_{ij} d_j, \qquad
        \operatorname{Var} A_{ij} \leftarrow \operatorname{Var} A_{ij}
        + (1 - e^{-|d|^2 / \ell^2})\, \kappa_{ij}^2 s_i^2,

    with the scale s of the images' gradients and the length scale ℓ. Half of what the drift does to the gradient over
    the move is added to the gradient's variance. The measurement is the mean gradient of the images, whose noise is
    known from how far the images differ: :math:`\nu_i = V_i / n` for n of them, and :math:`V_i \sum r^2 / (\sum r)^2`
    where responsibilities r share them among the rows (White, Econometrica 48, 1980). From a single image it cannot be
    known; there it is judged by the filter's surprise (Mehra, IEEE TAC 15, 1970). Where the measured gradients surprise
    the filter much more than it expects (the objective is no quadratic), all its variances grow by that factor (strong
    tracking; Zhou & Frank, IFAC 1991). Secant pairs of noisy gradients are thereby weighed by what they are worth
    (Hennig & Kiefel, "Quasi-Newton methods: a new direction", JMLR 14, 2013).

    Args:
        state: State of the filter.
        statistics: What the step has observed.
        theta: Coordinates at which the gradients were taken.
        mean: Coordinates about which they are drawn: curvature drifts as this moves, not as draws scatter.
        trust_radius: First trust radius; before anything is known a step has this length.
        curvature_length_scale: Distance ℓ in log units over which curvature changes.
        cautious: Take a single image's gradient for noise until later ones agree with it. That keeps variances honest
            where steps have one image each, and makes such steps slow where there is no noise.

    Shape:
        - theta, mean: `[G, S]`
    """
    count, gradient = statistics.count[:, None], statistics.mean_gradient
    square = statistics.mean_square_gradient
    seen, first = count > 0, state["images"] == 0
    # Components that have had no gradient before: a network may begin without using what the parameter acts on.
    first_seen = state["square"] == 0
    square = torch.where(first_seen, square, torch.lerp(square, state["square"], _DECAY))
    unit = square.clamp_min(TINY)
    move = torch.where(first, 0.0, theta - state["theta"])
    eye = torch.eye(theta.shape[1], dtype=theta.dtype, device=theta.device)

    known, curvature = state["filter_mean"][:, :, 0], state["filter_mean"][:, :, 1:]
    curvature = torch.where(first_seen[..., None], eye * unit.sqrt()[:, :, None] / trust_radius, curvature)
    predicted = known + (curvature @ move[..., None])[..., 0]
    covariance = _predicted_covariance(
        state["filter_covariance"], move, mean - state["mean"], unit, first_seen, trust_radius, curvature_length_scale
    )
    surprise = gradient - predicted
    scatter, freedom = _scatter(state, statistics, surprise, covariance[:, :, 0, 0], first_seen, cautious)
    # A variance from few degrees of freedom is taken for larger, as Student's t is wider than the normal.
    images = statistics.effective_count[:, None]
    factor = 1 / (freedom * count).clamp_min(TINY) + 2 / (freedom.square() * images).clamp_min(TINY)
    noise = scatter.diagonal(dim1=1, dim2=2).clamp_min(0) * factor + LEAST_NOISE * unit
    has_gradient = square > 0
    excess = torch.where(has_gradient, surprise.square() / (covariance[:, :, 0, 0] + noise), 0.0).sum(1, keepdim=True)
    excess = excess / has_gradient.sum(1, keepdim=True).clamp_min(1)
    covariance = covariance * torch.where(~first & (excess > _SURPRISE), excess, 1.0)[..., None, None]
    gain = covariance[:, :, :, 0] / (covariance[:, :, 0, 0] + noise)[..., None]
    filter_mean = torch.cat([predicted[..., None], curvature], 2) + gain * surprise[..., None]
    covariance = covariance - gain[..., :, None] * covariance[:, :, None, 0, :]

    # The gradient still points along the last move: the radius was too small. It has turned: too large.
    along = torch.where(first, 0.0, move * filter_mean[:, :, 0])
    radii = state["trust_radius"]
    radii = torch.where(along < 0, (radii * _GROWTH).clamp_max(_LARGEST * trust_radius), radii)
    radii = torch.where(along > 0, (radii * _CUT).clamp_min(LEAST_RADIUS * trust_radius), radii)
    updated = {
        "images": state["images"] + count,
        "theta": theta.clone(),  # a view of the table would move with it
        "mean": mean.clone(),
        "filter_mean": filter_mean,
        "filter_covariance": covariance,
        "square": square,
        "scatter": scatter,
        "freedom": freedom,
        "trust_radius": radii,
    }
    state = {
        name: torch.where(seen.view(-1, *[1] * (tensor.ndim - 1)), tensor, state[name])
        for name, tensor in updated.items()
    }
    return model_of(state), state


def model_of(state: RuleState) -> Model:
    """Gradient and curvature from the filter's state."""
    rows, covariance = state["filter_mean"][:, :, 1:], state["filter_covariance"].diagonal(dim1=2, dim2=3)
    # Of A_ij and A_ji, the one that is known better counts for more: the scales may be orders of magnitude apart.
    precision = 1 / (covariance[:, :, 1:] + TINY)
    curvature = (precision * rows + precision.mT * rows.mT) / (precision + precision.mT)
    # The filters of the components know their variances; the images know how the components vary together.
    noise = state["scatter"].diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    correlation = state["scatter"] / (noise[:, :, None] * noise[:, None, :]).clamp_min(TINY)
    spread = covariance[:, :, 0].clamp_min(0).sqrt()
    return Model(
        gradient=state["filter_mean"][:, :, 0],
        curvature=curvature,
        covariance=correlation * spread[:, :, None] * spread[:, None, :],
        hessian_variance=1 / (precision + precision.mT),
        scale=state["square"].sqrt(),
        trust_radius=state["trust_radius"],
    )


def _scatter(
    state: RuleState,
    statistics: Observations,
    surprise: Tensor,
    explained: Tensor,
    first_seen: Tensor,
    cautious: bool,
) -> tuple[Tensor, Tensor]:
    r"""How far the images' gradients differ, pooled over the last steps, and from how many degrees of freedom.

    One image alone has no scatter. What has is the part of the surprise z that the filter's variance c does not
    explain, z² − c; and, by caution, how much of it would be noise if the noise V were what it was thought to be, the
    first image all noise: the step of EM :math:`V \leftarrow z^2 V^2 / (c + V)^2 + c V / (c + V)`.
    """
    count, scatter, freedom = statistics.count[:, None], state["scatter"], state["freedom"]
    alone = (2 - statistics.effective_count[:, None]).clamp(0, 1) * count
    left = (surprise.square() - explained).clamp_min(0).sqrt()
    spread = torch.zeros_like(left)
    if cautious:
        believed = scatter.diagonal(dim1=1, dim2=2) / (freedom * count).clamp_min(TINY)
        believed = torch.where(first_seen, statistics.mean_square_gradient, believed)
        share = believed / (explained + believed).clamp_min(TINY)
        left, spread = torch.maximum(left, share * surprise.abs()), share * explained
    left = left * surprise.sign()
    outer_product = left[:, :, None] * left[:, None, :] + spread.diag_embed()
    kept = (1 - statistics.freedom[:, None] / _MEMORY - (1 - _DECAY) * alone).clamp_min(_DECAY)
    scatter = kept[..., None] * scatter + statistics.gradient_scatter + (alone * count)[..., None] * outer_product
    return scatter, kept * freedom + statistics.freedom[:, None] + alone


def _predicted_covariance(
    covariance: Tensor,
    move: Tensor,
    drift: Tensor,
    unit: Tensor,
    first_seen: Tensor,
    trust_radius: float,
    length_scale: float,
) -> Tensor:
    """Covariances of the filter after a move of θ and a drift of the mean about which it is drawn."""
    rows, size = move.shape
    eye = torch.eye(size, dtype=move.dtype, device=move.device)
    transition = torch.eye(size + 1, dtype=move.dtype, device=move.device).repeat(rows, 1, 1, 1)
    transition[:, 0, 0, 1:] = move
    covariance = transition @ covariance @ transition.mT
    # Curvatures are of the order of scale over radius; those between two coordinates half as large.
    spread = ((0.5 + 0.5 * eye) / trust_radius).square() * unit[:, :, None]
    forgotten = torch.where(first_seen[..., None], 1.0, _forgotten(drift, length_scale)[..., None])
    process_noise = 0.5 * _forgotten(move, length_scale) * (move.square()[:, None, :] * spread).sum(2)
    # Before the first evaluation nothing is known of the gradient.
    process_noise = torch.where(first_seen, 1e6 * unit, process_noise)
    return covariance + torch.diag_embed(torch.cat([process_noise[..., None], forgotten * spread], 2))


def _forgotten(move: Tensor, length_scale: float) -> Tensor:
    """Share of what was known of the curvature that a move makes worthless."""
    return 1 - torch.exp(-(move / length_scale).square().sum(1, keepdim=True))
