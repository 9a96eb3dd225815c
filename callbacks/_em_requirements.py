"""Requirements of a run for its M-step to be right."""

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from lightning_modules.em import ParameterTable


def check_module(pl_module: LightningModule) -> None:
    """Raises `MisconfigurationException` for a module without a table, or one whose steps cannot be told apart."""
    table = getattr(pl_module, "em_parameters", None)
    if not isinstance(table, ParameterTable):
        what = "has no attribute" if table is None else f"has a {type(table).__name__} as"
        raise MisconfigurationException(
            "EMParameterCallback learns the parameters of a lightning_modules.ParameterTable, but "
            f"{type(pl_module).__name__} {what} `em_parameters`: create the table in the module's __init__"
        )
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "EMParameterCallback needs automatic optimisation: under manual optimisation Lightning does not say which "
            "batches belong to an optimiser step"
        )


def check_trainer(trainer: Trainer, kind: type[Callback]) -> None:
    """Raises `MisconfigurationException` for a strategy, a device or a second callback under which it would be wrong.

    Args:
        trainer: The trainer of the run.
        kind: Class of which the run may have one callback.
    """
    strategy = trainer.strategy
    supported = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    if not supported:
        raise MisconfigurationException(
            f"EMParameterCallback does not work with {type(strategy).__name__}, under which a module's buffers or "
            "gradients are not whole on every process: use one device or strategy='ddp'"
        )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if strategy.root_device.type == "mps":
        raise MisconfigurationException(
            "EMParameterCallback needs float64, which Apple's MPS does not have: add --trainer.accelerator cpu"
        )
    twins = [callback for callback in callbacks if isinstance(callback, kind)]
    if len(twins) > 1:
        raise MisconfigurationException(
            f"{len(twins)} EMParameterCallbacks would each move the same parameter table: keep one of them"
        )
