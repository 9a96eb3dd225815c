"""Blind noise: one parameter set, regimes found by EM, and one set for each true level; with clean images and without.

    python benchmarks/em_regimes.py --json em_regimes.json

CIFAR-10, diffusion only. Each image has noise of 5, 15, 25 or 50/255; the restoration is told its own estimate of it
and nothing else. All runs start from the same parameters, see the same number of images, and are tested on the same
noisy images. Widths are absolute; last come those in units of the noise level, one set for all levels, for patches of
two sizes and for grey images, and what it does to clean images when it is told that they are clean.
"""

import logging
import warnings
from typing import Any

import lightning as L
import torch
from _common import arguments, quiet_trainer, write_json
from torch import Tensor

from callbacks import EMParameterCallback, GradientRule
from datamodules import CIFAR10DataModule
from lightning_modules import GraphDiffusion, GraphDiffusionReconstruction, ParameterTable
from lightning_modules.em import MixtureAssignment
from lightning_modules.noise import estimate_noise_std

LEVELS = [5 / 255, 15 / 255, 25 / 255, 50 / 255]
START = {"sigma": 0.3, "tau": 0.1, "radius": 3.0, "sigma_s": 10.0, "sigma_f": 0.3, "smooth_steps": 5}
BOUNDS = {
    "sigma": (0.02, 1.0),
    "tau": (0.005, 0.5),
    "radius": (3.0, 3.0),
    "sigma_s": (0.5, 20.0),
    "sigma_f": (0.02, 1.0),
}
# The same in units of noise, (2d)^¼ times its level, at the mean of the four levels.
START_NOISE = {**START, "sigma": 1.1, "sigma_f": 1.1}
BOUNDS_NOISE = {**BOUNDS, "sigma": (0.1, 4.0), "sigma_f": (0.1, 4.0)}
LEARNED = ["sigma", "tau", "sigma_s", "sigma_f"]


class Gray(CIFAR10DataModule):
    """CIFAR-10 in one channel, the mean of the three."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        return {**batch, "image": batch["image"].mean(1, keepdim=True)}


def learn(
    data: Any,
    steps: int,
    levels: list[float],
    regimes: int,
    objective: Any,
    patch_size: int = 3,
    widths: Any = "absolute",
) -> GraphDiffusionReconstruction:
    """A module that has learned its parameters under noise of the given levels."""
    L.seed_everything(0, verbose=False)
    in_noise = widths == "noise"
    table = ParameterTable(
        initial=START_NOISE if in_noise else START,
        bounds=BOUNDS_NOISE if in_noise else BOUNDS,
        learned=LEARNED,
        per_row=LEARNED if regimes else None,
        row_names=[f"regime {k}" for k in range(regimes)],
    )
    module = GraphDiffusionReconstruction(
        GraphDiffusion(patch_size=patch_size, widths=widths),
        table,
        assignment=MixtureAssignment(regimes) if regimes else None,
        noise_levels=levels,
        estimate_noise=True,
        objective=objective,
    )
    quiet_trainer(steps, EMParameterCallback(GradientRule(lr=0.1, pseudo_count=0.0))).fit(module, data)
    return module.eval()


@torch.no_grad()
def psnr(module: GraphDiffusionReconstruction, noisy: Tensor, clean: Tensor) -> Tensor:
    """PSNR of each restored image."""
    restored = torch.cat([module(part, estimate_noise_std(part)) for part in noisy.split(50)]).clamp(0, 1)
    return -10 * (restored - clean).square().mean((1, 2, 3)).log10()


def noisy_images(data: CIFAR10DataModule, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clean test images, the same with noise, and its level in each."""
    data.setup("test")
    data.setup("fit")
    clean = torch.cat([data.on_after_batch_transfer(batch, 0)["image"] for batch in data.test_dataloader()])[:count]
    truth = torch.tensor(LEVELS)[torch.arange(len(clean)) % len(LEVELS)]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    return clean, clean + truth.view(-1, 1, 1, 1) * noise, truth


def main() -> None:
    parser = arguments("One parameter set, regimes found by EM, and one set for each true level, under blind noise.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--unit-steps", type=int, default=150, help="steps of the runs in units of noise")
    parser.add_argument("--images", type=int, default=200, help="test images")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    data = CIFAR10DataModule(root=str(given.data), batch_size=32)
    clean, noisy, truth = noisy_images(data, given.images)

    records: list[dict[str, Any]] = []

    def report(name: str, scores: Tensor) -> float:
        parts = {level: scores[number :: len(LEVELS)].mean() for number, level in enumerate(LEVELS)}
        by_level = {f"psnr_{round(255 * level)}": float(score) for level, score in parts.items()}
        records.append({"work": name, "psnr": float(scores.mean()), **by_level})
        print(
            f"{name:34} {scores.mean():.3f} dB  " + "  ".join(f"{value:.2f}" for value in by_level.values()), flush=True
        )
        write_json(given.json, records)
        return float(scores.mean())

    for objective in ("supervised", "sure"):
        single = report(f"{objective}, one set", psnr(learn(data, given.steps, LEVELS, 0, objective), noisy, clean))
        module = learn(data, given.steps, LEVELS, len(LEVELS), objective)
        mixture = report(f"{objective}, {len(LEVELS)} regimes found by EM", psnr(module, noisy, clean))
        scores = torch.zeros(len(clean))
        for level in LEVELS:
            own = learn(data, given.steps, [level], 0, objective)
            chosen = truth == torch.tensor(level)
            scores[chosen] = psnr(own, noisy[chosen], clean[chosen])
        best = report(f"{objective}, one set for each true level", scores)
        share = (mixture - single) / (best - single)
        print(f"{objective}: the regimes go {share:.1%} of the way", flush=True)
        records.append({"work": f"{objective}, share of the way", "share": share})
    for channels, patch_size in ((3, 3), (3, 5), (1, 3), (1, 5)):
        source = data if channels == 3 else Gray(root=str(given.data), batch_size=32)
        clean, noisy, truth = noisy_images(source, given.images)
        module = learn(source, given.unit_steps, LEVELS, 0, "supervised", patch_size, "noise")
        name = f"in units of noise, {patch_size}×{patch_size} {'colour' if channels == 3 else 'grey'}"
        report(f"supervised, one set {name}", psnr(module, noisy, clean))
        with torch.no_grad():
            error = (module(clean, 0.0) - clean).square().mean((1, 2, 3)).clamp_min(1e-12)
        records[-1]["psnr_clean"] = float(-10 * error.log10().mean())
        records[-1]["parameters"] = module.em_parameters.get_parameters()
        print(f"  clean images, level told: {records[-1]['psnr_clean']:.1f} dB;", records[-1]["parameters"], flush=True)
    write_json(given.json, records)


if __name__ == "__main__":
    main()
