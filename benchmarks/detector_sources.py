"""How far a detector's verdicts reach: each source is left out of training in turn, and tested on.

    python benchmarks/detector_sources.py --json docs/results/detector_sources.json --work logs/detector_sources

Sources: portraits of Stable Diffusion 1.4 against ImageNet, images of DiffusionDB against COCO and ImageNet, and twins:
photographs beside themselves as autoencoders give them back, one published and four small ones that are trained here
for a minute, which differ in how they double the resolution, and in whether the power of texture counts for them; as
published decoders hardly blur, their twins get the power of their photographs. Training images are blurred more often
than those that are tested on. A fold trains on all but one source and one more, by which it is calibrated; beside all
that is measured are the shortcut probes, fitted to the same training images.

A fold that is done is read from its folder, one that was stopped goes on: the same command, again. `--folds` chooses
some, `--steps` is how long each trains. `--inputs` compares what the network sees; `--trained` and `--max-images` give
the curve over the number of sources and of images.
"""

import csv
import itertools
import json
import logging
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L
import torch
from _common import arguments, write_json
from _taef2 import TAEF2
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageFilter
from skimage.restoration import denoise_tv_chambolle
from torch.nn import functional as F

from callbacks import DetectorReport
from callbacks.detector_report.shortcut_probes import PROBES
from datamodules import AutoencoderTwins, GeneratedImagesDataModule, ImageFolderDataModule
from lightning_modules import (
    ConvAutoencoder,
    GeneratedImageDetector,
    NeighborDifferences,
    RawPixels,
    RestorationResidual,
)
from lightning_modules.detection import DetectorInput
from lightning_modules.imaging import Encoding, History, find_images, read_image, relive

CLASSES = ("photographic", "generated")
DECODERS = ("nearest", "bilinear", "transposed", "pixel_shuffle")
INPUTS: dict[str, list[type[DetectorInput]]] = {
    "residual": [RestorationResidual],
    "neighbour differences": [NeighborDifferences],
    "colours": [RawPixels],
    "residual and differences": [RestorationResidual, NeighborDifferences],
    "all": [RestorationResidual, NeighborDifferences, RawPixels],
}
# By which a fold is calibrated; a small decoder, for what is real is scarce and to be trained on.
CALIBRATING = ("nearest", "bilinear")
# Small decoders that are to give back how strong texture is, as published ones do; squares alone leave it blurred.
SHARP = ("bilinear", "pixel_shuffle")
TEXTURE_WEIGHT = 1e-3
# How often an image that is trained on is blurred: blur alone is not to be taken for a trace.
BLURRED = 0.4
PHOTOGRAPHS = "photographs.csv"
BATCH = 32
# Images that are changed before they are looked at again.
_LOOKED_AT_AGAIN = 30
# What is not among the changes that a verdict is tried by.
SAVED_AGAIN = (("JPEG", 85), ("JPEG", 70), ("WEBP", 80))


def write_table(data: Path, work: Path, max_images: int | None) -> Path:
    """The sources that are files, as one table, and the photographs for twins, which are in none of them, as another.

    Those that come without parts are split by their order.
    """
    rows = []
    for part, kind in itertools.product(("train", "val"), CLASSES):
        files = find_images(data / "aigc" / part / kind)
        if (part, kind) == ("train", "photographic"):
            for_twins, files = files[::2], files[1::2]
        files = files[:max_images]
        rows += [
            (path.resolve(), kind, "portraits", "test" if part == "val" else _split(i)) for i, path in enumerate(files)
        ]
    for kind in CLASSES:
        files = find_images(data / "aigc_diffusiondb" / kind)[:max_images]
        splits = ("train", "test", "train", "test", "val")
        rows += [(path.resolve(), kind, "diffusiondb", splits[i % 5]) for i, path in enumerate(files)]
    with (work / PHOTOGRAPHS).open("w", newline="") as file:
        csv.writer(file).writerows([("path",), *((path.resolve(),) for path in for_twins)])
    table = work / "sources.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "source", "split"), *rows])
    return table


