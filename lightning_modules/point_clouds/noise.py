"""Noise level of a point cloud, from what smooth pieces of surface leave of it."""

from typing import TYPE_CHECKING

import torch
from scipy.spatial import KDTree
from torch import Tensor

from lightning_modules.point_clouds.neighborhoods import clouds, random_order, typical_point

if TYPE_CHECKING:
    from torch_geometric.data import Data

# Points at which a piece of surface is fitted, neighbors that it is fitted to, and the numbers that describe it.
_PLACES, _NEIGHBORS, _TERMS = 1024, 48, 6
# A ball of so many standard deviations holds nearly all of the points that noise has moved off its surface.
_REACH = 4.0
_ROUNDS = 12


@torch.no_grad()
def estimate_cloud_noise(cloud: "Data") -> Tensor:
    r"""Standard deviation of isotropic Gaussian noise on the points of each cloud.

    At some points a quadric is fitted to the heights of neighbors over their tangent plane; the median of the squared
    residuals over the degrees of freedom is the variance. A ball that is smaller than the noise shows a part of it
    only, and a larger one the shape as well: its radius is :math:`4\hat\sigma` at last, found by going on from the
    nearest neighbors, and never under their distance.

    Args:
        cloud: A PyG `Data` or `Batch` with `pos` `[N, 3]`.

    Shape:
        - output: `[B]`; 0 for clouds of too few points
    """
    return torch.stack([_level(cloud.pos[part]) for part in clouds(cloud)])


def _level(points: Tensor) -> Tensor:
    size = len(points)
    count = min(_NEIGHBORS, size - 1)
    if count <= _TERMS:
        return points.new_zeros(())
    array = (points - typical_point(points)).double().cpu().numpy()
    order = random_order(size).numpy()
    places = array[order[:_PLACES]]
    least = radius = float(torch.from_numpy(KDTree(array).query(places, [count + 1])[0]).median())
    level, former = 0.0, -1.0
    tree = KDTree(array)
    for _ in range(_ROUNDS):
        within = float(torch.from_numpy(tree.query_ball_point(places, radius, return_length=True)).double().median())
        parts = max(1, min(int(within / count), size // (count + 1)))
        thinned = array[order[::parts]]
        index = KDTree(thinned).query(places, count)[1]
        offset = torch.from_numpy(thinned[index] - places[:, None])
        level = float(_residual_variance(offset).median()) ** 0.5
        if abs(level - former) <= 0.01 * level:
            break
        former, radius = level, max(least, _REACH * level)
    return points.new_tensor(level)


def _residual_variance(offset: Tensor) -> Tensor:
    """Variance about a quadric over the plane of each neighborhood `[N, k, 3]`."""
    offset = offset - offset.mean(1, keepdim=True)
    frame = torch.linalg.eigh(offset.mT @ offset)[1]  # by rising eigenvalue: the normal comes first
    height, x, y = (offset @ frame).unbind(2)
    scale = (x**2 + y**2).mean(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny).sqrt()
    x, y = x / scale, y / scale
    terms = torch.stack([torch.ones_like(x), x, y, x**2, x * y, y**2], 2)
    basis = torch.linalg.qr(terms)[0]
    left = height - (basis @ (basis.mT @ height[..., None]))[..., 0]
    return left.square().sum(1) / (offset.shape[1] - _TERMS)
