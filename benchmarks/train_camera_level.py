"""Trains `lightning_modules.noise.camera_level` on photographs under simulated cameras' noise, and on clean ones.

    OMP_NUM_THREADS=1 python benchmarks/train_camera_level.py --images 1600 --json camera_level.json

A quarter of the images are clean, encoded by JPEG, and as sharp as photographs are that have been scaled down. The
others are as soft as photographs at full size, which have noise, and more of it is smoothed than by `CameraNoise`.
"""

import math
from pathlib import Path

import numpy as np
import torch
from _common import arguments, write_json
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lightning_modules.imaging import Degradation, degrade, find_images, mix, read_image, seeded_uniform
from lightning_modules.noise import camera_level
from lightning_modules.noise.blocks import read_blocks
from lightning_modules.noise.camera_level import LEAST_LEVEL, CameraLevel, describe_blocks
from lightning_modules.noise.camera_noise import CameraNoise, _blurred

_CLEAN, _SMOOTHED = 0.25, 0.6
# Deviation of a blur in pixels, at most: of clean images, of others; and the share of images that have none.
_SHARPEST, _SOFTEST, _SHARP = 0.5, 1.4, 0.4
_MEMBERS_HELD_OUT = 8  # every eighth photograph is held out


def sample(path: Path, number: int) -> tuple[Tensor, float] | None:
    """Features of a simulated image, and the logarithm of its level."""
    draw = seeded_uniform(mix(torch.tensor([number])), 8)[0].tolist()
    factor, side = 0.27 + 0.4 * draw[0], 192 + 16 * round(10 * draw[1])
    picture = Image.fromarray(read_image(path).permute(1, 2, 0).numpy())
    filters = (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BOX, Image.Resampling.HAMMING)
    size = (max(round(factor * picture.width), side), max(round(factor * picture.height), side))
    left, top = (round(d * (s - side)) for d, s in zip(draw[2:4], size, strict=True))
    across, down = picture.width / size[0], picture.height / size[1]
    box = (left * across, top * down, (left + side) * across, (top + side) * down)
    small = picture.resize((side, side), filters[int(4 * draw[4])], box)
    image = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    is_clean = draw[5] < _CLEAN
    blur = (_SHARPEST if is_clean else _SOFTEST) * max(draw[6] - _SHARP, 0) / (1 - _SHARP)
    image = degrade(image, Degradation(blur=blur, quality=round(75 + 25 * draw[7]) if is_clean else None))
    clean = image[None].float() / 255
    level = 0.0
    if not is_clean:
        images = CameraNoise(level=(0.7 / 255, 20 / 255), shot=(1e-4, 5e-3))(clean, torch.tensor([number]))
        noise = images.noisy - images.clean
        if draw[7] < _SMOOTHED:
            smooth = _blurred(noise, torch.full((1, 1, 1, 1), 0.5 + 1.5 * draw[7] / _SMOOTHED))
            noise = smooth * (noise.square().mean() / smooth.square().mean()).sqrt().clamp_max(4)
        noisy = ((images.clean + noise).clamp(0, 1) * 255).round().byte()[0]
        noisy = degrade(noisy, Degradation(quality=round(80 + 20 * draw[1]))) if draw[0] < 0.5 else noisy
        clean = noisy[None].float() / 255
        level = float((clean - images.clean).square().mean().sqrt())
    blocks = read_blocks(clean[0])
    if len(blocks.means) < 48:
        return None
    return describe_blocks(blocks), math.log(max(level, LEAST_LEVEL))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=1600)
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
    torch.manual_seed(0)
    model = CameraLevel()
    model.center.copy_(features[~held].mean(0))
    model.scale.copy_(features[~held].std(0).clamp_min(0.05))
    inputs, wanted = features[~held], targets[~held]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.3)
    steps = 1500
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (256,))
        noisy = inputs[chosen] + 0.15 * model.scale * torch.randn(256, inputs.shape[1])
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
