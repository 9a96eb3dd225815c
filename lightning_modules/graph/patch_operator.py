"""Graph diffusion of patch vectors for graphs of few nodes: dense batched matrix products."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules._cached import cached_tensors
from lightning_modules.graph.laplacian import Laplacian, is_joined, normalized_weight, stable_step
from lightning_modules.graph.parameters import DiffusionParameters, repeat_step
from lightning_modules.graph.patches import PatchGrid
from lightning_modules.graph.weights import flush_small, gaussian, spatial_weight, white_noise_bias

# Up to this many nodes the products of dense matrices win over gathering and scattering along edges.
MAX_DENSE_NODES = 64


def diffuse_patches(
    images: Tensor,
    guide: Tensor,
    parameters: DiffusionParameters,
    noise_std: Tensor,
    grid: PatchGrid,
    laplacian: Laplacian,
    reach: float,
    max_radius: float,
) -> Tensor:
    """Restored images, by dense matrices; equal to `message_passing.diffuse_patches_sparse`.

    With fewer nodes than a patch has entries it is cheaper to form :math:`S' = (I - τL)^k S` and to multiply by the
    patches once than to multiply by them k + 1 times.

    Args:
        images: Images whose patches are the signal.
        guide: Images whose patches the distances are measured on.
        parameters: One number for each image.
        noise_std: Noise σ_n of the guide.
        grid: Positions of the patches.
        laplacian: Which Laplacian.
        reach: Largest distance in pixels of patches that are joined by a similarity.
        max_radius: Bound of the radius of the weights, in pixels.

    Shape:
        - images: `[B, C, H, W]`; guide: `[B, F, H, W]`
        - parameters, noise_std: `[B]`
        - output: as images
    """
    # Rows of S'/S'1 sum to one, so a constant passes through: both uses of the patches can do without the mean.
    mean = images.mean((2, 3), keepdim=True)
    patches = grid.extract(images - mean)
    features = patches if guide is images else grid.extract(_centered(guide))
    topology = _topology(grid, reach, max(reach, max_radius), features.device, features.dtype)
    operator = _smoothing_operator(features, parameters, noise_std, topology, laplacian)
    return grid.average(operator @ patches).add_(mean)


def _smoothing_operator(
    features: Tensor, parameters: DiffusionParameters, noise_std: Tensor, topology: "_Topology", laplacian: Laplacian
) -> Tensor:
    """Matrices S'/S'1 that take patches to restored patches, `[B, N, N]`, from centred features `[B, N, D]`."""
    per_image = parameters.map(lambda value: value.view(-1, 1, 1))
    distance = debiased_distance(features, noise_std)
    similarity = gaussian(distance, per_image.sigma) * topology.similar
    similarity.diagonal(dim1=1, dim2=2).add_(1)  # of a node to itself, whatever the noise
    weight = gaussian(distance, per_image.sigma_f) * topology.spatial_weight(parameters)
    degree = weight.sum(2, keepdim=True)
    inner = normalized_weight(weight, degree, degree.transpose(1, 2), laplacian)
    if laplacian == "unnormalized":
        step_size = stable_step(per_image.tau, degree.amax(1, keepdim=True))
        passed_on = step_size * degree
    else:
        step_size = per_image.tau
        passed_on = step_size * is_joined(degree)
    # Before the factor: where τ is 0 or 1 exactly, it still has a gradient.
    step_matrix = step_size * flush_small(inner)
    # What a node keeps of itself is on the diagonal, which `inner` leaves at 0.
    step_matrix.diagonal(dim1=1, dim2=2).add_(1 - passed_on.squeeze(2))
    smoothed = repeat_step(lambda signal: step_matrix @ flush_small(signal), similarity, per_image.smooth_steps)
    return smoothed / smoothed.sum(2, keepdim=True)


def debiased_distance(features: Tensor, noise_std: Tensor) -> Tensor:
    """Squared L2 distances of all pairs of nodes, less what noise adds (see `weights.debias_distance`).

    Args:
        features: Node features, close to centred: the Gram form loses the digits of an offset that they share.
        noise_std: Noise σ_n of the features.

    Shape:
        - features: `[B, N, D]`
        - noise_std: `[B]`
        - output: `[B, N, N]`, the diagonal exactly 0
    """
    gram = features @ features.transpose(1, 2)
    square = gram.diagonal(dim1=1, dim2=2)
    biased = square - white_noise_bias(noise_std, features.shape[2])[:, None]
    # In place: what autograd needs of these three is the result of the last.
    return (biased[:, :, None] + square[:, None, :]).sub_(gram, alpha=2).relu_()


def mean_similarity_dense(
    images: Tensor, sigma: Tensor, noise_std: Tensor, grid: PatchGrid, radius: float
) -> tuple[Tensor, int]:
    """Mean similarity of each image's patches at most `radius` apart, and the number of edges, both directions counted.

    Shape:
        - images: `[B, C, H, W]`
        - sigma, noise_std: `[B]`
        - output: `[B]`
    """
    features = grid.extract(_centered(images))
    topology = _topology(grid, radius, radius, features.device, features.dtype)
    similarity = gaussian(debiased_distance(features, noise_std), sigma.view(-1, 1, 1)) * topology.similar
    return similarity.sum((1, 2)) / max(topology.num_edges, 1), topology.num_edges


def _centered(images: Tensor) -> Tensor:
    return images - images.mean((2, 3), keepdim=True)


class _Topology(NamedTuple):
    """Which patches are joined, and how far apart they are.

    Attributes:
        similar: 1 for different patches at most `reach` apart, 0 elsewhere, `[N, N]`.
        num_edges: Number of its edges, both directions counted.
        lengths: The distinct lengths of weighted edges in pixels, `[U]`.
        members: 1 where an edge has a length, `[U, N²]`.
    """

    similar: Tensor
    num_edges: int
    lengths: Tensor
    members: Tensor

    def spatial_weight(self, parameters: DiffusionParameters) -> Tensor:
        """Spatial weights of the edges, 0 elsewhere, `[B, N, N]`.

        A grid has few distinct lengths: one weight for each, spread by a product, whose backward pass is a product too.
        """
        nodes = len(self.similar)
        of_length = spatial_weight(self.lengths[None], parameters.sigma_s[:, None], parameters.radius[:, None])
        return (of_length @ self.members).unflatten(1, (nodes, nodes))


@cached_tensors(maxsize=32)
def _topology(grid: PatchGrid, reach: float, radius: float, device: torch.device, dtype: torch.dtype) -> _Topology:
    length = torch.cdist(grid.centers, grid.centers, compute_mode="donot_use_mm_for_euclid_dist")
    similar, weighted = ((length > 0) & (length <= limit) for limit in (reach, radius))
    lengths = length[weighted].unique()
    members = (length.flatten() == lengths[:, None]) & weighted.flatten()
    num_edges = int(similar.sum())
    return _Topology(similar.to(device, dtype), num_edges, lengths.to(device, dtype), members.to(device, dtype))
