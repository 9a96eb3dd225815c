"""The image operator as one would first write it in torch: padded copies, one offset at a time, autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_image_operator(
    images: Tensor,
    patch_size: int,
    radius: int,
    sigma: Tensor,
    tau: Tensor,
    sigma_s: Tensor,
    sigma_f: Tensor,
    steps: int,
    noise_std: float,
) -> Tensor:
    """`[B, C, H, W]` of the same; the parameters are numbers."""
    _, channels, height, width = images.shape
    reach = range(-radius, radius + 1)
    offsets = [(a, b) for a in reach for b in reach if 0 < a * a + b * b <= radius**2]

    def shift(padded: Tensor, a: int, b: int) -> Tensor:
        return padded[..., radius + a : radius + a + height, radius + b : radius + b + width]

    def box(maps: Tensor) -> Tensor:
        return F.avg_pool2d(maps, patch_size, 1, patch_size // 2, count_include_pad=True) * patch_size**2

    around = F.pad(images, (radius,) * 4)
    inside = F.pad(torch.ones(1, 1, height, width), (radius,) * 4)
    distance, valid = [], []
    for a, b in offsets:
        here = shift(inside, a, b)
        squared = (images - shift(around, a, b)).square().sum(1, keepdim=True) * here
        squared = box(squared) * (patch_size**2 / box(here).clamp_min(1))
        distance.append((squared - 2 * noise_std**2 * channels * patch_size**2).clamp_min(0))
        valid.append(here)
    distances, valids = torch.cat(distance, 1), torch.cat(valid, 1)
    length = torch.tensor([(a * a + b * b) ** 0.5 for a, b in offsets]).view(1, -1, 1, 1)
    cutoff = 0.5 * (1 + torch.cos(torch.pi * (length / radius).clamp_max(1)))

    def average(weight: Tensor, self_weight: float, x: Tensor, count: int, step: Tensor | float) -> Tensor:
        total = weight.sum(1, keepdim=True) + self_weight
        weight, own = box(weight / total) * valids, box(self_weight / total)
        norm = own + weight.sum(1, keepdim=True)
        for _ in range(count):
            padded = F.pad(x, (radius,) * 4)
            mean = own * x
            for k, (a, b) in enumerate(offsets):
                mean = mean + weight[:, k : k + 1] * shift(padded, a, b)
            x = (1 - step) * x + step * mean / norm
        return x

    x = average(torch.exp(-distances / (2 * sigma**2)) * valids, 1.0, images, 1, 1.0)
    weight = torch.exp(-distances / (2 * sigma_f**2) - length**2 / (2 * sigma_s**2)) * cutoff * valids
    return average(weight, 1e-3, x, steps, tau)
