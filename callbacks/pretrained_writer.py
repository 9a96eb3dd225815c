"""Writer of trained weights, for use without Lightning."""

from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks._display import run_directory
from callbacks._tables import require_directory


class PretrainedWriter(Callback):
    """Writes the trained operator by its `save_pretrained`, with the parameters that the table has learned.

    It writes when training is over; weights that `EMAWeightAveraging` averages are then the averaged ones, the
    parameters those of the last M-step.

    Args:
        output_dir: Where to write; by default `pretrained` in the directory of the run.

    Example:
        >>> callback = PretrainedWriter("weights")
    """

    def __init__(self, output_dir: str | None = None) -> None:
        require_directory(self, output_dir)
        self.output_dir = output_dir

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a module that has nothing to write."""
        operator = getattr(pl_module, "operator", None)
        if stage == "fit" and not hasattr(operator, "save_pretrained"):
            raise MisconfigurationException(
                f"PretrainedWriter needs an operator with save_pretrained, such as GraphDenoiser; "
                f"{type(pl_module).__name__} has {type(operator).__name__}: remove the callback"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        default = Path(run_directory(trainer) or trainer.default_root_dir) / "pretrained"
        path = pl_module.operator.save_pretrained(  # type: ignore[operator, union-attr]
            self.output_dir or default,
            pl_module.em_parameters.get_parameters(),  # type: ignore[operator, union-attr]
        )
        rank_zero_info(f"The weights are in {path}")
