"""Are the parameters of any operator found, from wherever they start, with clean images and without?

CIFAR-10 images with noise of 25/255. Total variation and the bilateral filter learn their parameters in 50 batches of
16 by `NewtonRule`, from every corner of bounds that are at least a hundredfold wide. The oracle searches the same
bounds on the test images themselves, then refines the best point with exact gradients. Beside them functions of the
same kind, one thread each, whose settings were searched on training images.

    OMP_NUM_THREADS=1 python benchmarks/operators.py --json operators.json
"""

import itertools
import logging
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from _common import arguments, quiet_trainer, write_json
from _peers import failure
from skimage.restoration import denoise_bilateral, denoise_tv_chambolle
from torch import Tensor

from callbacks import EMParameterCallback, NewtonRule
from datamodules import CIFAR10DataModule
from lightning_modules import BilateralFilter, ParameterTable, Reconstruction, TotalVariation
from lightning_modules.operators import RestorationOperator

NOISE_STD = 25 / 255
# Twice the default: the bounds are two to three orders of magnitude wide, and the risk is noisy at their ends.
TRUST_RADIUS = 1.0
OPERATORS: dict[str, RestorationOperator] = {"TotalVariation": TotalVariation(), "BilateralFilter": BilateralFilter()}


def quality(restored: Tensor, clean: Tensor) -> Tensor:
    """Mean PSNR of the images in dB."""
    return -10 * (restored - clean).square().mean((1, 2, 3)).log10().mean()


def oracle(operator: RestorationOperator, noisy: Tensor, clean: Tensor) -> tuple[float, dict[str, float]]:
    """Best PSNR within the bounds, and where."""
    specs = operator.parameter_specs
    lower, upper = (torch.tensor([spec.bounds[side] for spec in specs]).log() for side in (0, 1))

    def score(theta: Tensor) -> Tensor:
        named = dict(zip((spec.name for spec in specs), theta.exp(), strict=True))
        return quality(operator(noisy, noise=NOISE_STD, **named), clean)

    count = 40 if len(specs) == 1 else 16
    axes = [torch.linspace(float(a), float(b), count) for a, b in zip(lower, upper, strict=True)]
    with torch.no_grad():
        theta = max((torch.stack(point) for point in itertools.product(*axes)), key=score)
    theta = theta.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -score(theta)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        theta = theta.clamp(lower, upper)
        best = float(score(theta))
    return best, {spec.name: float(value) for spec, value in zip(specs, theta.exp(), strict=True)}


def learn(name: str, start: dict[str, float], objective: Any, data: CIFAR10DataModule, steps: int) -> Reconstruction:
    """A module that has learned the operator's parameters from a start."""
    table = ParameterTable(initial=dict(start))
    module = Reconstruction(OPERATORS[name], table, noise_std=NOISE_STD, objective=objective)
    quiet_trainer(steps, EMParameterCallback(NewtonRule(trust_radius=TRUST_RADIUS))).fit(module, data)
    return module.eval()


def peers() -> dict[str, tuple[Callable[..., np.ndarray], list[dict[str, float]]]]:
    """Peers, and the settings among which the best is chosen."""
    weights = np.geomspace(0.02, 0.5, 24)
    sigmas = itertools.product(np.geomspace(0.5, 40, 12), np.geomspace(0.02, 3.0, 20))
    widths = [{"space": float(space), "spread": float(spread)} for space, spread in sigmas]
    return {
        "scikit-image `denoise_tv_chambolle`": (
            lambda image, weight: denoise_tv_chambolle(image, weight=weight, channel_axis=-1),
            [{"weight": float(weight)} for weight in weights],
        ),
        "scikit-image `denoise_bilateral`": (
            lambda image, space, spread: denoise_bilateral(
                image, sigma_color=spread, sigma_spatial=space, win_size=9, channel_axis=-1
            ),
            widths,
        ),
        "OpenCV `bilateralFilter`": (
            lambda image, space, spread: cv2.bilateralFilter(image, 9, spread, space),
            widths,
        ),
    }


def apply(function: Callable[..., np.ndarray], images: Tensor, **settings: float) -> Tensor:
    """A peer's result on each image."""
    restored = [function(np.ascontiguousarray(image.permute(1, 2, 0)), **settings) for image in images]
    return torch.from_numpy(np.stack(restored)).permute(0, 3, 1, 2).float()


def noisy_images(loader: Any, data: CIFAR10DataModule, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clean images of a loader, and the same with noise."""
    parts = (data.on_after_batch_transfer(batch, 0)["image"] for batch in loader)
    clean = torch.cat(list(itertools.islice(parts, math.ceil(count / data.batch_size))))[:count]
    return clean, clean + NOISE_STD * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))


def milliseconds(function: Callable[[], Any], images: int) -> float:
    """Time of one call for each image, the least of three."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return 1000 * min(times) / images


def main() -> None:
    parser = arguments("Are the parameters of any operator found, from wherever they start?")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--images", type=int, default=200, help="test images")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    data = CIFAR10DataModule(root=str(options.data), batch_size=16, val_size=100, augment=False)
    data.setup("fit")
    data.setup("test")
    clean, noisy = noisy_images(data.test_dataloader(), data, options.images, seed=1)
    others, noisy_others = noisy_images(data.train_dataloader(), data, 48, seed=2)

    records: list[dict[str, Any]] = []
    for name, operator in OPERATORS.items():
        best, where = oracle(operator, noisy, clean)
        print(f"{name}: oracle {best:.3f} dB at", {key: round(value, 3) for key, value in where.items()}, flush=True)
        corners = itertools.product(*(spec.bounds for spec in operator.parameter_specs))
        starts = [{s.name: v for s, v in zip(operator.parameter_specs, c, strict=True)} for c in corners]
        for objective, start in itertools.product(("supervised", "sure"), starts):
            module = learn(name, start, objective, data, options.steps)
            with torch.inference_mode():
                reached = float(quality(module(noisy, NOISE_STD), clean))
                each = milliseconds(lambda module=module: module(noisy, NOISE_STD), len(noisy))
            theta = module.em_parameters.get_parameters()
            record = {"operator": name, "objective": objective, "start": start, "parameters": theta, "psnr": reached}
            records.append({**record, "psnr_oracle": best, "ms_per_image": each})
            print(
                f"  {objective} from {start}: {reached:.3f} dB ({reached - best:+.3f} to the oracle), {each:.3f} ms",
                flush=True,
            )
            write_json(options.json, records)
    for name, (function, settings) in peers().items():
        try:
            chosen = max(settings, key=lambda s: float(quality(apply(function, noisy_others, **s), others)))
            reached = float(quality(apply(function, noisy, **chosen), clean))
            each = milliseconds(lambda f=function, s=chosen: apply(f, noisy, **s), len(noisy))
            record = {"operator": name, "parameters": chosen, "settings_tried": len(settings), "psnr": reached}
            records.append({**record, "ms_per_image": each})
        except Exception as error:
            records.append({"operator": name, "failed": failure(error)})
        print(records[-1], flush=True)
        write_json(options.json, records)


if __name__ == "__main__":
    main()
