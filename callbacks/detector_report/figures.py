"""Figures of a detector's report."""

from collections.abc import Mapping

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc, binary_roc
from torchvision.utils import make_grid

Curves = Mapping[str, tuple[Tensor, Tensor]]  # name -> probability [N] and label [N]

_BINS = 10
_FEW = 5  # images: the part of fewer that is generated jumps about
_STRICT = 0.01  # part of the photographs: below, the axis is linear
_TILE = 192  # pixels
_LARGEST = 0.995  # the quantile of the residual's magnitude that is drawn as nearly black or white


def roc_figure(evaluated: Curves, probes: Curves, positive: str) -> Figure:
    """Draws the receiver operating characteristic under each condition, and dashed that of the shortcut probes.

    Few false alarms, where detectors differ, take most of the width.
    """
    figure = Figure(figsize=(6, 5.5), layout="constrained")
    axes = figure.subplots()
    for style, curves in (("-", evaluated), ("--", probes)):
        for name, (probability, label) in curves.items():
            if 0 < int(label.sum()) < len(label):
                false, true, _ = binary_roc(probability.double(), label)
                area = float(binary_auroc(probability.double(), label))
                axes.plot(false, true, style, label=f"{name}: {area:.4f}", linewidth=1.5)
    chance = torch.linspace(0, 1, 200).square()
    axes.plot(chance, chance, color="0.8", linewidth=1)
    axes.set_xscale("symlog", linthresh=_STRICT)
    axes.set(
        xlabel="photographs taken for generated", ylabel=f"{positive} recognised", xlim=(-0.0005, 1), ylim=(0, 1.01)
    )
    axes.set_xticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    axes.legend(fontsize="small", loc="lower right", title="area")
    return figure


def reliability_figure(evaluated: Curves, positive: str) -> Figure:
    """Draws how often images are generated against how probable they were said to be; below, how many say so.

    Bins with a handful of images are left out above.
    """
    figure = Figure(figsize=(6, 6), layout="constrained")
    above, below = figure.subplots(2, height_ratios=(3, 1), sharex=True)
    above.plot([0, 1], [0, 1], color="0.8", linewidth=1)
    for i, (name, (probability, label)) in enumerate(evaluated.items()):
        said, true, count = reliability(probability, label)
        filled = count >= _FEW
        above.plot(said[filled], true[filled], "o-", label=name, markersize=3, linewidth=2 if i == 0 else 1)
        if i == 0:
            below.bar(
                [(k + 0.5) / _BINS for k in range(_BINS)], count.tolist(), 1 / _BINS, edgecolor="white", label=name
            )
            below.legend(fontsize="small")
    above.set(ylabel=f"part that is {positive} (of {_FEW} images or more)", xlim=(0, 1), ylim=(-0.01, 1.01))
    above.legend(fontsize="small")
    below.set(xlabel=f"probability of {positive}", ylabel="images", yscale="symlog")
    return figure


def reliability(probability: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns for ten equal bins of probability: its mean, the part with label 1, and the number of images.

    Shape:
        - probability, label: `[N]`
        - output: `[10]` each; NaN in bins without images
    """
    index = (probability * _BINS).long().clamp(0, _BINS - 1)
    count = torch.bincount(index, minlength=_BINS)
    said, true = (
        torch.bincount(index, weights=values.double(), minlength=_BINS) / count for values in (probability, label)
    )
    return said, true, count


def beside_residual(image: Tensor, residual: Tensor) -> Tensor:
    """Puts an image and what the restoration takes from it, stretched to be seen, side by side.

    Shape:
        - image, residual: `[3, H, W]`
        - output: `[3, H, 2 W]`
    """
    # every fourth value at the most: torch.quantile has a limit, and a quantile does not need all
    magnitude = torch.quantile(residual.abs().flatten()[:: max(residual.numel() // 2**18, 1)].float(), _LARGEST)
    return torch.cat([image, (0.5 + 0.45 * residual / magnitude.clamp_min(1e-8)).clamp(0, 1)], dim=-1)


def tile(pictures: list[Tensor]) -> Tensor:
    """Lays pictures of any size out as a grid, reduced to one height and the width of the widest.

    Shape:
        - pictures: `[3, H, W]` each
        - output: `[3, H', W']`
    """
    small = [
        F.interpolate(p[None], (_TILE, max(1, round(_TILE * p.shape[2] / p.shape[1]))), mode="area")[0]
        for p in pictures
    ]
    width = max(picture.shape[2] for picture in small)
    return make_grid([F.pad(p, (0, width - p.shape[2])) for p in small], nrow=4)
