"""Closed surfaces made from formulas, as triangle meshes: point clouds without any file."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mesh = tuple[Array, NDArray[np.int64]]  # vertices [V, 3], faces [F, 3]

_FINE = 160  # grid lines of a curved surface; finer than any cloud that is sampled from it


def ellipsoid() -> Mesh:
    """An ellipsoid of three different axes."""
    return _star(lambda x, y, z: 1 / np.sqrt(x**2 + (y / 0.7) ** 2 + (z / 0.5) ** 2))


def pebble() -> Mesh:
    """A sphere with soft bumps."""
    return _star(lambda x, y, z: 1 + 0.15 * np.sin(5 * x + 1) * np.sin(4 * y) * np.cos(6 * z))


def burr() -> Mesh:
    """A sphere with narrow bumps."""
    return _star(lambda x, y, z: 1 + 0.06 * np.sin(9 * x) * np.sin(11 * y + 1) * np.sin(8 * z + 2))


def pillow() -> Mesh:
    """A box with rounded edges."""
    return _star(lambda x, y, z: (np.abs(x / 1.0) ** 6 + np.abs(y / 0.8) ** 6 + np.abs(z / 0.45) ** 6) ** (-1 / 6))


def peanut() -> Mesh:
    """Two balls with a waist between them."""
    return _star(lambda x, y, z: 0.35 + 0.65 * x**2)


def torus() -> Mesh:
    """A ring."""
    return _tube(lambda t: np.stack([np.cos(t), np.sin(t), 0 * t], -1), 0.3)


def trefoil() -> Mesh:
    """A knotted tube."""

    def curve(t: Array) -> Array:
        return np.stack([np.sin(t) + 2 * np.sin(2 * t), np.cos(t) - 2 * np.cos(2 * t), -np.sin(3 * t)], -1)

    return _tube(curve, 0.45)


def ring_of_waves() -> Mesh:
    """A ring that goes up and down."""
    return _tube(lambda t: np.stack([np.cos(t), np.sin(t), 0.3 * np.sin(4 * t)], -1), 0.18)


def bracket() -> Mesh:
    """An angle iron: flat faces, straight edges, one of them inward."""
    return _prism(np.array([[-0.2, -0.2], [1, -0.2], [1, 0.25], [0.25, 0.25], [0.25, 1], [-0.2, 1]]), 0.5)


def box() -> Mesh:
    """A box."""
    return _prism(np.array([[-1, -0.6], [1, -0.6], [1, 0.6], [-1, 0.6]]), 0.8)


def cylinder() -> Mesh:
    """A cylinder with two flat ends."""
    angle = np.linspace(0, 2 * np.pi, _FINE, endpoint=False)
    return _prism(np.stack([np.cos(angle), np.sin(angle)], -1), 1.6)


def gear() -> Mesh:
    """A wheel with six teeth."""
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    radius = np.where(np.arange(24) % 4 < 2, 1.0, 0.75)
    return _prism(np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1), 0.5)


#: what each split is made of; no shape is in two of them
SHAPES: dict[str, tuple[Callable[[], Mesh], ...]] = {
    "train": (ellipsoid, pebble, burr, peanut, torus, trefoil, bracket, cylinder),
    "val": (pillow, ring_of_waves, box),
    "test": (pillow, ring_of_waves, gear),
}


def _star(radius: Callable[[Array, Array, Array], Array]) -> Mesh:
    """A surface that is seen whole from its centre, by its distance in each direction."""
    polar, azimuth = np.meshgrid(
        np.linspace(0, np.pi, _FINE // 2), np.linspace(0, 2 * np.pi, _FINE, endpoint=False), indexing="ij"
    )
    direction = np.stack([np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth), np.cos(polar)], -1)
    return _grid(radius(*np.moveaxis(direction, -1, 0))[..., None] * direction, closed=False)


def _tube(curve: Callable[[Array], Array], radius: float) -> Mesh:
    """The points at a distance from a closed curve."""
    along = np.linspace(0, 2 * np.pi, 2 * _FINE, endpoint=False)
    step = 1e-4
    tangent = curve(along + step) - curve(along - step)
    tangent /= np.linalg.norm(tangent, axis=-1, keepdims=True)
    first = np.cross(tangent, [0.0, 0.0, 1.0])  # no curve here runs straight up
    first /= np.linalg.norm(first, axis=-1, keepdims=True)
    second = np.cross(tangent, first)
    around = np.linspace(0, 2 * np.pi, _FINE // 2, endpoint=False)[None, :, None]
    return _grid(
        curve(along)[:, None] + radius * (np.cos(around) * first[:, None] + np.sin(around) * second[:, None]), True
    )


def _grid(points: Array, closed: bool) -> Mesh:
    """Two triangles in each cell of a grid `[U, V, 3]` that is closed along V, and along U where it is said."""
    rows, columns, _ = points.shape
    u, v = np.meshgrid(np.arange(rows if closed else rows - 1), np.arange(columns), indexing="ij")
    corner = [((u + du) % rows * columns + (v + dv) % columns).ravel() for du, dv in ((0, 0), (1, 0), (1, 1), (0, 1))]
    faces = np.concatenate([np.stack([corner[0], corner[k], corner[k + 1]], -1) for k in (1, 2)])
    return points.reshape(-1, 3), faces


def _prism(outline: Array, height: float) -> Mesh:
    """An outline that is seen whole from the origin, extruded."""
    count = len(outline)
    low, high = (np.column_stack([outline, np.full(count, z)]) for z in (-height / 2, height / 2))
    ends = np.array([[0, 0, -height / 2], [0, 0, height / 2]])
    here, there = np.arange(count), (np.arange(count) + 1) % count
    bottom, top = np.full(count, 2 * count), np.full(count, 2 * count + 1)
    faces = [(here, there, there + count), (here, there + count, here + count)]
    faces += [(there, here, bottom), (here + count, there + count, top)]
    return np.concatenate([low, high, ends]), np.concatenate([np.stack(corners, -1) for corners in faces])
