"""Small, exactly repeatable runs over point clouds; as a script, runs of several processes or runs that get killed.

python cloud_runs.py --devices 2 --out FILE
"""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import EMParameterCallback, NewtonRule
from datamodules import PointCloudDataModule
from lightning_modules import PointCloudDiffusion, PointCloudReconstruction

EPOCHS, STEPS = 3, 4  # 8 shapes make 4 steps of 2, or 2 processes with 1 each


class Kill(L.Callback):
    """Kills the process in the middle of the last epoch, without a goodbye."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.current_epoch == EPOCHS - 1 and trainer.global_step % STEPS == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def run(root: Path, batch_size: int = 2, ckpt: Path | None = None, **options: Any) -> dict[str, Any]:
    """Train, and return everything that must be equal between runs that should be equal."""
    torch.set_num_threads(1)
    L.seed_everything(7, verbose=False)
    # One graph: a second one would turn rounding into other neighbors.
    module = PointCloudReconstruction(PointCloudDiffusion(num_neighbors=12, graphs=1), objective="held_out")
    data = PointCloudDataModule(num_points=300, clouds_per_shape=1, batch_size=batch_size, sampling="uniform", seed=0)
    callback, extra = EMParameterCallback(NewtonRule()), options.pop("extra", [])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = L.Trainer(
        **{"accelerator": "cpu", "devices": 1, "limit_val_batches": 0, "precision": "64-true", **quiet, **options},
        max_epochs=EPOCHS,
        default_root_dir=root,
        callbacks=[callback, ModelCheckpoint(root, "{epoch}", save_top_k=-1), *extra],
    )
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return {
        "parameters": [list(values.values()) for values in callback.parameter_history],
        "loss": callback.loss_history,
        "rule": callback.state_dict()["rule_state"],
        "global_step": trainer.global_step,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    strategy = "ddp" if options.devices > 1 else "auto"  # gloo on the CPU
    extra = [Kill()] if options.kill else []
    found = run(
        options.out.parent,
        options.batch_size,
        devices=options.devices,
        strategy=strategy,
        extra=extra,
    )
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        torch.save(found, options.out)


if __name__ == "__main__":
    main()
