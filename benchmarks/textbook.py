"""Does the textbook configuration improve on its start, by its own rule and by the gradient?

`configs/cifar10_textbook.yaml` as the command line runs it: validated untrained, trained, and validated after each
epoch, with three seeds; then the same with `GradientRule` and without the smoothness bonus.

    python benchmarks/textbook.py --json docs/results/textbook.json
"""

import logging
import warnings
from typing import Any

import lightning as L
import torch
from _common import PROJECT, arguments, write_json

from callbacks import EMParameterCallback, GradientRule
from lightning_modules.cli import build


class Curve(L.Callback):
    """PSNR of the validation images before training and after each epoch."""

    def __init__(self) -> None:
        self.psnr: list[float] = []
        self.noisy = 0.0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.psnr.append(float(trainer.callback_metrics["val/psnr"]))
        self.noisy = float(trainer.callback_metrics["val/psnr_noisy"])


def run(words: list[str], epochs: int, by_gradient: bool) -> dict[str, Any]:
    """Curve, parameters and loss of each class of one run."""
    command = build([*words, "--model.smoothness_weight=0"] if by_gradient else words)
    module, data = command.model, command.datamodule
    (em,) = (callback for callback in command.trainer.callbacks if isinstance(callback, EMParameterCallback))
    if by_gradient:
        em.rule = GradientRule()
    curve = Curve()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[em, curve],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    names = module.em_parameters.row_names
    return {
        "psnr_noisy": curve.noisy,
        "psnr": curve.psnr,
        "start": module.em_parameters.initial_parameters(),
        "parameters": em.get_parameters(),
        "rows": {name: em.get_parameters(row) for row, name in enumerate(names)},
        "class_loss": {name: _recent(em.class_loss_history(row)) for row, name in enumerate(names)},
        "steps": trainer.global_step,
    }


def print_classes(row: dict[str, Any]) -> None:
    """The table of a run's classes, as the documentation has it."""
    print(f"\n| {row['rule']}, seed {row['seed']} | σ | τ | smooth_steps | loss |\n|---|---|---|---|---|")
    everything = {"global set": row["parameters"], **row["rows"]}
    for name, values in everything.items():
        loss = f"{row['class_loss'][name]:.4f}" if name in row["class_loss"] else ""
        print(f"| {name} | {values['sigma']:.3f} | {values['tau']:.3f} | {values['smooth_steps']} | {loss} |")


def _recent(losses: list[float]) -> float:
    known = [loss for loss in losses if loss == loss][-50:]
    return sum(known) / len(known)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    config = str(PROJECT / "configs" / "cifar10_textbook.yaml")
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        words = ["-c", config, f"--data.root={options.data}", "--data.val_size=0.1", f"--seed_everything={seed}"]
        words.append("--model.diffusion.implementation=auto")  # equal to message passing, in less time
        for rule in ("SignRule", "GradientRule"):
            found = run(words, options.epochs, rule == "GradientRule")
            rows.append({"seed": seed, "rule": rule, **found})
            print(f"{rule}, seed {seed}: " + " → ".join(f"{psnr:.2f}" for psnr in found["psnr"]), flush=True)
            write_json(options.json, rows)
    for rule in ("SignRule", "GradientRule"):
        print_classes(next(row for row in rows if row["rule"] == rule))


if __name__ == "__main__":
    main()
