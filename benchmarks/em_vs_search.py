"""One learning run against a search that tries parameters: Optuna's TPE and random search, 30 trials each.

    python benchmarks/em_vs_search.py --json em_vs_search.json

CIFAR-10 with noise of 25/255, restored by diffusion alone, the four parameters and bounds of `recovery.py`. A trial
restores as many batches as the learning run has steps and reports their mean squared error; its parameters are judged
on the test images, as those of the learning run are. A trial needs no backward pass; seconds and images restored are
given for both. The searches run in log space and know nothing but the bounds; the learning run starts at the defaults.
"""

import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import optuna
import torch
from _common import arguments, write_json
from recovery import BOUNDS, DEFAULT, FIXED, NOISE_STD, TestImages, learn
from torch import Tensor

from callbacks import GradientRule, NewtonRule, Rule
from datamodules import CIFAR10DataModule
from lightning_modules import GraphDiffusion
from lightning_modules.em.objectives import squared_error
from lightning_modules.graph import seeded_normal

BATCH_SIZE = 16
RULES: dict[str, Callable[[], Rule]] = {
    "GradientRule": lambda: GradientRule(lr=0.1),
    "NewtonRule": NewtonRule,
}
SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "Optuna TPE": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "random search": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}


class Trial:
    """The mean squared error of parameters over the batches of one run."""

    def __init__(self, data: CIFAR10DataModule, steps: int) -> None:
        data.setup("fit")
        self.batches: list[tuple[Tensor, Tensor]] = []
        for raw in data.train_dataloader():
            batch = data.on_after_batch_transfer(raw, 0)
            noise = seeded_normal(batch["key"], batch["image"].shape[1:])
            self.batches.append((batch["image"], batch["image"] + NOISE_STD * noise))
            if len(self.batches) == steps:
                break
        self.diffusion = GraphDiffusion(patch_size=3)

    @torch.no_grad()
    def __call__(self, trial: optuna.Trial) -> float:
        parameters = {name: trial.suggest_float(name, *bounds, log=True) for name, bounds in BOUNDS.items()}
        errors = [
            squared_error(self.diffusion(noisy, **FIXED, **parameters, noise_std=NOISE_STD), clean).mean()
            for clean, noisy in self.batches
        ]
        return float(torch.stack(errors).mean())


def search(trial: Trial, sampler: optuna.samplers.BaseSampler, trials: int) -> list[tuple[float, dict[str, float]]]:
    """Seconds since the start and the best parameters so far, after each trial."""
    study = optuna.create_study(sampler=sampler)
    begin, course = time.perf_counter(), []
    for _ in range(trials):
        study.optimize(trial, n_trials=1)
        course.append((time.perf_counter() - begin, dict(study.best_params)))
    return course


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="batches of a learning run, and of a trial")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=200, help="test images")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore")

    def data(seed: int) -> CIFAR10DataModule:
        return CIFAR10DataModule(root=str(options.data), batch_size=BATCH_SIZE, val_size=100, augment=False, seed=seed)

    images = TestImages(data(0), options.images)
    best, _ = images.oracle(points=128, refined=3)
    print(f"oracle {best:.3f} dB", flush=True)
    records: list[dict[str, Any]] = []

    def judge(parameters: dict[str, float]) -> float:
        with torch.no_grad():
            return float(images.quality(parameters))

    def report(work: str, seed: int, trials: int, passes: int, seconds: float, parameters: dict[str, float]) -> None:
        psnr = judge(parameters)
        records.append(
            {"work": work, "seed": seed, "trials": trials, "images": passes, "seconds": seconds, "psnr": psnr}
            | {"psnr_oracle": best}
            | parameters
        )
        write_json(options.json, records)

    length = options.steps * BATCH_SIZE
    for seed in options.seeds:
        for name, make in RULES.items():
            begin = time.perf_counter()
            parameters = learn(DEFAULT, data(seed), options.steps, make())[-1]
            report(name, seed, 1, length, time.perf_counter() - begin, parameters)
        trial = Trial(data(seed), options.steps)
        for name, sampler in SAMPLERS.items():
            for count, (seconds, parameters) in enumerate(search(trial, sampler(seed), options.trials), 1):
                report(name, seed, count, count * length, seconds, parameters)

    print(f"{'':34}{'images':>8}{'seconds':>9}   PSNR by seed")
    for name in (*RULES, *SAMPLERS):
        for count in (1, 5, 10, 20, options.trials):
            rows = [row for row in records if row["work"] == name and row["trials"] == count]
            if not rows:
                continue
            label = name if name in RULES else f"{name}, best of {count} trial{'s' if count > 1 else ''}"
            seconds = statistics.median(row["seconds"] for row in rows)
            scores = "  ".join(f"{row['psnr']:.3f}" for row in rows)
            print(f"{label:34}{rows[0]['images']:8}{seconds:9.1f}   {scores}")


if __name__ == "__main__":
    main()
