# %% [markdown]
# # A detector of generated photographs: what it does not know
#
# Source: `docs/detector_report.py`; built and executed by `docs/build_notebook.py`. Every number below was computed
# when the notebook was executed, from the record of `benchmarks/detector_sources.py` and one of its folds.

# %%
import json
import os
import platform
import warnings
from collections import Counter
from pathlib import Path

import lightning
import matplotlib.pyplot as plt
import numpy as np
import skimage.data
import torch
from IPython.display import Markdown, display
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve

from datamodules import GeneratedImagesDataModule
from lightning_modules import GeneratedImageDetector, NeighborDifferences, RestorationResidual
from lightning_modules.detection import fixed_crops, to_pixels
from lightning_modules.imaging import find_images, read_image

warnings.simplefilter("ignore")
if Path.cwd().name == "docs":  # Jupyter starts a notebook in its own folder
    os.chdir("..")
plt.rcParams.update({"figure.dpi": 72, "figure.constrained_layout.use": True, "font.size": 9})

RUN = Path(os.environ.get("DETECTOR_RUN", "logs/detector_sources/fold"))  # the folder of a fold
DATA = Path(os.environ.get("DETECTOR_DATA", "logs/detector_sources/sources.csv"))
RECORD = json.loads(Path("docs/results/detector_sources.json").read_text())

CLASSES = ("photographic", "generated")
COLORS = {"photographic": "C0", "generated": "C3"}
PROBES = ("file", "thumbnail", "color", "semantic")


def table(rows: list[dict], **names: str) -> None:
    """Shows rows as a table; `names` choose the columns and say what to call them."""
    names = names or {name: name for name in rows[0]}
    lines = ["| " + " | ".join(names.values()) + " |", "|---" * len(names) + "|"]
    lines += ["| " + " | ".join(cell(row.get(name, "")) for name in names) + " |" for row in rows]
    display(Markdown("\n".join(lines)))


def cell(value: object) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.2f}"
    return "–" if value == "" else f"{value:g}" if isinstance(value, float) else str(value)


left_out = {row["left out"]: row for row in RECORD["rows"] if row["left out"] != "none"}
own = next((row for row in RECORD["rows"] if row["left out"] == "none"), None)

# %% [markdown]
# ## In short

# %%
areas = {name: row["history auroc"] for name, row in left_out.items()}
worst = min(areas, key=areas.get)
on_its_own = f"On held-out images of those its AUROC is {own['history auroc']:.2f}." if own else ""
display(
    Markdown(
        f"""
**A detector knows the sources that it was trained on.** {on_its_own}
On images of a source that it was not trained on it has **{np.mean(list(areas.values())):.2f}** on average over
{len(areas)} sources that were left out in turn, and **{areas[worst]:.2f}** on the worst of them, *{worst}*. A coin has
0.50. Each fold was trained for {next(iter(left_out.values()))["steps"]} steps on a processor, which is short.

**It does not know** whether an image from elsewhere was generated. What it can do is measure how far its verdicts
reach, and keep silent where they do not hold: *unsure* below. A figure from held-out images of the training sources
says nothing about other images, and a figure that a shortcut probe reaches as well says nothing about traces.
"""
    )
)

# %% [markdown]
# ## Each source left out
#
# A fold trains on all sources but one, is calibrated on a second one, and is tested on images of the one left out,
# after histories that both classes share: rescaled, cropped, encoded as JPEG or WebP. Beside it are the areas of four
# **shortcut probes** on the same images: linear classifiers of the file's format and size, of a thumbnail of 8×8
# pixels, of the colors, and of what an ImageNet network recognises, fitted to the same training images. None of them
# can see a trace in neighbouring pixels. *Accuracy* counts unsure as wrong.

# %%
table(
    list(left_out.values()) + ([{**own, "left out": "none"}] if own else []),
    **{
        "left out": "left out",
        "history n": "images",
        "history auroc": "AUROC",
        "history accuracy_verdict": "accuracy",
        "history accuracy_sure": "of the sure",
        "history unsure": "unsure",
        **{f"history {name}_auroc": name for name in PROBES},
    },
)

# %%
figure, axes = plt.subplots(figsize=(8, 3))
for place, row in enumerate(left_out.values()):
    axes.plot(place, row["history auroc"], "o", color="black", label="detector" if place == 0 else None)
    for number, probe in enumerate(PROBES):
        if (area := row.get(f"history {probe}_auroc")) is not None:
            axes.plot(place + 0.1 * (number + 1), area, "s", color=f"C{number}", label=probe if place == 0 else None)
