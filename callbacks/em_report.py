"""Report of what a run has learned: a table on the screen, and a file that starts the next run."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich import get_console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from callbacks._display import em_table, error_bars, learner, leave_bar, run_directory, stopped_at
from callbacks.em_health import EMHealth
from lightning_modules.checkpoints.module import checkpoint_paths

if TYPE_CHECKING:
    from lightning_modules.em import ParameterTable

FILE_NAME = "em_parameters.yaml"
_SCORES = ("val/psnr", "val/psnr_noisy")


class EMReport(Callback):
    """Prints every learned parameter at the end of `fit`, and writes them to `em_parameters.yaml` beside the logs; of a
    run that is interrupted, what it has reached.

    Below the table are what `EMHealth` has found and the validation PSNR: of the start values and of those learned,
    where the Trainer has looked at the validation data before the first step (`num_sanity_val_steps: -1`).

    The file is a config: `lightning-em fit -c demo -c logs/.../em_parameters.yaml` starts where this run
    ended, with its bounds and what it learned. A parameter in units of the noise level is shown as such, and in its own
    unit at the module's `reference_noise`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[EMReport()], logger=False)
    """

    def __init__(self) -> None:
        self._directory: str | None = None
        self._channels = 3
        self._first_step = 0
        self._scores: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warns where there is nothing to report; takes over what `EMHealth` has to say."""
        for health in _healths(trainer):
            health.is_reported = True
        if stage == "fit" and em_table(pl_module) is None:
            rank_zero_warn(f"EMReport prints no parameters: {type(pl_module).__name__} has no em_parameters.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asks for the directory, on every rank."""
        self._directory = run_directory(trainer)
        self._scores = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes where the run begins."""
        self._first_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes the channels of the images, on which a unit may depend."""
        if batch_idx == 0 and isinstance(batch, dict) and "image" in batch:
            self._channels = batch["image"].shape[1]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the scores, on every rank: to ask for them may be a collective."""
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            self._scores = {name: float(metrics[name]) for name in _SCORES if name in metrics}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints and writes."""
        self._report(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Prints and writes what an interrupted run has reached."""
        if trainer.state.fn == "fit" and trainer.global_step > self._first_step:
            self._report(trainer, pl_module)

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        leave_bar(trainer, pl_module)
        console = get_console()
        table = em_table(pl_module)
        exported = None
        if table is not None:
            level, factors = units_of_noise(pl_module, table, self._channels)
            report = parameter_report(table, error_bars(trainer), level, factors)
            report.title = f"Learned parameters after {trainer.global_step} steps"
            console.print(report)
            if self._directory is not None:
                exported = Path(self._directory) / FILE_NAME
                exported.parent.mkdir(parents=True, exist_ok=True)
                exported.write_text(yaml.safe_dump(overlay(pl_module, table), sort_keys=False, allow_unicode=True))
        for finding in findings(trainer):
            console.print(f"! {finding}", markup=False, highlight=False)
        step = learner(trainer)
        start = None if step is None else step.start_score
        for line in summary(self._scores, self._directory, checkpoint_paths(trainer), exported, start):
            # A path is printed in one piece, so that it can be copied; brackets in it are no markup.
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def units_of_noise(
    pl_module: LightningModule, table: "ParameterTable", channels: int
) -> tuple[float | None, dict[str, float]]:
    """Returns the noise level by which reports show parameters in units of noise, and their factors at that level."""
    level, operator = getattr(pl_module, "reference_noise", None), getattr(pl_module, "operator", None)
    if not level or operator is None:
        return None, {}
    names = [name for name in table.learned if table.units[name] == "noise"]
    return level, {name: level * operator.unit_factor(name, channels) for name in names}


def parameter_report(
    table: "ParameterTable",
    deviation: Tensor | None = None,
    level: float | None = None,
    factors: Mapping[str, float] | None = None,
) -> Table:
    """Builds the table of the learned parameters, one column each: bounds, start, now, and the rows.

    `*` marks a value that rests on a bound. Where the rule knows the standard deviations, in log units, each value is
    followed by ± one of them in its own unit. Of a bank there are the least, the middle and the largest value.

    Args:
        table: The parameters.
        deviation: Standard deviations, where the rule knows them.
        level: Noise level at which parameters in units of noise are shown as well.
        factors: Their values in units of their own over those in units of noise, at that level.

    Shape:
        - deviation: `[K + 1, P]`
    """
    report = Table(title="Learned parameters", caption=_caption(table, deviation), caption_justify="left")
    bars = None if deviation is None else deviation.tolist()
    report.add_column("", no_wrap=True)
    for name in table.learned:
        report.add_column(_heading(table, name), justify="right")
    start, now, values = table.initial_parameters(), table.get_parameters(), table.values().tolist()
    for side, label in enumerate(("lower bound", "upper bound")):
        report.add_row(label, *(f"{table.bounds[name][side]:.4g}" for name in table.learned), style="dim")
    report.add_row("start", *(_text(start[name]) for name in table.learned))
    report.add_row("now", *(_cell(table, name, values[0], bars, 0) for name in table.learned), style="bold")
    if factors:
        absolute = (_text(_scaled(now[name], factors[name])) if name in factors else "" for name in table.learned)
        report.add_row(f"at noise {level:.3g}", *absolute)
    if any(name in table.per_row for name in table.learned):
        report.add_section()
        for row, label in enumerate(table.row_names, start=1):
            cells = (
                _cell(table, name, values[row], bars, row) if name in table.per_row else "" for name in table.learned
            )
            report.add_row(f"  {escape(label)}", *cells)
    return report


def overlay(pl_module: LightningModule, table: "ParameterTable") -> dict[str, Any]:
    """Returns the parameters, their bounds and what learns as a config that goes on top of the one of this run."""
    init_args: dict[str, Any] = {
        "initial": {name: _inside(table, name, value) for name, value in table.get_parameters().items()},
        "bounds": {name: list(bounds) for name, bounds in table.bounds.items()},
        "learned": list(table.learned),
        "per_row": list(table.per_row),
    }
    if table.per_row and table.row_names:
        init_args["initial_rows"] = {
            label: {name: _inside(table, name, table.get_parameters(row)[name]) for name in table.per_row}
            for row, label in enumerate(table.row_names)
        }
    em_parameters = {"class_path": class_path(type(table)), "init_args": init_args}
    return {"model": {"class_path": class_path(type(pl_module)), "init_args": {"em_parameters": em_parameters}}}


def summary(
    scores: Mapping[str, float],
    directory: str | None,
    checkpoints: tuple[str, str],
    exported: Path | None,
    start: float | None = None,
) -> list[str]:
    """Returns the lines below the table: what has been gained, and where things are.

    Args:
        scores: The last metrics of the validation.
        directory: Where the logs are.
        checkpoints: The best and the newest.
        exported: The file of parameters.
        start: Validation PSNR of the start values, where it is known.
    """
    lines = []
    if "val/psnr" in scores and "val/psnr_noisy" in scores:
        noisy, after = (f"{scores[name]:.2f}" for name in ("val/psnr_noisy", "val/psnr"))
        # Of the numbers as they are printed, so that they add up.
        lines.append(
            f"validation PSNR: noisy {noisy} dB, restored {after} dB: {float(after) - float(noisy):+.2f} dB"
            if start is None
            else f"validation PSNR: start values {start:.2f} dB, learned {after} dB: "
            f"{float(after) - float(f'{start:.2f}'):+.2f} dB (noisy {noisy} dB)"
        )
    if exported is not None:
        lines.append(f"parameters: {exported} (the next run starts from them with -c CONFIG -c {exported})")
    if directory is not None:
        lines.append(f"logs:       {directory}")
    best, last = checkpoints
    if best:
        lines.append(f"best:       {best}")
    if last:
        lines.append(f"newest:     {last} (fit goes on with --ckpt_path)")
    return lines


def findings(trainer: Trainer) -> list[str]:
    """Returns what `EMHealth` has seen in this run, where it took part."""
    return [text for health in _healths(trainer) for text in health.findings.values()]


def _healths(trainer: Trainer) -> list[EMHealth]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, EMHealth)]


def class_path(cls: type) -> str:
    """Returns the shortest path that imports a class: the package's public name where there is one."""
    parts = cls.__module__.split(".")
    for length in range(1, len(parts)):
        package = ".".join(parts[:length])
        if getattr(sys.modules.get(package), cls.__qualname__, None) is cls:
            return f"{package}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _caption(table: "ParameterTable", deviation: Tensor | None) -> str:
    now, values = table.get_parameters(), table.values()
    stopped = any(
        stopped_at(table, name, value)
        for name in table.learned
        for value in values[:, table.columns(name)].flatten().tolist()
    )
    fixed = ", ".join(f"{name} {_text(now[name])}" for name in table.names if name not in table.learned)
    known = deviation is not None and any(
        not isinstance(now[name], list) and not deviation[0, table.columns(name)].isnan().any()
        for name in table.learned
    )
    legend = {
        "* rests on a bound": stopped,
        "± one standard deviation": known,
        "… least, middle and largest of a bank": any(isinstance(now[name], list) for name in table.learned),
        f"fixed: {fixed}": bool(fixed),
    }
    return escape("; ".join(text for text, is_shown in legend.items() if is_shown))


def _heading(table: "ParameterTable", name: str) -> str:
    value, unit = table.get_parameters()[name], table.units[name]
    size = f" ({len(value)})" if isinstance(value, list) else ""
    return escape(f"{name}{size}" + (f"\n{'× noise' if unit == 'noise' else unit}" if unit else ""))


def _text(value: float | list[float]) -> str:
    if not isinstance(value, list):
        return f"{value:.4g}"
    return " … ".join(f"{part:.3g}" for part in (min(value), median(value), max(value)))


def _cell(table: "ParameterTable", name: str, values: list[float], bars: list[list[float]] | None, row: int) -> str:
    own = values[table.columns(name)]
    is_bank = isinstance(table.get_parameters()[name], list)
    cell = _text(own if is_bank else own[0]) + ("*" if any(stopped_at(table, name, value) for value in own) else "")
    deviation = math.nan if bars is None or is_bank else bars[row][table.columns(name)][0]
    # One digit that counts, and no exponent: ±20, not ±2e+01.
    return cell if math.isnan(deviation) else f"{cell} ±{float(f'{table.scales.get(name, own[0]) * deviation:.1g}'):g}"


def _scaled(value: float | list[float], factor: float) -> float | list[float]:
    return [factor * part for part in value] if isinstance(value, list) else factor * value


def _inside(table: "ParameterTable", name: str, value: float | list[float]) -> float | list[float]:
    """Undoes the last digit's rounding in exp(log(bound)), which the next run would refuse."""
    lower, upper = table.bounds[name]
    if isinstance(value, list):
        return [min(max(part, lower), upper) for part in value]
    return value if isinstance(value, int) else min(max(value, lower), upper)
