"""Denoising of point clouds, beside the peers that install here.

Shapes of `../shared/data/shapes`, sampled at even distances (as PU-Net's), with Gaussian noise of 1, 2 and 3 % of the
bounding sphere's radius. Chamfer distance and mean squared distance to the triangles, times 10⁴, in units of that
radius (Luo & Hu, ICCV 2021). The scalars of ours are learned on surfaces made from formulas, from the true surfaces or
from noisy points only, and it is told the noise level. Settings of peers are those of the best Chamfer distance on
another mesh, at each noise level and number of points. Rows are written as they come.

    OMP_NUM_THREADS=1 python benchmarks/point_clouds.py --json point_clouds.json
"""

import itertools
import logging
import resource
import time
import warnings
from collections.abc import Callable
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from _common import arguments, quiet_trainer, write_json
from _peers import failure
from numpy.typing import NDArray
from scipy.spatial import KDTree
from torch_geometric.data import Data
from trimesh.triangles import closest_point

from callbacks import EMParameterCallback, NewtonRule
from datamodules import PointCloudDataModule
from datamodules._surface_samples import sample_surface
from lightning_modules import ParameterTable, PointCloudDiffusion, PointCloudReconstruction
from lightning_modules.point_clouds import chamfer_distance
from lightning_modules.point_clouds.files import read_cloud

Objective = Literal["supervised", "held_out"]
Array = NDArray[np.float64]
Restore = Callable[..., Array]  # of noisy points, the noise level and a setting

# The mesh on which peers' settings, and nothing of ours, are chosen; the others are reported.
CHOSEN_ON = "spot"
LEVELS = (0.01, 0.02, 0.03)
OURS: dict[str, Objective] = {
    "ours, learned from surfaces": "supervised",
    "ours, learned from noisy points only": "held_out",
}
FAR_START = {"width_noise": 1.5, "width_spacing": 1.5, "sigma_height": 4.0, "sigma_normal": 1.0, "tau": 0.8}


class Shape:
    """A mesh within the unit sphere."""

    def __init__(self, path: Any) -> None:
        file = read_cloud(path)
        assert file.faces is not None
        self.name, self.faces = path.stem, file.faces
        center = (file.points.min(0) + file.points.max(0)) / 2
        self.vertices = file.points - center
        self.vertices /= np.sqrt(np.square(self.vertices).sum(1).max())
        corners = self.vertices[self.faces]
        areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
        generator = np.random.default_rng(0)
        self.owner = generator.choice(len(areas), 200_000, p=areas / areas.sum())
        weights = generator.dirichlet((1, 1, 1), len(self.owner))
        self.tree = KDTree((weights[:, :, None] * corners[self.owner]).sum(1))

    def clean(self, count: int) -> Array:
        return sample_surface(self.vertices, self.faces, count, torch.tensor(count), "even")[0].numpy()

    def errors(self, points: Array, clean: Array) -> dict[str, float]:
        """Chamfer distance to the clean points, and squared distance to the nearest of the near triangles."""
        near = self.faces[self.owner[self.tree.query(points, 8)[1]]]
        corners = self.vertices[near].reshape(-1, 3, 3)
        repeated = np.repeat(points, 8, axis=0)
        squares = np.square(closest_point(corners, repeated) - repeated).sum(1).reshape(-1, 8).min(1)
        chamfer = chamfer_distance(torch.from_numpy(points), torch.from_numpy(clean))
        return {"chamfer": 1e4 * float(chamfer), "surface": 1e4 * float(squares.mean())}


def learn(start: dict[str, float], steps: int, objective: Objective) -> dict[str, float]:
    """Parameters learned on surfaces made from formulas; of noisy points, half of which are held out, twice as many."""
    module = PointCloudReconstruction(PointCloudDiffusion(), ParameterTable(initial=dict(start)), objective=objective)
    callback = EMParameterCallback(NewtonRule())
    points = 8000 if objective == "held_out" else 4000
    quiet_trainer(steps, callback).fit(module, PointCloudDataModule(num_points=points, seed=0))
    return {name: float(value) for name, value in callback.parameter_history[-1].items()}


def ours(points: Array, level: float, **parameters: float) -> Array:
    with torch.no_grad():
        cloud = Data(pos=torch.from_numpy(points).float())
        return PointCloudDiffusion()(cloud, noise=level, **parameters).double().numpy()


def jet(points: Array, level: float, neighbors: int, times: int) -> Array:
    """CGAL's smoothing by jets: a polynomial surface is fitted about each point."""
    from CGAL.CGAL_Kernel import Point_3
    from CGAL.CGAL_Point_set_3 import Point_set_3
    from CGAL.CGAL_Point_set_processing_3 import jet_smooth_point_set

    cloud = Point_set_3()
    for point in points.tolist():
        cloud.insert(Point_3(*point))
    for _ in range(times):
        jet_smooth_point_set(cloud, neighbors)
    return np.array([(point.x(), point.y(), point.z()) for point in cloud.points()])


