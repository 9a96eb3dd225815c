"""Tables with the textbook's parameters, and one with a bank, declared as an operator would."""

from typing import Any

from lightning_modules import ParameterTable
from lightning_modules.operators import ParameterSpec

TEXTBOOK = (
    ParameterSpec("sigma", 0.3, (0.1, 0.5), relative_step=0.01),
    ParameterSpec("tau", 0.1, (0.05, 0.3)),
    ParameterSpec("radius", 10.0, (5.0, 20.0), unit="pixels"),
    ParameterSpec("sigma_s", 10.0, (5.0, 20.0), unit="pixels"),
    ParameterSpec("sigma_f", 0.3, (0.1, 0.5), relative_step=0.01),
    ParameterSpec("smooth_steps", 5, (2, 10), integer=True),
)


def textbook_table(**options: Any) -> ParameterTable:
    return ParameterTable(**options).declare(TEXTBOOK)


def bank_table(size: int = 3, **options: Any) -> ParameterTable:
    """A scalar `gain` in units of noise, and a bank `weight`."""
    weight = ParameterSpec("weight", [0.1 * (1 + k / size) for k in range(size)], (0.01, 1.0), (size,))
    return ParameterTable(**options).declare([ParameterSpec("gain", 1.0, (0.1, 10.0), unit="noise"), weight])
