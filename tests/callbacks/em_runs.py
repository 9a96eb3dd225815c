"""Small, exactly repeatable EM runs; as a script, runs of several processes or runs that get killed.

python em_runs.py --devices 2 --rules gradient sign --out FILE
"""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from tables import TEXTBOOK
from torch import nn
from torch.nn import functional as F

from callbacks import BayesianRule, EMParameterCallback, GradientRule, NewtonRule, Rule, SignRule, SPSARule
from datamodules.image_data_module import ImageDataModule, Split, TensorImages
from lightning_modules import GraphDiffusion, GraphDiffusionReconstruction, ParameterTable, ResidualDenoiser
from lightning_modules.em import Assignment, LabelAssignment, MixtureAssignment, SimilarityAssignment
from lightning_modules.em.image_features import NoiseLevel, Texture

CLASSES = ["cat", "dog", "owl"]


class SmoothImages(ImageDataModule):
    """Images of 11×9 pixels with labels −1 to 2; 45 for training, a number that two processes cannot share evenly."""

    def __init__(self, batch_size: int, size: int = 45) -> None:
        super().__init__(batch_size, num_workers=0, seed=0, augment=True)
        self.size = size

    @property
    def class_names(self) -> list[str]:
        return CLASSES

    def load_split(self, split: Split) -> TensorImages:
        generator = torch.Generator().manual_seed(0)
        size = self.size if split == "train" else 13
        images = F.avg_pool2d(torch.rand(size, 3, 13, 11, generator=generator), 3, 1)
        labels = (torch.rand(size, generator=generator) * 4).long() - 1
        images = (images * 255).round().to(torch.uint8)
        return TensorImages(images, labels)


def make_rule(name: str) -> Rule:
    if name == "gradient":
        return GradientRule(lr=0.1, pseudo_count=4)
    if name == "newton":
        return NewtonRule(trust_radius=0.1, pseudo_count=4)
    if name == "spsa":
        return SPSARule(trust_radius=0.1, pseudo_count=4)
    if name == "bayesian":
        return BayesianRule(trust_radius=0.1)
    return SignRule(
        window=3, row_parameters=("sigma", "tau"), loss_thresholds=(0.002, 0.004), smoothness_thresholds=(0.3, 0.5)
    )


def make_assignment(name: str) -> Assignment:
    if name == "mixture":
        return MixtureAssignment(3, [NoiseLevel(), Texture()])
    if name == "similarity":
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        return SimilarityAssignment(pool, embedding_size=12, num_classes=3, temperature=0.02)
    return LabelAssignment()


def make_module(network: bool = True, assignment: str = "label") -> GraphDiffusionReconstruction:
    torch.manual_seed(0)
    table = ParameterTable(
        initial={"radius": 2.5, "sigma_s": 2.0, "smooth_steps": 2},
        bounds={
            "sigma": (0.02, 3.0),
            "radius": (1.5, 3.0),
            "sigma_s": (0.5, 20.0),
            "smooth_steps": (1, 4),
            "tau": (0.02, 0.9),
        },
        per_row=["sigma", "tau", "smooth_steps"],
        row_names=CLASSES,
    ).declare(TEXTBOOK)
    return GraphDiffusionReconstruction(
        GraphDiffusion(patch_size=3),
        table,
        backbone=ResidualDenoiser(width=4, depth=4, graph_features=2, graph_on="features") if network else None,
        assignment=make_assignment(assignment),
        objective="sure" if assignment == "mixture" else "supervised",
        estimate_noise=assignment == "mixture",
        noise_std=(0.05, 0.15),
        smoothness_weight=0.001,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
    )


class Kill(L.Callback):
    """Kills the process in the middle of an epoch, without a goodbye."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.current_epoch == self.epoch and trainer.global_step % 3 == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def make_trainer(root: Path, callback: EMParameterCallback, epochs: int = 7, **options: Any) -> L.Trainer:
    extra = options.pop("callbacks", [])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    checkpoint = ModelCheckpoint(dirpath=root, filename="{epoch}", save_top_k=-1)
    return L.Trainer(
        **{"accelerator": "cpu", "devices": 1, "limit_val_batches": 0, **quiet, **options},
        max_epochs=epochs,
        default_root_dir=root,
        callbacks=[callback, checkpoint, *extra],
    )


def real_float16(**options: Any) -> MixedPrecision:
    """`16-mixed` with a scaler that scales; on the CPU Lightning's own "16-mixed" turns into bfloat16."""
    scaler = torch.amp.GradScaler("cpu", **{"init_scale": 2.0**12, "growth_interval": 3, **options})
    return MixedPrecision("16-mixed", "cpu", scaler)


def result(trainer: L.Trainer, module: L.LightningModule, callback: EMParameterCallback) -> dict[str, Any]:
    return {
        "parameters": [list(values.values()) for values in callback.parameter_history],
        "table": module.em_parameters.values(),
        "loss": callback.loss_history,
        "train_loss": float(trainer.callback_metrics["train/loss"]),
        "weights": {name: tensor.clone() for name, tensor in module.state_dict().items() if torch.is_tensor(tensor)},
        "rule": callback.state_dict()["rule_state"],
        "optimizer": trainer.optimizers[0].state_dict(),
        "global_step": trainer.global_step,
        "skipped": callback.skipped_steps,
    }


def run(
    root: Path, rule: str = "gradient", batch_size: int = 16, epochs: int = 7, ckpt: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Train, and return everything that must be equal between runs that should be equal.

    `rule` names a rule, or an assignment that learns by the gradient rule; regimes learn without clean images.
    """
    torch.set_num_threads(1)
    L.seed_everything(7, verbose=False)
    latent = rule in ("mixture", "similarity")
    module = make_module(assignment=rule) if latent else make_module()
    callback = EMParameterCallback(make_rule("gradient" if latent else rule))
    trainer = make_trainer(root, callback, epochs, **options)
    trainer.fit(module, SmoothImages(batch_size), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return result(trainer, module, callback)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--rules", nargs="+", default=["gradient"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--kill", type=int)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    strategy = "ddp" if options.devices > 1 else "auto"  # gloo on the CPU
    results = {}
    for rule in options.rules:
        results[rule] = run(
            options.out.parent / rule,
            rule,
            options.batch_size,
            devices=options.devices,
            strategy=strategy,
            precision=options.precision,
            callbacks=[Kill(options.kill)] if options.kill is not None else [],
        )
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        torch.save(results, options.out)


if __name__ == "__main__":
    main()
