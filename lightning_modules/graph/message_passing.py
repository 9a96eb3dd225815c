"""Graph diffusion by message passing: any graph, and the readable reference of the fast image operators.

Memory and time grow with E·D; images on a grid take the paths of `patch_operator` and `image_operator` instead.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import scatter

from lightning_modules.graph.laplacian import Laplacian, normalized_weight, stable_step
from lightning_modules.graph.parameters import DiffusionParameters, repeat_step
from lightning_modules.graph.patches import PatchGrid
from lightning_modules.graph.topology import radius_graph
from lightning_modules.graph.weights import SELF_WEIGHT, debias_distance, edge_weight, gaussian


class WeightedSum(MessagePassing):
    r"""Weighted sum over the neighbours, :math:`x'_i = \sum_{j \to i} w_{ji} x_j`."""

    def __init__(self) -> None:
        super().__init__(aggr="add")

    def forward(self, x: Tensor, edge_index: Tensor, weight: Tensor) -> Tensor:
        """Sum of the neighbours' signals.

        Shape:
            - x: `[N, D]`
            - edge_index: `[2, E]` (source, target)
            - weight: `[E]`
            - output: `[N, D]`
        """
        return self.propagate(edge_index, x=x, weight=weight, size=(len(x), len(x)))

    def message(self, x_j: Tensor, weight: Tensor) -> Tensor:
        """Signal of the sending node times the edge's weight, `[E, D]`."""
        return weight[:, None] * x_j


def diffuse_graph(
    data: Data, parameters: DiffusionParameters, noise_std: Tensor | float, laplacian: Laplacian, max_radius: float
) -> Tensor:
    r"""Diffuse the node signals of a graph or a batch of graphs.

    Evaluates :math:`S'x / S'1` with :math:`S' = (I - \tau L)^k S` without forming S': a column of ones goes along
    with the signal.

    Args:
        data: PyG `Data` or `Batch` with `x` (signal) and `pos`; optionally `edge_index` (without it nodes at most
            `max_radius` apart are joined) and `features` (what distances are measured on, `x` by default).
        parameters: Numbers, or one for each graph.
        noise_std: Noise of the features σ_n; a number or one for each graph.
        laplacian: Which Laplacian.
        max_radius: Radius of the topology in the unit of `pos`.

    Shape:
        - data.x: `[N, D]`; data.pos: `[N, 2]` or `[N, 3]`; data.edge_index: `[2, E]`; data.features: `[N, F]`
        - output: `[N, D]`
    """
    x, positions = data.x, data.pos
    batch = data.batch if data.batch is not None else torch.zeros(len(x), dtype=torch.long, device=x.device)
    edge_index = data.edge_index if data.edge_index is not None else radius_graph(positions, max_radius, data.batch)
    features = data.features if "features" in data else x
    source, target = edge_index
    on_edge = parameters.map(lambda value: value[batch[target]])
    on_node = parameters.map(lambda value: value[batch][:, None])
    edge_noise = noise_std[batch[target]] if torch.is_tensor(noise_std) else noise_std

    distance = debias_distance((features[source] - features[target]).square().sum(1), edge_noise, features.shape[1])
    length = (positions[source] - positions[target]).norm(dim=1).to(x.dtype)
    similarity = gaussian(distance, on_edge.sigma)
    weight = edge_weight(distance, length, on_edge.sigma_s, on_edge.sigma_f, on_edge.radius)

    propagate = WeightedSum()
    degree = scatter(weight, target, dim=0, dim_size=len(x), reduce="sum")
    inner = normalized_weight(weight, degree[target], degree[source], laplacian)

    if laplacian == "unnormalized":
        max_degree = scatter(degree, batch, dim=0, reduce="max")
        tau = parameters.tau
        step_size = stable_step(tau, max_degree)[batch][:, None]

        def step(signal: Tensor) -> Tensor:
            return signal + step_size * (propagate(signal, edge_index, inner) - degree[:, None] * signal)
    else:

        def step(signal: Tensor) -> Tensor:
            return (1 - on_node.tau) * signal + on_node.tau * propagate(signal, edge_index, inner)

    signal = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    signal = signal + propagate(signal, edge_index, similarity)
    signal = repeat_step(step, signal, on_node.smooth_steps)
    return signal[:, :-1] / signal[:, -1:]


