"""M-step by Newton's method in a trust region."""

import torch
from torch import Tensor

from lightning_modules.em.e_step import SufficientStatistics
from lightning_modules.em.parameter_table import ParameterTable, TableValues
from lightning_modules.em.rules.kalman_curvature import (
    checked_distances,
    from_groups,
    grouped,
    initial_state,
    model_of,
    observe,
    to_groups,
)
from lightning_modules.em.rules.rule import Rule, RuleState, centered
from lightning_modules.em.rules.trust_region import bounded_step, optimum_variance, theta_of


class NewtonRule(Rule):
    r"""Newton's step on :math:`\log\theta` in a trust region, with a curvature learned from the gradients on the way.

    .. math:: d = \arg\min_{|d_i| \le r_i} \hat g^\top d + \tfrac12 d^\top |A|\, d

    Gradient ĝ and curvature A are those of a Kalman filter over the noisy gradients of the batches, whose noise is
    known from how far the images of a batch differ: no second derivative is ever taken. The trust radius r of each
    coordinate grows while the gradient goes on pointing the way of the last step and halves where it has turned. A
    coordinate that is pushed against its bound is left out of the solve. There is no learning rate, and the rule does
    not mind the scale of the loss.

    More than 32 parameters, such as a bank of filters, are filtered in blocks of about as many, between which the
    curvature is taken for 0: time and memory grow with the number of parameters, not with its square.

    Rows have filters of their own. A row moves with the global set, and by the share n/(n+m) of what its own step
    differs from the global one, where n counts the images it has seen: one that has seen few borrows strength.

    Args:
        trust_radius: First trust radius in log units: before anything is known, a parameter moves by up to this. Radii
            stay between a fifth and twice of it.
        curvature_length_scale: Distance in log units over which the curvature changes; older steps further away count
            for little.
        pseudo_count: Images m that the global set is worth to a row; 0 does not pool.
        radius: `trust_radius` by its name of the version before.
        reach: `curvature_length_scale` by its name of the version before.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> import torch
        >>> from lightning_modules import EStep, ParameterTable
        >>> table = ParameterTable(initial={"gain": 1.0}, bounds={"gain": (0.1, 10.0)})
        >>> rule = NewtonRule()
        >>> state = rule.initial_state(table)
        >>> for _ in range(6):  # the proxy (log gain - 1)², whose gradient is 2 (log gain - 1)
        ...     statistics = SufficientStatistics(num_rows=0, num_parameters=1)
        ...     statistics.add(EStep(torch.zeros(1, 0), None, torch.ones(1)), gradient=2 * (table.shared[None] - 1))
        ...     proposal, state = rule.m_step(table, statistics, state)
        ...     table.write(table.project(proposal))
        >>> round(table.shared.item(), 3)
        1.0
    """

    def __init__(
        self,
        trust_radius: float = 0.5,
        curvature_length_scale: float = 0.5,
        pseudo_count: float = 20.0,
        radius: float | None = None,
        reach: float | None = None,
    ) -> None:
        self.trust_radius, self.curvature_length_scale = checked_distances(
            trust_radius, curvature_length_scale, radius, reach
        )
        if not pseudo_count >= 0:
            raise ValueError(f"pseudo_count must not be negative, got {pseudo_count}")
        self.pseudo_count = pseudo_count

    def initial_state(self, table: ParameterTable) -> RuleState:
        """The filters of the global set and of each row, and their trust radii; see `Rule.initial_state`."""
        return initial_state(table, self.trust_radius)

    def m_step(
        self, table: ParameterTable, statistics: SufficientStatistics, state: RuleState
    ) -> tuple[TableValues, RuleState]:
        """One step for the global set and for every row that has images; see `Rule.m_step`."""
        theta = to_groups(theta_of(table.shared, table.offsets, table.lower, table.upper))
        observed = grouped(statistics)
        model, state = observe(
            state, observed, theta, theta, self.trust_radius, self.curvature_length_scale, cautious=False
        )
        moves = bounded_step(table, observed.count, model, theta, model.trust_radius, self.trust_radius)
        step = from_groups(moves, len(table.row_names) + 1, len(table.shared))
        images = state["images"][:: statistics.num_blocks]
        share = images / (images + self.pseudo_count).clamp_min(torch.finfo(torch.float64).tiny)
        moved = (statistics.count[1:, None] > 0) & ~table.mask(table.integers)
        offsets = table.offsets + torch.where(moved, share[1:] * (step[1:] - step[0]), 0.0)
        return centered(table, TableValues(table.shared + step[0], offsets), images), state

    def standard_deviation(self, table: ParameterTable, state: RuleState) -> Tensor:
        """How far the θ at which the gradient vanishes is known, in log units; see `Rule.standard_deviation`."""
        rows, size = len(table.row_names) + 1, len(table.shared)
        width = to_groups((table.upper - table.lower).expand(rows, -1))
        variance = from_groups(optimum_variance(model_of(state), width), rows, size)
        # What has no rows is as uncertain in a row as it is in the global set.
        own = torch.where(table.mask(table.learned_per_row), variance[1:], variance[:1])
        moving = table.mask(table.learned) & ~table.mask(table.integers)
        return torch.where(moving, torch.cat([variance[:1], own]).sqrt(), torch.nan)
