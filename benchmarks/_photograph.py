"""One noisy photograph, parameters learned on others, and what the peers make of it."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from _timing import median_ms, record
from skimage import data
from torch import Tensor

from lightning_modules.graph import GraphDiffusion

NOISE_STD = 25 / 255
START = {"sigma": 0.25, "tau": 0.15, "sigma_s": 2.0, "sigma_f": 0.3}
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
    clean = torch.cat([_crops(_image(photo), 16, 64, generator) for photo in (data.coffee(), data.chelsea())])
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


def photograph_rows(bm3d: bool) -> Iterator[dict[str, Any]]:
    """Ours beside each peer, every peer at the best of its strengths *on the photograph itself*."""
    clean, noisy = photograph()
    diffusion, parameters, seconds = learn()
    rounded = {name: round(value, 3) for name, value in parameters.items()}
    print(f"learned in {seconds:.0f} s on crops of coffee and chelsea: {rounded}")
    with torch.inference_mode():
        quality = psnr(diffusion(noisy, **parameters), clean)
        ours = median_ms(lambda: diffusion(noisy, **parameters))
    for peer, restore, strengths, repeats in _peers(noisy, bm3d):
        best, strength = max((psnr(restore(strength), clean), strength) for strength in strengths)
        taken = median_ms(lambda restore=restore, strength=strength: restore(strength), repeats, warm_up=0)
        name = f"{peer}, strength {strength:.3g}"
        yield record("photograph 500×500", ours, name, taken, psnr=quality, peer_psnr=best)


def _peers(noisy: Tensor, bm3d: bool) -> Iterator[tuple[str, Callable[[float], Tensor], tuple[float, ...], int]]:
    import cv2
    from skimage.restoration import denoise_nl_means

    cv2.setNumThreads(torch.get_num_threads())
    array = np.ascontiguousarray(noisy[0].permute(1, 2, 0).numpy())
    eight_bit = (array.clip(0, 1) * 255).round().astype(np.uint8)

    def opencv(strength: float) -> Tensor:
        return _image(cv2.fastNlMeansDenoisingColored(eight_bit, None, strength, strength, 7, 21))[None]

    def scikit_image(strength: float) -> Tensor:
        restored = denoise_nl_means(
            array, 5, 6, h=strength * NOISE_STD, sigma=NOISE_STD, fast_mode=True, channel_axis=-1
        )
        return torch.from_numpy(restored).permute(2, 0, 1)[None]

    def block_matching(strength: float) -> Tensor:
        import bm3d

        restored = bm3d.bm3d_rgb(array, strength * NOISE_STD)
        return torch.from_numpy(restored.astype(np.float32)).permute(2, 0, 1)[None]

    yield "OpenCV fastNlMeansDenoisingColored 7/21", opencv, (10, 15, 20, 25, 30), 5
    yield "scikit-image NLM fast 5/6", scikit_image, (0.4, 0.6, 0.8, 1.0), 5
    if bm3d:
        yield "BM3D", block_matching, (1.0,), 1


def psnr(restored: Tensor, clean: Tensor) -> float:
    return -10 * float((restored.clamp(0, 1) - clean).square().mean().log10())


def _image(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def _crops(image: Tensor, count: int, side: int, generator: torch.Generator) -> Tensor:
    rows, columns = (torch.randint(length - side, (count,), generator=generator) for length in image.shape[1:])
    return torch.stack([image[:, a : a + side, b : b + side] for a, b in zip(rows, columns, strict=True)])
