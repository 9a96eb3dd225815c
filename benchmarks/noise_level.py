"""How well, and how fast, is the noise level of an image estimated?

White Gaussian noise of known level on the photographs of a folder, on CIFAR-10 test images and on scikit-image's gray
ones, stored in 8 bits with clipping and as they are. Ours beside the median of the finest diagonal Haar coefficients
and `skimage.restoration.estimate_sigma`; errors in units of 1/255.

    python benchmarks/noise_level.py --json noise_level.json
"""

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from _common import arguments, write_json
from _timing import median_ms
from PIL import Image
from skimage import data
from skimage.restoration import estimate_sigma
from torch import Tensor

from datamodules import CIFAR10DataModule
from lightning_modules.noise import estimate_noise_std

LEVELS = (0, 1, 2, 5, 10, 15, 25, 50)


def haar_median(images: Tensor) -> Tensor:
    """Median absolute diagonal Haar coefficient over 0.6745, in the opponent colors unless they hold little."""
    diagonal = images.diff(dim=-2).diff(dim=-1) / 2
    level = diagonal.abs().flatten(1).median(1).values / 0.6745
    if images.shape[1] != 3:
        return level
    red, green, blue = diagonal.unbind(1)
    opponent = torch.stack([(red - blue) / 2**0.5, (red - 2 * green + blue) / 6**0.5], 1)
    color = opponent.abs().flatten(1).median(1).values / 0.6745
    return torch.where(3 * color < level, level, color)


def skimage_sigma(images: Tensor) -> Tensor:
    """The mean over the channels of scikit-image's estimate."""
    return torch.tensor([estimate_sigma(image.numpy(), channel_axis=0, average_sigmas=True) for image in images])


ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {
    "ours": estimate_noise_std,
    "Haar median": haar_median,
    "skimage": skimage_sigma,
}


def photograph(pixels: np.ndarray) -> Tensor:
    image = torch.from_numpy(pixels.copy()).float() / 255
    return image[None, None] if image.ndim == 2 else image.permute(2, 0, 1)[None]


def add_noise(images: Tensor, level: int, stored: bool) -> Tensor:
    noisy = images + level / 255 * torch.randn(images.shape, generator=torch.Generator().manual_seed(level))
    return (noisy.clamp(0, 1) * 255).round() / 255 if stored else noisy


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--folder", default="denoise/CBSD68", help="photographs, below the folder of data")
    parser.add_argument("--images", type=int, default=500, help="of CIFAR-10's test images")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cifar = CIFAR10DataModule(args.data)
    cifar.setup("test")
    small = torch.cat([cifar.on_after_batch_transfer(batch, 0)["image"] for batch in cifar.test_dataloader()])[
        : args.images
    ]
    photographs = [photograph(np.asarray(Image.open(file))) for file in sorted((args.data / args.folder).glob("*.png"))]
    sets = {
        args.folder: photographs,
        "CIFAR-10 test": list(small.split(32)),
        "scikit-image, gray": [
            photograph(getattr(data, name)()) for name in ("camera", "coins", "moon", "gravel", "brick", "grass")
        ],
    }
    records = []
    for (name, images), stored, level in itertools.product(sets.items(), (True, False), LEVELS):
        noisy = [add_noise(batch, level, stored) for batch in images]
        for method, estimate in ESTIMATES.items():
            error = torch.cat([estimate(batch).double() for batch in noisy]) * 255 - level
            worst = error[error.abs().argmax()].item()
            mean, rms = error.mean().item(), error.square().mean().sqrt().item()
            records.append(
                {
                    "images": name,
                    "8 bit": stored,
                    "level": level,
                    "method": method,
                    "mean": mean,
                    "rms": rms,
                    "worst": worst,
                }
            )
            kind = "8 bit" if stored else "float"
            print(f"{name:20} {kind} {level:3} {method:12} {mean:+6.2f} {rms:6.2f} {worst:+7.2f}", flush=True)
    large = torch.rand(1, 3, 600, 833)
    for method, estimate in ESTIMATES.items():
        batch_ms, large_ms = median_ms(partial(estimate, small[:32])) / 32, median_ms(partial(estimate, large))
        records.append({"method": method, "ms, 32×32 in a batch of 32": batch_ms, "ms, 0.5 megapixels": large_ms})
        print(f"{method:12} {batch_ms:.2f} ms for one of 32 images of 32×32, {large_ms:.0f} ms for 0.5 megapixels")
    write_json(args.json, records)


if __name__ == "__main__":
    main()