def patch_graph(images: Tensor, guide: Tensor, grid: PatchGrid, max_radius: float) -> Data:
    """Block-diagonal graph over the patches of a batch of images.

    Args:
        images: Images whose patches are the signal.
        guide: Images whose patches the distances are measured on.
        grid: Where the patches lie.
        max_radius: Radius of the topology in pixels.

    Shape:
        - images: `[B, C, H, W]`; guide: `[B, F, H, W]`
        - output: `x` `[B·N, C·p²]`, `features` `[B·N, F·p²]`, `pos` `[B·N, 2]`, `edge_index` `[2, B·E]`,
          `batch` `[B·N]`
    """
    size, nodes = len(images), grid.num_patches
    edge_index = _grid_edges(grid, max_radius, images.device)
    first = torch.arange(size, device=images.device) * nodes
    return Data(
        x=grid.extract(images).flatten(0, 1),
        features=grid.extract(guide).flatten(0, 1),
        pos=grid.centers.to(images.device).repeat(size, 1),
        edge_index=(edge_index[:, None] + first[:, None]).flatten(1),
        batch=torch.arange(size, device=images.device).repeat_interleave(nodes),
    )


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # made in a validation and cached, it must still serve a training step
def _grid_edges(grid: PatchGrid, max_radius: float, device: torch.device) -> Tensor:
    return radius_graph(grid.centers, max_radius).to(device)


def mean_patch_similarity(
    images: Tensor, sigma: Tensor | float, noise_std: Tensor | float, grid: PatchGrid, max_radius: float
) -> tuple[Tensor, int]:
    """Mean similarity over the edges of each image's patch graph, and the number of edges (both directions counted).

    Shape:
        - images: `[B, C, H, W]`
        - output: `[B]`
    """
    graph = patch_graph(images, images, grid, max_radius)
    source, target = graph.edge_index
    distance = (graph.x[source] - graph.x[target]).square().sum(1).view(len(images), -1)
    width, noise = (value[:, None] if torch.is_tensor(value) else value for value in (sigma, noise_std))
    similarity = gaussian(debias_distance(distance, noise, graph.x.shape[1]), width)
    num_edges = distance.shape[1]
    return similarity.sum(1) / max(num_edges, 1), num_edges


def diffuse_image_reference(
    images: Tensor,
    guide: Tensor,
    parameters: DiffusionParameters,
    noise_std: Tensor | float,
    patch_size: int,
    max_radius: float,
) -> Tensor:
    """The image operator (see `image_operator.diffuse_image`) in its plainest form: patches sent along edges, folded.

    Every pixel is a node whose patch is the window around it, clipped at the border. A step sends whole patches along
    the edges, weighted so that the weights of a node sum to one, and averages the overlapping results.

    Shape:
        - images: `[B, C, H, W]`; guide: `[B, F, H, W]`
        - output: `[B, C, H, W]`
    """
    size, _, height, width = images.shape
    reach = patch_size // 2
    grid = PatchGrid(height + 2 * reach, width + 2 * reach, patch_size, 1)
    edge_index = radius_graph(grid.centers, max_radius).to(images.device)
    first = torch.arange(size, device=images.device) * grid.num_patches
    source, target = (edge_index[:, None] + first[:, None]).flatten(1)
    batch = torch.arange(size, device=images.device).repeat_interleave(grid.num_patches)

    def windows(image: Tensor) -> Tensor:  # [B·N, C·p²], zeros outside the image
        return grid.extract(torch.nn.functional.pad(image, (reach,) * 4)).flatten(0, 1)

    inside = windows(torch.ones_like(guide[:, :1])) > 0  # [B·N, p²]
    both = (inside[source] & inside[target]).to(guide.dtype)
    features = windows(guide).view(len(inside), -1, patch_size**2)
    squared = ((features[source] - features[target]).square() * both[:, None]).sum((1, 2))
    distance = squared * patch_size**2 / both.sum(1)
    on_edge = parameters.map(lambda value: value[batch[target]])
    edge_noise = noise_std[batch[target]] if torch.is_tensor(noise_std) else noise_std
    distance = debias_distance(distance, edge_noise, guide.shape[1] * patch_size**2)
    centers = grid.centers.to(guide)
    length = (centers[edge_index[0]] - centers[edge_index[1]]).norm(dim=1).repeat(size)

    def averaged(weight: Tensor, self_weight: float, image: Tensor) -> Tensor:
        total = self_weight + scatter(weight, target, dim=0, dim_size=len(inside), reduce="sum")
        edges = torch.stack([source, target])
        nodes = self_weight / total

        def folded(patches: Tensor) -> Tensor:
            sent = WeightedSum()(patches, edges, weight / total[target]) + nodes[:, None] * patches
            plane = grid.fold(sent.view(size, grid.num_patches, -1))
            return plane[..., reach : reach + height, reach : reach + width]

        return folded(windows(image)) / folded(inside.to(image.dtype))

    similarity = gaussian(distance, on_edge.sigma)
    weight = edge_weight(distance, length, on_edge.sigma_s, on_edge.sigma_f, on_edge.radius)
    on_image = parameters.map(lambda value: value.view(-1, 1, 1, 1))

    def step(image: Tensor) -> Tensor:
        return (1 - on_image.tau) * image + on_image.tau * averaged(weight, SELF_WEIGHT, image)

    return repeat_step(step, averaged(similarity, 1.0, images), on_image.smooth_steps)
