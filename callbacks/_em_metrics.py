"""Metrics of an M-step: parameters, objective and error bars by name."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_modules.em import ParameterTable, SufficientStatistics

# Entries of a bank that are logged each by itself; of more, the least, the middle and the largest.
MAX_SCALARS = 16
# Standard deviations either side of the mean that hold 90 % of a normal distribution.
_NORMAL_90 = 1.6449
_PARTS = ("reconstruction", "perceptual", "smoothness", "similarity")


def em_metrics(
    table: ParameterTable, statistics: SufficientStatistics, skipped_steps: Tensor, deviation: Tensor | None
) -> dict[str, Tensor]:
    """Returns the numbers to log after an optimizer step, on the device; what has no value is NaN.

    Args:
        table: The table after the step.
        statistics: Sums over the images of the step.
        skipped_steps: M-steps left out so far.
        deviation: Standard deviations in log units, where the rule knows them.

    Shape:
        - deviation: `[K + 1, P]`, row 0 for the global set
        - output: scalars
    """
    metrics = {"em/skipped_steps": skipped_steps.double()}
    metrics |= values_by_name(table, "em", table.values())
    proxy = torch.where(statistics.count > 0, statistics.mean("proxy"), torch.nan)
    metrics["em/loss_proxy"] = statistics.mean("proxy")[0]
    metrics |= {f"em/{name}": statistics.mean(name)[0] for name in _PARTS}
    metrics |= {f"em/loss_proxy/{row}": value for row, value in zip(table.row_names, proxy[1:], strict=True)}
    if deviation is not None:
        metrics |= values_by_name(table, "em/std", deviation)
        for side, sign in (("lower", -1), ("upper", 1)):
            edge = table.natural(table.shared + sign * _NORMAL_90 * deviation[:1])
            metrics |= {f"{name}/{side}": value for name, value in values_by_name(table, "em/interval", edge).items()}
    return metrics


def values_by_name(
    table: ParameterTable, prefix: str, values: Tensor, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Values of the global set and, of what has them, the rows; of a long bank the least, the middle and the largest.

    Shape:
        - values: `[K + 1, P]`, or `[1, P]` for the global set only
        - output: scalars
    """
    metrics: dict[str, Tensor] = {}
    for name in table.names if names is None else names:
        columns = table.columns(name)
        labels, bank = table.column_names[columns], values[:, columns]
        if len(labels) > MAX_SCALARS:
            labels = tuple(f"{name}/{part}" for part in ("min", "median", "max"))
            bank = torch.stack([bank.amin(1), bank.median(1).values, bank.amax(1)], dim=1)
        rows = ["", *(f"/{row}" for row in table.row_names)] if name in table.per_row else [""]
        for row, numbers in zip(rows, bank, strict=False):
            metrics |= {f"{prefix}/{label}{row}": value for label, value in zip(labels, numbers, strict=True)}
    return metrics
