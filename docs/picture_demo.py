"""The demo's picture: photographs that were not trained on, before and after, and how the parameters were learned.

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

# Where of the photographs a part is shown, by its top and left pixel: fur, edges, roofs, petals, grass.
SHOWN = {"chelsea": (60, 130), "coffee": (40, 40), "china": (50, 100), "flower": (40, 100), "camera": (30, 70)}
SIDE = 112
STAGES = ("clean", "noisy", "restored")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a demo run")
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="where demo.webp goes")
    options = parser.parse_args()
    module = GraphDiffusionReconstruction.load_from_checkpoint(options.run / "checkpoints" / "last.ckpt").eval()
    parts = restore_photographs(module)

    figure = plt.figure(figsize=(13, 4.6), dpi=100, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.75, 1])
    draw_images(left, parts)
    draw_parameters(right.subplots(), options.run, module.em_parameters.learned)
    options.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output / "demo.webp", pil_kwargs={"quality": 92})


def restore_photographs(module: GraphDiffusionReconstruction) -> dict[str, dict[str, Tensor]]:
    """Parts of the photographs that validation and test are of, clean, noisy and restored, by name."""
    data = PhotoCropsDataModule()
    parts = {}
    for loader in (data.val_dataloader(), data.predict_dataloader()):
        for batch in loader:
            with torch.inference_mode():
                output = module.predict_step({**data.on_after_batch_transfer(batch, 0), "clean": True}, 0)
            name = batch["name"][0].removesuffix(".png")
            top, left = SHOWN[name]
            parts[name] = {
                stage: output[stage][0, :, top : top + SIDE, left : left + SIDE].clamp(0, 1) for stage in STAGES
            }
    return parts


def draw_images(figure: SubFigure, parts: dict[str, dict[str, Tensor]]) -> None:
    grid = figure.subplots(len(STAGES), len(parts))
    for column, (name, stages) in zip(grid.T, parts.items(), strict=True):
        column[0].set_title(name, fontsize=11)
        for axes, stage in zip(column, STAGES, strict=True):
            axes.imshow(stages[stage].permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if stage != "clean":
                psnr = -10 * torch.log10((stages[stage] - stages["clean"]).square().mean())
                axes.set_xlabel(f"{psnr:.1f} dB", fontsize=10, labelpad=2)
    for axes, stage in zip(grid[:, 0], STAGES, strict=True):
        axes.set_ylabel(stage, fontsize=11)


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
