"""Error of denoised points, from noisy points that were held out: no surface need be known."""

import torch
from scipy.spatial import KDTree
from torch import Tensor

from lightning_modules.imaging import permutation
from lightning_modules.point_clouds.neighborhoods import random_order, smallest_eigenvector, thinning, unit

# Neighbors from which a normal is taken, and among which the nearest along the surface is looked for; and how many
# standard deviations they reach, at least.
_NEIGHBORS, _REACH = 16, 4.0
# Heights count up to so many standard deviations: beyond an edge, or on the other side of a thin wall, they are of
# another surface.
_MOST = 5.0


def halves(count: int, key: Tensor) -> tuple[Tensor, Tensor]:
    """Two halves of the points of a cloud, at random by a key.

    Args:
        count: Number of points.
        key: One integer.

    Shape:
        - key: `[]`, int64
        - output: `[⌈N/2⌉]` and `[⌊N/2⌋]`, int64
    """
    order = permutation(count, int(key))
    return order[: (count + 1) // 2], order[(count + 1) // 2 :]


def held_out_error(restored: Tensor, others: Tensor, noise_std: Tensor) -> Tensor:
    r"""Mean squared distance of denoised points to the surface, in units of the noise's variance, from other noisy
    points of the same surface that had no part in the denoising.

    .. math:: \frac{1}{\sigma_n^2 M} \sum_j \langle n_i, q_j - p_i \rangle^2 - 1

    for each held-out point q the denoised point p that is nearest to it *along* the surface, with the normal n of the
    denoised points: which point that is says nothing of the noise across, which is independent of how far p is off.
    So the mean square is the sum of both variances, up to how far the surface bends between p and q, on which the
    denoising has little influence (as in Lehtinen et al., "Noise2Noise", ICML 2018, where pixels are in the same
    place).

    Args:
        restored: Denoised points.
        others: Held-out noisy points.
        noise_std: Standard deviation of their noise.

    Shape:
        - restored: `[N, 3]`; others: `[M, 3]`
        - noise_std: `[]`
        - output: `[]`; 0 where no point was held out
    """
    if not len(others):
        return restored.new_zeros(())
    level = noise_std.clamp_min(torch.finfo(noise_std.dtype).tiny ** 0.25)
    count = min(_NEIGHBORS, len(restored))
    # Of points that are dense beside the noise every m-th: the nearest of all would be those that are off the surface
    # to the same side.
    tree = KDTree(restored.detach().cpu().numpy())
    parts = thinning(tree, others, _REACH * float(level), count)
    restored = restored[random_order(len(restored))[::parts].to(restored.device)]
    points = restored.detach()
    tree = KDTree(points.cpu().numpy())
    around = points[_nearest(tree, points, count)]
    around = around - around.mean(1, keepdim=True)
    normal = smallest_eigenvector(around.mT @ around)
    near = _nearest(tree, others, count)
    offset, normals = others[:, None] - points[near], normal[near]
    across = unit((normals * (normals @ normals[:, 0, :, None]).sign()).sum(1))
    along = offset.square().sum(2) - (offset @ across[..., None])[..., 0].square()
    chosen = near.gather(1, along.argmin(1, keepdim=True))[:, 0]
    height = ((others - restored[chosen]) * normal[chosen]).sum(1)
    return (height / level).square().clamp_max(_MOST**2).mean() - 1


def _nearest(tree: KDTree, points: Tensor, count: int) -> Tensor:
    index = tree.query(points.cpu().numpy(), [*range(1, count + 1)])[1]
    return torch.from_numpy(index).to(points.device)
