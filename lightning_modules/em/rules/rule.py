"""The interface of an M-step."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_modules.em.e_step import SufficientStatistics
from lightning_modules.em.parameter_table import ParameterTable, TableValues

RuleState = dict[str, Tensor]


class Rule(ABC):
    """Proposes new parameters from the statistics of one optimizer step.

    A rule is a pure function of what it is given: it reads the table, and returns what it proposes and its own next
    state. The callback projects the proposal into the bounds, leaves alone what is not learned, and takes proposal and
    state, or neither. So a rule needs no regard for bounds, ranks, precision, checkpoints or steps gone wrong. It knows
    no parameter by its name: P counts the table's columns, of which a parameter of several values has several.
    """

    #: whether it learns from gradients, so that a parameter without one is a mistake
    needs_gradient = True

    @abstractmethod
    def initial_state(self, table: ParameterTable) -> RuleState:
        """Tensors to carry from step to step, on the table's device.

        Shape:
            - output: by name, such as `[K + 1, P]`
        """

    @abstractmethod
    def m_step(
        self, table: ParameterTable, statistics: SufficientStatistics, state: RuleState
    ) -> tuple[TableValues, RuleState]:
        """Proposed coordinates of the table, and the next state.

        Must neither write to its arguments nor wait for the device (`.item()`, `if tensor`, `torch.tensor(...)` on an
        accelerator: `table.vector` and `table.mask` keep constants there).

        Args:
            table: The table as it is.
            statistics: Sums over all images of the optimizer step, all processes included.
            state: State that the previous step returned.

        Shape:
            - output: `shared` `[P]` and `offsets` `[K, P]`, float64
        """

    def standard_deviation(self, table: ParameterTable, state: RuleState) -> Tensor | None:
        """How well the parameters are known, in log units: NaN for what the rule does not learn.

        None, unless a rule overrides it. It becomes error bars in TensorBoard and in the closing table.

        Shape:
            - output: `[K + 1, P]`, row 0 for the global set
        """
        return None

    def sampled_values(self, table: ParameterTable, state: RuleState) -> TableValues | None:
        """What the next training step shall use in place of the table's values, which stay what was learned.

        None, unless a rule overrides it. Like `m_step`, a pure function of its arguments, and without waiting.

        Shape:
            - output: `shared` `[P]` and `offsets` `[K, P]`, float64
        """
        return None

    def pair_distance(self, table: ParameterTable, state: RuleState) -> Tensor | None:
        """Half the distance of the pairs that the next training step shall evaluate, in each coordinate.

        None, unless a rule overrides it: gradients come with the backward pass. With a distance, the training step
        asks the table for a `pair` of parameters and hands in `EStep.gradient`. Without waiting.

        Shape:
            - output: float64 `[P]`
        """
        return None

    def __init_subclass__(cls, **options: Any) -> None:
        """Lets rules of the version before work on: those that define `step`, and those who call it."""
        super().__init_subclass__(**options)
        if "m_step" in cls.__dict__:
            cls.step = _renamed(cls.m_step)  # type: ignore[attr-defined]
        elif "step" in cls.__dict__:
            warnings.warn(f"{cls.__name__}.step is now called m_step: rename it", FutureWarning, stacklevel=2)
            cls.m_step = cls.step  # type: ignore[attr-defined, method-assign]


def centered(table: ParameterTable, proposal: TableValues, images: Tensor) -> TableValues:
    r"""The proposal with the global set at the mean of the rows, weighted by their images.

    That is :math:`\sum_k n_k \delta_k = 0`, and rows keep their values. Once they fit, the mean gradient is 0 wherever
    the global set is, so that nothing else determines what an image of no row uses. Rows without images so far keep
    their offsets.

    Args:
        table: The table, for its bounds and for what has rows.
        proposal: Proposed coordinates.
        images: Images seen of all rows together, and of each.

    Shape:
        - images: `[K + 1, 1]`
        - output: `shared` `[P]` and `offsets` `[K, P]`
    """
    shared, offsets = table.project(proposal)
    mean = (images[1:] * offsets).sum(0) / images[1:].sum().clamp_min(torch.finfo(torch.float64).tiny)
    has_rows = table.mask(table.learned_per_row) & ~table.mask(table.integers)
    shift = torch.where(has_rows, (shared + mean).clamp(table.lower, table.upper) - shared, 0.0)
    return TableValues(shared + shift, torch.where(images[1:] > 0, offsets - shift, offsets))


def _renamed(m_step: Callable[..., Any]) -> Callable[..., Any]:
    def step(*args: Any, **options: Any) -> Any:
        """`m_step` by its name of the version before."""
        warnings.warn("Rule.step is now Rule.m_step", FutureWarning, stacklevel=2)
        return m_step(*args, **options)

    return step
