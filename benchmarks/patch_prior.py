"""Restoration by a mixture over patches (EPLL): learned on a folder of photographs, tested on others.

    python benchmarks/patch_prior.py --json patch_prior.json
    python benchmarks/patch_prior.py --checkpoint logs/patch_prior/version_0/checkpoints/last.ckpt --sets Set12

Learns from `denoise/Train400` unless a checkpoint is given, and restores `denoise/Set12` (grey) and `denoise/CBSD68`
(colour), all in the folder `--data`. The noise is white, drawn with a fixed seed for each image, and not clipped.
"""

import time
from pathlib import Path
from typing import Any

import torch
from _common import arguments, write_json
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from datamodules import PatchDataModule
from lightning_modules import PatchMixture, PatchPrior
from lightning_modules.imaging import find_images, read_image

NOISE_STD = 25 / 255


def learn(folder: Path, patches_per_image: int, epochs: int) -> PatchPrior:
    """The prior, learned as `configs/patch_prior.yaml` learns it."""
    seed_everything(0)
    mixture = PatchMixture(200, algorithm="stepwise", step_exponent=0.6, noise_std=NOISE_STD)
    data = PatchDataModule(str(folder), patches_per_image=patches_per_image, batch_size=20_000, shuffle=True)
    trainer = Trainer(max_epochs=epochs, accelerator="auto", devices=1, logger=False, enable_checkpointing=False)
    trainer.fit(mixture, data)
    return mixture.prior()


def photographs(folder: Path) -> list[tuple[str, Tensor]]:
    """Name and pixels `[C, H, W]` in [0, 1]; a grey photograph has one channel."""
    found = []
    for path in find_images(folder):
        pixels = read_image(path).float() / 255
        grey = bool((pixels == pixels[:1]).all())
        found.append((path.stem, pixels[:1] if grey else pixels))
    return found


def restore(prior: PatchPrior, folder: Path, limit: int | None) -> list[dict[str, Any]]:
    """PSNR, structural similarity and seconds for each photograph."""
    records = []
    for number, (name, clean) in enumerate(photographs(folder)[:limit]):
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(number))
        noisy = (clean + NOISE_STD * noise)[None]
        begin = time.perf_counter()
        restored = prior(noisy, NOISE_STD).clamp(0, 1)
        record = {
            "set": folder.name,
            "image": name,
            "psnr": float(peak_signal_noise_ratio(restored, clean[None], data_range=1.0)),
            "ssim": float(structural_similarity_index_measure(restored, clean[None], data_range=1.0)),
            "noisy_psnr": float(peak_signal_noise_ratio(noisy, clean[None], data_range=1.0)),
            "seconds": time.perf_counter() - begin,
        }
        records.append(record)
        print("{set} {image:>16} {noisy_psnr:6.2f} → {psnr:6.2f} dB, SSIM {ssim:.4f}, {seconds:.1f} s".format(**record))
    return records


def main() -> None:
    parser = arguments("Restoration by a mixture over patches.")
    parser.add_argument("--checkpoint", type=Path, help="of configs/patch_prior.yaml; learned here where left out")
    parser.add_argument("--sets", nargs="+", default=["Set12", "CBSD68"], help="folders of photographs to restore")
    parser.add_argument("--patches-per-image", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--stride", type=int, default=1, help="distance of the patches of an image that is restored")
    parser.add_argument("--limit", type=int, help="photographs of each set")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    folder = given.data / "denoise"
    begin = time.perf_counter()
    if given.checkpoint:
        prior = PatchPrior.from_checkpoint(given.checkpoint, noise_std=NOISE_STD)
    else:
        prior = learn(folder / "Train400", given.patches_per_image, given.epochs)
    prior.stride = given.stride
    records: list[dict[str, Any]] = [{"work": "learn", "seconds": time.perf_counter() - begin, "stride": given.stride}]
    for name in given.sets:
        found = restore(prior, folder / name, given.limit)
        mean = {key: sum(record[key] for record in found) / len(found) for key in ("psnr", "ssim", "seconds")}
        print("{} mean of {}: {psnr:.3f} dB, SSIM {ssim:.4f}, {seconds:.1f} s".format(name, len(found), **mean))
        records += [*found, {"set": name, "mean": mean}]
        write_json(given.json, records)


if __name__ == "__main__":
    main()
