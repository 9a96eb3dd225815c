"""What the benchmarks of learned parameters share: starts, noisy test images, and the best parameters for them."""

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.stats import qmc
from torch import Tensor

from datamodules import CIFAR10DataModule
from lightning_modules import GraphDiffusion
from lightning_modules.noise import estimate_noise_std

NOISE_STD = 25 / 255
BOUNDS = {"sigma": (0.1, 0.5), "tau": (0.05, 0.3), "sigma_s": (1.0, 20.0), "sigma_f": (0.1, 0.5)}
DEFAULT = {"sigma": 0.3, "tau": 0.1, "sigma_s": 10.0, "sigma_f": 0.3}
FIXED = {"radius": 3.0, "smooth_steps": 5}


def starts() -> list[dict[str, float]]:
    corners = itertools.product(*(BOUNDS[name] for name in ("sigma", "tau", "sigma_f")))
    return [DEFAULT, *({"sigma": s, "tau": t, "sigma_s": 10.0, "sigma_f": f} for s, t, f in corners)]


def psnr(restored: Tensor, clean: Tensor) -> Tensor:
    return -10 * torch.log10((restored.clamp(0, 1) - clean).square().mean((1, 2, 3))).mean()


class TestImages:
    """Noisy test images and the quality of the diffusion on them.

    Args:
        data: Where the images come from.
        count: How many of them.
        levels: Noise levels that take turns. With more than one, the diffusion is told its own estimate of each image,
            and quality is the PSNR of the mean squared error over all images, which is what the rules minimise: the
            best set for it is not the best one for the mean of the images' PSNR.
        bounds: Box in which the oracle looks for the best parameters.
        split: `test`, or `val` for what is not reported.
    """

    def __init__(
        self,
        data: CIFAR10DataModule,
        count: int,
        levels: Sequence[float] = (NOISE_STD,),
        bounds: dict[str, tuple[float, float]] | None = None,
        split: Literal["test", "val"] = "test",
    ) -> None:
        data.setup("test" if split == "test" else "validate")
        loader = data.test_dataloader() if split == "test" else data.val_dataloader()
        batches = [data.on_after_batch_transfer(batch, 0)["image"] for batch in loader]
        self.clean = torch.cat(batches)[:count]
        noise = torch.randn(self.clean.shape, generator=torch.Generator().manual_seed(1))
        truth = torch.tensor(levels)[torch.arange(len(self.clean)) % len(levels)]
        self.noisy = self.clean + truth.view(-1, 1, 1, 1) * noise
        self.noise_std = truth if len(levels) == 1 else estimate_noise_std(self.noisy)
        self.pooled = len(levels) > 1
        self.bounds = BOUNDS if bounds is None else bounds
        self.diffusion = GraphDiffusion(patch_size=3, signal="image")

    def quality(self, parameters: dict[str, Tensor | float]) -> Tensor:
        """Mean PSNR in dB, or that of the mean squared error where noise levels differ."""
        restored = self.diffusion(self.noisy, **FIXED, **parameters, noise=self.noise_std)
        if not self.pooled:
            return psnr(restored, self.clean)
        return -10 * (restored.clamp(0, 1) - self.clean).square().mean().log10()

    def oracle(self, points: int, refined: int) -> tuple[float, dict[str, float]]:
        """Best quality within the bounds, by Sobol search and L-BFGS-B on log θ from the best points."""
        names = list(self.bounds)
        low, high = np.log(np.array([self.bounds[name] for name in names])).T
        search = qmc.scale(qmc.Sobol(len(names), seed=0).random(points), low, high)

        def objective(log_theta: np.ndarray) -> tuple[float, np.ndarray]:
            leaf = torch.tensor(log_theta, dtype=torch.float32, requires_grad=True)
            loss = -self.quality(dict(zip(names, leaf.exp().unbind(), strict=True)))
            (gradient,) = torch.autograd.grad(loss, leaf)
            return float(loss), gradient.double().numpy()

        with torch.no_grad():
            scores = [float(self.quality(dict(zip(names, np.exp(point).tolist(), strict=True)))) for point in search]
        best = [search[index] for index in np.argsort(scores)[::-1][:refined]]
        box = list(zip(low, high, strict=True))
        found = [minimize(objective, point, jac=True, bounds=box, method="L-BFGS-B") for point in best]
        top = min(found, key=lambda result: result.fun)
        return -float(top.fun), dict(zip(names, np.exp(top.x).tolist(), strict=True))
