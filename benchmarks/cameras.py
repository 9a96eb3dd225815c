"""Noise of cameras and microscopes: how well the noisy image alone shows it, and what is restored with it.

Real pairs of a noisy photograph and the mean of hundreds of shots (CC15; PolyU, of which every second pair was looked
at when settings were chosen, and is reported apart). Simulated on photographs, scaled down: variance a·x + b, noise
that a blur has correlated, white noise, none; on gray images of 16 bits: photons. CBM3D
beside ours is told the true level.

    OMP_NUM_THREADS=1 python benchmarks/cameras.py --json cameras.json
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from _common import arguments, write_json
from _peers import bm3d, failure, psnr
from PIL import Image
from torch import Tensor

from lightning_modules.imaging import Picture, find_images, read_image
from lightning_modules.noise import NoiseModel, estimate_noise_model, estimate_noise_std
from lightning_modules.restoration import NoiseLike, load_operator, restore_picture

Pair = tuple[str, Tensor, Tensor]  # name, noisy, clean: [1, C, H, W]
Row = dict[str, Any]

# Gain and read noise of simulated cameras; deviation of a blur in pixels, and level after it; photons at white.
CAMERAS = ((0.002, 0.0001), (0.01, 0.0002), (0.02, 0.001))
BLUR, BLURRED_LEVEL = 0.7, 10.3 / 255
PHOTONS = (20, 100, 500)
LEAST = 0.6  # of 255: what is read as less is taken for clean


def read(path: Path) -> Tensor:
    return read_image(path)[None].float() / 255


def real_pairs(folder: Path, first: int = 0, step: int = 1) -> Iterator[Pair]:
    files = sorted(path for path in folder.iterdir() if "_real" in path.name)[first::step]
    for path in files:
        yield path.stem.removesuffix("_real"), read(path), read(path.with_name(path.name.replace("_real", "_mean")))


def photographs(folder: Path, count: int) -> Iterator[tuple[str, Tensor]]:
    """Photographs, scaled down to two fifths."""
    files = find_images(folder)
    for path in files[3 :: max(len(files) // count, 1)][:count]:
        picture = Image.fromarray(read_image(path).permute(1, 2, 0).numpy())
        size = (round(0.4 * picture.width), round(0.4 * picture.height))
        small = np.array(picture.resize(size, Image.Resampling.LANCZOS))
        yield path.stem, torch.from_numpy(small).permute(2, 0, 1)[None].float() / 255


def simulated(images: Iterator[tuple[str, Tensor]], noise: NoiseModel) -> Iterator[Pair]:
    """Noisy photographs as 8-bit files hold them."""
    for number, (name, clean) in enumerate(images):
        noisy = noise.sample(clean, torch.tensor([number]), clip=True)
        yield name, (255 * noisy).round() / 255, clean


def camera(slope: float, intercept: float) -> NoiseModel:
    each = torch.ones(1, 3)
    return NoiseModel(slope * each, intercept * each, each / 2, NoiseModel.white(torch.ones(1), 3).kernel)


def blurred_noise() -> NoiseModel:
    step = torch.arange(-3, 4.0)
    line = torch.exp(-step.square() / (2 * BLUR**2))
    kernel = line[:, None] * line / line.square().sum()
    white = NoiseModel.white(torch.tensor([BLURRED_LEVEL]), 3)
    return NoiseModel(white.slope, white.intercept, white.brightness, white.kernel * kernel)


def photon_noise(photons: int) -> Iterator[Pair]:
    """Gray images of 16 bits, of which white is so many photons, and reading noise of a tenth of their root."""
    from skimage import data

    for number, name in enumerate(("cell", "moon", "camera", "coins")):
        clean = torch.from_numpy(getattr(data, name)().astype(np.float32))[None, None] / 255 * 0.9 + 0.05
        generator = torch.Generator().manual_seed(1000 * photons + number)
        counts = torch.poisson(photons * clean, generator=generator)
        noisy = counts / photons + 0.1 / photons**0.5 * torch.randn(clean.shape, generator=generator)
        yield name, (65535 * noisy.clamp(0, 1)).round() / 65535, clean


def true_level(noisy: Tensor, clean: Tensor) -> float:
    """Root mean variance."""
    return float((noisy - clean).var((2, 3)).mean().sqrt())


def restored(noisy: Tensor, noise: NoiseLike) -> Tensor:
    picture, _ = restore_picture(
        Picture(noisy[0]), lambda *given, **named: load_operator("auto", *given, **named), noise
    )
    return picture.pixels[None]


def measure(name: str, pairs: Iterator[Pair], told: NoiseModel | None = None, peer: bool = False) -> Iterator[Row]:
    """A row for each image, and one of means."""
    rows: list[Row] = []
    cbm3d = bm3d() if peer else None
    for image, noisy, clean in pairs:
        begin = time.perf_counter()
        found = estimate_noise_model(noisy)
        seconds = time.perf_counter() - begin
        row = {
            "set": name,
            "image": image,
            "true level": 255 * true_level(noisy, clean),
            "level": 255 * float(found.level),
            "level as white": 255 * float(estimate_noise_std(noisy)),
            "kind": "white" if bool(found.is_white) else "camera",
            "slope": float(found.slope.mean()),
            "intercept": float(found.intercept.mean()),
            "correlation": float(found.neighbor_correlation),
            "seconds": seconds,
            "psnr noisy": min(psnr(noisy, clean), 100.0),
            "psnr": min(psnr(restored(noisy, "auto"), clean), 100.0),
            "psnr as white": min(psnr(restored(noisy, "white"), clean), 100.0),
        }
        if told is not None:
            row["psnr told"] = min(psnr(restored(noisy, told), clean), 100.0)
        if cbm3d is not None:
            row["psnr CBM3D"] = psnr(cbm3d.restore(noisy, true_level(noisy, clean), 1.0, False), clean)
        rows.append(row)
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        yield row
    means = {key: fmean(row[key] for row in rows) for key, value in rows[0].items() if isinstance(value, float)}
    ratios = [row["level"] / row["true level"] for row in rows if row["true level"] > 0]
    summary = {"set": name, "image": "mean", "images": len(rows), **means}
    if ratios:
        summary["median error of level"] = median(abs(ratio - 1) for ratio in ratios)
        summary["median ratio of level"] = median(ratios)
    summary["white"] = sum(row["kind"] == "white" for row in rows)
    summary["clean"] = sum(row["level"] < LEAST for row in rows)
    print(summary, flush=True)
    yield summary


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("--images", type=int, default=10, help="photographs under simulated noise")
    parser.add_argument("--sets", nargs="*", help="which of them; all by default")
    parser.add_argument("--peer", action="store_true", help="CBM3D beside ours on the real pairs: half a minute each")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    polyu, cc15 = args.data / "real_noise" / "PolyU", args.data / "real_noise" / "CC15"

    sets: dict[str, Callable[[], Iterator[Row]]] = {}

    def some() -> Iterator[tuple[str, Tensor]]:
        return photographs(args.data / "photos", args.images)

    def standard() -> Iterator[tuple[str, Tensor]]:
        for path in find_images(args.data / "denoise" / "CBSD68")[::17]:
            yield path.stem, read(path)

    sets["PolyU, looked at"] = lambda: measure("PolyU, looked at", real_pairs(polyu, 0, 2), peer=args.peer)
    sets["PolyU"] = lambda: measure("PolyU", real_pairs(polyu, 1, 2), peer=args.peer)
    sets["CC15"] = lambda: measure("CC15", real_pairs(cc15), peer=args.peer)
    for slope, intercept in CAMERAS:
        name, model = f"a {slope:g}, b {intercept:g}", camera(slope, intercept)
        sets[name] = lambda name=name, model=model: measure(name, simulated(some(), model), model)
    blurred = blurred_noise()
    sets["blurred"] = lambda: measure("blurred", simulated(some(), blurred), blurred)
    for level in (0, 2, 5, 25, 50):
        name, model = f"white {level}", NoiseModel.white(torch.tensor([level / 255]), 3)
        sets[name] = lambda name=name, model=model: measure(name, simulated(standard(), model), model)
    for photons in PHOTONS:
        name = f"{photons} photons"
        sets[name] = lambda name=name, photons=photons: measure(name, photon_noise(photons))
    records: list[Row] = []
    with torch.inference_mode():
        for name in args.sets or sets:
            try:
                for row in sets[name]():
                    records.append(row)
                    write_json(args.json, records)
            except ImportError as error:
                records.append({"set": name, "failed": failure(error)})


if __name__ == "__main__":
    main()