axes.axhline(0.5, color="0.7", linewidth=1)
axes.set(xticks=range(len(left_out)), xticklabels=left_out, ylabel="AUROC, source left out", ylim=(0, 1.02))
axes.legend(ncols=5, fontsize=8)
plt.show()

# %% [markdown]
# Where the detector errs is where a user most needs to know it. These are the shares of sure verdicts that turn into
# the other one when the file is saved again by an encoder that no verdict is tried by, and of real photographs called
# generated that were denoised, sharpened or taken in the dark.

# %%
table(
    list(left_out.values()) + ([own] if own else []),
    **{
        "left out": "left out",
        "flips": "saved again",
        **{f"{kind} called generated": kind for kind in ("denoised", "sharpened", "night")},
    },
)

# %% [markdown]
# ## Sources
#
# The fold that the rest of the notebook looks at, and the files that it had. Twins are photographs beside themselves,
# as an autoencoder gives them back: content, size, format, colors and history are equal, and what the decoder leaves is
# all that differs.

# %%
fold = next(row for row in left_out.values() if RUN.name.startswith(f"{row['left out']}_"))
data = GeneratedImagesDataModule(str(DATA), test_sources=[fold["left out"]], val_fraction=0.1, test_fraction=0.2)
print(f"left out: {fold['left out']}; calibrated on: {fold['calibrated on']}; trained on {fold['trained on']} sources")
rows = []
for source in data.source_names:
    every = GeneratedImagesDataModule(str(DATA), val_fraction=0.1, test_fraction=0.2)
    files = every.files("test").of_source(source)
    for label, name in enumerate(CLASSES):
        paths = [path for path, found in zip(files.paths, files.labels.tolist(), strict=True) if found == label]
        sizes = Counter(Image.open(path).size for path in paths)
        (common, times) = sizes.most_common(1)[0]
        rows.append(
            {
                "source": source,
                "class": name,
                "test images": len(paths),
                "sizes": len(sizes),
                "commonest": f"{common[0]}×{common[1]} ({times})",
                "formats": ", ".join(sorted({str(Image.open(path).format) for path in paths})),
            }
        )
table(rows)

# %%
detector = GeneratedImageDetector.load_from_checkpoint(
    RUN / "detector.ckpt", map_location="cpu", inputs=[RestorationResidual(), NeighborDifferences()]
).eval()
crop_count, crop_size = detector.crops.tolist()


def visible(residual: torch.Tensor, gain: float = 12.0) -> np.ndarray:
    return (0.5 + gain * residual).clamp(0, 1).permute(1, 2, 0).numpy()


def in_pairs(images: list[torch.Tensor], titles: list[str], width: float = 1.5) -> None:
    """Images above their residuals."""
    _, axes = plt.subplots(2, len(images), figsize=(width * len(images), 2 * width + 0.3), squeeze=False)
    for column, image, title in zip(axes.T, images, titles, strict=True):
        column[0].imshow(image.permute(1, 2, 0).numpy())
        column[0].set_title(title, fontsize=8)
        column[1].imshow(visible(detector.residual(image[None])[0]))
        for one in column:
            one.axis("off")
    plt.show()


folders = sorted(path for path in (RUN.parent / "twins").glob("*") if path.is_dir())
if folders:
    photograph = find_images(folders[0] / "train" / "photographic")[2]
    twins = [find_images(folder / "train" / "generated")[2] for folder in folders]
    in_pairs(
        [fixed_crops(to_pixels(read_image(path)), 128, 1)[0] for path in (photograph, *twins)],
        ["photograph", *(folder.name for folder in folders)],
    )

# %% [markdown]
# Below each image is what the restoration takes away from it, stretched by one factor: what neighbouring, similar
# patches cannot explain. A camera leaves noise, demosaicking and compression there, a decoder the marks of its
# up-sampling.
#
# ## Verdicts on the source that was left out

# %%
files = data.files("test") if fold["left out"] in data.source_names else None
if files is None:  # twins are no files of the table
    paths = [find_images(RUN.parent / "twins" / fold["left out"] / "test" / name) for name in CLASSES]
    paths, labels = [*paths[0], *paths[1]], torch.tensor([0] * len(paths[0]) + [1] * len(paths[1]))
else:
    paths, labels = files.paths, files.labels
chosen = torch.linspace(0, len(paths) - 1, min(60, len(paths))).round().long().tolist()
labels = labels[chosen]
read = [data.read(paths[place], "history") for place in chosen]
verdicts = [detector.verdict(image) for image in read]
counts = Counter((CLASSES[label], one.label) for label, one in zip(labels.tolist(), verdicts, strict=True))
table([{"is": name, **{f"called {said}": counts[name, said] for said in (*CLASSES, "unsure")}} for name in CLASSES])
reasons = Counter(reason for one in verdicts for reason in one.reason.split("; ") if reason)
table([{"why unsure": reason, "images": count} for reason, count in reasons.most_common()] or [{"why unsure": "none"}])

