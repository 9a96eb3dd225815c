"""Parts that the callbacks that show results share."""

from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from callbacks.em_parameter import EMParameterCallback

if TYPE_CHECKING:
    from lightning_modules.em import ParameterTable


def em_table(pl_module: LightningModule) -> "ParameterTable | None":
    """Returns the parameters that the M-step learns, where the module declares any."""
    return getattr(pl_module, "em_parameters", None)


def error_bars(trainer: Trainer) -> Tensor | None:
    """Returns how well each parameter is known, in log units `[K + 1, P]`, where the rule of the run says so."""
    found = learner(trainer)
    return None if found is None else found.standard_deviation()


def learner(trainer: Trainer) -> EMParameterCallback | None:
    """Returns the M-step of a run, where it has one."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, EMParameterCallback)), None)


def at_bound(value: float, bound: float) -> bool:
    """Tells whether a value has been stopped by a bound, but for the rounding in exp(log(bound))."""
    return abs(value - bound) <= 1e-6 * abs(bound)


def stopped_at(table: "ParameterTable", name: str, value: float) -> str:
    """Which bound of a learned parameter stops a value: `lower`, `upper`, or neither, the empty string."""
    lower, upper = table.bounds[name]
    if name not in table.learned or lower == upper:
        return ""
    return "lower" if at_bound(value, lower) else "upper" if at_bound(value, upper) else ""


def tensorboard_loggers(trainer: Trainer) -> list[TensorBoardLogger]:
    """Returns the TensorBoard loggers of a run; other loggers take no images from here."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def run_directory(trainer: Trainer) -> str | None:
    """Returns the directory of the run's logs, or None where the run keeps none (`logger: false`, `fast_dev_run`).

    It is a collective: call it on every rank.
    """
    directory = trainer.log_dir
    # the stand-in logger of `fast_dev_run` answers every attribute with a function
    return directory if trainer.loggers and isinstance(directory, str) else None


def is_drawn(epoch: int, every_n_epochs: int) -> bool:
    """Whether a picture is drawn in this epoch: the numbers 0, 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on of each n-th.

    A picture takes hundreds of kilobytes, and an hour has one epoch or hundreds.
    """
    number, rest = divmod(epoch, every_n_epochs)
    return rest == 0 and number % 2 ** max(0, number.bit_length() - 2) == 0


def leave_bar(trainer: Trainer, pl_module: LightningModule) -> None:
    """Ends the progress bar of a `fit`, so that what is printed next comes after it."""
    bar = trainer.progress_bar_callback
    if bar is not None:
        bar.teardown(trainer, pl_module, "fit")


def require_positive(owner: object, **arguments: int) -> None:
    """Raises a `ValueError` that names the argument, the rule and the value."""
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{type(owner).__name__}: {name} must be at least 1, got {value}.")
