"""One learning run against searches that try parameters: Optuna's TPE, SciPy's Nelder-Mead, random search.

    OMP_NUM_THREADS=1 python benchmarks/em_vs_search.py --json em_vs_search.json

CIFAR-10 with noise of 25/255, restored by diffusion alone, the four parameters and bounds of `recovery.py`. A trial
restores some batches of training images and reports their mean squared error; it needs no backward pass. How many
batches, and the settings of each search, are those that did best on validation images in other seeds: of the settings
within 0.01 dB of the best, the one with the shortest trials. Parameters are judged on the test images. All start at the
defaults, work in log space and know the bounds; seconds and images restored are given for each.
"""

import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import optuna
import torch
from _common import arguments, quiet_trainer, write_json
from _peers import Setting, failure, grid
from _recovery import BOUNDS, DEFAULT, FIXED, NOISE_STD, TestImages
from scipy.optimize import minimize
from torch import Tensor

from callbacks import EMParameterCallback, GradientRule, NewtonRule, Rule
from datamodules import CIFAR10DataModule
from lightning_modules import GraphDiffusion, GraphDiffusionReconstruction, ParameterTable
from lightning_modules.em.objectives import squared_error
from lightning_modules.imaging import seeded_normal

BATCH_SIZE = 16
LENGTHS = (1, 2, 5, 10)  # batches of a trial
NEAR = 0.01  # dB
RULES: dict[str, Callable[[], Rule]] = {"GradientRule": lambda: GradientRule(lr=0.1), "NewtonRule": NewtonRule}
Parameters = dict[str, float]
Course = list[tuple[float, Parameters]]  # seconds since the start and the best parameters so far


class Objective:
    """The mean squared error of parameters over some batches of training images, and the course of the best."""

    def __init__(self, data: CIFAR10DataModule, length: int) -> None:
        data.setup("fit")
        self.batches: list[tuple[Tensor, Tensor]] = []
        for raw in data.train_dataloader():
            batch = data.on_after_batch_transfer(raw, 0)
            noise = seeded_normal(batch["key"], batch["image"].shape[1:])
            self.batches.append((batch["image"], batch["image"] + NOISE_STD * noise))
            if len(self.batches) == length:
                break
        self.diffusion = GraphDiffusion(patch_size=3)
        self.course: Course = []
        self._least = float("inf")
        self._begin = time.perf_counter()

    @torch.no_grad()
    def __call__(self, parameters: Parameters) -> float:
        errors = [
            squared_error(self.diffusion(noisy, **FIXED, **parameters, noise=NOISE_STD), clean).mean()
            for clean, noisy in self.batches
        ]
        error = float(torch.stack(errors).mean())
        best = self.course[-1][1] if self.course and error >= self._least else parameters
        self._least = min(self._least, error)
        self.course.append((time.perf_counter() - self._begin, best))
        return error


def optuna_search(objective: Objective, trials: int, sampler: optuna.samplers.BaseSampler) -> None:
    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial(DEFAULT)
    study.optimize(
        lambda trial: objective(
            {name: trial.suggest_float(name, *bounds, log=True) for name, bounds in BOUNDS.items()}
        ),
        n_trials=trials,
    )


def tpe(objective: Objective, trials: int, seed: int, random_trials: int, multivariate: bool) -> None:
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=random_trials, multivariate=multivariate)
    optuna_search(objective, trials, sampler)


def random_search(objective: Objective, trials: int, seed: int) -> None:
    optuna_search(objective, trials, optuna.samplers.RandomSampler(seed=seed))


def nelder_mead(objective: Objective, trials: int, seed: int, step: float) -> None:
    """From the defaults, on a simplex of steps of log θ; `seed` is that of the images only."""
    start = np.log([DEFAULT[name] for name in BOUNDS])
    simplex = np.vstack([start, start - step * np.eye(len(start))])
    box = [tuple(np.log(bounds)) for bounds in BOUNDS.values()]
    minimize(
        lambda theta: objective(dict(zip(BOUNDS, np.exp(theta).tolist(), strict=True))),
        start,
        method="Nelder-Mead",
        bounds=box,
        options={"maxfev": trials, "initial_simplex": np.clip(simplex, *np.array(box).T)},
    )


