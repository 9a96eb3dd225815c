"""Distances between point clouds, and from points to surfaces, by k-d trees."""

import torch
from scipy.spatial import KDTree
from torch import Tensor


def nearest(points: Tensor, targets: Tensor) -> Tensor:
    """Index of the target nearest to each point, by a k-d tree; without a gradient.

    Shape:
        - points: `[N, 3]`; targets: `[M, 3]`
        - output: `[N]`, int64
    """
    tree = KDTree(targets.detach().double().cpu().numpy())
    index = tree.query(points.detach().double().cpu().numpy())[1]
    return torch.from_numpy(index).to(points.device)


def chamfer_distance(points: Tensor, others: Tensor) -> Tensor:
    r"""Mean squared distance to the nearest point of the other cloud, one way plus the other.

    .. math:: \frac1N \sum_i \min_j \lVert p_i - q_j \rVert^2 + \frac1M \sum_j \min_i \lVert p_i - q_j \rVert^2

    as in Luo & Hu, "Score-based point cloud denoising", ICCV 2021, equation 14, who first scale the clean cloud's
    bounding sphere to a radius of 1. Which point is the nearest is taken as given by the gradient.

    Shape:
        - points: `[N, 3]`; others: `[M, 3]`
        - output: `[]`
    """
    forth = (points - others[nearest(points, others)]).square().sum(1).mean()
    return forth + (others - points[nearest(others, points)]).square().sum(1).mean()


def surface_distance(points: Tensor, surface: Tensor, normals: Tensor | None = None) -> Tensor:
    r"""Mean squared distance of points to a surface that is known by many of its points.

    With normals it is the distance to the tangent plane at the nearest of them, whose error is of the fourth order in
    their distance from each other.

    Args:
        points: The points.
        surface: Points of the surface.
        normals: The surface's normals there; without them the distance is that to the nearest point.

    Shape:
        - points: `[N, 3]`; surface, normals: `[M, 3]`
        - output: `[]`
    """
    index = nearest(points, surface)
    offset = points - surface[index]
    if normals is None:
        return offset.square().sum(1).mean()
    return (offset * normals[index]).sum(1).square().mean()
