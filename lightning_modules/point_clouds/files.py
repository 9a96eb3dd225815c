"""Files of point clouds: points with whatever else each of them has, and faces."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_modules.imaging import write_whole
from lightning_modules.point_clouds.neighborhoods import check_coordinates

_AXES = ("x", "y", "z")
_INSTALL = 'pip install "lightning-em[point-clouds]"'


@dataclass(frozen=True)
class CloudFile:
    """What a file of points holds.

    Args:
        vertices: A structured array with a field for each number of a point, x, y and z among them.
        faces: Corners of the triangles [F, 3]; None where there are none.
        source: The whole of a PLY file, as it was read; None for other files.
    """

    vertices: NDArray[Any]
    faces: NDArray[np.int64] | None = None
    source: Any = None

    @classmethod
    def of(cls, table: NDArray[Any]) -> "CloudFile":
        """Points from a table [N, 3] of their coordinates, or [N, D] with columns of one's own after them."""
        if table.ndim != 2 or table.shape[1] < 3:
            plane = ": append a column of zeros to points of a plane" if table.ndim == 2 and table.shape[1] == 2 else ""
            raise ValueError(f"points must be [N, 3] or [N, D] with x, y and z first, got {list(table.shape)}{plane}")
        if table.dtype.kind not in "iuf":
            raise ValueError(f"points must be real numbers, got {table.dtype}")
        names = [*_AXES, *(f"scalar_{column}" for column in range(3, table.shape[1]))]
        kind = table.dtype if table.dtype.kind == "f" and table.dtype.itemsize in (4, 8) else np.dtype("f8")
        vertices = np.empty(len(table), [(name, kind.newbyteorder("=")) for name in names])
        for column, name in enumerate(names):
            vertices[name] = table[:, column]
        return cls(vertices)

    @property
    def points(self) -> NDArray[np.float64]:
        """Coordinates [N, 3], in double precision."""
        return np.stack([self.vertices[axis].astype(np.float64) for axis in _AXES], 1)

    @property
    def finite(self) -> NDArray[np.bool_]:
        """Which points have coordinates that are numbers [N]; scanners mark what they have missed by NaN."""
        return np.asarray(np.isfinite(self.points).all(1))

    def finite_mesh(self) -> tuple[NDArray[np.float64], NDArray[np.int64] | None]:
        """Points that are finite [M, 3], and the triangles between them that have an area [F, 3]; None without any.

        Raises:
            ValueError: If there is no such point, a triangle has a corner that is none of them, or the numbers are too
                coarse, or about their median out of the range of single precision.
        """
        finite, faces = self.finite, self.faces
        if not finite.any():
            raise ValueError("it has no point with finite coordinates")
        if faces is not None:
            if faces.min() < 0 or faces.max() >= len(finite):
                raise ValueError(f"a face has the corner {faces.max()}, and there are {len(finite)} points from 0 on")
            faces = (finite.cumsum() - 1)[faces[finite[faces].all(1)]]
            first, second, third = (self.points[finite][faces[:, corner]] for corner in range(3))
            faces = faces[np.cross(second - first, third - first).any(1)]
        points = self.points[finite]
        own = np.result_type(np.float32, *(self.vertices[axis] for axis in _AXES))
        for numbers in (points.astype(own), (points - np.median(points, 0)).astype(np.float32)):
            check_coordinates(torch.from_numpy(numbers))
        return points, faces if faces is not None and len(faces) else None

    def moved(self, points: NDArray[np.float64]) -> "CloudFile":
        """The same with other coordinates, rounded to the precision that the file has."""
        vertices = self.vertices.copy()
        for axis, values in zip(_AXES, points.T, strict=True):
            vertices[axis] = values
        return replace(self, vertices=vertices)


