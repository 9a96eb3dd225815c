"""Course of the learned parameters over a run: what is kept of it, and a figure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from callbacks._em_metrics import MAX_SCALARS

if TYPE_CHECKING:
    from lightning_modules.em import ParameterTable

_MOST_POINTS = 256
_MOST_NAMED = 20  # rows that the legend names; of more, it gives the number
_COLUMNS = 3


class Course:
    """Numbers by step, at most 256 of them: where there would be more, every second one is left out."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[Tensor] = []
        self._stride, self._count = 1, 0

    def add(self, step: int, value: Tensor) -> None:
        """Adds what holds from a step on.

        Shape:
            - value: any, the same each time
        """
        if self.values and value.shape != self.values[0].shape:
            self.steps, self.values, self._stride, self._count = [], [], 1, 0  # of a table that had other rows
        if self._count % self._stride == 0 and step not in self.steps[-1:]:
            self.steps.append(step)
            self.values.append(value.detach().float().clone())  # where it is: a copy to the host would be waited for
        self._count += 1
        if len(self.steps) > _MOST_POINTS:
            self.steps, self.values, self._stride = self.steps[::2], self.values[::2], 2 * self._stride

    def stacked(self) -> Tensor:
        """All values, on the host.

        Shape:
            - output: `[T, ...]`
        """
        return torch.stack([value.cpu() for value in self.values])

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        values = self.stacked() if self.values else torch.empty(0)
        return {"steps": self.steps, "values": values, "stride": self._stride, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with what `state_dict` gave."""
        self.steps, self.values = [*state["steps"]], [*state["values"]]
        self._stride, self._count = state["stride"], state["count"]


def draw_course(table: "ParameterTable", parameters: Course, gain: Course) -> Figure:
    """Draws each learned parameter over the steps, the global set black and the rows in colors of their own, between
    its bounds where they are near; and what has been gained over the start values.

    Of a bank there are the entries of the global set, of a long one the least, the middle and the largest.

    Args:
        table: The table whose values they are.
        parameters: Its `values()`, `[K + 1, P]` each.
        gain: Validation PSNR above that of the start values; may be empty.
    """
    count = len(table.learned) + bool(gain.steps)
    columns = 2 if count == 4 else min(count, _COLUMNS)
    lines = -(-count // columns)
    width, height = 4 * columns + 2, 2.7 * lines + 0.2
    figure = Figure(figsize=(width, height), dpi=90)
    # Without a layout engine, which would draw all of it twice.
    margins = {"left": 0.6 / width, "right": 1 - 2 / width, "bottom": 0.5 / height, "top": 1 - 0.35 / height}
    grid = figure.subplots(
        lines, columns, squeeze=False, gridspec_kw={**margins, "hspace": 0.35, "wspace": 0.22}
    ).ravel()
    values = parameters.stacked()
    labels: dict[str, Any] = {}
    for axes, name in zip(grid, table.learned, strict=False):
        labels |= _draw_parameter(axes, table, name, parameters.steps, values)
    if gain.steps:
        _draw_gain(grid[len(table.learned)], gain)
    for axes in grid[:count]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    for axes in grid[count:]:
        axes.set_axis_off()
    for axes in grid[max(0, count - columns) : count]:
        axes.set_xlabel("step", fontsize=9)
    figure.legend(labels.values(), labels.keys(), loc="upper right", fontsize=9, frameon=False)
    return figure


def _draw_parameter(
    axes: Axes, table: "ParameterTable", name: str, steps: Sequence[int], values: Tensor
) -> dict[str, Any]:
    lower, upper = table.bounds[name]
    unit = {"noise": " (× noise)", "": ""}.get(table.units[name], f" ({table.units[name]})")
    axes.set_title(f"{name}{unit}, bounds {lower:g} and {upper:g}", fontsize=10)
    if name not in table.scales:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs="all"))
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_minor_locator(NullLocator())
    columns = table.columns(name)
    own = values[..., columns]
    labels: dict[str, Any] = {}
    if own.shape[-1] > 1:
        entries = own[:, 0]
        if entries.shape[1] > MAX_SCALARS:
            entries = torch.stack([entries.amin(1), entries.median(1).values, entries.amax(1)], dim=1)
        axes.plot(steps, entries, linewidth=1.2, color="0.4")
    else:
        if name in table.per_row and (rows := own[:, 1:, 0]).shape[1]:
            is_named = rows.shape[1] <= _MOST_NAMED
            colors = colormaps["tab10" if rows.shape[1] <= 10 else "tab20"].colors if is_named else None  # type: ignore[attr-defined]
            for number, (label, curve) in enumerate(zip(table.row_names, rows.T, strict=True)):
                color, alpha = (colors[number], 1.0) if colors else ("tab:blue", 0.25)
                (line,) = axes.plot(steps, curve, linewidth=1.2, color=color, alpha=alpha)
                labels[label if is_named else f"{rows.shape[1]} rows"] = line
        (line,) = axes.plot(steps, own[:, 0, 0], linewidth=2.4, color="k", zorder=3)
        labels = {"global": line, **labels}
    axes.margins(y=0.12)
    bottom, top = axes.get_ylim()
    for bound in (lower, upper):
        if bottom <= bound <= top:
            labels["bound"] = axes.axhline(bound, color="tab:red", linestyle=":", linewidth=1.4)
    return labels


def _draw_gain(axes: Axes, gain: Course) -> None:
    axes.axhline(0, color="0.6", linewidth=1)
    axes.plot(gain.steps, gain.stacked(), color="k", marker="o", markersize=3, linewidth=1.5)
    axes.set_title("validation PSNR above the start values, dB", fontsize=10)
