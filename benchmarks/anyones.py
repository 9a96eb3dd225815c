"""Does `learn_parameters` find the best parameters of anyone's restoration, and what does that cost?

Gray CIFAR-10 images and parts of gray photographs (Train400) with noise of 25/255.

- `finding`: total variation, the bilateral filter, deepinv's total variation and plug-and-play iterations in 10 batches
  of 32, scikit-image's non-local means and wavelet shrinkage, which have no gradient, by pairs of batches of 16, in at
  most 60 evaluations an image; bounds at least a hundredfold wide, begun at both ends, with clean images and with noisy
  ones alone. Beside it the optimum of an exhaustive grid, taken on the test images themselves and refined once. The
  size of the patch is chosen on CIFAR-10 only: that grid is four times as long.
- `search`: non-local means by `learn_parameters`, by Optuna and by scikit-image's `calibrate_denoiser`, whose settings
  (trials' length and number, points, stride, how the result is used) did best on other images.
- `bank`: a field of experts learned on Train400 against the best weight of total variation, both judged on Set12.

    OMP_NUM_THREADS=1 python benchmarks/anyones.py --json anyones.json
"""

import itertools
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from _common import arguments, write_json
from _peers import Setting, grid
from skimage.restoration import calibrate_denoiser, denoise_invariant, denoise_nl_means, denoise_wavelet
from torch import Tensor

from callbacks import GradientRule
from datamodules import CIFAR10DataModule
from lightning_modules import BilateralFilter, FieldOfExperts, FunctionOperator, TotalVariation, learn_parameters
from lightning_modules.imaging import read_picture
from lightning_modules.operators import RestorationOperator

NOISE_STD = 25 / 255
BATCH_SIZE, PAIR_BATCH_SIZE = 32, 16
STEPS = 10
# Of a rule that evaluates pairs: by clean images two restorations of an image a step, by the risk estimate four.
PAIR_STEPS = {"supervised": 20, "sure": 10}
NEAR = 0.01  # dB
POINTS = {1: 20, 2: 14}  # of the grid, along each axis
REFINED = {1: 13, 2: 7}
CHOSEN_ON = "CIFAR-10"
H = (0.005, 1.0)
Values = dict[str, float]


def non_local_means(image: np.ndarray, *, h: float, patch_size: int = 5) -> np.ndarray:
    return denoise_nl_means(image, h=h, patch_size=patch_size, patch_distance=5, fast_mode=True)


def wavelet_shrinkage(image: np.ndarray, *, sigma: float) -> np.ndarray:
    return denoise_wavelet(image, sigma=sigma, wavelet="db2", method="VisuShrink", mode="soft")


def operators() -> Iterator[tuple[str, RestorationOperator]]:
    """What is to be learned, by name; deepinv's where it is installed."""
    yield "`TotalVariation`", TotalVariation()
    yield "`BilateralFilter`", BilateralFilter()
    yield "scikit-image NLM", FunctionOperator(non_local_means, {"h": H}, arrays=True)
    sides = {"patch_size": [1, 3, 5, 7]}
    yield "scikit-image NLM, patch chosen", FunctionOperator(non_local_means, {"h": H}, sides, arrays=True)
    yield "scikit-image wavelets", FunctionOperator(wavelet_shrinkage, {"sigma": (0.003, 1.0)}, arrays=True)
    try:
        from deepinv.models import TVDenoiser
        from deepinv.optim import PGD
        from deepinv.optim.data_fidelity import L2
        from deepinv.optim.prior import PnP
    except ImportError:
        print("deepinv is not installed: left out", flush=True)
        return
    from lightning_modules.operators.deepinv import DeepinvDenoiser, DeepinvOptim

    yield "deepinv `TVDenoiser`", DeepinvDenoiser(TVDenoiser(n_it_max=30), (0.001, 1.0))
    plug_and_play = PGD(data_fidelity=L2(), prior=PnP(TVDenoiser(n_it_max=10)), max_iter=4)
    bounds = {"stepsize": (0.01, 1.0), "sigma_denoiser": (0.001, 1.0)}
    yield "deepinv `PGD` with `PnP`", DeepinvOptim(plug_and_play, bounds)


def with_noise(clean: Tensor, seed: int) -> Tensor:
    return clean + NOISE_STD * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))