def find_clouds(root: Path) -> list[Path]:
    """Files of point clouds below a folder, sorted by relative path; hidden ones are left out."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder. root must be a folder with files of {', '.join(SUFFIXES)}")
    paths = [
        path
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    if not paths:
        raise FileNotFoundError(f"{root} holds no point clouds: no file below it ends in {', '.join(SUFFIXES)}")
    return sorted(paths, key=lambda path: path.relative_to(root).parts)


def read_cloud(path: Path) -> CloudFile:
    """Reads a file by its suffix.

    Raises:
        ImportError: If the library for it is not installed.
        ValueError: If it holds no points.
    """
    if path.suffix.lower() in SUFFIXES and path.is_file() and not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    try:
        file = SUFFIXES[path.suffix.lower()](path)
    except KeyError:
        raise ValueError(f"{path} is not one of {', '.join(SUFFIXES)}") from None
    except ImportError as error:
        raise ImportError(f"{path} needs {error.name}, which is not installed: {_INSTALL}") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    fields = file.vertices.dtype.names
    missing = [axis for axis in _AXES if axis not in (fields or ())]
    if missing or not len(file.vertices):
        what = f"no {' and no '.join(missing)}" if fields and missing else "no points"
        raise ValueError(f"{path} holds {what}")
    return file


def write_ply(file: CloudFile, path: Path) -> None:
    """Writes a binary PLY file, whole or not at all; what was read from one keeps its other elements and comments."""
    try:
        from plyfile import PlyData, PlyElement
    except ImportError as error:
        raise ImportError(f"{path} needs plyfile, which is not installed: {_INSTALL}") from error
    vertex = PlyElement.describe(file.vertices, "vertex")
    if file.source is not None:
        elements = [vertex if element.name == "vertex" else element for element in file.source.elements]
        data = PlyData(elements, comments=file.source.comments, obj_info=file.source.obj_info)
    else:
        faces = []
        if file.faces is not None:
            corners = np.empty(len(file.faces), [("vertex_indices", "i4", (3,))])
            corners["vertex_indices"] = file.faces
            faces = [PlyElement.describe(corners, "face")]
        data = PlyData([vertex, *faces])
    buffer = BytesIO()
    data.write(buffer)
    write_whole(path, buffer.getvalue())


def _read_ply(path: Path) -> CloudFile:
    from plyfile import PlyData

    data = PlyData.read(path)
    vertices = data["vertex"].data if "vertex" in data else np.empty(0)
    return CloudFile(vertices, _triangles(data["face"].data) if "face" in data else None, data)


def _triangles(faces: NDArray[Any]) -> NDArray[np.int64] | None:
    """Polygons as fans of triangles."""
    name = next((name for name in faces.dtype.names or () if name in ("vertex_indices", "vertex_index")), None)
    if name is None or not len(faces):
        return None
    fans = [[corners[0], b, c] for corners in faces[name] for b, c in pairwise(corners[1:])]
    return np.array(fans, dtype=np.int64).reshape(-1, 3)


def _read_obj(path: Path) -> CloudFile:
    import trimesh

    mesh: Any = trimesh.load(path, process=False)
    if isinstance(mesh, trimesh.PointCloud):  # points and no faces, of which force="mesh" would keep nothing
        return CloudFile.of(np.asarray(mesh.vertices))
    if isinstance(mesh, trimesh.Scene):
        mesh = trimesh.load(path, process=False, force="mesh")
    return replace(CloudFile.of(np.asarray(mesh.vertices)), faces=np.asarray(mesh.faces, dtype=np.int64))


def _read_pcd(path: Path) -> CloudFile:
    from pypcd4.pypcd4 import PointCloud

    return CloudFile(PointCloud.from_path(path).pc_data)


def _read_xyz(path: Path) -> CloudFile:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*input contained no data")  # which is an error of its own
        table = np.loadtxt(path, ndmin=2)
    if not table.size:
        raise ValueError("it is empty")
    return CloudFile.of(table)


def _read_npy(path: Path) -> CloudFile:
    return CloudFile.of(np.load(path, allow_pickle=False))


#: what is read, by suffix
SUFFIXES: dict[str, Callable[[Path], CloudFile]] = {
    ".ply": _read_ply,
    ".pcd": _read_pcd,
    ".xyz": _read_xyz,
    ".npy": _read_npy,
    ".obj": _read_obj,
}
