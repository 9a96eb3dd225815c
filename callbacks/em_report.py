"""What a run has learned: a table on the screen, and a file that starts the next run."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich import get_console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from callbacks._display import at_bound, em_table, error_bars, run_directory
from callbacks.em_health import EMHealth

if TYPE_CHECKING:
    from lightning_modules.em import ParameterTable

FILE_NAME = "em_parameters.yaml"


class EMReport(Callback):
    """Prints every learned parameter at the end of `fit`, and writes them to `em_parameters.yaml` beside the logs.

    The file is a config: `lightning-em fit -c configs/demo.yaml -c logs/.../em_parameters.yaml` starts where this run
    ended.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[EMReport()], logger=False)
    """

    def __init__(self) -> None:
        self._directory: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warns where there is nothing to report."""
        if stage == "fit" and em_table(pl_module) is None:
            rank_zero_warn(f"EMReport prints no parameters: {type(pl_module).__name__} has no em_parameters.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asks for the directory, on every rank."""
        self._directory = run_directory(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints and writes."""
        if not trainer.is_global_zero:
            return
        console = get_console()  # that of the progress bar, which moves out of the way
        table = em_table(pl_module)
        exported = None
        if table is not None:
            console.print(parameter_report(table, error_bars(trainer)))
            if self._directory is not None:
                exported = Path(self._directory) / FILE_NAME
                exported.parent.mkdir(parents=True, exist_ok=True)
                exported.write_text(yaml.safe_dump(overlay(pl_module, table), sort_keys=False, allow_unicode=True))
        for finding in findings(trainer):
            console.print(f"! {finding}", markup=False, highlight=False)
        for line in summary(trainer.callback_metrics, self._directory, _checkpoint(trainer), exported):
            # A path is printed in one piece, so that it can be copied; brackets in it are no markup.
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def parameter_report(table: "ParameterTable", deviation: Tensor | None = None) -> Table:
    """Builds the table of the learned parameters, one column each: bounds, start, now, and the rows.

    `*` marks a value that rests on a bound. Where the rule knows the standard deviations, in log units `[K + 1, P]`,
    each value is followed by ± one of them in its own unit.
    """
    report = Table(title="Learned parameters", caption=_caption(table), caption_justify="left")
    bars = None if deviation is None else deviation.tolist()
    report.add_column("", no_wrap=True)
    for name in table.learned:
        report.add_column(escape(name), justify="right")
    start, now = table.initial_parameters(), table.get_parameters()
    for side, label in enumerate(("lower bound", "upper bound")):
        report.add_row(label, *(f"{table.bounds[name][side]:.4g}" for name in table.learned), style="dim")
    report.add_row("start", *(f"{start[name]:.4g}" for name in table.learned))
    report.add_row("now", *(_cell(table, name, now[name], bars, 0) for name in table.learned), style="bold")
    if any(name in table.per_row for name in table.learned):
        report.add_section()
        for row, label in enumerate(table.row_names):
            values = table.get_parameters(row)
            cells = (
                _cell(table, name, values[name], bars, row + 1) if name in table.per_row else ""
                for name in table.learned
            )
            report.add_row(f"  {escape(label)}", *cells)
    return report


def overlay(pl_module: LightningModule, table: "ParameterTable") -> dict[str, Any]:
    """Returns the learned parameters as a config that goes on top of the one of this run."""
    initial_rows = {
        label: {name: _inside(table, name, table.get_parameters(row)[name]) for name in table.per_row}
        for row, label in enumerate(table.row_names)
        if table.per_row
    }
    init_args: dict[str, Any] = {
        "initial": {name: _inside(table, name, value) for name, value in table.get_parameters().items()}
    }
    if initial_rows:
        init_args["initial_rows"] = initial_rows
    em_parameters = {"class_path": class_path(type(table)), "init_args": init_args}
    return {"model": {"class_path": class_path(type(pl_module)), "init_args": {"em_parameters": em_parameters}}}


def summary(
    metrics: Mapping[str, Any], directory: str | None, checkpoint: str | None, exported: Path | None
) -> list[str]:
    """Returns the lines below the table: the metric before and after, and where things are."""
    lines = []
    if "val/psnr" in metrics and "val/psnr_noisy" in metrics:
        before, after = float(metrics["val/psnr_noisy"]), float(metrics["val/psnr"])
        gain = float(metrics.get("val/gain", after - before))
        lines.append(f"validation PSNR: {before:.2f} dB before restoration, {after:.2f} dB after: {gain:+.2f} dB")
    if exported is not None:
        lines.append(f"parameters: {exported} (the next run starts from them with -c CONFIG -c {exported})")
    if directory is not None:
        lines.append(f"logs:       {directory}")
    if checkpoint is not None:
        lines.append(f"checkpoint: {checkpoint}")
    return lines


def findings(trainer: Trainer) -> list[str]:
    """Returns what `EMHealth` has seen in this run, where it took part."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [text for callback in callbacks if isinstance(callback, EMHealth) for text in callback.findings.values()]


def class_path(cls: type) -> str:
    """Returns the shortest path that imports a class: the package's public name where there is one."""
    parts = cls.__module__.split(".")
    for length in range(1, len(parts)):
        package = ".".join(parts[:length])
        if getattr(sys.modules.get(package), cls.__qualname__, None) is cls:
            return f"{package}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _caption(table: "ParameterTable") -> str:
    now = table.get_parameters()
    fixed = ", ".join(f"{name} {now[name]:.4g}" for name in table.names if name not in table.learned)
    return escape("* rests on a bound" + (f"; fixed: {fixed}" if fixed else ""))


def _cell(table: "ParameterTable", name: str, value: float, bars: list[list[float]] | None, row: int) -> str:
    on_bound = any(at_bound(value, bound) for bound in table.bounds[name])
    cell = f"{value:.4g}*" if on_bound else f"{value:.4g}"
    deviation = math.nan if bars is None else bars[row][table.names.index(name)]
    # One digit that counts, and no exponent: ±20, not ±2e+01.
    return cell if math.isnan(deviation) else f"{cell} ±{float(f'{value * deviation:.1g}'):g}"


def _inside(table: "ParameterTable", name: str, value: float) -> float:
    """Undoes the last digit's rounding in exp(log(bound)), which the next run would refuse."""
    lower, upper = table.bounds[name]
    return value if isinstance(value, int) else min(max(value, lower), upper)


def _checkpoint(trainer: Trainer) -> str | None:
    callback = trainer.checkpoint_callback
    for name in ("best_model_path", "last_model_path"):
        if path := getattr(callback, name, ""):
            return str(path)
    return None