def quality(restored: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio of the mean squared error over all pixels, which is what is learned."""
    return float(-10 * (restored - clean).square().mean().log10())


def restored_by(operator: RestorationOperator, noisy: Tensor, values: Values) -> Tensor:
    given = {s.name: round(values[s.name]) if s.integer else values[s.name] for s in operator.parameter_specs}
    with torch.no_grad():
        return operator(noisy, noise=NOISE_STD, **given)


def grid_optimum(operator: RestorationOperator, noisy: Tensor, clean: Tensor) -> tuple[float, Values]:
    """Best quality on a grid over the bounds, and on a finer one between its neighbors."""
    specs = operator.parameter_specs
    scalars = sum(not spec.integer for spec in specs)
    count = POINTS[scalars]
    axes = [
        np.arange(spec.bounds[0], spec.bounds[1] + 1) if spec.integer else np.geomspace(*spec.bounds, count)
        for spec in specs
    ]

    def best_of(axes: list[np.ndarray]) -> tuple[float, Values]:
        points = [
            dict(zip((s.name for s in specs), map(float, point), strict=True)) for point in itertools.product(*axes)
        ]
        scores = [quality(restored_by(operator, noisy, point), clean) for point in points]
        best = int(np.argmax(scores))
        return scores[best], points[best]

    coarse = best_of(axes)
    finer = []
    for spec in specs:
        step, at = (spec.bounds[1] / spec.bounds[0]) ** (1 / (count - 1)) if not spec.integer else 1, coarse[1]
        low, high = max(spec.bounds[0], at[spec.name] / step), min(spec.bounds[1], at[spec.name] * step)
        finer.append(np.array([at[spec.name]]) if spec.integer else np.geomspace(low, high, REFINED[scalars]))
    return max(coarse, best_of(finer), key=lambda found: found[0])


class Counted(RestorationOperator):
    """An operator, and how many images it has restored."""

    def __init__(self, operator: RestorationOperator) -> None:
        super().__init__()
        self.operator = operator
        self.images = 0

    @property
    def parameter_specs(self) -> Any:
        return self.operator.parameter_specs

    def forward(self, noisy: Tensor, **options: Any) -> Tensor:
        self.images += len(noisy)
        return self.operator(noisy, **options)

    def unit_factor(self, name: str, channels: int) -> float:
        return self.operator.unit_factor(name, channels)


def learned(
    operator: RestorationOperator, clean: Tensor, objective: Any, start: Values, seed: int = 0
) -> tuple[Any, dict[str, Any]]:
    """What `learn_parameters` finds, and what it took."""
    images = clean if objective == "supervised" else with_noise(clean, 1000 + seed)
    counted = Counted(operator)
    arrays = getattr(operator, "arrays", False)
    steps, batch_size = (PAIR_STEPS[objective], PAIR_BATCH_SIZE) if arrays else (STEPS, BATCH_SIZE)
    begin = time.perf_counter()
    found = learn_parameters(
        counted,
        {},
        images,
        noise_std=NOISE_STD,
        objective=objective,
        start=start,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        progress=False,
    )
    took = time.perf_counter() - begin
    work = {"batches": steps, "restorations": counted.images, "evaluations": counted.images / batch_size}
    return found, {**work, "seconds": took}


def finding(data: dict[str, tuple[Tensor, Tensor]]) -> Iterator[dict[str, Any]]:
    """Distance to the grid's optimum, from both ends."""
    for (name, operator), (source, (train, clean)) in itertools.product(operators(), data.items()):
        if source != CHOSEN_ON and any(spec.integer for spec in operator.parameter_specs):
            continue
        noisy = with_noise(clean, 1)
        best, where = grid_optimum(operator, noisy, clean)
        specs = operator.parameter_specs
        ends: list[Values] = [{s.name: s.bounds[side] for s in specs} for side in (0, 1)]
        for objective, start in itertools.product(("supervised", "sure"), ends):
            found, work = learned(operator, train, objective, start)
            reached = quality(restored_by(operator, noisy, found.operator.values), clean)
            row = {"part": "finding", "data": source, "restorer": name, "objective": objective, "start": start}
            yield {**row, **work, "parameters": found.parameters, "psnr": reached, "psnr_grid": best, "grid": where}


def optuna_search(
    clean: Tensor, seed: int, trials: int, images: int, random_trials: int
) -> tuple[float, dict[str, Any]]:
    """The strength that Optuna finds on so many images, and what it took."""
    part = clean[torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed))[:images]]
    noisy, operator = with_noise(part, 1000 + seed), FunctionOperator(non_local_means, {"h": H}, arrays=True)
    begin = time.perf_counter()
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=random_trials))
    study.optimize(
        lambda trial: -quality(restored_by(operator, noisy, {"h": trial.suggest_float("h", *H, log=True)}), part),
        n_trials=trials,
    )
    return study.best_params["h"], {"restorations": trials * images, "seconds": time.perf_counter() - begin}


