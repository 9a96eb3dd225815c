"""Clean, noisy and denoised clouds of the validation set on TensorBoard's mesh page."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks._display import require_positive, tensorboard_loggers

_NAMES = ("clean", "noisy", "restored")


class PointCloudView(Callback):
    """Draws the first clouds of the validation set, the same ones every time, on TensorBoard's page *Mesh*.

    It takes them from what `validation_step` returns (`{"clean", "noisy", "restored"}`, `[N, 3]` each, those that there
    are, and `"cloud_of_point"`, `[N]`), without a forward pass of its own. With several processes it draws those of the
    first.

    Args:
        num_clouds: How many clouds.
        max_points: Points of each that are drawn; the browser has to turn them.
        every_n_epochs: Draw in every n-th epoch, beginning with the first.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PointCloudView(num_clouds=1)], logger=False)
    """

    def __init__(self, num_clouds: int = 2, max_points: int = 10000, every_n_epochs: int = 1) -> None:
        require_positive(self, num_clouds=num_clouds, max_points=max_points, every_n_epochs=every_n_epochs)
        self.num_clouds = num_clouds
        self.max_points = max_points
        self.every_n_epochs = every_n_epochs
        self._drawn = 0

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins with the first cloud again."""
        self._drawn = 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draws clouds until there are enough."""
        loggers = tensorboard_loggers(trainer)
        if trainer.sanity_checking or not trainer.is_global_zero or trainer.current_epoch % self.every_n_epochs:
            return
        for cloud in range(int(outputs["cloud_of_point"].max()) + 1) if loggers else ():
            if self._drawn == self.num_clouds:
                return
            chosen = (outputs["cloud_of_point"] == cloud).nonzero()[:, 0]
            chosen = chosen[:: -(-len(chosen) // self.max_points)]
            for name in (name for name in _NAMES if name in outputs):
                points: Tensor = outputs[name][chosen].detach().float().cpu()[None]
                colors = torch.full(points.shape, 128, dtype=torch.uint8)
                for logger in loggers:
                    logger.experiment.add_mesh(
                        f"val/{self._drawn}/{name}", points, colors, None, None, trainer.global_step
                    )
            self._drawn += 1
