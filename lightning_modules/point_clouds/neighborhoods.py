"""Neighbors of a cloud's points, and the normals of the surface that they lie on."""

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor

from lightning_modules.graph.topology import nearest_neighbors
from lightning_modules.imaging import permutation

if TYPE_CHECKING:
    from torch_geometric.data import Data

# Points that speak for a cloud where a number of all of it is wanted.
_SAMPLE = 256


@lru_cache(maxsize=4)
def random_order(count: int) -> Tensor:
    """The random order of so many points that every part of a cloud is taken from; not to be written to.

    Shape:
        - output: `[count]`, int64
    """
    return permutation(count, 0)


def median_spacing(tree: KDTree) -> float:
    """Median distance of the points of a k-d tree from each other: the root of the area that a point has to itself.

    From the disk that holds the eight nearest neighbors, which noise changes less than the distance of the nearest.
    """
    count = min(8, tree.n - 1)
    if count < 1:
        return 0.0
    order = random_order(tree.n)[:_SAMPLE].numpy()
    distance = tree.query(tree.data[order], [count + 1])[0]
    return float(torch.from_numpy(distance).median()) * math.sqrt(math.pi / count)


def typical_point(points: Tensor) -> Tensor:
    """Median coordinates of some of the points, which outliers do not move.

    Shape:
        - points: `[N, 3]`
        - output: `[3]`
    """
    return points[random_order(len(points))[:_SAMPLE].to(points.device)].median(0).values


