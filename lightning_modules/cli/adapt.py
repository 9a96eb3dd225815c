"""`lightning-em adapt`: a denoiser for a folder's own noise, learned from its noisy photographs."""

import io
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from lightning_modules.adaptation import Adapted, adapt
from lightning_modules.cli.walk import error_console, reason_of, show_progress
from lightning_modules.cli.words import Parser
from lightning_modules.graph_denoiser import GraphDenoiser
from lightning_modules.imaging import camera_of, find_images, fixed_crops, read_picture, write_whole
from lightning_modules.restoration import restore

_MOST_PIXELS, _CROP, _NUM_CROPS = 2**20, 256, 16  # of larger photographs, crops from all over are looked at
_SHOWN = 3  # photographs in the report
_UNKNOWN = "unknown camera"


def run(words: list[str]) -> int:
    """Run the command.

    Args:
        words: Words after `adapt`.

    Returns:
        The exit code: 0 where weights were written, 1 where not, 130 where the user has stopped it.
    """
    options = _parser().parse_args(words)
    console = error_console()
    folder, output = (Path(path).expanduser() for path in (options.folder, options.output))
    begin = time.perf_counter()
    try:
        if output.suffix != ".safetensors":
            raise ValueError(f"{output}: name a file that ends in .safetensors with -o")
        if output.exists() and not options.overwrite:
            raise FileExistsError(f"{output} exists: name another file with -o, or adapt with --overwrite")
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder: give one with noisy photographs")
        images, cameras = _read(folder, console)
        with show_progress(console, options.steps) as show:
            start = None if options.model == "auto" else GraphDenoiser.from_pretrained(options.model)
            found = adapt(
                images, cameras, start, options.steps, options.seed, lambda part: show(part * options.steps, "adapts")
            )
        found.denoiser.save_pretrained(output)
        report = output.with_suffix(".png")
        write_whole(report, _picture(found, images, cameras))
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:
        console.print(f"lightning-em adapt: {reason_of(error)}")
        return 1
    console.print(_summary(found, cameras))
    console.print(
        f"{output} and {report.name}: {time.perf_counter() - begin:.0f} s; lightning-em restore --model {output}"
    )
    return 0


def _read(folder: Path, console: Console) -> tuple[list[Tensor], list[str]]:
    """The photographs of a folder, large ones in crops, and their cameras."""
    images, cameras = [], []
    for path in find_images(folder):
        try:
            with warnings.catch_warnings(action="ignore"):
                picture = read_picture(path)
        except (OSError, ValueError) as error:
            console.print(f"left out: {reason_of(error)}")
            continue
        pixels = picture.pixels
        if not bool(pixels.isfinite().all()):
            console.print(f"left out: {path.name} has NaN or infinite pixels")
            continue
        if pixels[0].numel() > _MOST_PIXELS and min(pixels.shape[1:]) >= _CROP:
            rows = fixed_crops(pixels, _CROP, _NUM_CROPS).split(4)
            pixels = torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2)
        images.append(pixels)
        cameras.append(camera_of(picture))
    if not images:
        raise ValueError(f"{folder} has no photographs that can be read")
    return images, cameras


def _summary(found: Adapted, cameras: Sequence[str]) -> str:
    lines = []
    for camera in sorted(set(cameras)):
        levels = [255 * float(n.level) for n, name in zip(found.noises, cameras, strict=True) if name == camera]
        lines.append(
            f"{camera or _UNKNOWN}: {len(levels)} photographs, noise {min(levels):.1f} to {max(levels):.1f} of 255"
        )
    kept = "the adapted weights are kept" if found.is_better else "no better: the weights stay as they were"
    lines.append(
        f"risk of held-out crops, of the noise's variance: {found.before:.4f}, adapted {found.after:.4f}: {kept}"
    )
    return "\n".join(lines)


def _picture(found: Adapted, images: Sequence[Tensor], cameras: Sequence[str]) -> bytes:
    """The report: noise curves, risk, and crops before and after."""
    from matplotlib.figure import Figure  # takes a while

    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 4)
    light = torch.linspace(0, 1, 33)
    names = sorted(set(cameras))
    for noise, camera in zip(found.noises, cameras, strict=True):
        channels = noise.slope.shape[1]
        curve = 255 * noise.variance(light.expand(1, channels, 1, -1)).mean((0, 1, 2)).sqrt()
        axes[0, 0].plot(light, curve, color=f"C{names.index(camera) % 10}", linewidth=0.8, label=camera or _UNKNOWN)
    handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    axes[0, 0].legend(handles.values(), handles.keys(), fontsize=7)
    axes[0, 0].set(title="noise by brightness", xlabel="brightness", ylabel="standard deviation, of 255")
    axes[1, 0].plot(found.risks, linewidth=0.8, label="training crops")
    axes[1, 0].axhline(found.before, color="C1", label="held out, before")
    axes[1, 0].axhline(found.after, color="C2", label="held out, after")
    axes[1, 0].legend(fontsize=7)
    axes[1, 0].set(title="estimated risk, of the noise's variance", xlabel="step")
    order = sorted(range(len(images)), key=lambda place: -float(found.noises[place].level))[:_SHOWN]
    for column, place in enumerate(order, start=1):
        size = min(128, *images[place].shape[1:])
        top, left = ((length - size) // 2 for length in images[place].shape[1:])
        crop = images[place][:, top : top + size, left : left + size]
        restored = restore(crop, noise=found.noises[place], model=found.denoiser)
        for row, (part, name) in enumerate(((crop, "noisy"), (restored, "restored"))):
            axes[row, column].imshow(part.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0), interpolation="nearest")
            axes[row, column].set(title=name, xticks=[], yticks=[])
    for axis in axes[:, 1 + len(order) :].flat:
        axis.set_axis_off()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _parser() -> Parser:
    parser = Parser(
        "lightning-em adapt",
        description="Learn the noise of a folder's photographs, and a denoiser for it, from the photographs only.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="noisy photographs; those of a camera share their noise")
    parser.add_argument("-o", "--output", metavar="OUT", default="adapted.safetensors", help="weights to write")
    parser.add_argument("--model", default="auto", metavar="FILE", help="weights to start from")
    parser.add_argument("--steps", type=int, default=100, help="training steps; half a second each")
    parser.add_argument("--seed", type=int, default=0, help="seed of crops and draws")
    parser.add_argument("--overwrite", action="store_true", help="replace the output where it exists")
    return parser
