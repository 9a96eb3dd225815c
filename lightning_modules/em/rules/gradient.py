"""M-step by Adam on the gradient of the loss proxy."""

import torch

from lightning_modules.em.e_step import SufficientStatistics
from lightning_modules.em.parameter_table import ParameterTable, TableValues
from lightning_modules.em.rules.rule import Rule, RuleState, centered


class GradientRule(Rule):
    r"""Adam on :math:`\log\theta`, with the gradient that the network's own backward pass brings along.

    Adam is that of Kingma & Ba (ICLR 2015, algorithm 1). Rows are partially pooled (Gelman & Hill 2007, chapter 12):
    with n images of a row and pseudo-count m, its offset moves by the share n/(n+m) of its step and then shrinks by the
    factor 1 − lr·m/(n+m), so that a rare class borrows strength from the global set. A row without images keeps its
    offset and its moments.

    Args:
        lr: Step size in log units: 0.1 moves a parameter by up to about 10 % a step.
        betas: Decay of Adam's first and second moment.
        eps: Added to the root of the second moment.
        pseudo_count: Images m that the global set is worth to a row; 0 does not pool.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> import torch
        >>> from lightning_modules import EStep, ParameterTable
        >>> table = ParameterTable(initial={"gain": 1.0}, bounds={"gain": (0.5, 2.0)})
        >>> rule, statistics = GradientRule(lr=0.1), SufficientStatistics(num_rows=0, num_parameters=1)
        >>> statistics.add(EStep(torch.zeros(1, 0), None, torch.ones(1)), gradient=torch.ones(1, 1))
        >>> proposal, _ = rule.m_step(table, statistics, rule.initial_state(table))
        >>> round(proposal.shared.item(), 4)
        -0.1
    """

    def __init__(
        self,
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-12,
        pseudo_count: float = 20.0,
    ) -> None:
        if not 0 < lr < 1:
            raise ValueError(f"lr must be between 0 and 1, got {lr}: a step of 1 would move a parameter by a factor e")
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        if not pseudo_count >= 0:
            raise ValueError(f"pseudo_count must not be negative, got {pseudo_count}")
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.pseudo_count = pseudo_count

    def initial_state(self, table: ParameterTable) -> RuleState:
        """Moments, steps and images of the global set and of each row; see `Rule.initial_state`."""
        shape = (len(table.row_names) + 1, len(table.shared))
        zeros = torch.zeros(shape, dtype=torch.float64, device=table.shared.device)
        moments = {"first_moment": zeros, "second_moment": zeros.clone()}
        return {**moments, "steps": zeros[:, :1].clone(), "images": zeros[:, :1].clone()}

    def m_step(
        self, table: ParameterTable, statistics: SufficientStatistics, state: RuleState
    ) -> tuple[TableValues, RuleState]:
        """One step of Adam for the global set and for every row that has images; see `Rule.m_step`."""
        gradient, count = statistics.mean_gradient, statistics.count[:, None]
        seen = count > 0
        first, second = self.betas
        next_state = {
            "first_moment": torch.where(
                seen, torch.lerp(gradient, state["first_moment"], first), state["first_moment"]
            ),
            "second_moment": torch.where(
                seen, torch.lerp(gradient.square(), state["second_moment"], second), state["second_moment"]
            ),
            "steps": state["steps"] + seen,
            "images": state["images"] + count,
        }
        steps = next_state["steps"].clamp_min(1)
        mean = next_state["first_moment"] / (1 - first**steps)
        scale = (next_state["second_moment"] / (1 - second**steps)).sqrt() + self.eps
        update = torch.where(seen, self.lr * mean / scale, 0.0)

        own = count[1:] / (count[1:] + self.pseudo_count).clamp_min(torch.finfo(torch.float64).tiny)
        # Integers have no gradient, and what another rule has given them is not this one's to shrink.
        kept = torch.where(seen[1:] & ~table.mask(table.integers), 1 - self.lr * (1 - own), 1.0)
        proposal = TableValues(table.shared - update[0], (table.offsets - own * update[1:]) * kept)
        return centered(table, proposal, next_state["images"]), next_state
