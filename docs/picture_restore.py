"""The README's picture of `restore`: a photograph of scikit-image, noisy, by CBM3D, and by the weights that ship.

pip install -e ".[benchmark]"
python docs/picture_restore.py --output docs/images
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from bm3d import bm3d_rgb
from matplotlib import pyplot as plt
from skimage import data

from lightning_modules import restore

LEVEL = 25
SHOWN = (slice(60, 180), slice(130, 290))  # an eye and its fur


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="where restore.png goes")
    options = parser.parse_args()
    clean = data.chelsea()
    noisy = clean + np.random.default_rng(0).normal(0, LEVEL, clean.shape)
    noisy = noisy.clip(0, 255).round().astype(np.uint8)
    methods: dict[str, Callable[[], np.ndarray]] = {
        "noisy": lambda: noisy,
        "CBM3D, level told": lambda: to_bytes(255 * bm3d_rgb(noisy / 255, LEVEL / 255)),
        "restore, level estimated": lambda: restore(noisy),
        "clean": lambda: clean,
    }
    restore(noisy)  # loads the weights
    figure, axes = plt.subplots(1, len(methods), figsize=(13, 2.9), dpi=100, layout="constrained")
    for axis, (name, method) in zip(axes, methods.items(), strict=True):
        begin = time.perf_counter()
        image = method()
        seconds = time.perf_counter() - begin
        axis.imshow(image[SHOWN], interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(name, fontsize=11)
        if name != "clean":
            error = np.square(image.astype(float) - clean).mean()
            took = "" if name == "noisy" else f", {seconds:.1f} s"
            axis.set_xlabel(f"{10 * np.log10(255**2 / error):.1f} dB{took}", fontsize=10, labelpad=2)
            print(name, f"{10 * np.log10(255**2 / error):.2f} dB", f"{seconds:.2f} s")
    options.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output / "restore.png", pil_kwargs={"optimize": True})


def to_bytes(image: np.ndarray) -> np.ndarray:
    return image.clip(0, 255).round().astype(np.uint8)


if __name__ == "__main__":
    main()
