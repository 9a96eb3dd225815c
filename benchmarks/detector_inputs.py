"""Inputs of a detector: residual, neighbour differences, colours; with and without compression in training.

    python benchmarks/detector_inputs.py --json detector_inputs.json

Every run has the same network, the same number of crops and of steps, and the same images; three seeds of weights,
crops and order. All are tested on the same crops under all conditions. The restoration of `residual` has the default
parameters; those of `residual, learned` follow the detector's own loss. The data are confounded (the photographs show
everything, the generated images show people): accuracies here compare inputs; how well a detector works elsewhere is
another question.
"""

import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from _common import arguments, write_json
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader, Dataset

from callbacks import EMParameterCallback, GradientRule
from datamodules import GeneratedImagesDataModule
from lightning_modules import GeneratedImageDetector, NeighborDifferences, RawPixels, RestorationResidual
from lightning_modules.detection import DetectorInput

Batch = dict[str, Any]

INPUTS: dict[str, Callable[[], list[DetectorInput]]] = {
    "residual": lambda: [RestorationResidual()],
    "neighbour differences": lambda: [NeighborDifferences()],
    "colours": lambda: [RawPixels()],
    "all": lambda: [RestorationResidual(), NeighborDifferences(), RawPixels()],
    "residual, learned": lambda: [RestorationResidual(learn=True)],
}
SCORES = ("accuracy", "auroc", "average_precision", "ece", "generative_accuracy")


class Batches(Dataset[Batch]):
    """Batches that are made once for all runs."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch:
        batch = self.batches[number]
        return {**batch, "image": batch["image"].float() / 255}


def make_loader(batches: list[Batch], shuffle: bool = False) -> DataLoader[Batch]:
    return DataLoader(Batches(batches), batch_size=None, shuffle=shuffle)


def prepare(root: Path, crop_size: int, epochs: int, seed: int, compressed: bool) -> list[Batch]:
    """Training batches of some epochs, each image with a crop and a degradation of its own in each of them."""
    data = GeneratedImagesDataModule(
        str(root),
        crop_size=crop_size,
        batch_size=16,
        seed=seed,
        cache=True,
        **({} if compressed else {"jpeg_probability": 0.0}),
    )
    loader = data.train_dataloader()
    batches = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches += list(loader)
    return batches


def measure(name: str, training: list[Batch], tests: list[list[Batch]], seed: int) -> dict[str, dict[str, float]]:
    """Scores by condition."""
    L.seed_everything(seed, verbose=False)
    steps = len(training)
    detector = GeneratedImageDetector(
        INPUTS[name](),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.15),
        lr_interval="step",
    )
    learner = [EMParameterCallback(GradientRule(lr=0.05))] if name.endswith("learned") else []
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[*learner, EMAWeightAveraging(decay=0.98, use_buffers=True)],
    )
    # calibrated on the clean test crops: no score here but the calibration error depends on it
    trainer.fit(detector, make_loader(training, shuffle=True), make_loader(tests[0]))
    found = {
        key: value
        for part in trainer.test(detector, [make_loader(test) for test in tests], verbose=False)
        for key, value in part.items()
    }
    result: dict[str, dict[str, float]] = {}
    for key, value in found.items():
        *_, condition, score = key.split("/", 2) if key.count("/") == 2 else ("test", "clean", key.split("/")[1])
        if score in SCORES:
            result.setdefault(condition, {})[score] = value
    table = detector.em_parameters
    if table is not None:
        result["clean"] |= {f"parameter {n}": v for n, v in table.get_parameters().items()}
    return result


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training images")
    parser.add_argument("--crop-size", type=int, default=64)
    parser.add_argument("--crops", type=int, default=4, help="crops of each image in the test")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    root = options.data / "aigc"
    data = GeneratedImagesDataModule(str(root), crop_size=options.crop_size, eval_crops=options.crops)
    tests = [list(loader) for loader in data.test_dataloader()]
    records: list[dict[str, Any]] = []
    for seed in options.seeds:
        for compressed in (True, False):
            training = prepare(root, options.crop_size, options.epochs, seed, compressed)
            for name in INPUTS:
                begin = time.perf_counter()
                scores = measure(name, training, tests, seed)
                setting = {"input": name, "compressed": compressed, "seed": seed}
                seconds = round(time.perf_counter() - begin, 1)
                records += [
                    {**setting, "condition": condition, **found, "seconds": seconds}
                    for condition, found in scores.items()
                ]
                write_json(options.json, records)
                line = "  ".join(f"{condition} {found['accuracy']:.3f}" for condition, found in scores.items())
                print(f"seed {seed}  {name:24s} {'jpeg' if compressed else 'no jpeg':8s} {line}", flush=True)
    print("\nMean accuracy over the seeds")
    for name in INPUTS:
        for compressed in (True, False):
            own = [r for r in records if r["input"] == name and r["compressed"] == compressed]
            means = {
                condition: statistics.mean(r["accuracy"] for r in own if r["condition"] == condition)
                for condition in dict.fromkeys(r["condition"] for r in own)
            }
            line = "  ".join(f"{condition} {value:.3f}" for condition, value in means.items())
            print(f"{name:24s} {'jpeg' if compressed else 'no jpeg':8s} {line}")


if __name__ == "__main__":
    main()
