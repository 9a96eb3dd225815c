"""What does learning the parameters of the diffusion bring, against fixing them at their defaults?

    python benchmarks/em_impact.py --json em_impact.json

CIFAR-10, image signal, patches of 3 pixels, the defaults of `ParameterTable` (radius 10 included) fixed or as the start
of learning, in four settings: (1) diffusion alone, noise 25/255; (2) diffusion alone, blind noise of 5, 15, 25 or
50/255, estimated for each image, learned as one set and as four regimes; (3) `ResidualDenoiser` with a graph on patches
and (4) on its features, noise 25/255. Fixed and learned runs share seeds: order, noise, initial weights. All are tested
on the same noisy test images.
"""

import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from _common import arguments, quiet_trainer, write_json

from callbacks import EMParameterCallback, GradientRule
from datamodules import CIFAR10DataModule
from lightning_modules import GraphDiffusion, GraphDiffusionReconstruction, ParameterTable, ResidualDenoiser
from lightning_modules.em import MixtureAssignment

BLIND = [5 / 255, 15 / 255, 25 / 255, 50 / 255]
# The defaults are the start; the bounds are those of the recommended configurations, up to the default radius.
BOUNDS = {
    "sigma": (0.02, 1.0),
    "tau": (0.005, 0.9),
    "radius": (1.5, 10.0),
    "sigma_s": (0.5, 20.0),
    "sigma_f": (0.02, 3.0),
}
LEARNED = list(BOUNDS)
PER_REGIME = ["sigma", "tau", "sigma_s", "sigma_f"]
SETTINGS = {
    "diffusion alone": ("fixed", "learned"),
    "diffusion alone, blind noise": ("fixed", "learned, one set", "learned, four regimes"),
    "ResidualDenoiser, graph on patches": ("fixed", "learned"),
    "ResidualDenoiser, graph on features": ("fixed", "learned"),
}


class Course(L.Callback):
    """Test error in the course of training, without the time that it takes to measure it."""

    def __init__(self, batches: list[dict[str, Any]], every: int) -> None:
        self.batches, self.every = batches, every
        self.points: list[dict[str, float]] = []
        self._paused = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin = time.perf_counter()
        self._measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measure(trainer, pl_module)

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.points and self.points[-1]["step"] == trainer.global_step:
            return
        begin = time.perf_counter()
        seconds = begin - self._begin - self._paused
        self.points.append({"step": trainer.global_step, "seconds": seconds, **measure(pl_module, self.batches)})
        self._paused += time.perf_counter() - begin


@torch.no_grad()
def measure(module: L.LightningModule, batches: list[dict[str, Any]]) -> dict[str, float]:
    """Mean squared error and mean PSNR over the test images, restored values cut to [0, 1]."""
    module.eval()
    errors = torch.cat(
        [
            (restored.clamp(0, 1) - batch["image"]).square().mean((1, 2, 3))
            for batch in batches
            for restored in [module.predict_step(batch, 0)["restored"]]
        ]
    )
    module.train()
    return {"mse": float(errors.mean()), "psnr": float(-10 * errors.log10().mean())}


def build(setting: str, variant: str, steps: int) -> GraphDiffusionReconstruction:
    regimes = 4 if "regimes" in variant else 0
    table = ParameterTable(
        bounds=BOUNDS,
        learned=[] if variant == "fixed" else LEARNED,
        per_row=PER_REGIME if regimes else None,
        row_names=[f"regime {k}" for k in range(regimes)],
    )
    blind = "blind" in setting
    network = "Residual" in setting
    graph_on: Any = setting.rpartition(" ")[2]
    return GraphDiffusionReconstruction(
        GraphDiffusion(patch_size=3),
        table,
        backbone=ResidualDenoiser(width=16, depth=8, graph_on=graph_on) if network else None,
        assignment=MixtureAssignment(regimes) if regimes else None,
        noise_levels=BLIND if blind else None,
        noise_std=25 / 255,
        estimate_noise=blind,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        lr_interval="step",
    )