def calibrated(noisy: Tensor, points: int, approximate: bool, invariant: bool, stride: int) -> tuple[Tensor, int]:
    """Each image restored at the strength that scikit-image finds for it, and the number of restorations."""
    restored, calls = [], 0

    def counted(image: np.ndarray, **options: Any) -> np.ndarray:
        nonlocal calls
        calls += 1
        return non_local_means(image, **options)

    for image in noisy[:, 0].double().numpy():
        best = calibrate_denoiser(
            image, counted, {"h": np.geomspace(*H, points)}, stride=stride, approximate_loss=approximate
        )
        options = best.keywords["denoiser_kwargs"]
        function = denoise_invariant if invariant else None
        found = (
            function(image, counted, stride=stride, denoiser_kwargs=options) if function else counted(image, **options)
        )
        restored.append(torch.from_numpy(found).float())
    return torch.stack(restored)[:, None], calls


def near_best(scores: list[tuple[float, float, Setting]]) -> Setting:
    """Of the settings that are as good as the best, the cheapest."""
    best = max(score for score, *_ in scores)
    return min((each for each in scores if each[0] >= best - NEAR), key=lambda each: (each[1], -each[0]))[2]


def search(train: Tensor, clean: Tensor, seeds: list[int]) -> Iterator[dict[str, Any]]:
    """Non-local means by three ways, over restorations and seconds; those of a calibration are of the test images."""
    operator = FunctionOperator(non_local_means, {"h": H}, arrays=True)
    others, tuning = train[-64:], train[:-64]
    noisy, noisy_others = with_noise(clean, 1), with_noise(others, 2)

    def judged(h: float, images: Tensor, truth: Tensor) -> float:
        return quality(restored_by(operator, images, {"h": h}), truth)

    best, where = grid_optimum(operator, noisy, clean)
    yield {"part": "search", "method": "exhaustive grid, on the test images", "psnr": best, "parameters": where}
    for objective, seed in itertools.product(("supervised", "sure"), seeds):
        found, work = learned(operator, tuning, objective, {}, seed)
        row = {"part": "search", "method": "`learn_parameters`", "objective": objective, "seed": seed, **work}
        yield {**row, "psnr": judged(found.parameters["h"], noisy, clean)}
    for trials in (10, 20):
        scores = []
        for setting in grid(images=(4, 16, 64), random_trials=(4, 8)):
            runs = [optuna_search(tuning, seed, trials, **setting) for seed in (10, 11)]
            mean = statistics.mean(judged(h, noisy_others, others) for h, _ in runs)
            scores.append((mean, runs[0][1]["restorations"], setting))
        chosen = near_best(scores)
        for seed in seeds:
            h, work = optuna_search(tuning, seed, trials, **chosen)
            row = {"part": "search", "method": "Optuna TPE", "seed": seed, "setting": {"trials": trials, **chosen}}
            yield {**row, **work, "psnr": judged(h, noisy, clean)}
    for invariant in (False, True):
        scores = []
        for setting in grid(points=(8, 16), approximate=(True, False), stride=(3, 4), invariant=(invariant,)):
            restored, calls = calibrated(noisy_others[:8], **setting)
            scores.append((quality(restored, others[:8]), calls, setting))
        chosen, begin = near_best(scores), time.perf_counter()
        restored, calls = calibrated(noisy, **chosen)
        row = {"part": "search", "method": "scikit-image `calibrate_denoiser`", "setting": chosen}
        yield {**row, "restorations": calls, "seconds": time.perf_counter() - begin, "psnr": quality(restored, clean)}