def compact_groups(points: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Groups of equally many points that are near each other, by halving the cloud along its longest side repeatedly.

    Args:
        points: The points.
        size: Least size of a group; the size is at most twice as large.

    Shape:
        - points: `[N, 3]`
        - output: `[G, S]`, the points of each group, some of them in two; and `[N]`, where in it each point is
    """
    count = len(points)
    groups = 1
    while count >= 2 * size * groups:
        groups *= 2
    each = -(-count // groups)
    # Some points come twice, so that all halves are equal; spread over the cloud, and so over the groups.
    order = np.concatenate(
        [np.arange(count), np.arange(groups * each - count) * count // max(groups * each - count, 1)]
    )
    coordinates = np.ascontiguousarray(points.detach().cpu().numpy().T)
    blocks = 1
    while blocks < groups:
        part = coordinates.take(order, 1).reshape(3, blocks, -1)
        along = part[np.ptp(part, axis=2).argmax(0), np.arange(blocks)]
        halves = along.argpartition(along.shape[1] // 2, axis=1)
        order = np.take_along_axis(order.reshape(blocks, -1), halves, 1).ravel()
        blocks *= 2
    place = np.empty(count, dtype=np.int64)
    place[order] = np.arange(len(order))
    return torch.from_numpy(order).view(groups, each).to(points.device), torch.from_numpy(place).to(points.device)


def thinning(tree: KDTree, centers: Tensor, radius: float, count: int) -> int:
    """Number m of parts into which a cloud is taken apart, so that some places have `count` neighbors within a radius.

    Where there are no more than `count`, m is 1. Where the noise is longer than the points are apart there are many
    more, and the nearest would be those that the noise has brought near.

    Args:
        tree: The points.
        centers: The places.
        radius: The radius.
        count: Number of neighbors; no more than there are points.

    Shape:
        - centers: `[G, 3]`
    """
    places = centers[random_order(len(centers))[:_SAMPLE]].cpu().numpy()
    within = float(np.median(tree.query_ball_point(places, radius, return_length=True)))
    return max(1, min(round(within / count), tree.n // count, len(centers)))


def thinned_neighbors(points: Tensor, centers: Tensor, count: int, parts: int, turn: int) -> Tensor:
    """Neighbors of some places: the nearest of every m-th point of the cloud; see `thinning`.

    The m parts of the cloud are chosen at random, once; which part a place looks into goes round with `turn`.

    Args:
        points: The points.
        centers: The places.
        count: Number K of neighbors; no more than there are in a part.
        parts: Number m of parts.
        turn: Number of the graph, counted from 0.

    Shape:
        - points: `[N, 3]`; centers: `[G, 3]`
        - output: `[G, K]`, int64
    """
    order, places = random_order(len(points)), random_order(len(centers))
    neighbors = torch.empty(len(centers), count, dtype=torch.long)
    for part in range(parts):
        sources, targets = order[part::parts], places[(part + turn) % parts :: parts]
        neighbors[targets] = sources[nearest_neighbors(points[sources], centers[targets], count).cpu()]
    return neighbors.to(points.device)


def smallest_eigenvector(matrix: Tensor) -> Tensor:
    r"""Unit eigenvector of the least eigenvalue of symmetric 3×3 matrices, in closed form; 0 where there is none.

    The eigenvalue by Smith, "Eigenvalues of a symmetric 3 × 3 matrix", CACM 4, 1961; the vector is the longest column
    of the adjugate of :math:`A - \lambda I`. It has a derivative wherever the eigenvalue is single.

    Shape:
        - matrix: `[N, 3, 3]`
        - output: `[N, 3]`
    """
    a, b, c, d, e, f = matrix.flatten(1).T[[0, 4, 8, 1, 5, 2]]
    tiny = torch.finfo(matrix.dtype).tiny ** 0.25
    mean = (a + b + c) / 3
    a, b, c = a - mean, b - mean, c - mean
    spread = ((a**2 + b**2 + c**2 + 2 * (d**2 + e**2 + f**2)) / 6).clamp_min(tiny**2).sqrt()
    half = (a * (b * c - e**2) - d * (d * c - e * f) + f * (d * e - b * f)) / (2 * spread**3)
    rounding = 8 * torch.finfo(matrix.dtype).eps
    angle = half.clamp(rounding - 1, 1 - rounding).acos() / 3
    least = 2 * spread * (angle + 2 * math.pi / 3).cos()
    a, b, c = a - least, b - least, c - least
    xy, yz, zx = e * f - d * c, d * f - a * e, d * e - b * f
    vector = torch.stack([b * c - e**2, xy, zx])
    for column in (torch.stack([xy, a * c - f**2, yz]), torch.stack([zx, yz, a * b - d**2])):
        vector = torch.where(column.square().sum(0) > vector.square().sum(0), column, vector)
    return unit(vector.T)


def unit(vector: Tensor) -> Tensor:
    """Vectors of length 1; 0 stays 0, with a finite gradient.

    Shape:
        - vector: `[..., 3]`
        - output: as vector
    """
    square = vector.square().sum(-1, keepdim=True)
    return vector * square.clamp_min(torch.finfo(vector.dtype).tiny ** 0.5).rsqrt()


def clouds(data: "Data") -> list[Tensor]:
    """Indices of the points of each cloud of a `Data` or `Batch`.

    Shape:
        - output: `[N_i]` each
    """
    batch = data.batch
    if batch is None:
        return [torch.arange(len(data.pos), device=data.pos.device)]
    count = max(getattr(data, "num_graphs", 0), int(batch.max()) + 1 if len(batch) else 0)
    sizes: list[int] = torch.bincount(batch, minlength=count).tolist()
    return list(batch.argsort(stable=True).split(sizes))


def check_cloud(data: "Data", guide: Tensor | None = None) -> None:
    """Raise `ValueError` unless these are points that can be denoised.

    Shape:
        - guide: `[N, F]`
    """
    points = getattr(data, "pos", None)
    if points is None:
        raise ValueError("the cloud has no pos: give a PyG Data with pos [N, 3]")
    if points.ndim != 2 or points.shape[1] != 3:
        plane = ": points of a plane are on no surface" if points.ndim == 2 and points.shape[1] == 2 else ""
        raise ValueError(f"pos of the cloud must be [N, 3], got {list(points.shape)}{plane}")
    if not points.is_floating_point():
        raise ValueError(f"pos of the cloud must be floating-point, got {points.dtype}: call .float() on it")
    if not len(points):
        raise ValueError("the cloud is empty: give at least one point")
    if not points.isfinite().all():
        wrong = int((~points.isfinite().all(1)).sum())
        raise ValueError(f"{wrong} of {len(points)} points have NaN or infinite coordinates: leave them out")
    batch = data.batch
    if batch is not None and (batch.shape != points.shape[:1] or batch.is_floating_point() or (batch < 0).any()):
        raise ValueError(
            f"batch of the cloud must be integers [N], counted from 0, got {batch.dtype} {list(batch.shape)}"
        )
    if guide is not None and (guide.ndim != 2 or len(guide) != len(points) or not guide.is_floating_point()):
        raise ValueError(f"guide must be floating-point [N, F] with N = {len(points)}, got {list(guide.shape)}")
    for part in clouds(data):
        check_coordinates(points[part])


def check_coordinates(points: Tensor) -> None:
    """Raise `ValueError` if finite points have squares that are out of range, or no digits to tell them apart by.

    Shape:
        - points: `[N, 3]`
    """
    points = points.detach()
    kind = torch.finfo(points.dtype)
    largest = float(points.abs().max())
    if largest and not kind.tiny**0.4 < largest < kind.max**0.4:
        raise ValueError(
            f"coordinates up to {largest:.3g} have squares that are out of the range of {points.dtype}: leave outliers "
            "out, or give all in another unit of length"
        )
    middle = typical_point(points)
    step = float(middle.abs().max()) * kind.eps
    extent = 4 * float(typical_point((points - middle).abs()).max())
    if extent and step * len(points) ** 0.5 > 0.1 * extent:
        raise ValueError(
            f"coordinates as large as {float(middle.abs().max()):.3g} have steps of {step:.2g} in {points.dtype}, too "
            f"long for {len(points)} points within {extent:.3g}: give them in float64, or subtract an origin first"
        )