def run(setting: str, variant: str, seed: int, data: CIFAR10DataModule, options: Any) -> list[dict[str, Any]]:
    """Train one variant; a record for each measurement, the last of which is final and has the parameters."""
    L.seed_everything(seed, verbose=False)
    module = build(setting, variant, options.steps)
    network = module.backbone is not None
    steps = options.steps if network else options.diffusion_steps
    data.setup("predict")
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.predict_dataloader()]
    batches = batches[: -(-options.images // len(batches[0]["image"]))]
    course = Course(batches, options.every)
    if not network and variant == "fixed":  # nothing to train
        course.points = [{"step": 0, "seconds": 0.0, **measure(module, batches)}]
    else:
        rule = EMParameterCallback(GradientRule(lr=0.05 if network else 0.1, pseudo_count=0.0))
        quiet_trainer(steps, course, *([] if variant == "fixed" else [rule])).fit(module, data)
    table = module.em_parameters
    parameters = table.get_parameters()
    for row, name in enumerate(table.row_names):
        parameters |= {f"{parameter} of {name}": table.get_parameters(row)[parameter] for parameter in table.per_row}
    which = {"setting": setting, "variant": variant, "seed": seed}
    records = [{**which, **point, "final": False} for point in course.points]
    records[-1] |= {"final": True, **parameters}
    return records


def comparison(records: list[dict[str, Any]]) -> Iterator[str]:
    """One line for each setting and learned variant, means over the seeds; steps and seconds to the fixed run's end."""
    ends = [record for record in records if record["final"]]
    for setting, (fixed, *learned) in SETTINGS.items():
        for variant in learned:
            pairs = [
                (one, two)
                for one in ends
                for two in ends
                if one["setting"] == two["setting"] == setting
                and (one["variant"], two["variant"]) == (fixed, variant)
                and one["seed"] == two["seed"]
            ]
            if not pairs:
                continue
            lower = statistics.mean(1 - two["mse"] / one["mse"] for one, two in pairs)
            psnr = [statistics.mean(record["psnr"] for record in side) for side in zip(*pairs, strict=True)]
            line = f"{setting}, {variant}: {psnr[0]:.2f} → {psnr[1]:.2f} dB, {lower:.1%} lower MSE"
            if pairs[0][0]["step"]:
                line += "; the fixed run's final MSE after "
                line += " | ".join(_reached(_course(records, two), one) for one, two in pairs)
            yield line


def _course(records: list[dict[str, Any]], end: dict[str, Any]) -> list[dict[str, Any]]:
    """The measurements of the run that ends with `end`."""
    same = ("setting", "variant", "seed")
    return [record for record in records if all(record[name] == end[name] for name in same)]


def _reached(course: list[dict[str, Any]], end: dict[str, Any]) -> str:
    """When a course has come down to the error at the end of another run, in that run's steps and seconds."""
    point = next((point for point in course if point["mse"] <= end["mse"]), None)
    if point is None:
        return "never"
    return f"{point['step'] / end['step']:.0%} of the steps, {point['seconds'] / end['seconds']:.0%} of the time"


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="of the networks")
    parser.add_argument("--diffusion-steps", type=int, default=100, help="of diffusion alone")
    parser.add_argument("--every", type=int, default=50, help="steps between two measurements")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=200, help="test images")
    parser.add_argument("--settings", type=int, nargs="+", default=[1, 2, 3, 4])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    records: list[dict[str, Any]] = []
    for number, (setting, variants) in enumerate(SETTINGS.items(), 1):
        if number not in options.settings:
            continue
        for seed in options.seeds:
            for variant in variants:
                data = CIFAR10DataModule(root=str(options.data), batch_size=32, val_size=100, seed=seed)
                records += run(setting, variant, seed, data, options)
                write_json(options.json, records)
                end = records[-1]
                values = {name: round(end[name], 3) for name in LEARNED}
                print(
                    f"{setting}, {variant}, seed {seed}: MSE {end['mse']:.6f}, {end['psnr']:.3f} dB, "
                    f"{end['seconds']:.0f} s {values}",
                    flush=True,
                )
    print("\n".join(comparison(records)))


if __name__ == "__main__":
    main()
