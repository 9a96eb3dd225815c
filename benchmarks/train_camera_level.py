"""Trains `lightning_modules.noise.camera_level` on photographs under simulated cameras' noise, and on clean ones.

    OMP_NUM_THREADS=1 python benchmarks/train_camera_level.py --images 6400 --json camera_level.json

Nearly half of the images are clean: sharp or soft, sharpened, denoised, encoded by JPEG of many qualities. Of the
others some have the noise of `CameraNoise`, most noise that a camera has smoothed by far more, and JPEG kept in part.
"""

import io
import math
from pathlib import Path

import numpy as np
import torch
from _common import arguments, write_json
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lightning_modules.imaging import find_images, mix, read_image, seeded_uniform
from lightning_modules.noise import camera_level
from lightning_modules.noise.camera_level import LEAST_LEVEL, CameraLevel, describe_image
from lightning_modules.noise.camera_noise import CameraNoise, _blurred
from lightning_modules.noise.estimate import COLORS

# Shares of the images without noise, and of those by `CameraNoise`.
_CLEAN, _PLAIN = 0.45, 0.2
# Deviation of a blur in pixels, at most: of clean images, of others; and the share of images that have none.
_SOFTEST, _SHARP = 1.4, 0.4
_MEMBERS_HELD_OUT = 8  # every eighth photograph is held out


class Draws:
    """Uniform numbers, one after the other."""

    def __init__(self, number: int) -> None:
        self._values = iter(seeded_uniform(mix(torch.tensor([number])), 64)[0].tolist())

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._values)

    def log_between(self, low: float, high: float) -> float:
        return math.exp(self.between(math.log(low), math.log(high)))

    def chance(self, probability: float) -> bool:
        return next(self._values) < probability


def blurred(image: Tensor, width: float) -> Tensor:
    """Gaussian blur, `[1, C, H, W]`."""
    return _blurred(image, torch.full((1, 1, 1, 1), width)) if width > 0.2 else image


def processed(clean: Tensor, draws: Draws, generator: torch.Generator) -> Tensor:
    """A photograph as a camera shows it that has smoothed its noise, colors by far more than the light: what is left in
    them is in blots, and in the light less where it is flat.
    """

    def grain(width: float, channels: int) -> Tensor:
        # blots wider than the blur reaches: of a smaller image
        factor = max(round(width / 1.5), 1)
        size = [side // factor + 2 for side in clean.shape[-2:]]
        small = blurred(torch.randn(1, channels, *size, generator=generator), width / factor)
        large = torch.nn.functional.interpolate(small, scale_factor=factor, mode="bilinear")
        large = large[..., : clean.shape[2], : clean.shape[3]]
        return large / large.std((2, 3), keepdim=True)

    level = draws.log_between(0.7 / 255, 14 / 255)
    soft = draws.between(0, 0.5) * draws.chance(0.7)
    light = (1 - soft) ** 0.5 * grain(draws.between(0.25, 1.0), 1) + soft**0.5 * grain(draws.between(1.5, 5), 1)
    blots = draws.between(0, 0.6)
    colors = (1 - blots) ** 0.5 * grain(draws.between(1, 4), 2) + blots**0.5 * grain(draws.between(4, 10), 2)
    colors = colors * draws.log_between(0.08, 0.8)
    luma = clean.mean(1, keepdim=True)
    # how the noise grows with the light: a line through five brightnesses
    steps = torch.tensor([math.exp(draws.between(-0.6, 0.6)) for _ in range(5)])
    place = (4 * luma).clamp(0, 3.999)
    lower = place.long()
    gain = steps[lower] + (place - lower) * (steps[(lower + 1)] - steps[lower])
    if draws.chance(0.6):
        contrast = (luma - blurred(luma, 2)).square()
        contrast = blurred(contrast, 2).sqrt() * 255
        least = draws.between(0.3, 1)
        gain = gain * (least + (1 - least) * contrast / (contrast + draws.between(2, 10)))
    axes = torch.tensor(COLORS)
    noise = torch.einsum("kc,bkhw->bchw", axes, torch.cat([3**0.5 * light, colors], 1))
    return level * gain * noise


def encoded(image: Tensor, quality: int, is_halved: bool) -> Tensor:
    file = io.BytesIO()
    pixels = (255 * image[0].clamp(0, 1)).round().byte().permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=2 if is_halved else 0)
    with Image.open(file) as decoded:
        return torch.from_numpy(np.array(decoded)).permute(2, 0, 1)[None].float() / 255


