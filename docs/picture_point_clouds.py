"""The page's picture of point clouds: a noisy scan, denoised by the best peer and by ours, and the true surface.

pip install -e ".[benchmark]" cgal
python docs/picture_point_clouds.py --data DATA --output docs/images

DATA holds shapes. Parameters and the setting of the peer are those of docs/results/point_clouds.json; points are
brighter where the surface faces the reader, by normals from their neighbors, so that what noise is left is seen.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation
from tables import rows

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from point_clouds import Array, Shape, noisy, ours, peers

SHAPES, COUNT, LEVEL = ("stanford-bunny", "fandisk"), 10_000, 0.02
OURS = "ours, learned from noisy points only"
TURNED = Rotation.from_euler("yx", (-30, 15), degrees=True).as_matrix().T  # to the right, up, and to the reader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="where point_clouds.png goes")
    options = parser.parse_args()
    found = [row for row in rows("point_clouds") if (row.get("points"), row.get("level")) == (COUNT, LEVEL)]
    settings = {row["method"]: row["setting"] for row in found if "setting" in row}
    choices = peers(COUNT)
    best = min((row for row in found if row["method"] in choices and "setting" in row), key=lambda row: row["chamfer"])
    peer = best["method"]
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    for row, name in zip(figure.subplots(len(SHAPES), 4), SHAPES, strict=True):
        shape = Shape(options.data / "shapes" / f"{name}.obj")
        clean = shape.clean(COUNT)
        points = noisy(clean, LEVEL)
        shown = {
            "noisy": points,
            peer: choices[peer][0](points, LEVEL, **settings[peer]),
            "ours": ours(points, LEVEL, **settings[OURS]),
            "true": clean,
        }
        for axes, (title, cloud) in zip(row, shown.items(), strict=True):
            right, up, depth = (cloud @ TURNED).T
            light = np.abs(normals(cloud) @ TURNED[:, 2])
            order = depth.argsort()  # what is near is drawn over what is far
            axes.scatter(right[order], up[order], c=light[order], s=2, cmap="gray", vmin=0, vmax=1, linewidths=0)
            axes.set(aspect="equal", title=f"{title}: {shape.errors(cloud, clean)['chamfer']:.2f}")
            axes.axis("off")
    options.output.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(options.output / "point_clouds.png", dpi=110, pil_kwargs={"optimize": True})


def normals(points: Array) -> Array:
    near = points[KDTree(points).query(points, 10)[1]]
    near = near - near.mean(1, keepdims=True)
    return np.linalg.eigh(near.mT @ near)[1][:, :, 0]


if __name__ == "__main__":
    main()