def bank(folder: Path, steps: int) -> dict[str, Any]:
    """A field of experts against total variation at the weight that is best on the test images, mean PSNR of Set12."""
    clean = [read_picture(path).pixels[None] for path in sorted((folder / "Set12").glob("*.png"))]
    noisy = [with_noise(image, number) for number, image in enumerate(clean)]

    def mean_quality(restore: Callable[[Tensor], Tensor]) -> float:
        with torch.no_grad():
            pairs = zip(noisy, clean, strict=True)
            return statistics.mean(quality(restore(one).clamp(0, 1), other) for one, other in pairs)

    variation = TotalVariation(100)
    weights = [round(weight, 3) for weight in np.geomspace(0.4, 1.2, 9)]
    hand = {w: mean_quality(lambda image, w=w: variation(image, noise=NOISE_STD, weight=w)) for w in weights}
    weight = max(hand, key=lambda each: hand[each])
    begin = time.perf_counter()
    found = learn_parameters(
        FieldOfExperts(iterations=6),
        {},
        str(folder / "Train400"),
        noise_std=NOISE_STD,
        rule=GradientRule(lr=0.05),
        steps=steps,
        batch_size=8,
        crop_size=48,
        progress=False,
    )
    took = time.perf_counter() - begin
    numbers = sum(len(v) if isinstance(v, list) else 1 for v in found.parameters.values())
    reached = mean_quality(lambda image: found.operator(image, noise=NOISE_STD))
    row = {"part": "bank", "numbers": numbers, "batches": steps, "seconds": took, "psnr": reached}
    return {**row, "psnr_total_variation": hand[weight], "weight": weight, "psnr_noisy": mean_quality(lambda x: x)}


def cifar_images(root: Path, count: int) -> tuple[Tensor, Tensor]:
    """Gray training and test images."""
    data = CIFAR10DataModule(root=str(root), batch_size=BATCH_SIZE, val_size=100, augment=False)
    sides = []
    for stage, number in (("fit", 512), ("test", count)):
        data.setup(stage)
        loader: Any = data.train_dataloader() if stage == "fit" else data.test_dataloader()
        batches = itertools.islice(loader, math.ceil(number / BATCH_SIZE))
        images = torch.cat([data.on_after_batch_transfer(batch, 0)["image"] for batch in batches])
        sides.append(images[:number].mean(1, keepdim=True))
    return sides[0], sides[1]


def photographs(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """The middles of photographs, 64×64, to learn from and, spread over the folder, to test on."""
    paths = sorted(path for path in (folder / "Train400").iterdir() if path.suffix == ".png")
    images = torch.stack([read_picture(path).pixels[:, 58:122, 58:122] for path in paths])
    chosen = torch.zeros(len(images), dtype=torch.bool)
    chosen[:: len(images) // count] = True
    return images[~chosen], images[chosen]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--parts", nargs="+", choices=("finding", "search", "bank"), default=["finding", "search", "bank"]
    )
    parser.add_argument("--images", type=int, default=100, help="test images of CIFAR-10; of photographs half as many")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the search")
    parser.add_argument("--bank-steps", type=int, default=400, help="batches from which the bank is learned")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore")
    data = {CHOSEN_ON: cifar_images(options.data, options.images)}
    folder = options.data / "denoise"
    if folder.is_dir():
        data["photographs"] = photographs(folder, options.images // 2)

    def rows() -> Iterator[dict[str, Any]]:
        if "bank" in options.parts and folder.is_dir():
            yield bank(folder, options.bank_steps)
        if "finding" in options.parts:
            yield from finding(data)
        if "search" in options.parts:
            yield from search(*data[CHOSEN_ON], options.seeds)

    records: list[dict[str, Any]] = []
    for row in rows():
        records.append(row)
        below = f" ({row['psnr'] - row['psnr_grid']:+.3f})" if "psnr_grid" in row else ""
        named = [row.get(key) for key in ("part", "data", "restorer", "method", "objective", "start", "setting")]
        work = f"{row.get('evaluations', math.nan):.0f} evaluations, {row.get('seconds', math.nan):.1f} s"
        print(*[each for each in named if each is not None], f"{row['psnr']:.3f} dB{below}", work, flush=True)
        write_json(options.json, records)


if __name__ == "__main__":
    main()
