"""Optimizer and schedule from what the command line injects."""

from collections.abc import Iterable
from typing import Any, Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.nn import Parameter


def optimizer_config(
    parameters: Iterable[Parameter],
    optimizer: OptimizerCallable,
    lr_scheduler: LRSchedulerCallable | None,
    interval: Literal["step", "epoch"],
    lr: float | None = None,
) -> Any:
    """Returns the value of `configure_optimizers`.

    Args:
        parameters: Those of the module; what needs no gradient is left out.
        optimizer: Makes the optimizer of them.
        lr_scheduler: Makes the schedule of the optimizer; None for a constant rate.
        interval: Whether the schedule counts steps or epochs.
        lr: Learning rate in place of the optimizer's own, where `LearningRateFinder` has found one.
    """
    made = optimizer(parameter for parameter in parameters if parameter.requires_grad)
    for group in made.param_groups if lr is not None else ():
        group["lr"] = lr
    if lr_scheduler is None:
        return made
    scheduler = lr_scheduler(made)
    monitor = getattr(scheduler, "monitor", "val/loss")  # only ReduceLROnPlateau asks for it
    return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": monitor}}
