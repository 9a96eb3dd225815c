"""M-step by the sign of the loss proxy's change."""

import math

import torch

from lightning_modules.em.e_step import SufficientStatistics
from lightning_modules.em.parameter_table import ParameterTable, TableValues
from lightning_modules.em.rules.rule import Rule, RuleState

# Of a mean of scores: the threshold itself is the score of a graph without similarity, which moves nothing.
_ROUNDING = 1e-6


class SignRule(Rule):
    r"""All learned global parameters move together: down where the smoothed proxy rose, up where it fell.

    .. math:: \theta \leftarrow \theta\,(1 - \lambda \,\mathrm{sign}\,\Delta\ell)

    Nothing moves at the first step. The step halves while the sign of Δℓ alternates and doubles back to λ once it
    stops. Rows follow their own smoothness: `row_parameters` grow by `row_rate` where the mean smoothness score of the
    row's images exceeds the upper smoothness threshold and shrink under the lower one; whole numbers gain one where the
    row's loss exceeds the upper loss threshold and lose one under the lower. It needs no gradient, and it wanders where
    a gradient converges: keep it for comparison, and for parameters without a gradient.

    Args:
        rates: Relative step λ by parameter name, in place of the table's `relative_steps`.
        window: Number of proxies whose mean is compared from step to step.
        row_rate: Relative step of a row's own parameters.
        row_parameters: Names that the row's smoothness moves; None for all that have rows, learn and are not whole
            numbers.
        smoothness_thresholds: Lower and upper smoothness score of a row between which its parameters rest. A dense
            graph without any similarity has a score of 0.3, which moves nothing; nor does a score that is not measured.
        loss_thresholds: Lower and upper loss of a row between which its whole numbers rest, in the loss's own unit.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> SignRule(window=10, loss_thresholds=(0.002, 0.004)).window
        10
    """

    needs_gradient = False

    def __init__(
        self,
        rates: dict[str, float] | None = None,
        window: int = 5,
        row_rate: float = 0.02,
        row_parameters: tuple[str, ...] | None = None,
        smoothness_thresholds: tuple[float, float] = (0.3, 0.7),
        loss_thresholds: tuple[float, float] = (0.2, 0.5),
    ) -> None:
        self.rates = dict(rates or {})
        for name, rate in {**self.rates, "row_rate": row_rate}.items():
            if not 0 <= rate < 1:
                raise ValueError(f"the rate of {name} must be in [0, 1), got {rate}")
        if window < 1:
            raise ValueError(f"window must be at least 1 step, got {window}")
        for argument, (low, high) in (
            ("smoothness_thresholds", smoothness_thresholds),
            ("loss_thresholds", loss_thresholds),
        ):
            if low > high:
                raise ValueError(f"{argument} must be (lower, upper), got ({low}, {high})")
        self.window = window
        self.row_rate = row_rate
        self.row_parameters = None if row_parameters is None else tuple(row_parameters)
        self.smoothness_thresholds = smoothness_thresholds
        self.loss_thresholds = loss_thresholds

    def initial_state(self, table: ParameterTable) -> RuleState:
        """The last proxies, their mean, its last direction and the scale of the step; see `Rule.initial_state`."""

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.float64, device=table.shared.device)

        return {
            "proxies": zeros(self.window),
            "steps": zeros(),
            "smoothed": zeros(),
            "direction": zeros(),
            "scale": zeros() + 1,
        }

    def m_step(
        self, table: ParameterTable, statistics: SufficientStatistics, state: RuleState
    ) -> tuple[TableValues, RuleState]:
        """One step along the sign of the proxy's change; see `Rule.m_step`."""
        steps = state["steps"] + 1
        proxies = torch.cat([state["proxies"][1:], statistics.mean("proxy")[:1]])
        smoothed = proxies.sum() / steps.clamp_max(self.window)
        direction = torch.where(steps > 1, torch.sign(smoothed - state["smoothed"]), 0.0)
        alternates = direction * state["direction"] < 0
        scale = torch.where(alternates, state["scale"] / 2, (state["scale"] * 2).clamp_max(1))

        rate = torch.where(table.mask([*self.rates]), table.vector(self.rates), table.relative_steps)
        rate = torch.where(table.mask(table.integers), 0.0, rate)
        shared = table.shared + torch.log1p(-rate * scale * direction)
        next_state = {
            "proxies": proxies,
            "steps": steps,
            "smoothed": smoothed,
            "direction": direction,
            "scale": scale,
        }
        return TableValues(shared, table.offsets + self._row_steps(table, statistics)), next_state

    def _row_steps(self, table: ParameterTable, statistics: SufficientStatistics) -> torch.Tensor:
        seen = statistics.count[1:, None] > 0
        score = statistics.mean("smoothness")[1:, None]
        loss = (statistics.mean("reconstruction") + statistics.mean("perceptual"))[1:, None]
        low, high = self.smoothness_thresholds
        growth = torch.where(score > high, math.log1p(self.row_rate), 0.0)
        growth = torch.where((score > 0) & (score < low - _ROUNDING), math.log1p(-self.row_rate), growth)
        low, high = self.loss_thresholds
        count = (loss > high).double() - (loss < low).double()
        whole = table.mask(table.integers)
        moved = table.mask(table.learned_per_row if self.row_parameters is None else self.row_parameters) & ~whole
        step = torch.where(moved, growth, 0.0) + torch.where(whole, count, 0.0)
        return torch.where(seen, step, 0.0)