def sample(path: Path, number: int) -> tuple[Tensor, float] | None:
    """Features of a simulated image, and the logarithm of its level."""
    draws = Draws(number)
    factor = draws.log_between(0.13, 0.9)
    picture = Image.fromarray(read_image(path).permute(1, 2, 0).numpy())
    filters = (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BOX, Image.Resampling.HAMMING)
    shorter = min(round(factor * side) for side in picture.size)
    side = min(128 + 16 * round(draws.between(0, 16)), max(shorter, 128))
    size = (max(round(factor * picture.width), side), max(round(factor * picture.height), side))
    left, top = (round(draws.between(0, s - side)) for s in size)
    across, down = picture.width / size[0], picture.height / size[1]
    box = (left * across, top * down, (left + side) * across, (top + side) * down)
    small = picture.resize((side, side), filters[int(draws.between(0, 4))], box)
    clean = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 255
    is_clean, is_plain = draws.chance(_CLEAN), draws.chance(_PLAIN / (1 - _CLEAN))
    is_soft = not draws.chance(_SHARP)
    clean = blurred(clean, draws.between(0.2, _SOFTEST) * is_soft)
    sharpening = draws.between(0, 1.5) * draws.chance(0.4) * (not is_soft)
    clean = clean + sharpening * (clean - blurred(clean, draws.between(0.5, 1.2)))
    exposure = draws.log_between(0.5, 1.2)
    clean = (exposure * clean).clamp(0, 1)
    quality, is_halved = round(draws.between(70, 100)), draws.chance(0.7)
    is_encoded = draws.chance(0.85)
    generator = torch.Generator().manual_seed(number)
    if is_clean:
        noisy = clean
        if draws.chance(0.3):  # denoised: smooth where it is flat
            contrast = blurred((clean - blurred(clean, 1.5)).square().mean(1, keepdim=True), 1.5).sqrt()
            share = contrast / (contrast + draws.between(1, 6) / 255)
            noisy = share * clean + (1 - share) * blurred(clean, draws.between(0.8, 2))
        quality = round(draws.between(40, 100))
        target = noisy
    elif is_plain:
        images = CameraNoise(level=(0.7 / 255, 20 / 255), shot=(1e-4, 5e-3))(clean, torch.tensor([number]))
        noisy, target, is_encoded = images.noisy, images.clean, False
    else:
        noisy, target = clean + processed(clean, draws, generator), clean
    if is_encoded:
        noisy, target = encoded(noisy, quality, is_halved), encoded(target, quality, is_halved)
    noisy, target = ((255 * each.clamp(0, 1)).round() / 255 for each in (noisy, target))
    level = float((noisy - target).square().mean().sqrt())
    features = describe_image(noisy[0])
    return None if features is None else (features, math.log(max(level, LEAST_LEVEL)))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=6400)
    parser.add_argument("--output", type=Path, default=Path(camera_level.__file__).with_suffix(".safetensors"))
    parser.add_argument("--cache", type=Path, help="features, where they are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = find_images(args.data / "photos")
    if args.cache is not None and args.cache.exists():
        features, targets, owners = torch.load(args.cache)
    else:
        rows = []
        for number in range(args.images):
            found = sample(files[number % len(files)], number)
            if found is not None:
                rows.append((*found, number % len(files)))
            if number % 100 == 99:
                print(number + 1, flush=True)
        features = torch.stack([row[0] for row in rows])
        targets, owners = torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])
        if args.cache is not None:
            torch.save((features, targets, owners), args.cache)
    held = owners % _MEMBERS_HELD_OUT == 3
    torch.manual_seed(1)
    model = CameraLevel()
    model.center.copy_(features[~held].mean(0))
    model.scale.copy_(features[~held].std(0).clamp_min(0.05))
    inputs, wanted = features[~held], targets[~held]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.3)
    steps = 2500
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (256,))
        noisy = inputs[chosen] + 0.3 * model.scale * torch.randn(256, inputs.shape[1])
        mean, spread = model(noisy)
        # heavy tails: a clean image taken for a noisy one is no reason to doubt all others
        z = (mean - wanted[chosen]) / spread
        loss = (spread.log() + 2.5 * (1 + z.square() / 4).log()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        mean, spread = model(features[held])
    true = targets[held]
    noisy = true > math.log(1 / 255)
    error = (mean - true).abs()[noisy].exp() - 1
    levels = 255 * mean[~noisy].exp()
    record = {
        "images": int(held.sum()),
        "median error of level": float(error.median()),
        "largest tenth of errors above": float(error.quantile(0.9)),
        "median level read off clean images": float(levels.median()),
        "largest tenth above": float(levels.quantile(0.9)),
        "spread": float(spread.median()),
    }
    print(record)
    write_json(args.json, [record])
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, args.output)


if __name__ == "__main__":
    main()