def moving_least_squares(points: Array, level: float, kind: str, scale: float, neighbors: int) -> Array:
    """PyMeshLab's projection onto an algebraic (APSS) or robust implicit (RIMLS) surface."""
    import pymeshlab

    meshes = pymeshlab.MeshSet()
    for _ in range(2):  # what is projected, and what it is projected onto
        meshes.add_mesh(pymeshlab.Mesh(vertex_matrix=points))
        meshes.compute_normal_for_point_clouds(k=neighbors)
    meshes.apply_filter(f"compute_mls_projection_{kind}", controlmesh=1, proxymesh=0, filterscale=scale)
    meshes.set_current_mesh(0)
    moved = meshes.current_mesh().vertex_matrix()
    return np.where(np.isfinite(moved).all(1, keepdims=True), moved, points)  # where it finds no surface, NaN


def statistical(points: Array, level: float, neighbors: int, ratio: float) -> Array:
    """Open3D's removal of points that are far from their neighbors; it moves none."""
    import open3d

    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points))
    return np.asarray(cloud.remove_statistical_outlier(neighbors, ratio)[0].points)


def grid(**values: Any) -> list[dict[str, Any]]:
    return [dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())]


def peers(size: int) -> dict[str, tuple[Restore, list[dict[str, Any]]]]:
    """Peers, and the settings among which the best is chosen; more neighbors where points are dense."""
    dense = size > 20_000
    scales = (4.0, 6.0, 9.0) if dense else (2.0, 3.0, 4.0, 6.0)
    return {
        "CGAL `jet_smooth_point_set`": (jet, grid(neighbors=(96, 192) if dense else (24, 48, 96), times=(1, 2))),
        "PyMeshLab APSS": (moving_least_squares, grid(kind=["apss"], scale=scales, neighbors=[30])),
        "PyMeshLab RIMLS": (moving_least_squares, grid(kind=["rimls"], scale=scales, neighbors=[30])),
        "Open3D `remove_statistical_outlier`": (statistical, grid(neighbors=[20], ratio=(0.5, 1.0, 2.0))),
    }


def noisy(clean: Array, level: float) -> Array:
    return clean + level * np.random.default_rng(round(1000 * level)).standard_normal(clean.shape)


def measured(restore: Restore, shapes: list[Shape], size: int, level: float, **setting: Any) -> dict[str, Any]:
    """Means over shapes, and the least time on a processor."""
    found, seconds = [], []
    for shape in shapes:
        clean = shape.clean(size)
        points = noisy(clean, level)
        begin = time.process_time()
        restored = restore(points, level, **setting)
        seconds.append(time.process_time() - begin)
        found.append(shape.errors(np.ascontiguousarray(restored, dtype=np.float64), clean))
    means = {name: fmean(each[name] for each in found) for name in found[0]}
    return {**means, "seconds": min(seconds), "shapes": len(shapes)}


def main() -> None:
    parser = arguments("Denoising of point clouds, beside peers.")
    parser.add_argument("--steps", type=int, default=24, help="batches of four clouds to learn from")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 50_000], help="points of a cloud")
    parser.add_argument("--shapes", type=int, help="report on so many shapes only, the first by name")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    files = sorted((options.data / "shapes").glob("*.obj"))
    shapes = [Shape(path) for path in files if path.stem != CHOSEN_ON][: options.shapes]
    other = [Shape(path) for path in files if path.stem == CHOSEN_ON]
    rows: list[dict[str, Any]] = []

    def keep(**row: Any) -> None:
        rows.append(row)
        print(row, flush=True)
        write_json(options.json, rows)

    ways: dict[str, tuple[Restore, list[dict[str, Any]]]] = {}
    for method, objective in OURS.items():
        parameters = learn(FAR_START, options.steps, objective)
        keep(method=method, start=FAR_START, steps=options.steps, learned=parameters)
        ways[method] = (ours, [parameters])
    for size in options.sizes:
        for level, (method, (restore, settings)) in itertools.product(
            LEVELS, ({"noisy": (lambda points, level: points, [{}])} | ways | peers(size)).items()
        ):
            case = {"method": method, "points": size, "level": level}
            try:
                setting = settings[0]
                if len(settings) > 1:
                    tried = [(measured(restore, other, size, level, **each)["chamfer"], each) for each in settings]
                    setting = min(tried, key=lambda each: each[0])[1]
                keep(**case, **measured(restore, shapes, size, level, **setting), setting=setting)
            except Exception as error:  # the others go on
                keep(**case, failed=failure(error))
    points = noisy(shapes[0].clean(200_000), 0.01)
    warm = noisy(shapes[0].clean(10_000), 0.01)
    seconds = []
    for _ in range(21):
        begin = time.process_time()
        ours(warm, 0.01, **parameters)
        seconds.append(time.process_time() - begin)
    keep(method="ours, time", points=len(warm), seconds=min(seconds))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    ours(points, 0.01, **parameters)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    keep(method="ours, memory", points=len(points), seconds=time.perf_counter() - begin, peak=after, before=before)


if __name__ == "__main__":
    main()
