"""A detector whose answers are known, and images for it; what the tests of predictions and of the report share."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from datamodules import GeneratedImagesDataModule


class Stub(LightningModule):
    """Takes the mean of the red channel for the probability, and knows how to restore: to the mean of an image."""

    threshold = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        probability = batch["image"][:, :, 0].mean((1, 2, 3))
        passed_on = {name: batch[name] for name in ("label", "index", "weight", "name", "condition")}
        return {"probability": probability, "logit": probability.logit(), **passed_on}

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return self.predict(batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return self.predict(batch)

    def residual(self, images: torch.Tensor) -> torch.Tensor:
        return images - images.mean((-1, -2), keepdim=True)


class WithOODScore(Stub):
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return self.predict(batch) | {"ood_score": batch["index"] / 2}


def paint(path: Path, red: int, size: tuple[int, int] = (24, 20), seed: int = 0) -> None:
    """An image whose red channel has one value; the others are noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels[..., 0] = red
    Image.fromarray(pixels).save(path, quality=95)


def module(root: Path, **options: Any) -> GeneratedImagesDataModule:
    return GeneratedImagesDataModule(str(root), **({"crop_size": 8, "batch_size": 2, "eval_crops": 2} | options))


def trainer(folder: Path, callback: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", default_root_dir=folder, callbacks=[callback], **(quiet | options))


def two_processes(folder: Path, callback: Callback) -> Trainer:
    return trainer(folder, callback, devices=2, strategy="ddp_fork", enable_checkpointing=False)
