"""What an M-step logs: parameters, objective and error bars by name."""

import torch
from torch import Tensor

from lightning_modules.em import ParameterTable, SufficientStatistics

# Standard deviations either side of the mean that hold 90 % of a normal distribution.
_NORMAL_90 = 1.6449
_PARTS = ("reconstruction", "perceptual", "smoothness")


def em_metrics(
    table: ParameterTable, statistics: SufficientStatistics, skipped_steps: int, deviation: Tensor | None
) -> dict[str, float]:
    """Returns the numbers to log after an optimiser step; what has no value is left out.

    Args:
        table: The table after the step.
        statistics: Sums over the images of the step.
        skipped_steps: M-steps left out so far.
        deviation: Standard deviations in log units, where the rule knows them.

    Shape:
        - deviation: `[K + 1, P]`, row 0 for the global set
    """
    # One transfer for everything.
    parts = torch.stack([statistics.mean(name) for name in ("proxy", *_PARTS)], dim=1)
    rows = torch.cat([table.values(), parts, statistics.count[:, None]], dim=1).tolist()
    metrics: dict[str, float] = {"em/skipped_steps": float(skipped_steps)}
    names = [*table.names, "loss_proxy", *_PARTS]
    metrics.update({f"em/{name}": value for name, value in zip(names, rows[0], strict=False)})
    for row_name, values in zip(table.row_names, rows[1:], strict=True):
        named = dict(zip(names, values, strict=False))
        metrics.update({f"em/{name}/{row_name}": named[name] for name in table.per_row})
        if values[-1] > 0:
            metrics[f"em/loss_proxy/{row_name}"] = named["loss_proxy"]
    if deviation is not None:
        metrics.update(_error_bars(table, deviation))
    return {name: value for name, value in metrics.items() if value == value}


def _error_bars(table: ParameterTable, deviation: Tensor) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for side, sign in (("lower", -1), ("upper", 1)):
        edge = (table.shared + sign * _NORMAL_90 * deviation[0]).clamp(table.lower, table.upper).exp().tolist()
        metrics.update({f"em/interval/{name}/{side}": value for name, value in zip(table.names, edge, strict=True)})
    shared, *rows = deviation.tolist()
    metrics.update({f"em/std/{name}": value for name, value in zip(table.names, shared, strict=True)})
    for row_name, values in zip(table.row_names, rows, strict=True):
        named = dict(zip(table.names, values, strict=True))
        metrics.update({f"em/std/{name}/{row_name}": named[name] for name in table.per_row})
    return metrics
