"""One learning run against searches that try parameters: Optuna's TPE, SciPy's Nelder-Mead, random search.

    OMP_NUM_THREADS=1 python benchmarks/em_vs_search.py --json em_vs_search.json

CIFAR-10 with noise of 25/255, restored by diffusion alone, the four parameters and bounds of `recovery.py`. A trial
restores some batches of training images and reports their mean squared error; it needs no backward pass. How many
batches, and the settings of each search, are those that did best on validation images in other seeds: of the settings
within 0.01 dB of the best, the one with the shortest trials. Parameters are judged on the test images. All start at the
defaults, work in log space and know the bounds; seconds and images restored are given for each.
"""

import itertools
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
LENGTHS = (1, 2, 5)  # batches of a trial
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
    parser.add_argument("--trials", type=int, nargs="+", default=[30, 100], help="of a search, one run for each number")
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

    @torch.no_grad()
    def judge(images: TestImages, course: Course) -> list[float]:
        """Quality after each step; the best parameters of a search stay the same for many."""
        known: dict[tuple[float, ...], float] = {}
        for _, parameters in course:
            key = tuple(parameters.values())
            if key not in known:
                known[key] = float(images.quality(parameters))
        return [known[tuple(parameters.values())] for _, parameters in course]

    def best_settings(search: Search) -> dict[int, tuple[int, Setting]]:
        """For each number of trials the length of a trial and the setting that did best on validation images."""
        scores: dict[int, list[tuple[float, int, Setting]]] = {count: [] for count in options.trials}
        for length, setting in itertools.product(LENGTHS, search.settings):
            found = []
            for seed in options.tuning_seeds:
                objective = Objective(data(seed), length)
                search.run(objective, max(options.trials), seed, **setting)
                found.append(judge(validation, objective.course))
            for count, those in scores.items():
                those.append((statistics.mean(each[min(count, len(each)) - 1] for each in found), length, setting))
        near = {
            c: [each for each in those if each[0] >= max(each[0] for each in those) - NEAR]
            for c, those in scores.items()
        }
        return {count: min(those, key=lambda each: (each[1], -each[0]))[1:] for count, those in near.items()}

    validation = TestImages(data(options.tuning_seeds[0]), 100, split="val")
    images = TestImages(data(0), options.images)
    best, _ = images.oracle(points=128, refined=3)
    print(f"oracle {best:.3f} dB", flush=True)
    records: list[dict[str, Any]] = []

    def report(work: str, seed: int, batches: int, course: Course, **more: Any) -> None:
        """A row for a course: seconds and quality after each step, or trial, of so many batches."""
        seconds, scores = [round(point[0], 4) for point in course], [round(s, 4) for s in judge(images, course)]
        row = {"work": work, "seed": seed, "batches": batches, "images": batches * BATCH_SIZE, **more}
        records.append({**row, "seconds": seconds, "psnr": scores, "psnr_oracle": best})
        write_json(options.json, records)
        print(f"{row}: {scores[-1]:.3f} dB after {len(course)}, {seconds[-1]:.2f} s", flush=True)

    for seed, (name, make) in itertools.product(options.seeds, RULES.items()):
        report(name, seed, 1, learn(data(seed), options.steps, make()))
    for name, search in SEARCHES.items():
        try:
            for count, (length, setting) in best_settings(search).items():
                for seed in options.seeds:
                    objective = Objective(data(seed), length)
                    search.run(objective, count, seed, **setting)
                    report(name, seed, length, objective.course, trials=count, setting=setting)
        except Exception as error:
            records.append({"work": name, "failed": failure(error)})
            write_json(options.json, records)
            print(f"{name} failed: {records[-1]['failed']}", flush=True)


if __name__ == "__main__":
    main()
