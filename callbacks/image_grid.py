"""Clean, noisy and restored images of the validation set, side by side in TensorBoard."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from callbacks._display import is_drawn, require_positive, tensorboard_loggers

_NAMES = ("clean", "noisy", "restored")
_LEAST_SIDE = 96  # pixels; smaller images are enlarged by a whole factor
_MOST_SIDE = 128  # pixels; of larger images there is the middle, or a picture would take megabytes


class ImageGrid(Callback):
    """Draws the first images of the validation set, the same ones every time, clean above noisy above restored; of
    large ones the middle, pixel by pixel.

    It takes them from what `validation_step` returns (`{"clean", "noisy", "restored"}`, `[B, C, H, W]` each), without a
    forward pass of its own. With several processes it draws those of the first process.

    Args:
        num_images: How many images, one a column.
        every_n_epochs: Draw in every n-th epoch, beginning with the first; more rarely as the run grows long.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ImageGrid(num_images=4)], logger=False)
    """

    def __init__(self, num_images: int = 8, every_n_epochs: int = 1) -> None:
        require_positive(self, num_images=num_images, every_n_epochs=every_n_epochs)
        self.num_images = num_images
        self.every_n_epochs = every_n_epochs
        self._samples: list[tuple[Tensor, ...]] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the samples of the epoch before."""
        self._samples = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the images until there are enough of them."""
        missing = self.num_images - len(self._samples)
        if missing <= 0 or dataloader_idx > 0 or not self._draws(trainer):
            return
        if not isinstance(outputs, dict) or any(name not in outputs for name in _NAMES):
            raise TypeError(
                f"ImageGrid draws what validation_step returns, a dict with the images {', '.join(_NAMES)}; "
                f"{type(pl_module).__name__}.validation_step returned "
                f"{sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__}."
            )
        images = (_middle(outputs[name][:missing]).detach().float().cpu() for name in _NAMES)
        self._samples += zip(*images, strict=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws."""
        if self._samples:
            grid = image_grid(self._samples)
            for logger in tensorboard_loggers(trainer):
                logger.experiment.add_image("val/clean_noisy_restored", grid, trainer.global_step)
        self._samples = []

    def _draws(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking or not trainer.is_global_zero or not tensorboard_loggers(trainer):
            return False
        return trainer.state.fn != TrainerFn.FITTING or is_drawn(trainer.current_epoch, self.every_n_epochs)


def image_grid(samples: list[tuple[Tensor, ...]]) -> Tensor:
    """Lays samples out as the columns of a grid, their images one below the other; smaller images get a margin.

    Shape:
        - samples: of each, its images `[C, H, W]` in [0, 1]
        - output: `[3, H', W']`
    """
    height = max(image.shape[-2] for sample in samples for image in sample)
    width = max(image.shape[-1] for sample in samples for image in sample)
    padded = [
        F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]))
        for across in zip(*samples, strict=True)
        for image in across
    ]
    tiles = torch.stack(padded).clamp(0, 1)
    factor = max(1, _LEAST_SIDE // max(height, width))
    tiles = tiles.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
    return make_grid(tiles, nrow=len(samples))


def _middle(images: Tensor) -> Tensor:
    """The middle of images that are larger than what is drawn."""
    top, left = (max(0, side - _MOST_SIDE) // 2 for side in images.shape[-2:])
    return images[..., top : top + _MOST_SIDE, left : left + _MOST_SIDE]
