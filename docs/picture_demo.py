"""The README's first picture: photographs before and after, and how the parameters were learned.

lightning-em fit -c demo
python docs/picture_demo.py logs/demo/version_0 --output docs/images
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from datamodules import PhotoCropsDataModule
from lightning_modules import GraphDiffusionReconstruction

SHOWN = ("astronaut", "coffee", "ihc", "motorcycle_left", "china")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a demo run")
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="where demo.png goes")
    options = parser.parse_args()
    module = GraphDiffusionReconstruction.load_from_checkpoint(options.run / "checkpoints" / "last.ckpt").eval()
    data = PhotoCropsDataModule(crop_size=56, val_crops=10)  # the largest that all held-out parts have room for
    batch = data.on_after_batch_transfer(next(iter(data.predict_dataloader())), 0)
    with torch.inference_mode():
        output = module.predict_step(batch, 0)
    chosen = [data.class_names.index(name) for name in SHOWN]

    figure = plt.figure(figsize=(13, 4.6), dpi=100, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.75, 1])
    rows = {"clean": output["clean"], "noisy": output["noisy"].clamp(0, 1), "restored": output["restored"]}
    draw_images(left, {name: images[chosen] for name, images in rows.items()})
    draw_parameters(right.subplots(), options.run, module.em_parameters.learned)
    options.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output / "demo.png", pil_kwargs={"optimize": True})


def draw_images(figure: SubFigure, rows: dict[str, Tensor]) -> None:
    grid = figure.subplots(len(rows), len(SHOWN))
    for (label, images), line in zip(rows.items(), grid, strict=True):
        line[0].set_ylabel(label, fontsize=11)
        for axes, image, clean, name in zip(line, images, rows["clean"], SHOWN, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if label == "clean":
                axes.set_title(name, fontsize=11)
            else:
                psnr = -10 * torch.log10((image - clean).square().mean())
                axes.set_xlabel(f"{psnr:.1f} dB", fontsize=10, labelpad=2)


def draw_parameters(axes: Axes, run: Path, names: tuple[str, ...]) -> None:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    for name in names:
        points = events.Scalars(f"em/{name}")
        steps, values = [point.step for point in points], [point.value for point in points]
        (line,) = axes.semilogy(steps, values, label=name)
        axes.annotate(f" {name} {values[-1]:.3g}", (steps[-1], values[-1]), color=line.get_color(), va="center")
    axes.set(xlabel="optimiser step", title="the learned parameters of the diffusion")
    axes.margins(x=0.02)
    axes.set_xticks(range(0, steps[-1] + 1, 100))
    axes.set_xlim(right=axes.get_xlim()[1] * 1.38)  # room for the names
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
