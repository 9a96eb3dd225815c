"""Small, exactly repeatable runs of the detector; as a script, on as many processes as asked for.

python detector_training.py --devices 2 --out FILE
"""

import argparse
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from callbacks import EMParameterCallback, GradientRule
from datamodules import BatchDataset, ImageDataModule, SampleBatch
from datamodules._sampler import FixedBatches
from datamodules.image_data_module import Split
from lightning_modules import GeneratedImageDetector, ParameterTable, RestorationResidual, TraceNetwork
from lightning_modules.imaging import ImageBatch

SIDE = 12
# Numbers of images that two processes cannot share evenly.
TRAINING, VALIDATION = 45, 61
CONDITIONS = ("clean", "jpeg 75")


class Textures(BatchDataset):
    """Noise, and noise that neighbours share (label 1), with 2 crops an image; every seventh label is unknown."""

    def __init__(self, count: int, seed: int, condition: str = "clean") -> None:
        generator = torch.Generator().manual_seed(seed)
        self.label = torch.arange(count) % 2
        pixels = torch.rand(count, 2, 3, SIDE, SIDE, generator=generator)
        smooth = F.avg_pool2d(pixels.flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(pixels)
        share = 0.5 + 0.4 * torch.rand(count, generator=generator)
        share = (share * (1.0 if condition == "clean" else 0.5) * self.label).view(-1, 1, 1, 1, 1)
        self.image = 0.3 + 0.4 * ((1 - share) * pixels + share * smooth)
        self.label[::7] = -1
        self.condition = condition

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, samples: SampleBatch) -> ImageBatch:
        index = samples.index
        return {
            **samples.batch(self.image[index], self.label[index]),
            "name": [f"{i}.png" for i in index.tolist()],
            "condition": self.condition,
        }


class TextureData(ImageDataModule):
    """`Textures` for training, validation, prediction, and a test under two conditions."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size, num_workers=0, seed=0, augment=False)

    @property
    def class_names(self) -> list[str]:
        return ["photographic", "generated"]

    def load_split(self, split: Split) -> Textures:
        return Textures(TRAINING, 0) if split == "train" else Textures(VALIDATION, 1)

    def test_dataloader(self) -> list[DataLoader[Any]]:  # type: ignore[override]
        return [
            self._loader("test", DataLoader, FixedBatches, data=Textures(VALIDATION, 2, condition))
            for condition in CONDITIONS
        ]


def make_module(learn: bool = False, **options: Any) -> GeneratedImageDetector:
    torch.manual_seed(0)
    table = ParameterTable(
        initial={"sigma": 0.3, "radius": 1.5, "sigma_s": 1.0, "smooth_steps": 1},
        bounds={"sigma": (0.02, 1.0), "radius": (1.0, 1.5), "sigma_s": (0.5, 20.0), "smooth_steps": (1, 2)},
        learned=["sigma", "sigma_s", "sigma_f"],
    )
    return GeneratedImageDetector(
        [RestorationResidual(em_parameters=table, learn=learn, scale=5.0)],
        TraceNetwork(3, (16, 32), (1, 2), normalization="group"),
        num_directions=3,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-2),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5),
        **options,
    )


def make_trainer(root: Path, epochs: int = 6, learn: bool = False, **options: Any) -> L.Trainer:
    learner = [EMParameterCallback(GradientRule(lr=0.1))] if learn else []
    checkpoint = ModelCheckpoint(dirpath=root, filename="{epoch}", save_top_k=-1)
    averaging = EMAWeightAveraging(decay=0.7, use_buffers=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        **{"accelerator": "cpu", "devices": 1, **quiet, **options},
        max_epochs=epochs,
        default_root_dir=root,
        callbacks=[*learner, averaging, checkpoint],
    )


def run(root: Path, batch_size: int = 16, learn: bool = False, ckpt: Path | None = None, **options: Any) -> dict:
    """Train and test, and return everything that must be equal between runs that should be equal."""
    torch.set_num_threads(1)
    module, data = make_module(learn), TextureData(batch_size)
    trainer = make_trainer(root, learn=learn, **options)
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    validation = {name: float(value) for name, value in trainer.callback_metrics.items()}
    tested = {name: value for part in trainer.test(module, data, verbose=False) for name, value in part.items()}
    weights = {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    return {"val": validation, "test": tested, "weights": weights}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    words = parser.parse_args()
    results = {
        learn: run(
            words.out.parent / f"run {learn}",
            words.batch_size,
            learn,
            devices=words.devices,
            strategy="ddp",
            precision="64-true",
        )
        for learn in (False, True)
    }
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        torch.save(results, words.out)


if __name__ == "__main__":
    main()
