"""The page's picture of cameras: the middles of real photographs, by CBM3D and by `restore`, at 200 %.

pip install -e ".[benchmark]"
python docs/picture_cameras.py --data DATA --output docs/images

Every fifth of CC15, and every sixth of the pairs of PolyU that settings were not chosen on; DATA holds real_noise.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from bm3d import bm3d_rgb
from matplotlib import pyplot as plt
from PIL import Image

from lightning_modules import restore

SIDE, AROUND = 112, 48  # pixels shown, and beside them those that CBM3D sees as well
TITLES = ("noisy", "CBM3D, level told", "restore", "mean of many shots")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="where cameras.png goes")
    options = parser.parse_args()
    folder = options.data / "real_noise"
    files = [*pairs(folder / "CC15")[::5], *pairs(folder / "PolyU")[1::2][::6]]
    figure, axes = plt.subplots(
        len(TITLES), len(files), figsize=(2 * SIDE * len(files) / 100, 2.18 * SIDE * len(TITLES) / 100), dpi=100
    )
    figure.subplots_adjust(0.02, 0.025, 1, 0.985, 0.02, 0.1)
    for column, path in zip(axes.T, files, strict=True):
        noisy, clean = (
            np.array(Image.open(each).convert("RGB"))
            for each in (path, path.with_name(path.name.replace("_real", "_mean")))
        )
        middle = tuple(slice((side - SIDE) // 2, (side + SIDE) // 2) for side in noisy.shape[:2])
        wider = tuple(slice(each.start - AROUND, each.stop + AROUND) for each in middle)
        level = (noisy.astype(float) - clean).std()
        peer = (255 * bm3d_rgb(noisy[wider] / 255, level / 255)).clip(0, 255).round().astype(np.uint8)
        inner = slice(AROUND, AROUND + SIDE)
        shown = (noisy[middle], peer[inner, inner], restore(noisy)[middle], clean[middle])
        for axis, image in zip(column, shown, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            error = np.square(image.astype(float) - clean[middle]).mean()
            if image is not shown[-1]:
                axis.set_xlabel(f"{10 * np.log10(255**2 / error):.1f} dB", fontsize=8, labelpad=2)
        print(path.stem, [axis.get_xlabel() for axis in column], flush=True)
    for axis, title in zip(axes[:, 0], TITLES, strict=True):
        axis.set_ylabel(title, fontsize=8, labelpad=2)
    options.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output / "cameras.png", pil_kwargs={"optimize": True})


def pairs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if "_real" in path.name)


if __name__ == "__main__":
    main()
