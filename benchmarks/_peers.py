"""Peers that restore photographs, and the best setting of each, found on photographs that are not reported."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A form this near to the best quality is as good as it.
NEAR = 0.1  # dB
LEAST_LEVEL = 0.1 / 255  # of peers that divide by it
Setting = dict[str, Any]


@dataclass
class Peer:
    """A way to restore `[1, 3, H, W]`, given the noise level and a setting, and the settings to choose from."""

    name: str
    restore: Callable[..., Tensor]
    settings: list[Setting] = field(default_factory=lambda: [{}])
    weights: int = 0

    def best_setting(self, clean: list[Tensor], noisy: list[Tensor], level: float) -> Setting:
        """Of the settings' forms, each at the strength that is best on these images, the fastest of the best ones."""
        if len(self.settings) == 1:
            return self.settings[0]
        forms: dict[str, tuple[float, float, Setting]] = {}
        for setting in self.settings:
            begin = time.perf_counter()
            restored = [self.restore(image, level, **setting) for image in noisy]
            seconds = time.perf_counter() - begin
            found = (fmean(map(psnr, restored, clean)), seconds, setting)
            form = str({name: value for name, value in setting.items() if name != "strength"})
            forms[form] = max(found, forms.get(form, found), key=lambda each: each[0])
        best = max(quality for quality, *_ in forms.values())
        return min((each for each in forms.values() if each[0] >= best - NEAR), key=lambda each: each[1])[2]


def opencv() -> Peer:
    """Non-local means, in the colors of a camera or in opponent ones; strengths in units of the noise."""
    import cv2

    cv2.setNumThreads(torch.get_num_threads())

    def restore(noisy: Tensor, level: float, strength: float, template: int, search: int, colored: bool) -> Tensor:
        h, eight_bit = 255 * strength * level, (to_array(noisy).clip(0, 1) * 255).round().astype(np.uint8)
        if colored:
            restored = cv2.fastNlMeansDenoisingColored(eight_bit, None, h, h, template, search)
        else:
            restored = cv2.fastNlMeansDenoising(eight_bit, None, h, template, search)
        return to_image(restored) / 255

    forms = {"template": (3, 5, 7), "search": (5, 7, 9, 13, 21), "colored": (False, True)}
    return Peer("OpenCV NLM", restore, grid(strength=(0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6), **forms))


def scikit_image() -> Peer:
    """Non-local means; strengths in units of the noise."""
    from skimage.restoration import denoise_nl_means

    def restore(noisy: Tensor, level: float, strength: float, patch: int, distance: int) -> Tensor:
        level = max(level, LEAST_LEVEL)
        options = {"h": strength * level, "sigma": level, "fast_mode": True, "channel_axis": -1}
        return to_image(denoise_nl_means(to_array(noisy), patch, distance, **options))

    strengths = (0.2, 0.4, 0.6, 0.8, 1.0)
    return Peer("scikit-image NLM", restore, grid(strength=strengths, patch=(3, 5, 7), distance=(4, 6, 9, 11)))


def bm3d() -> Peer:
    """BM3D in color; strengths in units of the noise, and its profile of low complexity as well."""
    from bm3d import BM3DProfile, BM3DProfileLC, bm3d_rgb

    def restore(noisy: Tensor, level: float, strength: float, low_complexity: bool) -> Tensor:
        profile = BM3DProfileLC() if low_complexity else BM3DProfile()
        return to_image(bm3d_rgb(to_array(noisy), strength * max(level, LEAST_LEVEL), profile))

    return Peer("CBM3D", restore, grid(strength=(0.9, 1.0, 1.1), low_complexity=(False, True)))


def grid(**choices: tuple[Any, ...]) -> list[Setting]:
    """Every combination."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def failure(error: Exception) -> str:
    """One line for a row of results: what a peer died of."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")


def psnr(restored: Tensor, clean: Tensor) -> float:
    return -10 * float((restored.clamp(0, 1) - clean).square().mean().log10())


def to_array(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())


def to_image(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array, np.float32)).permute(2, 0, 1)[None]
