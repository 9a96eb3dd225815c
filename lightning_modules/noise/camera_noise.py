"""Noise of a camera on clean photographs: photons, demosaicking, smoothing, sharpening, JPEG."""

import io
import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.imaging import mix, seeded_normal, seeded_uniform

# Streams of the draws, apart from those that other noise takes from the same key.
_SETTINGS_STREAM, _SENSOR_STREAM, _PIXELS_STREAM, _SHAPES_STREAM = 0x3C6E_F372, 0x1B87_3593, 0x510E_527F, 0x2B3E_6C1F
_BLUR_REACH = 6
_GAMMA = 2.2
# Demosaicking after Malvar, He & Cutler (ICASSP 2004): green at red and blue; red where its row has it, and where its
# column does; red at blue.
_SHARP = (
    ((0, 0, -1, 0, 0), (0, 0, 2, 0, 0), (-1, 2, 4, 2, -1), (0, 0, 2, 0, 0), (0, 0, -1, 0, 0)),
    ((0, 0, 0.5, 0, 0), (0, -1, 0, -1, 0), (-1, 4, 5, 4, -1), (0, -1, 0, -1, 0), (0, 0, 0.5, 0, 0)),
    ((0, 0, -1, 0, 0), (0, -1, 4, -1, 0), (0.5, 0, 5, 0, 0.5), (0, -1, 4, -1, 0), (0, 0, -1, 0, 0)),
    ((0, 0, -1.5, 0, 0), (0, 2, 0, 2, 0), (-1.5, 0, 6, 0, -1.5), (0, 2, 0, 2, 0), (0, 0, -1.5, 0, 0)),
)
# The same by the mean of the neighbors.
_PLAIN = (
    ((0, 0, 0, 0, 0), (0, 0, 2, 0, 0), (0, 2, 0, 2, 0), (0, 0, 2, 0, 0), (0, 0, 0, 0, 0)),
    ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0), (0, 4, 0, 4, 0), (0, 0, 0, 0, 0), (0, 0, 0, 0, 0)),
    ((0, 0, 0, 0, 0), (0, 0, 4, 0, 0), (0, 0, 0, 0, 0), (0, 0, 4, 0, 0), (0, 0, 0, 0, 0)),
    ((0, 0, 0, 0, 0), (0, 2, 0, 2, 0), (0, 0, 0, 0, 0), (0, 2, 0, 2, 0), (0, 0, 0, 0, 0)),
)
_LUMA = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


class CameraImages(NamedTuple):
    """What cameras make of clean photographs.

    Attributes:
        clean: What they would show without noise, demosaicked and sharpened too, `[B, 3, H, W]`.
        noisy: What they show, `[B, 3, H, W]`.
        level: Standard deviation of the noise by brightness, `[B, 1, H, W]`, as `level_map` fits it.
    """

    clean: Tensor
    noisy: Tensor
    level: Tensor


