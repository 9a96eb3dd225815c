"""Graph diffusion of patch vectors for graphs of few nodes: dense batched matrix products."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.graph.laplacian import Laplacian, normalized_weight, stable_step
from lightning_modules.graph.parameters import DiffusionParameters, repeat_step
from lightning_modules.graph.patches import PatchGrid
from lightning_modules.graph.weights import gaussian, smallest_weight, spatial_weight

# Up to this many nodes the products of dense matrices win over gathering and scattering along edges.
MAX_DENSE_NODES = 64

# Sum of a row of S', in units of the smallest weight, under which too many of its digits have been dropped.
_LEAST_SUM = 2.0**20


def diffuse_patches(
    images: Tensor,
    guide: Tensor,
    parameters: DiffusionParameters,
    noise_std: Tensor | float,
    grid: PatchGrid,
    laplacian: Laplacian,
    max_radius: float,
) -> Tensor:
    """Restored images; equal to `message_passing.diffuse_graph` on `message_passing.patch_graph`, folded.

    With fewer nodes than a patch has entries it is cheaper to form :math:`S' = (I - τL)^k S` and to multiply by the
    patches once than to multiply by them k + 1 times.

    Args:
        images: Images whose patches are the signal.
        guide: Images whose patches the distances are measured on.
        parameters: Numbers, or one for each image.
        noise_std: Noise σ_n of the guide; a number or one for each image.
        grid: Where the patches lie.
        laplacian: Which Laplacian.
        max_radius: Radius of the topology in pixels.

    Shape:
        - images: `[B, C, H, W]`; guide: `[B, F, H, W]`
        - output: as images
    """
    # Rows of S'/S'1 sum to one, so a constant passes through: both uses of the patches can do without the mean.
    mean = images.mean((2, 3), keepdim=True)
    patches = grid.extract(images - mean)
    features = patches if guide is images else grid.extract(_centered(guide))
    operator = _smoothing_operator(features, parameters, noise_std, _topology(grid, max_radius, features), laplacian)
    return grid.average(operator @ patches).add_(mean)


def _smoothing_operator(
    features: Tensor,
    parameters: DiffusionParameters,
    noise_std: Tensor | float,
    topology: "_Topology",
    laplacian: Laplacian,
) -> Tensor:
    """Matrices S'/S'1 that take patches to restored patches, `[B, N, N]`, from centred features `[B, N, D]`."""
    per_image = parameters.map(lambda value: value.view(-1, 1, 1))
    distance = debiased_distance(features, noise_std)
    # A node's similarity to itself is 1 whatever the noise: distance 0 sits on the diagonal already.
    similarity = gaussian(distance, per_image.sigma) * topology.adjacency_and_self
    weight = gaussian(distance, per_image.sigma_f) * topology.spatial_weight(per_image.sigma_s, per_image.radius)
    degree = weight.sum(2, keepdim=True)
    inner = normalized_weight(weight, degree, degree.transpose(1, 2), laplacian)
    if laplacian == "unnormalized":
        step_size: Tensor | float = stable_step(per_image.tau, degree.amax(1, keepdim=True))
        given: Tensor | float = step_size * degree
    else:
        step_size = given = per_image.tau
    # Before the factor: where τ is 0 or 1 exactly, it still has a gradient.
    step_matrix = step_size * without_traces(inner)
    # What a node keeps of itself stands on the diagonal, which `inner` leaves at 0.
    step_matrix.diagonal(dim1=1, dim2=2).add_(1 - (given.squeeze(2) if torch.is_tensor(given) else given))
    smoothed = repeat_step(lambda signal: step_matrix @ without_traces(signal), similarity, per_image.smooth_steps)
    total = smoothed.sum(2, keepdim=True)
    # An isolated patch keeps (1 - τ)^k of its row of S. The division undoes that, unless next to nothing is left.
    lost = total.abs() <= _LEAST_SUM * smallest_weight(total.dtype)
    smoothed, total = torch.where(lost, similarity, smoothed), torch.where(lost, similarity.sum(2, keepdim=True), total)
    return smoothed / total


def debiased_distance(features: Tensor, noise_std: Tensor | float) -> Tensor:
    """Squared L2 distances of all pairs of nodes, less what noise adds (see `weights.debias_distance`).

    Args:
        features: Node features, close to centred: the Gram form loses the digits of an offset that they share.
        noise_std: Noise σ_n of the features; a number or one for each graph.

    Shape:
        - features: `[B, N, D]`
        - noise_std: scalar or `[B]`
        - output: `[B, N, N]`, the diagonal exactly 0
    """
    gram = features @ features.transpose(1, 2)
    square = gram.diagonal(dim1=1, dim2=2)
    bias = 2 * features.shape[2] * noise_std**2
    biased = square - (bias.view(-1, 1) if torch.is_tensor(bias) else bias)
    # In place: what autograd needs of these three is the result of the last.
    return (biased[:, :, None] + square[:, None, :]).sub_(gram, alpha=2).relu_()


def without_traces(matrix: Tensor) -> Tensor:
    """The matrix with 0 for numbers so small that products of two of them are subnormal; see `smallest_weight`.

    Shape:
        - matrix: any
        - output: as matrix
    """
    return torch.nn.functional.hardshrink(matrix, 1.01 * smallest_weight(matrix.dtype))


def mean_similarity_dense(
    images: Tensor, sigma: Tensor | float, noise_std: Tensor | float, grid: PatchGrid, max_radius: float
) -> tuple[Tensor, int]:
    """Mean similarity over the edges of each image, and the number of edges (both directions counted).

    Shape:
        - images: `[B, C, H, W]`
        - output: `[B]`
    """
    features = grid.extract(_centered(images))
    topology = _topology(grid, max_radius, features)
    width = sigma.view(-1, 1, 1) if torch.is_tensor(sigma) else sigma
    noise = noise_std.view(-1, 1, 1) if torch.is_tensor(noise_std) else noise_std
    similarity = gaussian(debiased_distance(features, noise), width) * topology.adjacency
    return similarity.sum((1, 2)) / max(topology.num_edges, 1), topology.num_edges


def _centered(images: Tensor) -> Tensor:
    return images - images.mean((2, 3), keepdim=True)


class _Topology(NamedTuple):
    """Which patches are joined, and how far apart they are.

    Attributes:
        adjacency: 1 for an edge, 0 elsewhere, `[N, N]`.
        adjacency_and_self: The same with 1 on the diagonal, `[N, N]`.
        lengths: The distinct lengths of edges in pixels, `[U]`.
        members: 1 where an edge has a length, `[U, N²]`.
        num_edges: Number of edges, both directions counted.
    """

    adjacency: Tensor
    adjacency_and_self: Tensor
    lengths: Tensor
    members: Tensor
    num_edges: int

    def spatial_weight(self, sigma_s: Tensor | float, radius: Tensor | float) -> Tensor:
        """Spatial weights of the edges, 0 elsewhere, `[B or 1, N, N]`.

        A grid has few distinct lengths: one weight for each, spread by a product, whose backward pass is a product too.
        """
        nodes = len(self.adjacency)
        of_length = spatial_weight(self.lengths[None], *(_flat(value) for value in (sigma_s, radius)))
        return (of_length @ self.members).unflatten(1, (nodes, nodes))


def _flat(value: Tensor | float) -> Tensor | float:
    return value.view(-1, 1) if torch.is_tensor(value) else value


def _topology(grid: PatchGrid, max_radius: float, like: Tensor) -> _Topology:
    return _cached_topology(grid, max_radius, like.device, like.dtype)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # made in a validation and cached, it must still serve a training step
def _cached_topology(grid: PatchGrid, max_radius: float, device: torch.device, dtype: torch.dtype) -> _Topology:
    length = torch.cdist(grid.centers, grid.centers, compute_mode="donot_use_mm_for_euclid_dist")
    adjacency = (length > 0) & (length <= max_radius)
    lengths = length[adjacency].unique()
    members = (length.flatten() == lengths[:, None]) & adjacency.flatten()

    def there(part: Tensor) -> Tensor:
        return part.to(device, dtype)

    itself = length == 0
    num_edges = int(adjacency.sum())
    return _Topology(there(adjacency), there(adjacency | itself), there(lengths), there(members), num_edges)
