"""What does the bank of diffusions add to the denoiser's network?

The same network, data, steps and seeds, with a bank of K diffusions held at its start values (`GraphDenoiser`), and
without (`y + network(y)`); K among 0, 1, 3, 5. Trained on crops of photographs scaled down, blind to the noise level
from 0 to 55/255, by the loss and the optimizer of `configs/photographs.yaml`; PSNR on photographs of CBSD68.

    python benchmarks/bank_gain.py --json bank_gain.json
"""

import time
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
from _common import arguments, write_json
from _photograph import psnr
from torch import Tensor, nn

from datamodules import ImageFolderDataModule
from lightning_modules import GraphDenoiser
from lightning_modules.imaging import find_images, read_image
from lightning_modules.networks import GatedUNet

# The widths of configs/photographs.yaml come first; the further two widen what one and three see.
BANK = {
    "sigma": (0.8, 0.3, 1.8, 0.5, 3.0),
    "tau": (0.3,) * 5,
    "sigma_s": (1.5,) * 5,
    "sigma_f": (1.2, 0.5, 2.2, 0.8, 3.0),
}
HIGHEST, LEVELS = 55 / 255, (15, 25, 50)


class Plain(nn.Module):
    """The network without a bank."""

    def __init__(self) -> None:
        super().__init__()
        self.network = GatedUNet(3, 3)

    def forward(self, noisy: Tensor, *, noise: Tensor) -> Tensor:
        return noisy + self.network(noisy, noise)


def denoiser(size: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return GraphDenoiser(bank={name: values[:size] for name, values in BANK.items()}) if size else Plain()


def batches(data: ImageFolderDataModule, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Clean crops, noisy ones, and their noise levels, without end; the same for every network."""
    generator = torch.Generator().manual_seed(seed)
    loader: Any = data.train_dataloader()
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            clean = data.on_after_batch_transfer(batch, 0)["image"]
            level = HIGHEST * torch.rand(len(clean), generator=generator)
            yield clean, clean + level.view(-1, 1, 1, 1) * torch.randn(clean.shape, generator=generator), level
        epoch += 1


def train(model: nn.Module, data: ImageFolderDataModule, steps: int, seed: int) -> float:
    """Trains in place; returns the seconds of a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1, cycle_momentum=False)
    begin = time.perf_counter()
    for _, (clean, noisy, level) in zip(range(steps), batches(data, seed), strict=False):
        loss = (model(noisy, noise=level) - clean).square().mean((1, 2, 3)).add(1e-6).log().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return (time.perf_counter() - begin) / steps


@torch.inference_mode()
def quality(model: nn.Module, images: list[Tensor], level: int) -> float:
    found = []
    for number, clean in enumerate(images):
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1000 * level + number))
        found.append(psnr(model(clean + level / 255 * noise, noise=torch.tensor([level / 255])), clean))
    return fmean(found)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[0, 3], help="numbers of diffusions")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16, help="crops of a step")
    parser.add_argument("--crop", type=int, default=64, help="side of a crop")
    parser.add_argument("--images", type=int, default=12, help="photographs of CBSD68, spread over it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    files = find_images(args.data / "denoise" / "CBSD68")
    images = [read_image(path)[None].float() / 255 for path in files[:: max(len(files) // args.images, 1)]]
    records: list[dict[str, Any]] = []
    for seed in args.seeds:
        data = ImageFolderDataModule(
            str(args.data / "photos"),
            crop_size=args.crop,
            batch_size=args.batch,
            val_fraction=0,
            seed=seed,
            rescale=(0.27, 0.6),
            cache_gib=8,
            crops_per_image=64,
        )
        for size in args.sizes:
            model = denoiser(size, seed)
            seconds = train(model, data, args.steps, seed)
            reached = {f"psnr_{level}": quality(model, images, level) for level in LEVELS}
            found = {"bank": size, "seed": seed, "steps": args.steps, "batch": args.batch, "crop": args.crop}
            weights = sum(weight.numel() for weight in model.parameters())
            records.append({**found, "weights": weights, "images": len(images), "seconds_a_step": seconds, **reached})
            print(records[-1], flush=True)
            write_json(args.json, records)


if __name__ == "__main__":
    main()
