"""Dashboard of the M-step: one page of TensorBoard."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from callbacks._course import Course, draw_course
from callbacks._display import (
    em_table,
    error_bars,
    is_drawn,
    learner,
    require_positive,
    stopped_at,
    tensorboard_loggers,
)
from callbacks._em_metrics import MAX_SCALARS, values_by_name

if TYPE_CHECKING:
    from lightning_modules.em import ParameterTable

_METRICS = ("val/psnr", "val/psnr_gain")
_ARROWS = {"lower": "↓", "upper": "↑", "": ""}
_LEAST_RANGE = math.log2(1.1)  # of the colours: rows that differ by less than a tenth stay pale


class EMDashboard(Callback):
    """Draws the M-step: its course, a page of curves, a heat map of the rows, and the run's line among the
    hyperparameters.

    - *Images*, `em/course`: each learned parameter over the steps, the global value and every row in colors of their
      own, with the bounds where they are near, and the gain over the start values on a scale of its own. `em/table`:
      rows by parameters, coloured by their ratio to the global value; a long bank as a picture of its own,
      `em/table/<name>`.
    - *Custom scalars*: one chart for each global value, the loss proxy, the smoothness, the validation metric and the
      gain. Where the rule has error bars (`BayesianRule`), one more for each parameter with its band of 90 %.
    - *HParams*, at the end: start values against final values and validation metric, to compare runs. Give the logger
      `default_hp_metric: false`, or its placeholder is in the way.

    Args:
        every_n_epochs: Draw after every n-th epoch, beginning with the first, and after the last; more
            rarely as the run grows long.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[EMDashboard()], logger=False)
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        require_positive(self, every_n_epochs=every_n_epochs)
        self.every_n_epochs = every_n_epochs
        self._drawn_at = self._last_step = -1
        self._parameters, self._gain = Course(), Course()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warns where there is nothing to draw; a run that is resumed gets its course after this."""
        if stage == "fit":
            self._parameters, self._gain = Course(), Course()
        if stage == "fit" and em_table(pl_module) is None:
            rank_zero_warn(f"EMDashboard draws nothing: {type(pl_module).__name__} has no em_parameters.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lays out the page."""
        table = em_table(pl_module)
        self._drawn_at = -1
        if table is not None and trainer.is_global_zero:
            for logger in tensorboard_loggers(trainer):
                has_start = trainer.num_sanity_val_steps == float("inf")
                layout = custom_scalars_layout(table, error_bars(trainer) is not None, has_start)
                logger.experiment.add_custom_scalars(layout)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the course."""
        self._last_step = trainer.global_step
        if not self._parameters.steps:
            self._record(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds to the course, on steps that log."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step != self._last_step and every > 0 and trainer.global_step % every == 0:
            self._record(trainer, pl_module)
        self._last_step = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds what has been gained over the start values."""
        score, step = trainer.callback_metrics.get(_METRICS[0]), learner(trainer)
        start = None if step is None else step.start_score
        if trainer.state.fn == "fit" and not trainer.sanity_checking and score is not None and start is not None:
            if not self._gain.steps:
                self._gain.add(0, torch.zeros(()))
            self._gain.add(trainer.global_step, torch.as_tensor(float(score) - start))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws."""
        if is_drawn(trainer.current_epoch, self.every_n_epochs):
            self._draw(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws for the last time and enters the run among the hyperparameters."""
        table = em_table(pl_module)
        if table is None or not trainer.is_global_zero:
            return
        self._draw(trainer, pl_module)
        for logger in tensorboard_loggers(trainer):
            start, metrics = hyperparameters(table, trainer.callback_metrics)
            known = dict(logger.hparams)
            # Metrics of the validation are tags that exist already: written once more where they are, not at step 0.
            logger.log_hyperparams({**known, **start}, metrics, step=max(trainer.global_step - 1, 0))
            logger.hparams = known  # hparams.yaml keeps to the arguments that build the module

    def state_dict(self) -> dict[str, Any]:
        """The course, for a run that goes on."""
        return {"parameters": self._parameters.state_dict(), "gain": self._gain.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the course of the checkpoint."""
        for name, course in (("parameters", self._parameters), ("gain", self._gain)):
            if name in state_dict:
                course.load_state_dict(state_dict[name])

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        table = em_table(pl_module)
        if table is not None and trainer.is_global_zero:
            self._parameters.add(trainer.global_step, table.values())

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        table = em_table(pl_module)
        loggers = tensorboard_loggers(trainer)
        if table is None or not loggers or not trainer.is_global_zero or trainer.global_step == self._drawn_at:
            return
        self._drawn_at = trainer.global_step
        pictures = {"em/table": heat_map(table)}
        if len(self._parameters.steps) > 1 and table.learned:
            pictures["em/course"] = draw_course(table, self._parameters, self._gain)
        pictures |= {f"em/table/{name}": bank_map(table, name) for name in table.names if _is_long(table, name)}
        for tag, figure in pictures.items():
            for logger in loggers:
                logger.experiment.add_image(tag, render(figure), trainer.global_step, dataformats="HWC")


def custom_scalars_layout(
    table: "ParameterTable", with_bars: bool = False, with_gain: bool = False
) -> dict[str, dict[str, list[Any]]]:
    """Returns the page of curves in the form of `SummaryWriter.add_custom_scalars`.

    TensorBoard gives all curves of a chart the color of their run, so that each chart has one; the rows are told apart
    in `em/course`. A rule that knows how well it knows the parameters gets a page more, of bands that hold 90 % of the
    posterior.

    Tags are regular expressions that match from the left: `$` keeps `em/sigma` from matching `em/sigma_s`.
    """
    charts = {
        "loss proxy": "em/loss_proxy$",
        "smoothness": "em/smoothness$",
        "similarity": "em/similarity$",
        "validation PSNR": "val/psnr$",
        "skipped steps": "em/skipped_steps$",
    }
    if with_gain:
        charts["validation PSNR above the start values, dB"] = "val/psnr_over_start$"
    layout: dict[str, dict[str, list[Any]]] = {
        "learned parameters": {name: ["Multiline", [f"{_pattern(table, name)}$"]] for name in table.learned},
        "objective": {title: ["Multiline", [tag]] for title, tag in charts.items()},
    }
    if with_bars:
        moving = [name for name in table.learned if name not in table.integers and not _is_long(table, name)]
        layout["90 % intervals"] = {
            label: ["Margin", [f"em/{label}", f"em/interval/{label}/lower", f"em/interval/{label}/upper"]]
            for name in moving
            for label in table.column_names[table.columns(name)]
        }
    return layout


def hyperparameters(
    table: "ParameterTable", callback_metrics: dict[str, Any]
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the start values as hyperparameters, and the validation metrics and final values as their outcome.

    The final values have tags of their own: one more point of `em/…` would leave its curve with a step that its band
    lacks, and TensorBoard draws no band then.
    """
    first: list[float] = []
    for value in table.initial_parameters().values():
        first += value if isinstance(value, list) else [value]
    metrics = {name: float(callback_metrics[name]) for name in _METRICS if name in callback_metrics}
    start, end = (
        {tag: float(value) for tag, value in values_by_name(table, prefix, values, table.learned).items()}
        for prefix, values in (("em_start", torch.tensor([first])), ("em_end", table.values()[:1]))
    )
    return start, metrics | end


def heat_map(table: "ParameterTable") -> Figure:
    """Draws rows by parameters: numbers in natural units, colors by the ratio to the global value.

    Parameters without rows have their one value at the top only; of a long bank there are the least, the middle and the
    largest value. An arrow marks a value that rests on a bound.
    """
    rows = ["global", *table.row_names]
    columns: list[tuple[str, str, list[float]]] = []  # heading, parameter, values of the global set and the rows
    for name in table.names:
        named = values_by_name(table, "", table.values(), [name])
        numbers = [float(value) for value in named.values()]
        size = len(named) // (len(rows) if name in table.per_row else 1)
        columns += [(label[1:], name, numbers[k::size]) for k, label in enumerate([*named][:size])]
    values = np.array([[*numbers, *[np.nan] * (len(rows) - len(numbers))] for _, _, numbers in columns]).T
    scales = [table.scales.get(name) for _, name, _ in columns]  # of a number that may be negative, the difference
    ratio = np.array(
        [
            np.log2(column / column[0]) if scale is None else (column - column[0]) / (scale * math.log(2))
            for column, scale in zip(values.T, scales, strict=True)
        ]
    ).T
    limit = max(_LEAST_RANGE, float(np.nanmax(np.abs(ratio))))
    font_size = 9 if len(rows) <= 30 else 6
    line = 0.32 if len(rows) <= 30 else 0.16

    figure = Figure(figsize=(2.2 + 1.05 * len(columns), 1.1 + line * len(rows)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(ratio, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set_facecolor("0.93")
    headings = [label if name in table.learned else f"{label}\n(fixed)" for label, name, _ in columns]
    axes.set_xticks(range(len(columns)), headings)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0, labelsize=font_size, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.axhline(0.5, color="0.3", linewidth=1.0)
    for column, (_, name, numbers) in enumerate(columns):
        for row, value in enumerate(numbers):
            dark = abs(ratio[row, column]) > 0.6 * limit
            text = f"{value:.3g}{_ARROWS[stopped_at(table, name, value)]}"
            axes.text(column, row, text, ha="center", va="center", fontsize=font_size, color="w" if dark else "k")
    bar = figure.colorbar(picture, ax=axes, fraction=0.04, pad=0.02, ticks=[-limit, 0, limit])
    bar.ax.set_yticklabels([f"×{2**-limit:.2f}", "global", f"×{2**limit:.2f}"], fontsize=font_size)
    return figure


def bank_map(table: "ParameterTable", name: str) -> Figure:
    """Draws a bank of many values as a picture: its entries from left to right, the global set and the rows below; a
    bank of pictures, such as filters, as these, of the global set.
    """
    if name in table.pictures:
        return _mosaic(table, name)
    rows = ["global", *(table.row_names if name in table.per_row else ())]
    figure = Figure(figsize=(8, 1.2 + 0.2 * len(rows)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    values = table.values()[: len(rows), table.columns(name)].cpu().numpy()
    picture = axes.imshow(values, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(name)
    figure.colorbar(picture, ax=axes, fraction=0.04, pad=0.02)
    return figure


def _mosaic(table: "ParameterTable", name: str) -> Figure:
    """The pictures of a bank side by side, on one scale of color."""
    height, width = table.pictures[name]
    tiles = table.values()[0, table.columns(name)].cpu().numpy().reshape(-1, height, width)
    count = math.ceil(len(tiles) ** 0.5 * 1.5)
    lines = math.ceil(len(tiles) / count)
    mosaic = np.full((lines * (height + 1), count * (width + 1)), np.nan)
    for number, tile in enumerate(tiles):
        top, left = number // count * (height + 1), number % count * (width + 1)
        mosaic[top : top + height, left : left + width] = tile
    limit = float(np.abs(tiles).max()) or 1.0
    least, colors = (-limit, "RdBu_r") if table.bounds[name][0] < 0 else (float(tiles.min()), "viridis")
    figure = Figure(figsize=(8, 1.0 + 7.0 * mosaic.shape[0] / mosaic.shape[1]), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(mosaic[:-1, :-1], cmap=colors, vmin=least, vmax=limit, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(name)
    figure.colorbar(picture, ax=axes, fraction=0.03, pad=0.02)
    return figure


def render(figure: Figure) -> np.ndarray:
    """Renders a figure to pixels, without the global state of pyplot.

    Shape:
        - output: `[H, W, 3]`, uint8
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _is_long(table: "ParameterTable", name: str) -> bool:
    return len(table.column_names[table.columns(name)]) > MAX_SCALARS


def _pattern(table: "ParameterTable", name: str) -> str:
    """Regular expression of a parameter's tags, without rows."""
    is_bank = table.column_names[table.columns(name)] != (name,)
    ends = "" if not is_bank else "/(min|median|max)" if _is_long(table, name) else r"\[[0-9]+\]"
    return f"em/{name}{ends}"
