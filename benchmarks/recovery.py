"""Does the gradient rule reach the best parameters from every start?

CIFAR-10 images with noise of 25/255, restored by diffusion alone (`signal="image"`, patch 3, radius 3, five steps).
σ, τ, σ_s and σ_f are learned in 50 batches of 16, from the defaults and from the eight corners of (σ, τ, σ_f) with σ_s
at 10.
The oracle searches the same bounds on the test images themselves, then refines the best points with exact gradients.

    python benchmarks/recovery.py --json recovery.json
"""

import logging
import warnings

import lightning as L
import torch
from _common import arguments, quiet_trainer, write_json
from _recovery import BOUNDS, FIXED, NOISE_STD, TestImages, starts

from callbacks import EMParameterCallback, GradientRule
from datamodules import CIFAR10DataModule
from lightning_modules import GraphDiffusion, GraphDiffusionReconstruction, ParameterTable


class Snapshots(L.Callback):
    """Parameters after a given number of steps."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.parameters: dict[str, float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            self.parameters = pl_module.em_parameters.get_parameters()


def learn(start: dict[str, float], data: CIFAR10DataModule, steps: int, lr: float) -> list[dict[str, float]]:
    """Parameters after 15 steps and at the end."""
    table = ParameterTable(
        initial={**start, **FIXED},
        bounds={**BOUNDS, "radius": (3.0, 3.0)},
        learned=list(BOUNDS),
    )
    module = GraphDiffusionReconstruction(GraphDiffusion(patch_size=3, signal="image"), table, noise_std=NOISE_STD)
    snapshots = Snapshots(15)
    quiet_trainer(steps, EMParameterCallback(GradientRule(lr=lr)), snapshots).fit(module, data)
    return [{name: values[name] for name in BOUNDS} for values in (snapshots.parameters, table.get_parameters())]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--images", type=int, default=200, help="test images")
    parser.add_argument("--lr", type=float, default=0.1, help="step of the rule on log θ")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    def data() -> CIFAR10DataModule:
        return CIFAR10DataModule(root=str(options.data), batch_size=16, val_size=100, augment=False)

    images = TestImages(data(), options.images)
    best, best_parameters = images.oracle(points=128, refined=3)
    print(f"oracle {best:.3f} dB at", {name: round(value, 3) for name, value in best_parameters.items()})
    records = []
    for start in starts():
        after_15, final = learn(start, data(), options.steps, options.lr)
        with torch.no_grad():
            quality = [float(images.quality(parameters)) for parameters in (start, after_15, final)]
        record = dict(zip(("psnr_start", "psnr_15", "psnr_50"), quality, strict=True))
        records.append({"start": start, **record, "psnr_oracle": best, "parameters": final})
        named = {name: round(value, 3) for name, value in final.items()}
        print(
            f"from {tuple(start.values())}: {quality[0]:.2f} → {quality[1]:.3f} → {quality[2]:.3f} dB "
            f"({quality[2] - best:+.3f} to the oracle) at {named}",
            flush=True,
        )
        write_json(options.json, records)
    gap_15, gap_50 = (max(best - record[name] for record in records) for name in ("psnr_15", "psnr_50"))
    print(f"largest distance to the oracle: {gap_15:.3f} dB after 15 batches, {gap_50:.3f} dB after {options.steps}")


if __name__ == "__main__":
    main()
