"""Draws the pictures of docs/site/em_study.md from the results in docs/results.

python docs/picture_em_study.py
"""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tables import rows as load

DOCS = Path(__file__).parent
COLORS = {"fixed": "0.5", "learned": "C0"}


def save(figure: Figure, name: str) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(DOCS / "images" / f"{name}.png", dpi=110)


def impact() -> Figure:
    """Test error in the course of training, networks with fixed and with learned parameters, one line for each seed."""
    records = [record for record in load("em_impact") if "Residual" in record["setting"]]
    settings = list(dict.fromkeys(record["setting"] for record in records))
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(settings), sharey=True, squeeze=False)[0], settings, strict=True):
        runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for record in (record for record in records if record["setting"] == setting):
            runs.setdefault((record["variant"], record["seed"]), []).append(record)
        drawn = set()
        for (variant, _), points in runs.items():
            steps, errors = ([point[name] for point in points] for name in ("step", "mse"))
            label = None if variant in drawn else f"{variant} parameters"
            axes.plot(steps, errors, color=COLORS[variant], linewidth=1.2, label=label)
            drawn.add(variant)
        axes.set(title=setting, xlabel="step", yscale="log")
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("mean squared error, test images")
    figure.axes[0].legend()
    return figure


def search() -> Figure:
    """Quality over images restored: learning runs by batch, searches by trial; median and range of the seeds."""
    records = [record for record in load("em_vs_search") if "failed" not in record]
    most = max(record.get("trials", 0) for record in records)
    records = [record for record in records if record.get("trials", most) == most]
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, work in enumerate(dict.fromkeys(record["work"] for record in records)):
        rows = [record for record in records if record["work"] == work]
        scores = list(zip(*(row["psnr"] for row in rows), strict=False))
        passes = [rows[0]["images"] * count for count in range(1, len(scores) + 1)]
        middle = [statistics.median(each) for each in scores]
        how = "after each batch" if work.endswith("Rule") else "best trial so far"
        axes.plot(passes, middle, color=f"C{number}", label=f"{work}, {how}")
        axes.fill_between(passes, [min(s) for s in scores], [max(s) for s in scores], color=f"C{number}", alpha=0.15)
    best = records[0]["psnr_oracle"]
    axes.axhline(best, color="0.3", linestyle=":", label="oracle")
    axes.set(xscale="log", xlabel="training images restored", ylabel="PSNR of the test images, dB")
    axes.set_ylim(best - 0.6, best + 0.03)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def main() -> None:
    for name, draw in (("em_impact", impact), ("em_vs_search", search)):
        save(draw(), name)


if __name__ == "__main__":
    main()
