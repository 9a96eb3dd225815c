"""Points on a triangle mesh, drawn by key: independent, or at even distances."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree
from torch import Tensor

from lightning_modules.imaging import seeded_uniform

Sampling = Literal["even", "uniform"]

# Candidates for each point that is kept, and how far apart points are, in units of the root of the area of a point.
# Random disks jam at 0.83; what is found with so many candidates is a little more than is wanted.
_CANDIDATES, _DISTANCE, _SHRINK = 6, 0.74, 0.96


def sample_surface(
    vertices: NDArray[np.float64], faces: NDArray[np.int64], count: int, key: Tensor, sampling: Sampling = "uniform"
) -> tuple[Tensor, Tensor]:
    """Points of a surface and its normals there.

    Args:
        vertices: Corners of the triangles.
        faces: Which three of them make a triangle.
        count: How many points.
        key: What they are drawn from; the same key gives the same points.
        sampling: `uniform` draws each point for itself; `even` keeps a least distance between them, as a scanner does
            (Poisson disks, by leaving out what is too near to what is kept).

    Shape:
        - vertices: `[V, 3]`; faces: `[F, 3]`
        - key: `[]`, int64
        - output: two tensors `[N, 3]`, float64
    """
    first, second, third = (vertices[faces[:, corner]] for corner in range(3))
    normals = np.cross(second - first, third - first)
    areas = np.linalg.norm(normals, axis=1) / 2
    if not areas.sum() > 0:
        raise ValueError(f"the mesh of {len(faces)} triangles has no area: there is nothing to sample")
    candidates = count * (_CANDIDATES if sampling == "even" else 1)
    draws = seeded_uniform(key[None], 3 * candidates).view(3, candidates).numpy()
    total = areas.cumsum()
    chosen = np.minimum(np.searchsorted(total, draws[0] * total[-1]), len(faces) - 1)
    root, along = np.sqrt(draws[1])[:, None], draws[2][:, None]
    points = (1 - root) * first[chosen] + root * ((1 - along) * second[chosen] + along * third[chosen])
    if sampling == "even":
        kept = _apart(points, _DISTANCE * float(np.sqrt(total[-1] / count)), count)
        points, chosen = points[kept], chosen[kept]
    unit = normals[chosen] / np.maximum(2 * areas[chosen], np.finfo(float).tiny)[:, None]
    return torch.from_numpy(points), torch.from_numpy(unit)


def _apart(points: NDArray[np.float64], distance: float, count: int) -> NDArray[np.int64]:
    """The first `count` points none of which is nearer than `distance` to one before it; nearer where they are few."""
    tree = KDTree(points)
    while True:
        kept = _independent(tree.query_pairs(distance, output_type="ndarray"), len(points))
        if len(kept) >= count:
            return kept[:count]
        distance *= _SHRINK


def _independent(pairs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """What remains of `range(count)` where each, in order, is kept unless it is paired with one kept before it."""
    kept, out = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
    pairs = np.sort(pairs, axis=1)
    while len(pairs):
        waiting = out.copy()
        waiting[pairs[:, 1]] = True
        kept |= ~waiting
        out[pairs[kept[pairs[:, 0]], 1]] = True
        pairs = pairs[~(kept | out)[pairs[:, 0]] & ~out[pairs[:, 1]]]
    return np.flatnonzero(~out)
