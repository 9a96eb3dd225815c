"""M-step by a Gaussian posterior of the parameters."""

import os

import torch
from torch import Tensor

from lightning_modules.em.e_step import MAX_BLOCK, SufficientStatistics
from lightning_modules.em.parameter_table import ParameterTable, TableValues
from lightning_modules.em.rules.kalman_curvature import (
    LEAST_RADIUS,
    TINY,
    Model,
    checked_distances,
    grouped,
    initial_state,
    observe,
)
from lightning_modules.em.rules.rule import Rule, RuleState, centered
from lightning_modules.em.rules.trust_region import bounded_step, optimum_variance, theta_of
from lightning_modules.imaging import seeded_normal

# Variance of the rows' offsets before any row has been seen, half a log unit either way. It goes on to count as one
# row: variances learned from a few rows alone collapse to 0 and stay there.
_FIRST_POOLING_VARIANCE = 0.25
# Standard deviation of the rows' curvatures about the global one, relative to it.
_BETWEEN_ROWS = 0.5


class BayesianRule(Rule):
    r"""A Gaussian posterior over the best :math:`\log\theta`, updated with the gradients of every step.

    The Bayesian learning rule with a Gaussian posterior :math:`\mathcal N(m, \Lambda^{-1})` is variational online
    Newton (Khan & Rue, JMLR 24, 2023): :math:`m \leftarrow m - \Lambda^{-1} \nabla`, with a curvature for the
    precision Λ. The curvature of a loss is a precision only where the loss is a log-likelihood; ours has no unit. What
    the loss does determine is its gradients, and how far they differ between images. N noisy gradients with covariance
    V for each image know the θ* where their expectation A (θ − θ*) vanishes with the precision

    .. math:: \Lambda = A\, \Sigma^{-1} A, \qquad \Sigma = \operatorname{Cov} \hat g \approx V / N,

    which is Godambe's information, the inverse of the sandwich :math:`A^{-1} \Sigma A^{-1}`, and which the scale of the
    loss does not change. Curvature A, gradient ĝ and the variances in Σ come from the filter of `NewtonRule`, with
    the images' own correlations between the components. The mean moves by :math:`-|A|^{-1} \hat g` in the same trust
    region, and a uniform distribution over the bounds limits the standard deviation where the loss is flat.

    Several images a step show how noisy their gradients are; a single one does not. Then all of it is taken for noise
    until later ones agree, and the intervals stay wide for some dozens of steps: raise `batch_size` or
    `accumulate_grad_batches`. A row's deviation is that of images which are its own for the most part; where rows blend
    about equally, they share what is known, and it says too much.

    Rows are pooled by empirical Bayes (Gelman & Hill 2007, chapter 12): their offsets are draws of
    :math:`\mathcal N(0, \tau^2)`, an offset that its own images put at d with variance s² is given the posterior mean
    :math:`d\,\tau^2 / (\tau^2 + s^2)`, and τ², one for each parameter, is learned by EM from the posterior means and
    variances of all rows, under a weak prior of half a log unit.

    Args:
        trust_radius: First trust radius in log units; see `NewtonRule`.
        curvature_length_scale: Distance in log units over which the curvature changes.
        exploration: Posterior standard deviations by which the parameters of a training step are perturbed, at random
            and by a fifth of the radius at most. The curvature is learned from it: without (0), the path of the
            mean may leave some of it unknown, and the standard deviations stay wide. The table itself, and so
            validation, checkpoints and the result, hold the mean. The draws are a function of the step and of the run's
            seed (`seed_everything`; 0 without): alike on every process, and on resuming those of the run that began.
        radius: `trust_radius` by its name of the version before.
        reach: `curvature_length_scale` by its name of the version before.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> import torch
        >>> from lightning_modules import EStep, ParameterTable
        >>> table = ParameterTable(initial={"gain": 1.0}, bounds={"gain": (0.1, 10.0)})
        >>> rule = BayesianRule()
        >>> state = rule.initial_state(table)
        >>> noise = torch.linspace(-1.7, 1.7, 50, dtype=torch.float64)[:, None]  # of variance 1 between 50 images
        >>> for _ in range(16):  # the proxy ½ (log gain - 1)²
        ...     theta = rule.sampled_values(table, state).shared
        ...     statistics = SufficientStatistics(num_rows=0, num_parameters=1)
        ...     statistics.add(EStep(torch.zeros(50, 0), None, torch.ones(50)), gradient=theta - 1 + noise)
        ...     proposal, state = rule.m_step(table, statistics, state)
        ...     table.write(table.project(proposal))
        >>> mean, deviation = table.shared.item(), rule.standard_deviation(table, state).item()
        >>> abs(mean - 1) < deviation, 0.035 < deviation < 0.1  # 1/√(16·50) and what is not known of the curvature
        (True, True)
    """

    def __init__(
        self,
        trust_radius: float = 0.5,
        curvature_length_scale: float = 0.5,
        exploration: float = 1.0,
        radius: float | None = None,
        reach: float | None = None,
    ) -> None:
        self.trust_radius, self.curvature_length_scale = checked_distances(
            trust_radius, curvature_length_scale, radius, reach
        )
        if not exploration >= 0:
            raise ValueError(f"exploration must not be negative, got {exploration}")
        self.exploration = exploration

    def initial_state(self, table: ParameterTable) -> RuleState:
        """Filters of the global set and of each row, pooling variances, steps; see `Rule.initial_state`."""
        rows, size = len(table.row_names) + 1, len(table.shared)
        if size > MAX_BLOCK:
            raise ValueError(
                f"a posterior over {size} parameters together is more than BayesianRule can hold ({MAX_BLOCK}): choose "
                "NewtonRule, which takes them in blocks, or GradientRule"
            )
        return {
            **initial_state(table, self.trust_radius),
            "pooling_variance": torch.full_like(table.shared, _FIRST_POOLING_VARIANCE),
            # Before the first gradient: that of the uniform distribution between the bounds.
            "deviation": ((table.upper - table.lower) / 12**0.5).repeat(rows, 1),
            "steps": torch.zeros(1, dtype=torch.long, device=table.shared.device),
            # Every process has this variable, and in it the same number, whatever its own generator has come to.
            "seed": torch.full((1,), int(os.environ.get("PL_GLOBAL_SEED", 0)), device=table.shared.device),
        }

    def m_step(
        self, table: ParameterTable, statistics: SufficientStatistics, state: RuleState
    ) -> tuple[TableValues, RuleState]:
        """Posterior after the gradients of one step; see `Rule.m_step`."""
        mean = theta_of(*table.state, table.lower, table.upper)
        sampled = self.sampled_values(table, state)
        theta = mean if sampled is None else theta_of(*sampled, table.lower, table.upper)
        model, filters = observe(
            state, grouped(statistics), theta, mean, self.trust_radius, self.curvature_length_scale, cautious=True
        )
        model = _pooled(model)
        back = model.curvature @ (mean - theta)[..., None]
        model = model._replace(gradient=model.gradient + back[..., 0])
        trust = torch.stack([model.trust_radius, torch.full_like(mean, torch.inf)])
        step, wanted = bounded_step(table, statistics.count, model, mean, trust, self.trust_radius)

        variance = optimum_variance(model, table.upper - table.lower)
        seen, met = statistics.count[1:, None] > 0, (filters["images"][1:] > 0).double()
        share = _share(state["pooling_variance"], variance[1:])
        # The posterior mean is drawn to 0 from where the row's own images want it, however far; the way there is walked
        # in steps. Drawing in each step instead would keep a row whose optimum is far and not well known where it is.
        target = share * (table.offsets + wanted[1:] - step[0])
        offsets = table.offsets + (target - table.offsets).clamp(-model.trust_radius[1:], model.trust_radius[1:])
        spread = (met * (target.square() + share * variance[1:])).sum(0)
        # What has no rows is as uncertain in a row as it is in the global set.
        rows = torch.where(table.mask(table.learned_per_row), share * variance[1:], variance[:1])
        next_state = {
            **filters,
            "pooling_variance": (_FIRST_POOLING_VARIANCE + spread) / (1 + met.sum(0)),
            "deviation": torch.cat([variance[:1], rows]).sqrt(),
            "steps": state["steps"] + 1,
            "seed": state["seed"],
        }
        moved = seen & ~table.mask(table.integers)
        proposal = TableValues(table.shared + step[0], torch.where(moved, offsets, table.offsets))
        return centered(table, proposal, filters["images"]), next_state

    def standard_deviation(self, table: ParameterTable, state: RuleState) -> Tensor:
        """Posterior standard deviation in log units; see `Rule.standard_deviation`."""
        moving = table.mask(table.learned) & ~table.mask(table.integers)
        return torch.where(moving, state["deviation"], torch.nan)

    def sampled_values(self, table: ParameterTable, state: RuleState) -> TableValues | None:
        """A draw around the mean, the same on every process; see `Rule.sampled_values`."""
        if not self.exploration:
            return None
        rows = len(table.row_names) + 1
        key = (state["seed"] << 32) + state["steps"] * rows + torch.arange(rows, device=table.shared.device)
        draws = seeded_normal(key, (len(table.shared),)).to(table.shared)
        limit = LEAST_RADIUS * self.trust_radius
        noise = (self.exploration * self.standard_deviation(table, state) * draws).nan_to_num(0.0).clamp(-limit, limit)
        return table.project(TableValues(table.shared + noise[0], table.offsets + noise[1:]))


def _pooled(model: Model) -> Model:
    """The rows' curvatures, with what the global set knows of them: they are taken to differ by half from row to row.

    A row of single images stays near one place, where it would never learn a curvature of its own.
    """
    curvature, variance = model.curvature, model.hessian_variance
    size = curvature[:1].diagonal(dim1=1, dim2=2).abs().sqrt()
    between = variance[:1] + (_BETWEEN_ROWS * size[:, :, None] * size[:, None, :]).square() + TINY
    own, shared = 1 / (variance[1:] + TINY), 1 / between
    rows = (own * curvature[1:] + shared * curvature[:1]) / (own + shared)
    return model._replace(
        curvature=torch.cat([curvature[:1], rows]), hessian_variance=torch.cat([variance[:1], 1 / (own + shared)])
    )


def _share(pooling_variance: Tensor, variance: Tensor) -> Tensor:
    """How much of what its own images say a row's offset is given."""
    return pooling_variance / (pooling_variance + variance).clamp_min(torch.finfo(torch.float64).tiny)
