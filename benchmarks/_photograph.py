"""One noisy photograph, parameters learned on others, and what the peers make of it."""

import argparse
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from _peers import bm3d, failure, opencv, psnr, scikit_image
from _timing import median_ms, record
from skimage import data
from sklearn.datasets import load_sample_images
from torch import Tensor

from lightning_modules.graph import GraphDiffusion

NOISE_STD = 25 / 255
START = {"sigma": 0.25, "tau": 0.15, "sigma_s": 2.0, "sigma_f": 0.3}
WORK = "photograph of 500×500"
OTHERS = ("coffee", "chelsea")
CANDIDATES = ((2, 5), (3, 2), (3, 5))  # radius, steps


def photograph() -> tuple[Tensor, Tensor]:
    """The clean and the noisy 500×500 crop of scikit-image's `astronaut`, `[1, 3, 500, 500]`."""
    clean = _image(data.astronaut())[None, :, 6:506, 6:506].contiguous()
    return clean, clean + NOISE_STD * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))


def learn(steps: int = 30) -> tuple[GraphDiffusion, dict[str, Any], float]:
    """The operator and its parameters, by gradient descent on crops of other photographs; how long it took, seconds.

    Each candidate of radius and steps is learned; the best on the crops wins: four numbers learned from 400,000.
    """
    begin = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    clean = torch.cat([_crops(_image(getattr(data, name)()), 16, 64, generator) for name in OTHERS])
    noisy = clean + NOISE_STD * torch.randn(clean.shape, generator=generator)
    diffusion, best, chosen = GraphDiffusion(patch_size=3), float("inf"), dict[str, Any]()
    for radius, count in CANDIDATES:
        log_theta = torch.tensor(list(START.values())).log().requires_grad_()
        optimizer = torch.optim.Adam([log_theta], lr=0.1)
        fixed = {"radius": float(radius), "smooth_steps": count, "noise": NOISE_STD}
        for _ in range(steps):
            theta = dict(zip(START, log_theta.exp().unbind(), strict=True))
            loss = (diffusion(noisy, **theta, **fixed) - clean).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if loss.item() < best:
            best = loss.item()
            chosen = {**{name: float(value.detach()) for name, value in theta.items()}, **fixed}
    return diffusion, chosen, time.perf_counter() - begin


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Ours beside each peer, on as many threads; every one has learned or searched its setting on other photographs."""
    clean, noisy = photograph()
    diffusion, parameters, seconds = learn()
    rounded = {name: round(value, 3) for name, value in parameters.items()}
    print(f"learned in {seconds:.0f} s on crops of {' and '.join(OTHERS)}: {rounded}")
    with torch.inference_mode():
        quality = psnr(diffusion(noisy, **parameters), clean)
        ours = median_ms(lambda: diffusion(noisy, **parameters))
    others, noisy_others = _others()
    for name, make, repeats in (("OpenCV NLM", opencv, 5), ("scikit-image NLM", scikit_image, 5), ("CBM3D", bm3d, 1)):
        common: dict[str, Any] = {"psnr": quality, "setting": rounded}
        try:
            peer = make()
            setting = peer.best_setting(others, noisy_others, NOISE_STD)
            taken = median_ms(partial(peer.restore, noisy, NOISE_STD, **setting), repeats, warm_up=0)
            common |= {"peer_psnr": psnr(peer.restore(noisy, NOISE_STD, **setting), clean), "peer_setting": setting}
            yield record(WORK, ours, name, taken, **common, peer_settings_tried=len(peer.settings))
        except Exception as error:
            yield record(WORK, ours, name, failed=failure(error), **common)


def _others() -> tuple[list[Tensor], list[Tensor]]:
    """A part of each of four other photographs, clean and noisy: what the peers' settings are found on."""
    generator = torch.Generator().manual_seed(1)
    photographs = [*(getattr(data, name)() for name in OTHERS), *load_sample_images().images]
    clean = [_crops(_image(photograph), 1, 128, generator) for photograph in photographs]
    return clean, [image + NOISE_STD * torch.randn(image.shape, generator=generator) for image in clean]


def _image(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def _crops(image: Tensor, count: int, side: int, generator: torch.Generator) -> Tensor:
    rows, columns = (torch.randint(length - side, (count,), generator=generator) for length in image.shape[1:])
    return torch.stack([image[:, a : a + side, b : b + side] for a, b in zip(rows, columns, strict=True)])
