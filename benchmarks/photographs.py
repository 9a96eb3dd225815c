"""Photographs restored: ours beside its peers on the same noise, quality and time.

White Gaussian noise, seeded and not clipped, on the photographs of a folder; its level told and estimated. Then clean
photographs and little noise, stored in 8 bits and clipped, the level estimated. Peers with settings have the best of
them, at each level, on other photographs, scaled down. One thread each:

    OMP_NUM_THREADS=1 python benchmarks/photographs.py --json photographs.json
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from _common import arguments, write_json
from _peers import Peer, Setting, bm3d, failure, opencv, psnr, scikit_image, to_image
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from lightning_modules import GraphDenoiser
from lightning_modules.imaging import find_images, read_image
from lightning_modules.noise import estimate_noise_std

STORED_LEVELS = (0, 2, 5)
OURS = "GraphDenoiser"


def ours(weights: str) -> Peer:
    denoiser = GraphDenoiser.from_pretrained(weights)
    count = sum(weight.numel() for weight in denoiser.parameters())
    return Peer(OURS, lambda noisy, level: denoiser(noisy, noise=level), weights=count)


def dncnn(folder: Path) -> Peer:
    """One set of weights for each of three levels; the nearest is used."""
    networks = {level: convolutions(folder / f"dncnn_color_{level}.npz") for level in (15, 25, 50)}

    def restore(noisy: Tensor, level: float) -> Tensor:
        return noisy - cascade(noisy, networks[min(networks, key=lambda known: abs(known - 255 * level))])

    return Peer("DnCNN", restore, weights=count(networks[25]))


def ffdnet(folder: Path) -> Peer:
    network = convolutions(folder / "ffdnet_color.npz")

    def restore(noisy: Tensor, level: float) -> Tensor:
        height, width = noisy.shape[-2:]
        folded = F.pixel_unshuffle(F.pad(noisy, (0, width % 2, 0, height % 2), mode="replicate"), 2)
        shown = torch.cat([folded, torch.full_like(folded[:, :1], level)], 1)
        return F.pixel_shuffle(cascade(shown, network), 2)[..., :height, :width]

    return Peer("FFDNet", restore, weights=count(network))


Convolutions = list[tuple[Tensor, Tensor]]


def convolutions(path: Path) -> Convolutions:
    with np.load(path) as file:
        names = sorted(name for name in file if name.startswith("weight"))
        return [tuple(torch.from_numpy(file[n]) for n in (name, name.replace("weight", "bias"))) for name in names]


def cascade(images: Tensor, network: Convolutions) -> Tensor:
    for weight, bias in network[:-1]:
        images = F.conv2d(images, weight, bias, padding=1).relu_()
    return F.conv2d(images, *network[-1], padding=1)


def count(network: Convolutions) -> int:
    return sum(tensor.numel() for layer in network for tensor in layer)


def add_noise(images: list[Tensor], level: int, stored: bool = False) -> list[Tensor]:
    noisy = []
    for number, image in enumerate(images):
        generator = torch.Generator().manual_seed(1000 * level + number)
        image = image + level / 255 * torch.randn(image.shape, generator=generator)
        noisy.append((image.clamp(0, 1) * 255).round() / 255 if stored else image)
    return noisy


def other_photographs(folder: Path) -> list[Tensor]:
    """Parts of four photographs, scaled down: what settings are found on."""
    images = []
    for path in find_images(folder)[::40][:4]:
        picture = Image.fromarray(read_image(path).permute(1, 2, 0).numpy())
        small = picture.resize((round(0.4 * picture.width), round(0.4 * picture.height)), Image.Resampling.BICUBIC)
        images.append(to_image(np.asarray(small))[..., :192, :192] / 255)
    return images


def row(
    method: Peer, setting: Setting, images: list[Tensor], noisy: list[Tensor], told: float | None
) -> dict[str, Any]:
    """Means over the images; the level is estimated where it is not told."""
    measured = []
    for clean, image in zip(images, noisy, strict=True):
        level = float(estimate_noise_std(image)) if told is None else told
        begin = time.process_time()  # of one thread, and other programs do not count
        restored = method.restore(image, level, **setting).clamp(0, 1)
        seconds = time.process_time() - begin
        similarity = float(structural_similarity_index_measure(restored, clean, data_range=1.0))
        noisy_psnr = min(psnr(image, clean), 100.0)  # a clean image, stored, is itself
        milliseconds = 1e9 * seconds / image[0, 0].numel()
        measured.append((min(psnr(restored, clean), 100.0), noisy_psnr, similarity, milliseconds, 255 * level))
    names = ("psnr", "psnr_noisy", "ssim", "ms_per_megapixel", "level_used")
    means = dict(zip(names, map(fmean, zip(*measured, strict=True)), strict=True))
    return {"method": method.name, "setting": setting, "weights": method.weights, "images": len(images), **means}


def rows_of_peers(record: Path, images: int) -> dict[tuple[str, int, bool, bool], dict[str, Any]]:
    """What an earlier run has found of peers on as many images, with its commit, by method, level, told and stored."""
    earlier = json.loads(record.read_text())
    return {
        (found["method"], found["level"], found["told"], found["stored"]): {"commit": earlier["commit"], **found}
        for found in earlier["rows"]
        if found.get("images") == images and found["method"] != OURS
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("--weights", default="color", help="of ours: what `GraphDenoiser.from_pretrained` takes")
    parser.add_argument("--folder", default="denoise/CBSD68", help="photographs, below the folder of data")
    parser.add_argument("--images", type=int, help="how many of them, spread over the folder; all by default")
    parser.add_argument("--levels", type=int, nargs="*", default=[15, 25, 50], help="of the noise, of 255")
    parser.add_argument("--stored", type=int, nargs="*", default=STORED_LEVELS, help="of the noise in 8-bit files")
    makers: dict[str, Callable[[], Peer]] = {
        "bm3d": bm3d,
        "opencv": opencv,
        "skimage": scikit_image,
        "dncnn": lambda: dncnn(args.data / "peers"),
        "ffdnet": lambda: ffdnet(args.data / "peers"),
    }
    parser.add_argument("--peers", nargs="*", choices=makers, default=list(makers), help="whom to compare with")
    parser.add_argument("--keep", action="store_true", help="rows of peers that the record has: CBM3D takes an hour")
    args = parser.parse_args()
    if args.keep and (args.json is None or not args.json.is_file()):
        parser.error(f"--keep needs --json with the record of an earlier run, got {args.json}")
    torch.set_num_threads(args.threads)
    methods = [ours(args.weights)]
    records: list[dict[str, Any]] = []
    for name in args.peers:
        try:
            methods.append(makers[name]())
        except Exception as error:
            records.append({"method": name, "failed": failure(error)})
            print(f"{name} failed: {records[-1]['failed']}")
    files = find_images(args.data / args.folder)
    files = files[:: max(len(files) // (args.images or len(files)), 1)][: args.images]
    images = [read_image(path)[None].float() / 255 for path in files]
    others = other_photographs(args.data / "photos")
    settings: dict[tuple[str, int], Setting] = {}
    kept = rows_of_peers(args.json, len(images)) if args.keep else {}
    tasks = [(level, told, False) for level in args.levels for told in (True, False)]
    tasks += [(level, False, True) for level in args.stored]
    with torch.inference_mode():
        for method in methods:
            method.restore(others[0][..., :64, :64], 0.1, **method.settings[0])  # compiled and loaded
        for level, told, stored in tasks:
            noisy = add_noise(images, level, stored)
            for method in methods:
                key = method.name, max(level, 2)  # clean photographs are restored with the setting for little noise
                found = kept.get((method.name, level, told, stored))
                if found is None:
                    if key not in settings:
                        settings[key] = method.best_setting(others, add_noise(others, key[1]), key[1] / 255)
                    found = row(method, settings[key], images, noisy, level / 255 if told else None)
                records.append({"level": level, "told": told, "stored": stored, **found})
                kind = "stored" if stored else "told" if told else "estimated"
                print(
                    f"{level:3} {kind:9} {method.name:17} {found['psnr']:6.2f} dB (noisy {found['psnr_noisy']:6.2f})  "
                    f"SSIM {found['ssim']:.4f}  {found['ms_per_megapixel']:8.0f} ms/MP",
                    flush=True,
                )
                write_json(args.json, records)


if __name__ == "__main__":
    main()