def _split(number: int) -> str:
    return "val" if number % 10 == 9 else "train"


def small_autoencoder(upsampling: Any) -> ConvAutoencoder:
    """One that halves the resolution once: in a minute a deeper one learns little but to blur."""
    return ConvAutoencoder(width=16, latent_channels=8, downsamplings=1, upsampling=upsampling)


def train_decoder(kind: str, photographs: Path, folder: Path, steps: int) -> Path:
    """Weights of a small autoencoder that has been trained to give photographs back."""
    path = folder / f"{kind}.pt"
    if path.is_file():
        return path
    torch.manual_seed(DECODERS.index(kind))
    network = small_autoencoder(kind)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    data = ImageFolderDataModule(
        str(photographs), 48, 8, val_fraction=0, rescale=(0.4, 1.0), cache_gib=8, crops_per_image=1, seed=1
    )
    loader = data.train_dataloader()
    errors: list[float] = []
    while len(errors) < steps:
        loader.sampler.set_epoch(len(errors))
        for batch in itertools.islice(loader, steps - len(errors)):
            images = batch["image"].float() / 255
            decoded = network(images)
            error = F.mse_loss(decoded, images)
            sharpness = (texture(decoded) - texture(images)).abs().mean() if kind in SHARP else 0.0
            loss = error + TEXTURE_WEIGHT * sharpness
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            errors.append(float(error.detach()))
    torch.save(network.state_dict(), path)
    print(f"decoder {kind}: {-10 * math.log10(fmean(errors[-20:])):.1f} dB", flush=True)
    return path


def texture(images: torch.Tensor) -> torch.Tensor:
    """Logarithm of the power of windows of 16×16 pixels at each frequency.

    Shape:
        - images: `[B, C, H, W]` in [0, 1]
        - output: `[B, C, M, N, 16, 9]`
    """
    fade = torch.hann_window(16, periodic=False)
    windows = images.unfold(2, 16, 8).unfold(3, 16, 8)
    windows = windows - windows.mean((-1, -2), keepdim=True)
    power = torch.fft.rfft2(windows * fade * fade[:, None], norm="ortho").abs().square()
    return (power + 1e-4).log()  # below a hundredth of white nothing is seen


def make_twins(options: Any) -> list[AutoencoderTwins]:
    """One source for each autoencoder; the photographs of a part are the same for all of them."""
    data, work, steps = options.data, options.work, options.decoder_steps
    folder = work / "decoders"
    folder.mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = {
        "folder": str(work / "twins"),
        "photographs": str(work / PHOTOGRAPHS),
        "max_images": min(options.twins, options.max_images or options.twins),
        "side": 256,
    }
    # what the decoders are trained on is not what they are passed
    weights = {kind: train_decoder(kind, data / "photos", folder, steps) for kind in DECODERS}
    small = [
        AutoencoderTwins(kind, small_autoencoder(kind), weights=str(path), match_power=True, **common)
        for kind, path in weights.items()
    ]
    return [AutoencoderTwins("taef2", TAEF2(data / "twins"), **common), *small]


def make_data(
    table: Path,
    twins: list[AutoencoderTwins],
    seed: int,
    crop_size: int,
    unused: Sequence[str] = (),
    blur_probability: float = 0.1,
    **held_out: Any,
) -> GeneratedImagesDataModule:
    """The data of a fold; without the sources that it does not look at."""
    with table.open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["source"] not in unused]
    own = table.with_name(f"sources_without_{'_'.join(unused)}.csv") if unused else table
    if unused:
        with own.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    return GeneratedImagesDataModule(
        str(own),
        crop_size=crop_size,
        batch_size=BATCH,
        eval_crops=9,
        conditions=["history", "clean"],
        twins=[one for one in twins if one.name not in unused],
        val_fraction=0.1,
        test_fraction=0.2,
        seed=seed,
        blur_probability=blur_probability,
        cache_gib=8,
        **held_out,
    )


