"""Graph diffusion of patch vectors for graphs of few nodes: dense batched matrix products."""

from functools import lru_cache

import torch
from torch import Tensor

from lightning_modules.graph.laplacian import Laplacian, normalized_weight, stable_step
from lightning_modules.graph.parameters import DiffusionParameters, repeat_step
from lightning_modules.graph.patches import PatchGrid
from lightning_modules.graph.weights import debias_distance, edge_weight, gaussian

# Up to this many nodes the products of dense matrices win over gathering and scattering along edges.
MAX_DENSE_NODES = 64


def diffuse_patches_dense(
    images: Tensor,
    guide: Tensor,
    parameters: DiffusionParameters,
    noise_std: Tensor | float,
    grid: PatchGrid,
    laplacian: Laplacian,
    max_radius: float,
) -> Tensor:
    """Restored patches of the images; equal to `message_passing.diffuse_graph` on `message_passing.patch_graph`.

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
        - output: `[B, N, C·p²]`
    """
    per_image = parameters.map(lambda value: value.view(-1, 1, 1))
    noise = noise_std.view(-1, 1, 1) if torch.is_tensor(noise_std) else noise_std
    length, adjacency, _ = _topology(grid, max_radius, guide.device, guide.dtype)
    features = grid.extract(guide)
    distance = debias_distance(pairwise_squared_distance(features), noise, features.shape[2])
    # A node's similarity to itself is 1 whatever the noise: distance 0 sits on the diagonal already.
    similarity = gaussian(distance, per_image.sigma) * adjacency.clone().fill_diagonal_(1)
    weight = edge_weight(distance, length, per_image.sigma_s, per_image.sigma_f, per_image.radius) * adjacency
    degree = weight.sum(2, keepdim=True)
    inner = normalized_weight(weight, degree, degree.transpose(1, 2), laplacian)

    if laplacian == "unnormalized":
        step_size = stable_step(per_image.tau, degree.amax(1, keepdim=True))

        def step(signal: Tensor) -> Tensor:
            return signal + step_size * (inner @ signal - degree * signal)
    else:

        def step(signal: Tensor) -> Tensor:
            return (1 - per_image.tau) * signal + per_image.tau * (inner @ signal)

    patches = features if guide is images else grid.extract(images)
    signal = similarity @ torch.cat([patches, patches.new_ones(*patches.shape[:2], 1)], dim=2)
    signal = repeat_step(step, signal, per_image.smooth_steps)
    return signal[..., :-1] / signal[..., -1:]


def pairwise_squared_distance(features: Tensor) -> Tensor:
    """Squared L2 distances of all pairs of nodes of each graph, the diagonal exactly 0.

    The mean node is subtracted first: distances do not change, and the Gram form loses no digits to a large offset.

    Shape:
        - features: `[B, N, D]`
        - output: `[B, N, N]`
    """
    centered = features - features.mean(1, keepdim=True)
    square = centered.square().sum(2)
    distance = square[:, :, None] + square[:, None, :] - 2 * centered @ centered.transpose(1, 2)
    off_diagonal = 1 - torch.eye(features.shape[1], device=features.device, dtype=features.dtype)
    return distance.clamp_min(0) * off_diagonal


def mean_similarity_dense(
    images: Tensor, sigma: Tensor | float, grid: PatchGrid, max_radius: float
) -> tuple[Tensor, int]:
    """Mean similarity over the edges of each image, and the number of edges (both directions counted).

    Shape:
        - images: `[B, C, H, W]`
        - output: `[B]`
    """
    _, adjacency, num_edges = _topology(grid, max_radius, images.device, images.dtype)
    width = sigma.view(-1, 1, 1) if torch.is_tensor(sigma) else sigma
    similarity = gaussian(pairwise_squared_distance(grid.extract(images)), width) * adjacency
    return similarity.sum((1, 2)) / max(num_edges, 1), num_edges


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # made in a validation and cached, it must still serve a training step
def _topology(
    grid: PatchGrid, max_radius: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, int]:
    """Distances of the patch centres and which of them are edges, `[N, N]` each; the number of edges."""
    length = torch.cdist(grid.centers, grid.centers, compute_mode="donot_use_mm_for_euclid_dist")
    adjacency = (length > 0) & (length <= max_radius)
    return length.to(device, dtype), adjacency.to(device, dtype), int(adjacency.sum())
