"""M-step without gradients, by simultaneous perturbation."""

from torch import Tensor

from lightning_modules.em.parameter_table import ParameterTable
from lightning_modules.em.rules.kalman_curvature import from_groups
from lightning_modules.em.rules.newton import NewtonRule
from lightning_modules.em.rules.rule import RuleState


class SPSARule(NewtonRule):
    r"""Simultaneous perturbation (Spall, IEEE TAC 37, 1992), for whatever can be evaluated: no gradient is asked for.

    The E-step restores each image twice, under :math:`\theta + c \circ \Delta` and :math:`\theta - c \circ \Delta`
    with a direction Δ of the image's own, and with the same noise (common random numbers). The difference of its two
    losses over that of the parameters estimates its gradient,

    .. math:: \hat g_j = \frac{\ell(\theta + c \circ \Delta) - \ell(\theta - c \circ \Delta)}{2 c_j \Delta_j},

    up to what the other parameters contribute, whose mean over random signs Δ is 0. Up to eight parameters take turns
    instead: each image has one of them moved, and counts for all, which leaves the others' part out. Either way the
    draw is part of how the images' gradients differ, in which `NewtonRule` sees the noise: its steps are as long as
    that allows, and no gain sequence is to be chosen. The distance c is a share of the trust radius, and shrinks with
    it as the optimum is near.

    Whole numbers, and choices by their place in a list (`FunctionOperator`), take part: between neighbors the loss is
    taken to be linear, and the pair is the two neighbors. That finds the least of a loss that falls and then rises
    along the list; where it does not, learn once for each value and compare the losses.

    Args:
        perturbation: c over the trust radius.
        trust_radius: As in `NewtonRule`.
        curvature_length_scale: As in `NewtonRule`.
        pseudo_count: As in `NewtonRule`.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> import torch
        >>> from lightning_modules import EStep, ParameterTable
        >>> from lightning_modules.em import SufficientStatistics
        >>> table = ParameterTable({"gain": 1.0}, {"gain": (0.1, 10.0)})
        >>> rule, key = SPSARule(), torch.arange(4)
        >>> state = rule.initial_state(table)
        >>> for _ in range(12):  # the loss (log gain - 1)², which is only evaluated
        ...     table.pair_distance = rule.pair_distance(table, state)
        ...     pair = table.pair(torch.zeros(4, 0), key)
        ...     plus, minus = ((gain.log() - 1) ** 2 for gain in (pair.plus["gain"], pair.minus["gain"]))
        ...     statistics = SufficientStatistics(num_rows=0, num_parameters=1)
        ...     statistics.add(EStep(torch.zeros(4, 0), None, plus), pair.gradient(plus, minus))
        ...     proposal, state = rule.m_step(table, statistics, state)
        ...     table.write(table.project(proposal))
        >>> round(table.shared.item(), 3)
        1.0
    """

    needs_gradient = False

    def __init__(
        self,
        perturbation: float = 0.25,
        trust_radius: float = 0.5,
        curvature_length_scale: float = 0.5,
        pseudo_count: float = 20.0,
    ) -> None:
        super().__init__(trust_radius, curvature_length_scale, pseudo_count)
        if not 0 < perturbation <= 1:
            raise ValueError(
                f"perturbation must be a share of the trust radius, above 0 and up to 1, got {perturbation}"
            )
        self.perturbation = perturbation

    def pair_distance(self, table: ParameterTable, state: RuleState) -> Tensor:
        """A share of the global set's trust radii; see `Rule.pair_distance`."""
        radii = from_groups(state["trust_radius"], len(table.row_names) + 1, len(table.shared))
        return self.perturbation * radii[0]
