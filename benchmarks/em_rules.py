"""How many batches does each rule need to the best parameters, and what does it cost?

CIFAR-10, diffusion alone, batches of 16. Every rule learns σ, τ, σ_s and σ_f from the same starts (those of
`recovery.py`) on the same batches: with noise of 25/255, or blind with {5, 15, 25, 50}/255, of which the restoration is
told its own estimate; from clean images (`supervised`) or without (`sure`). The oracle is the best single set on the
noisy test images themselves, by the mean of their PSNR, or blind by the PSNR of their mean squared error. "Reached" is
the batch after which a run is within 0.05 dB of it and stays so to the end.

    python benchmarks/em_rules.py --json em_rules.json

`GradientRule` runs once for each learning rate in the first setting; the best of them, by the median of the batches it
needs, goes on to the others.
"""

import logging
import math
import statistics
import time
import warnings
from typing import Any

import lightning as L
import torch
from _common import arguments, quiet_trainer, write_json
from _recovery import BOUNDS, FIXED, NOISE_STD, TestImages, starts

from callbacks import BayesianRule, EMParameterCallback, GradientRule, NewtonRule, Rule, SignRule
from datamodules import CIFAR10DataModule
from lightning_modules import GraphDiffusion, GraphDiffusionReconstruction, ParameterTable

LEVELS = [5 / 255, 15 / 255, 25 / 255, 50 / 255]
BLIND_BOUNDS = {"sigma": (0.02, 1.0), "tau": (0.005, 0.5), "sigma_s": (0.5, 20.0), "sigma_f": (0.02, 1.0)}
NEAR = 0.05  # dB


class Clock(L.Callback):
    """Times of the rule's step and of the whole training step, in milliseconds."""

    def __init__(self, rule: Rule) -> None:
        self.rule_ms: list[float] = []
        self.step_ms: list[float] = []
        self._start = 0.0
        plain = rule.m_step

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = plain(*args, **options)
            self.rule_ms.append(1000 * (time.perf_counter() - start))
            return result

        rule.m_step = timed  # type: ignore[method-assign]

    def on_train_batch_start(self, *args: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.step_ms.append(1000 * (time.perf_counter() - self._start))


def learn(
    rule: Rule, start: dict[str, float], data: CIFAR10DataModule, steps: int, blind: bool, objective: Any
) -> tuple[list[dict[str, float]], Clock]:
    """Parameters after each batch, and the times."""
    L.seed_everything(0, verbose=False)
    table = ParameterTable(
        initial={**start, **FIXED},
        bounds={**(BLIND_BOUNDS if blind else BOUNDS), "radius": (3.0, 3.0)},
        learned=list(BOUNDS),
    )
    module = GraphDiffusionReconstruction(
        GraphDiffusion(patch_size=3, signal="image"),
        table,
        noise_std=NOISE_STD,
        noise_levels=LEVELS if blind else None,
        estimate_noise=blind,
        objective=objective,
    )
    clock, callback = Clock(rule), EMParameterCallback(rule)
    quiet_trainer(steps, callback, clock).fit(module, data)
    return [{name: values[name] for name in BOUNDS} for values in callback.parameter_history], clock


def reached(gaps: list[float]) -> float:
    """Batches after which the distance to the oracle stays below `NEAR`; infinity where it does not."""
    outside = [step for step, gap in enumerate(gaps, 1) if not gap <= NEAR]
    last = max(outside, default=0)
    return last + 1 if last < len(gaps) else math.inf


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="batches of a run")
    parser.add_argument("--images", type=int, default=200, help="test images")
    parser.add_argument("--starts", type=int, default=9, help="starts in the first setting")
    parser.add_argument("--other-starts", type=int, default=9, help="starts in the other three settings")
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.3, 0.5], help="of GradientRule")
    parser.add_argument("--noise", nargs="+", choices=["25/255", "blind"], default=["25/255", "blind"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    def data() -> CIFAR10DataModule:
        return CIFAR10DataModule(root=str(given.data), batch_size=16, val_size=100, augment=False)

    images = {
        False: TestImages(data(), given.images),
        True: TestImages(data(), given.images, LEVELS, BLIND_BOUNDS),
    }
    oracle = {blind: images[blind].oracle(points=64, refined=2)[0] for blind in images}
    print(f"oracle: {oracle[False]:.3f} dB at 25/255, {oracle[True]:.3f} dB blind", flush=True)
    records: list[dict[str, Any]] = []

    def compete(name: str, make: Any, blind: bool, objective: str, count: int) -> float:
        needed, final, rule_ms, step_ms = [], [], [], []
        for start in starts()[:count]:
            path, clock = learn(make(), start, data(), given.steps, blind, objective)
            with torch.no_grad():
                gaps = [oracle[blind] - float(images[blind].quality(parameters)) for parameters in path]
            needed.append(reached(gaps))
            final.append(gaps[-1])
            rule_ms += clock.rule_ms[5:]
            step_ms += clock.step_ms[5:]
        record = {
            "rule": name,
            "noise": "blind" if blind else "25/255",
            "objective": objective,
            "starts": count,
            "steps": given.steps,
            "batches_median": statistics.median(needed),
            "batches_worst": max(needed),
            "never": sum(math.isinf(number) for number in needed),
            "final_gap_median": statistics.median(final),
            "final_gap_worst": max(final),
            "rule_ms": statistics.median(rule_ms),
            "step_ms": statistics.median(step_ms),
        }
        # JSON has no infinity: a run that never stays near is null.
        records.append({k: None if isinstance(v, float) and math.isinf(v) else v for k, v in record.items()})
        write_json(given.json, records)
        print("  ".join(f"{v:.3f}" if isinstance(v, float) else f"{v}" for v in record.values()), flush=True)
        return statistics.median(needed)

    best_lr = given.lrs[0]
    for blind in (noise == "blind" for noise in given.noise):
        for objective in ("supervised", "sure"):
            count = given.other_starts if records and (blind or objective == "sure") else given.starts
            if not records:
                medians = {
                    lr: compete(f"GradientRule({lr})", lambda lr=lr: GradientRule(lr=lr), blind, objective, count)
                    for lr in given.lrs
                }
                best_lr = min(medians, key=lambda lr: medians[lr])
            else:
                compete(f"GradientRule({best_lr})", lambda lr=best_lr: GradientRule(lr=lr), blind, objective, count)
            compete("NewtonRule", NewtonRule, blind, objective, count)
            compete("BayesianRule", BayesianRule, blind, objective, count)
            compete("SignRule", SignRule, blind, objective, count)


if __name__ == "__main__":
    main()