class CameraNoise:
    """A population of cameras: each image is taken by one of its own, which is a function of the image's key.

    Six in ten see the photograph through a mosaic of colors: light without tone curve and color correction, photons and
    reading noise (the range of Brooks et al., CVPR 2019), demosaicking, and the way back, sharpened or not. To the
    others noise is added that grows with the light more or less and that the channels share more or less. Then what is
    noise is smoothed, in its colors more, and the image encoded by JPEG, rounded to 8 bits, or left as it is.

    Args:
        raw: Share of the cameras with a mosaic.
        level: Least and largest level of the others, where white is 1.
        shot: Least and largest variance of the photons for each unit of light, of those with a mosaic.
        doubt: How far off the level is that is told of an image, as the estimate of it will be: the standard deviation
            of its logarithm.

    Example:
        >>> images = CameraNoise()(torch.rand(2, 3, 32, 48), torch.tensor([1, 2]))
        >>> images.noisy.shape, images.level.shape
        (torch.Size([2, 3, 32, 48]), torch.Size([2, 1, 32, 48]))
    """

    def __init__(
        self,
        raw: float = 0.6,
        level: tuple[float, float] = (0.7 / 255, 40 / 255),
        shot: tuple[float, float] = (1e-4, 1.2e-2),
        doubt: float = 0.15,
    ) -> None:
        if not 0 <= raw <= 1:
            raise ValueError(f"raw must be a share from 0 to 1, got {raw}")
        for name, (low, high) in (("level", level), ("shot", shot)):
            if not 0 < low <= high < 1:
                raise ValueError(f"{name} must be a range between 0 and 1, got ({low}, {high})")
        if not 0 <= doubt <= 2:
            raise ValueError(f"doubt must be from 0 to 2, got {doubt}")
        self.raw, self.level, self.shot, self.doubt = raw, tuple(level), tuple(shot), doubt

    @torch.no_grad()
    def __call__(self, clean: Tensor, key: Tensor) -> CameraImages:
        """What cameras make of photographs.

        Args:
            clean: The photographs, in color; of odd height or width, the mosaic's last cells are cut.
            key: One integer for each.

        Shape:
            - clean: `[B, 3, H, W]`
            - key: `[B]`, int64
            - output: `[B, 3, H, W]`, `[B, 3, H, W]` and `[B, 1, H, W]`

        Raises:
            ValueError: If the images have another number of channels than 3, or are smaller than 8×8 pixels.
        """
        if clean.shape[1] != 3 or min(clean.shape[-2:]) <= _BLUR_REACH:
            raise ValueError(f"cameras take images of 3 channels and at least 8×8 pixels, got {list(clean.shape)}")
        draws = _Draws(key, clean)
        is_raw = draws.chance(self.raw)
        developed, from_raw = self._develop(clean, key, draws)
        noise = torch.where(is_raw, from_raw, self._add(clean, key, draws))
        target = torch.where(is_raw, developed, clean)
        # what a camera smooths: the luma a little, the colors more; where noise was added, its level stays
        luma = clean.new_tensor(_LUMA)
        light, colors = _mixed(luma, noise).split((1, 2), 1)
        light_width = draws.between(0, 1.2) * draws.chance(0.5)
        color_width = (draws.between(0.4, 3) * draws.chance(0.6)).maximum(light_width)
        smooth = torch.cat([_blurred(light, light_width), _blurred(colors, color_width)], 1)
        smooth = _mixed(torch.linalg.inv(luma), smooth)
        energies = [each.square().mean((1, 2, 3), keepdim=True) for each in (noise, smooth)]
        gain = (energies[0] / energies[1].clamp_min(1e-12)).sqrt().clamp_max(4)
        noisy = target + torch.where(is_raw, smooth, gain * smooth)
        noisy = _stored(noisy, draws)
        told = level_map(noisy, target) * (self.doubt * draws.normal()).exp()
        return CameraImages(target, noisy, told.clamp(1e-4, 1))

    def _develop(self, clean: Tensor, key: Tensor, draws: "_Draws") -> tuple[Tensor, Tensor]:
        """What the camera shows of the photograph without noise, and the noise that it shows."""
        height, width = clean.shape[-2:]
        even = F.pad(clean, (0, width % 2, 0, height % 2), mode="replicate")
        is_curved, is_plain = draws.chance(0.5), draws.chance(0.3)
        saturation = draws.between(0, 0.6)[..., 0]
        gray = torch.full_like(saturation, 1 / 3).expand(-1, 3, 3)
        correction = (1 + saturation) * torch.eye(3).to(clean) - saturation * gray
        red, blue = draws.between(1.3, 2.4), draws.between(1.3, 2.4)
        gains = torch.cat([red, torch.ones_like(red), blue], 1)
        sensed = (_mixed(torch.linalg.inv(correction), _linear(even, is_curved)) / gains).clamp(0, 1)
        shot = draws.between(*map(math.log, self.shot)).exp()
        read = (2.18 * shot.log() + 1.2 + 0.26 * draws.normal()).exp()
        mosaic = (sensed * _bayer(sensed)).sum(1, keepdim=True)
        grain = seeded_normal(mix(key ^ _SENSOR_STREAM), mosaic.shape[1:]).to(clean)
        amount, reach = draws.between(0.2, 1) * draws.chance(0.4), draws.between(0.6, 1.2)

        def developed(raw: Tensor) -> Tensor:
            colors = torch.where(is_plain, _demosaicked(raw, _PLAIN), _demosaicked(raw, _SHARP))
            shown = _toned(_mixed(correction, colors * gains), is_curved)
            return (shown + amount * (shown - _blurred(shown, reach)))[..., :height, :width]

        target = developed(mosaic).clamp(0, 1)
        return target, developed(mosaic + (shot * mosaic + read).sqrt() * grain) - target

    def _add(self, clean: Tensor, key: Tensor, draws: "_Draws") -> Tensor:
        """Noise that grows with the light, some of it the same in all channels."""
        level, share = draws.between(*map(math.log, self.level)).exp(), draws.between(0, 1)
        channels = (0.25 * draws.normal(3)).exp()
        light = clean / clean.mean((1, 2, 3), keepdim=True).clamp_min(0.05)
        common = draws.between(0, 0.7) * draws.chance(0.5)
        grain = seeded_normal(mix(key ^ _PIXELS_STREAM), clean.shape[1:]).to(clean)
        grain = (1 - common).sqrt() * grain + common.sqrt() * grain[:, :1]
        return level * (channels * (1 - share + share * light)).sqrt() * grain


def level_map(noisy: Tensor, clean: Tensor) -> Tensor:
    """Standard deviation of the noise at each brightness, from pairs: a line through the squared differences.

    Shape:
        - noisy, clean: `[B, C, H, W]`
        - output: `[B, 1, H, W]`
    """
    square = (noisy - clean).square().mean(1, keepdim=True)
    light = noisy.mean(1, keepdim=True)
    mean, middle = (each.mean((2, 3), keepdim=True) for each in (square, light))
    covariance = ((light - middle) * (square - mean)).mean((2, 3), keepdim=True)
    slope = covariance / (light - middle).square().mean((2, 3), keepdim=True).clamp_min(1e-9)
    line = (mean + slope * (light - middle)).maximum(0.15 * mean)
    return (line * mean / line.mean((2, 3), keepdim=True).clamp_min(1e-12)).sqrt()