# %%
probability = np.array([one.probability for one in verdicts])
figure, (roc, counts_of) = plt.subplots(1, 2, figsize=(8, 3))
false, true, _ = roc_curve(labels, probability)
roc.plot(false, true, label=f"{fold['left out']}: {roc_auc_score(labels, probability):.2f}")
roc.plot([0, 1], [0, 1], color="0.8", linewidth=1, zorder=0)
roc.set(xlabel="photographs taken for generated", ylabel="generated recognised", title="ROC, area")
roc.legend()
for label, name in enumerate(CLASSES):
    counts_of.hist(probability[labels == label], np.linspace(0, 1, 21), color=COLORS[name], alpha=0.6, label=name)
counts_of.axvline(detector.threshold, color="0.3", linewidth=1, linestyle=":")
counts_of.set(xlabel="probability of generated (dotted: the threshold)", ylabel="images")
counts_of.legend()
plt.show()

# %%
wrong = sorted(
    (place for place, one in enumerate(verdicts) if one.label not in ("unsure", CLASSES[labels[place]])),
    key=lambda place: -abs(probability[place] - 0.5),
)[:7]
if wrong:
    in_pairs(
        [fixed_crops(to_pixels(read[place]), 128, 1)[0] for place in wrong],
        [f"is {CLASSES[labels[place]][:5]}, {probability[place]:.2f}" for place in wrong],
    )
else:
    print("no sure verdict is wrong")

# %% [markdown]
# The gravest mistakes: what the image is, and the probability of *generated* that it got.
#
# ## Out of distribution
#
# Pictures that are neither class, and photographs from elsewhere. A verdict is also unsure where the Gaussian mixtures
# of the features explain an image by neither class (`ood_score` above 0).

# %%
random = np.random.default_rng(0)
strangers = {
    "white noise": random.integers(0, 256, (512, 512, 3), dtype=np.uint8),
    "flat grey": np.full((512, 512, 3), 128, dtype=np.uint8),
    "scanned page": skimage.data.page(),
    "drawing": skimage.data.horse().astype(np.uint8) * 255,
    "microscope": skimage.data.immunohistochemistry(),
    "photograph, coffee": skimage.data.coffee(),
    "photograph, astronaut": skimage.data.astronaut(),
    "photograph, cat": skimage.data.chelsea(),
}
found = {name: detector.verdict(to_pixels(image)) for name, image in strangers.items()}
table(
    [
        {
            "image": name,
            "label": one.label,
            "probability": one.probability,
            "ood_score": one.ood_score,
            "why": one.reason,
        }
        for name, one in found.items()
    ]
)

# %% [markdown]
# ## Method
#
# **Inputs.** The image is diffused over the graph of its similar patches, and $r(x) = x -
# \operatorname{restore}_\theta(x)$ is what that takes away; beside it are the differences of neighbouring pixels within
# cells of 2×2. **Network.** Eight 3×3 convolutions, the first at full resolution, then an average: features $f$ see
# statistics of neighbourhoods, not the scene; a linear layer gives the logit $z$. **Pooling.** An image is $V$ crops at
# places that depend only on its size, and $z = \frac1V\sum_v z_v$. **Calibration.** $p = \sigma(z/T)$, with temperature
# and threshold fitted to images of a source that was not trained on. **Verdict.** *unsure* where the odds, counted
# from the threshold, are below three to one, where it changes under JPEG 90 or 75, rescaling by 0.75 or a light blur,
# or where the image is unlike those of either class.
#
# ## Limits
#
# - **Few sources.** Two data sets and five decoders are not the world's generators. An area on sources that were left
#   out is an estimate from as many draws as there are sources.
# - **Content.** In the two data sets the classes show different things: where a probe of theirs is far from a half, so
#   could a detector be that has learned nothing about traces. Twins have no such difference.
# - **Small decoders**, trained for minutes, blur more than those of published generators.
# - **Two of the sources share a decoder**: portraits and DiffusionDB come from versions of one model.
# - **Short training** on a processor, at the size of crop that it allows.
#
# ## How to reproduce
#
# ```bash
# pip install -e ".[docs]"
# python benchmarks/detector_sources.py --own --json docs/results/detector_sources.json --work logs/detector_sources
# python docs/build_notebook.py --run logs/detector_sources/FOLD --data logs/detector_sources/sources.csv
# ```
#
# On sources of one's own: `lightning-em test -c detector --data.root DATA --leave_one_source_out true`;
# `docs/site/detector.md` has the layout.

# %%
print(f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}")