@dataclass
class Search:
    """A search and the settings to choose from; each is tried at every length of a trial."""

    run: Callable[..., None]
    settings: list[Setting]


SEARCHES = {
    "Optuna TPE": Search(tpe, grid(random_trials=(5, 10), multivariate=(False, True))),
    "Nelder-Mead": Search(nelder_mead, grid(step=(0.25, 0.5, 1.0))),
    "random search": Search(random_search, [{}]),
}


class Clock(L.Callback):
    """Seconds since the start of the run, and the parameters, after each step."""

    def __init__(self) -> None:
        self.course: Course = []
        self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        values = pl_module.em_parameters.get_parameters()
        self.course.append((time.perf_counter() - self._begin, {name: values[name] for name in BOUNDS}))


def learn(data: CIFAR10DataModule, steps: int, rule: Rule) -> Course:
    """The course of a learning run, with the start of the Trainer."""
    data.setup("fit")  # as a search has its data before it begins
    table = ParameterTable(initial={**DEFAULT, **FIXED}, bounds={**BOUNDS, "radius": (3.0, 3.0)}, learned=list(BOUNDS))
    module = GraphDiffusionReconstruction(GraphDiffusion(patch_size=3), table, noise_std=NOISE_STD)
    clock = Clock()
    quiet_trainer(steps, EMParameterCallback(rule), clock).fit(module, data)
    return clock.course


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="batches of a learning run")
    parser.add_argument("--trials", type=int, default=100, help="of a search")
    parser.add_argument("--tuning-trials", type=int, default=30, help="of a search whose settings are being found")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tuning-seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--images", type=int, default=200, help="test images")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore")

    def data(seed: int) -> CIFAR10DataModule:
        return CIFAR10DataModule(root=str(options.data), batch_size=BATCH_SIZE, val_size=100, augment=False, seed=seed)

    def judge(images: TestImages, parameters: Parameters) -> float:
        with torch.no_grad():
            return float(images.quality(parameters))

    def best_setting(search: Search) -> tuple[Setting, int]:
        """Setting and length of a trial: the shortest of the best ones on validation images."""
        found = []
        for length in LENGTHS:
            for setting in search.settings:
                scores = []
                for seed in options.tuning_seeds:
                    objective = Objective(data(seed), length)
                    search.run(objective, options.tuning_trials, seed, **setting)
                    scores.append(judge(validation, objective.course[-1][1]))
                found.append((statistics.mean(scores), length, setting))
        best = max(score for score, *_ in found)
        _, length, setting = min(
            (each for each in found if each[0] >= best - NEAR), key=lambda each: (each[1], -each[0])
        )
        return setting, length

    validation = TestImages(data(options.tuning_seeds[0]), 100, split="val")
    images = TestImages(data(0), options.images)
    best, _ = images.oracle(points=128, refined=3)
    print(f"oracle {best:.3f} dB", flush=True)
    records: list[dict[str, Any]] = []

    def report(work: str, seed: int, each: int, course: Course, **more: Any) -> None:
        """A row for each step of a course: what it had cost, and how good it was."""
        for count, (seconds, parameters) in enumerate(course, 1):
            row = {"work": work, "seed": seed, "count": count, "images": count * each, "seconds": seconds, **more}
            records.append({**row, "psnr": judge(images, parameters), "psnr_oracle": best})
        write_json(options.json, records)
        print(f"{work}, seed {seed}: {records[-1]}", flush=True)

    for seed in options.seeds:
        for name, make in RULES.items():
            report(name, seed, BATCH_SIZE, learn(data(seed), options.steps, make()))
    for name, search in SEARCHES.items():
        try:
            setting, length = best_setting(search)
            for seed in options.seeds:
                objective = Objective(data(seed), length)
                search.run(objective, options.trials, seed, **setting)
                report(name, seed, length * BATCH_SIZE, objective.course, batches=length, setting=setting)
        except Exception as error:
            records.append({"work": name, "failed": failure(error)})
            write_json(options.json, records)
            print(f"{name} failed: {records[-1]['failed']}", flush=True)


if __name__ == "__main__":
    main()