def train(name: str, data: GeneratedImagesDataModule, inputs: str, options: Any, seed: int) -> L.Trainer:
    """Trains the detector of a fold, from where it was stopped."""
    L.seed_everything(seed, verbose=False)
    folder = options.work / name
    detector = GeneratedImageDetector(
        [kind() for kind in INPUTS[inputs]],
        optimizer=lambda parameters: torch.optim.AdamW(parameters, weight_decay=1e-2),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, options.steps),
        lr_interval="step",
    )
    newest = _unfinished(folder / "checkpoints" / "last.ckpt", options.steps)
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=options.steps,
        logger=TensorBoardLogger(options.work, name=None, version=name),
        val_check_interval=options.steps,  # at the end, which calibrates
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            EMAWeightAveraging(decay=0.97, use_buffers=True),
            ModelCheckpoint(folder / "checkpoints", save_last=True, every_n_train_steps=50),
        ],
    )
    trainer.fit(detector, data, ckpt_path=newest, weights_only=True)
    trainer.save_checkpoint(folder / "detector.ckpt")  # calibrated, which the last of training is not
    return trainer


def _unfinished(checkpoint: Path, steps: int) -> str | None:
    """A checkpoint from which there are steps left, after which the detector is calibrated."""
    if not checkpoint.is_file():
        return None
    done: int = torch.load(checkpoint, weights_only=True, map_location="cpu")["global_step"]
    return str(checkpoint) if done < steps else None


def measure(
    name: str,
    trained: GeneratedImagesDataModule,
    data: GeneratedImagesDataModule,
    inputs: str,
    options: Any,
    seed: int,
) -> dict[str, Any]:
    """A fold's figures, from its folder where it is done; the data differ in what training images go through."""
    folder = options.work / name
    record = folder / "fold.json"
    if record.is_file():
        found: dict[str, Any] = json.loads(record.read_text())
        return found
    begin = time.process_time()
    trainer = train(name, trained, inputs, options, seed)
    detector: Any = trainer.lightning_module
    # only now: before a fit the report would fit its probes to each source, in each fold again
    trainer.callbacks.append(  # type: ignore[attr-defined]
        DetectorReport(200, str(options.data / "weights" / "squeezenet1_0-imagenet-pruned.pth"))
    )
    trainer.test(detector, data, verbose=False)
    with (folder / "detector_report.csv").open(newline="") as file:
        lines = {line["condition"]: line for line in csv.DictReader(file) if line["slice"] == "all"}
    found = {
        f"{condition} {column}": float(value)
        for condition, line in lines.items()
        for column, value in line.items()
        if column not in ("condition", "slice") and value != ""
    }
    found |= {"validation auroc": float(detector.calibration.auroc), "flips": flips(detector, data)}
    found |= {**altered(detector, options), "processor minutes": (time.process_time() - begin) / 60}
    record.write_text(json.dumps(found, indent=1))
    return found