class _Draws:
    """Settings of each image's camera, one after the other, `[B, 1, 1, 1]` each."""

    def __init__(self, key: Tensor, like: Tensor) -> None:
        self._uniform = seeded_uniform(mix(key ^ _SETTINGS_STREAM), 32).to(like)
        self._normal = seeded_normal(mix(key ^ _SHAPES_STREAM), (8,)).to(like)
        self._next = [0, 0]

    def between(self, low: float, high: float) -> Tensor:
        self._next[0] += 1
        return low + (high - low) * self._uniform[:, self._next[0] - 1, None, None, None]

    def chance(self, probability: float) -> Tensor:
        return self.between(0, 1) < probability

    def normal(self, count: int = 1) -> Tensor:
        self._next[1] += count
        return self._normal[:, self._next[1] - count : self._next[1], None, None]


def _mixed(matrix: Tensor, images: Tensor) -> Tensor:
    return torch.einsum("...ij,...jhw->...ihw", matrix, images)


def _bayer(images: Tensor) -> Tensor:
    """Which color each pixel of a mosaic has, `[3, H, W]`: red and green in one row, green and blue in the next."""
    cell = images.new_zeros(3, 2, 2)
    cell[0, 0, 0] = cell[1, 0, 1] = cell[1, 1, 0] = cell[2, 1, 1] = 1
    return cell.repeat(1, images.shape[2] // 2, images.shape[3] // 2)


def _demosaicked(mosaic: Tensor, filters: tuple[tuple[tuple[float, ...], ...], ...]) -> Tensor:
    weight = mosaic.new_tensor(filters)[:, None] / 8
    across, row, column, diagonal = F.conv2d(F.pad(mosaic, (2,) * 4, mode="reflect"), weight).split(1, 1)
    is_red, _, is_blue = _bayer(mosaic).bool()
    in_red_row = is_red | is_red.roll(1, 1)
    green = torch.where(is_red | is_blue, across, mosaic)
    # red and blue change places from row to row
    red = torch.where(in_red_row, torch.where(is_red, mosaic, row), torch.where(is_blue, diagonal, column))
    blue = torch.where(in_red_row, torch.where(is_red, diagonal, column), torch.where(is_blue, mosaic, row))
    return torch.cat([red, green, blue], 1)


def _toned(light: Tensor, is_curved: Tensor) -> Tensor:
    shown = light.clamp(1e-6, 1) ** (1 / _GAMMA)
    return torch.where(is_curved, 3 * shown.square() - 2 * shown**3, shown)


def _linear(shown: Tensor, is_curved: Tensor) -> Tensor:
    straight = 0.5 - torch.sin(torch.asin((1 - 2 * shown).clamp(-1, 1)) / 3)
    return torch.where(is_curved, straight, shown).clamp(0, 1) ** _GAMMA


def _blurred(images: Tensor, width: Tensor) -> Tensor:
    """Gaussian blur of each image by a width of its own; 0 leaves it as it is."""
    step = torch.arange(-_BLUR_REACH, _BLUR_REACH + 1).to(images)
    line = torch.exp(-step.square() / (2 * width.clamp_min(0.05).square()))
    line = line / line.sum(-1, keepdim=True)
    for dimension in (2, 3):  # shifted images: convolutions with a group for each image take many times as long
        length = images.shape[dimension]
        edges = (0, 0, _BLUR_REACH, _BLUR_REACH) if dimension == 2 else (_BLUR_REACH, _BLUR_REACH, 0, 0)
        padded = F.pad(images, edges, mode="reflect")
        images = torch.zeros_like(images)
        for place in range(len(step)):
            images.addcmul_(line[..., place, None], padded.narrow(dimension, place, length))
    return images


def _stored(noisy: Tensor, draws: _Draws) -> Tensor:
    """Half of the images by JPEG, others clipped and rounded to 8 bits, others as they are."""
    is_coded, is_rounded = draws.chance(0.5).flatten().tolist(), draws.chance(0.6).flatten().tolist()
    qualities, is_halved = draws.between(80, 100).long().flatten().tolist(), draws.chance(0.5).flatten().tolist()
    results = []
    for image, coded, rounded, quality, halved in zip(noisy, is_coded, is_rounded, qualities, is_halved, strict=True):
        counts = (255 * image.clamp(0, 1)).round()
        if coded:
            file = io.BytesIO()
            pixels = np.ascontiguousarray(counts.byte().cpu().permute(1, 2, 0).numpy())
            Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=2 if halved else 0)
            with Image.open(file) as decoded:
                counts = torch.from_numpy(np.array(decoded)).permute(2, 0, 1).to(image)
        results.append(counts / 255 if coded or rounded else image)
    return torch.stack(results)
