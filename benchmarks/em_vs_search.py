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

import lightning as L
import optuna
import torch
from _common import arguments, quiet_trainer, write_json
from _recovery import BOUNDS, DEFAULT, FIXED, NOISE_STD, TestImages
from torch import Tensor

from callbacks import EMParameterCallback, GradientRule, NewtonRule, Rule
from datamodules import CIFAR10DataModule
from lightning_modules import GraphDiffusion, GraphDiffusionReconstruction, ParameterTable
from lightning_modules.em.objectives import squared_error
from lightning_modules.imaging import seeded_normal

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


class Course(L.Callback):
    """Seconds since the start of the run, and the parameters, after each step."""

    def __init__(self) -> None:
        self.points: list[tuple[float, dict[str, float]]] = []
        self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        values = pl_module.em_parameters.get_parameters()
        self.points.append((time.perf_counter() - self._begin, {name: values[name] for name in BOUNDS}))


def learn(data: CIFAR10DataModule, steps: int, rule: Rule) -> list[tuple[float, dict[str, float]]]:
    """Seconds since the start, with that of the Trainer, and the parameters after each step."""
    data.setup("fit")  # as a search has its data before it begins
    table = ParameterTable(initial={**DEFAULT, **FIXED}, bounds={**BOUNDS, "radius": (3.0, 3.0)}, learned=list(BOUNDS))
    module = GraphDiffusionReconstruction(GraphDiffusion(patch_size=3), table, noise_std=NOISE_STD)
    course = Course()
    quiet_trainer(steps, EMParameterCallback(rule), course).fit(module, data)
    return course.points


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

    def report(work: str, seed: int, passes: int, seconds: float, parameters: dict[str, float]) -> None:
        record = {"work": work, "seed": seed, "images": passes, "seconds": seconds, "psnr": judge(parameters)}
        records.append({**record, "psnr_oracle": best, **parameters})
        write_json(options.json, records)

    length = options.steps * BATCH_SIZE
    for seed in options.seeds:
        trial = Trial(data(seed), options.steps)
        for name, make in RULES.items():
            for step, (seconds, parameters) in enumerate(learn(data(seed), options.steps, make()), 1):
                report(name, seed, step * BATCH_SIZE, seconds, parameters)
        for name, sampler in SAMPLERS.items():
            for count, (seconds, parameters) in enumerate(search(trial, sampler(seed), options.trials), 1):
                report(name, seed, count * length, seconds, parameters)

    print(f"{'':44}{'images':>8}{'seconds':>9}   PSNR by seed")
    for name, unit, sizes in (
        *((name, "batches", [count * BATCH_SIZE for count in (5, 10, 15, 20, 30, options.steps)]) for name in RULES),
        *((name, "best of trials", [count * length for count in (1, 5, 10, 20, options.trials)]) for name in SAMPLERS),
    ):
        for size in sizes:
            rows = [row for row in records if row["work"] == name and row["images"] == size]
            if rows:
                label = f"{name}, {size // (BATCH_SIZE if name in RULES else length)} {unit}"
                seconds = statistics.median(row["seconds"] for row in rows)
                scores = "  ".join(f"{row['psnr']:.3f}" for row in rows)
                print(f"{label:44}{size:8}{seconds:9.2f}   {scores}")


if __name__ == "__main__":
    main()