@torch.no_grad()
def flips(detector: GeneratedImageDetector, data: GeneratedImagesDataModule) -> float:
    """Share of the sure verdicts on test images that become the other one where the image is saved again."""
    detector.eval()
    pairs = []
    files = data.files("test")
    for path in files.paths[:: max(len(files) // _LOOKED_AT_AGAIN, 1)]:
        image = data.read(path)
        before = detector.verdict(image).label
        for kind, quality in SAVED_AGAIN:
            after = detector.verdict(relive(image, History(encodings=(Encoding(kind, quality),)))).label
            pairs.append((before, after))
    sure = [pair for pair in pairs if "unsure" not in pair]
    return sum(before != after for before, after in sure) / max(len(sure), 1)


@torch.no_grad()
def altered(detector: GeneratedImageDetector, options: Any) -> dict[str, float]:
    """Share of real photographs called generated that were denoised, sharpened, or taken at night."""
    detector.eval()
    photographs = find_images(options.data / "denoise" / "CBSD68")[:_LOOKED_AT_AGAIN]
    counts: dict[str, list[bool]] = {}
    for number, path in enumerate(photographs):
        image = read_image(path)
        dark = image.double() / 255 * 0.25
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        night = ((dark + (dark / 400 + 1e-4).sqrt() * noise).clamp(0, 1) * 4).clamp(0, 1)
        denoised = denoise_tv_chambolle(night.permute(1, 2, 0).numpy(), 0.08, channel_axis=-1)
        sharp = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.UnsharpMask(2, 150, 2))
        for name, changed in {
            "denoised": (255 * denoised).round().astype("uint8"),
            "sharpened": sharp,
            "night": (255 * night).round().to(torch.uint8),
        }.items():
            counts.setdefault(name, []).append(detector.verdict(changed).label == "generated")
    return {f"{name} called generated": sum(found) / len(found) for name, found in counts.items()}


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("logs/detector_sources"), help="folds, decoders and twins")
    parser.add_argument("--folds", nargs="+", metavar="SOURCE", help="sources to leave out; by default each in turn")
    parser.add_argument("--own", action="store_true", help="also train on all sources, and test on images held out")
    parser.add_argument("--steps", type=int, default=1000, help="of training in each fold")
    parser.add_argument("--decoder-steps", type=int, default=1000, help="of training of each small decoder")
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=["residual and differences"])
    parser.add_argument("--trained", type=int, metavar="N", help="train on no more than so many sources: the curve")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--crop-size", type=int, default=64)
    parser.add_argument("--twins", type=int, default=80, metavar="N", help="photographs of each part with twins")
    parser.add_argument("--max-images", type=int, metavar="N", help="of each class and part of a source: the curve")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options.work.mkdir(parents=True, exist_ok=True)
    table = write_table(options.data, options.work, options.max_images)
    twins = make_twins(options)
    names = ["portraits", "diffusiondb", *(one.name for one in twins)]
    if unknown := [name for name in options.folds or [] if name not in names]:
        parser.error(f"there is no source {unknown[0]}; there is {', '.join(names)}")
    rows: list[dict[str, Any]] = []
    for seed, inputs, left_out in itertools.product(
        options.seeds, options.inputs, [*(options.folds or names), *[None] * options.own]
    ):
        held_out: dict[str, Any] = {} if left_out is None else hold_out(names, left_out, options.trained)
        common: Any = (table, twins, seed, options.crop_size)
        data = make_data(*common, **held_out)
        trained = make_data(*common, blur_probability=BLURRED, **held_out)
        setting = {
            "left out": left_out or "none",
            "calibrated on": ", ".join(data.val_sources),
            "trained on": len(data.trained_sources),
            "images": options.max_images or "all",
            "inputs": inputs,
            "seed": seed,
            "steps": options.steps,
        }
        name = "_".join(str(value).replace(" ", "-") for key, value in setting.items() if key != "calibrated on")
        rows.append({**setting, **measure(name, trained, data, inputs, options, seed)})
        write_json(options.json, rows)
        row = rows[-1]
        probes = "  ".join(f"{probe} {row.get(f'history {probe}_auroc', float('nan')):.2f}" for probe in PROBES)
        print(
            f"without {setting['left out']:14s} {inputs:24s} AUROC {row['history auroc']:.3f}  sure "
            f"{row.get('history accuracy_sure', float('nan')):.3f}  unsure {row['history unsure']:.2f}  {probes}",
            flush=True,
        )


def hold_out(names: list[str], left_out: str, trained: int | None) -> dict[str, list[str]]:
    """Which source a fold is tested on, by which it is calibrated, and which it does not look at."""
    calibrating = next(name for name in CALIBRATING if name != left_out)
    rest = [name for name in names if name not in (left_out, calibrating)]
    return {"test_sources": [left_out], "val_sources": [calibrating], "unused": rest[trained:] if trained else []}


if __name__ == "__main__":
    main()
