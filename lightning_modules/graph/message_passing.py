"""Graph diffusion by message passing: any graph, and the readable reference of the fast image operators.

Memory and time grow with E·D; images on a grid take the paths of `patch_operator` and `image_operator` instead. This is
the one file that needs PyG, and is imported where it is used.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_modules._cached import cached_tensors
from lightning_modules._pyg import Data, MessagePassing, remove_self_loops, scatter, to_undirected
from lightning_modules.graph.laplacian import Laplacian, is_joined, normalized_weight, stable_step
from lightning_modules.graph.parameters import DiffusionParameters, repeat_step
from lightning_modules.graph.patches import PatchGrid
from lightning_modules.graph.topology import half_offsets, radius_graph, within_image
from lightning_modules.graph.weights import SELF_WEIGHT, debias_distance, edge_weight, gaussian, white_noise_bias

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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
    data: Data,
    parameters: DiffusionParameters,
    noise_std: Tensor,
    laplacian: Laplacian,
    reach: float,
    max_radius: float,
) -> Tensor:
    r"""Diffuse the node signals of a graph or a batch of graphs.

    Evaluates :math:`S'x / S'1` with :math:`S' = (I - \tau L)^k S` without forming S': a column of ones goes along
    with the signal.

    Args:
        data: PyG `Data` or `Batch` with `x` (signal) and `pos`; optionally `edge_index` (without it all nodes within
            the larger one of `reach` and `max_radius` are joined) and `guide` (what distances are measured on, `x` by
            default). The graph is undirected: an edge in one direction is taken in both, loops are dropped and
            repeated edges merged.
        parameters: One number for each graph.
        noise_std: Noise σ_n of the guide.
        laplacian: Which Laplacian.
        reach: Largest length of edges with a similarity, in the unit of `pos`.
        max_radius: Bound of the radius of the weights, in the same unit.

    Shape:
        - data.x: `[N, D]`; data.pos: `[N, 2]` or `[N, 3]`; data.edge_index: `[2, E]`; data.guide: `[N, F]`
        - parameters, noise_std: `[B]`
        - output: `[N, D]`

    Raises:
        ValueError: If an entry is missing or has another shape or type, or an edge names no node or joins two graphs.
    """
    check_graph(data)
    edge_index = data.edge_index
    if edge_index is None:
        edge_index = radius_graph(data.pos, max(reach, max_radius), data.batch)
    else:
        edge_index = to_undirected(remove_self_loops(edge_index)[0], num_nodes=len(data.x))
    guide = data.guide if "guide" in data else data.x
    batch = graph_of_node(data)
    return _diffuse(data.x, guide, data.pos, edge_index, batch, parameters, noise_std, laplacian, reach)


def graph_of_node(data: Data) -> Tensor:
    """Index of each node's graph, `[N]`."""
    if data.batch is not None:
        return data.batch.long()
    return torch.zeros(len(data.x), dtype=torch.long, device=data.x.device)


def count_graphs(data: Data) -> int:
    """Number of graphs, those without nodes counted where a `Batch` knows of them."""
    batch = graph_of_node(data)
    return max(getattr(data, "num_graphs", 0), int(batch.max()) + 1 if len(batch) else 0)


def check_graph(data: Data) -> None:
    """Raise `ValueError` unless the data are a graph that can be diffused."""
    missing = [name for name in ("x", "pos") if getattr(data, name, None) is None]
    if missing:
        raise ValueError(
            f"the graph has no {' and no '.join(missing)}: give a PyG Data with x [N, D] (signal) and pos [N, 2] "
            "(positions); edge_index is optional"
        )
    size = len(data.x)
    for name in ("x", "pos", "guide"):
        entry = getattr(data, name, None)
        if entry is None:
            continue
        if entry.ndim != 2 or len(entry) != size:
            raise ValueError(
                f"{name} of the graph must be [N, D] with the N = {size} of x, got {list(entry.shape)}: a column of "
                "numbers is [N, 1]"
            )
        if not entry.is_floating_point():
            raise ValueError(f"{name} of the graph must be floating-point, got {entry.dtype}: call .float() on it")
    if not data.pos.isfinite().all():
        raise ValueError("pos of the graph has NaN or infinite entries: leave such nodes out")
    batch, edges = data.batch, data.edge_index
    if batch is not None:
        if batch.shape != (size,):
            raise ValueError(f"batch of the graph must be [N] with N = {size}, got {list(batch.shape)}")
        if batch.dtype not in _INTEGERS or (batch < 0).any():
            least = f", the least {batch.min():g}" if size else ""
            raise ValueError(f"batch of the graph must be integers, counted from 0, got {batch.dtype}{least}")
    if edges is None:
        return
    if edges.ndim != 2 or len(edges) != 2 or edges.dtype != torch.long:
        raise ValueError(f"edge_index must be int64 [2, E], got {edges.dtype} {list(edges.shape)}")
    outside = (edges < 0) | (edges >= size)
    if outside.any():
        raise ValueError(
            f"edge_index must name the {size} nodes of x, counted from 0, got {int(edges[outside][0])}: correct it or "
            "leave it out"
        )
    if batch is not None:
        across = batch[edges[0]] != batch[edges[1]]
        if across.any():
            source, target = edges[:, across][:, 0].tolist()
            raise ValueError(
                f"edge_index joins nodes of different graphs of the batch, {source} of graph {int(batch[source])} and "
                f"{target} of graph {int(batch[target])}: leave such edges out, or batch"
            )


def _diffuse(
    x: Tensor,
    guide: Tensor,
    positions: Tensor,
    edge_index: Tensor,
    batch: Tensor,
    parameters: DiffusionParameters,
    noise_std: Tensor,
    laplacian: Laplacian,
    reach: float,
) -> Tensor:
    source, target = edge_index
    on_edge = parameters.map(lambda value: value[batch[target]])
    on_node = parameters.map(lambda value: value[batch][:, None])

    squared = (guide[source] - guide[target]).square().sum(1)
    distance = debias_distance(squared, white_noise_bias(noise_std, guide.shape[1])[batch[target]])
    length = (positions[source] - positions[target]).norm(dim=1)
    similarity = gaussian(distance, on_edge.sigma) * (length <= reach)
    weight = edge_weight(distance, length.to(x.dtype), on_edge.sigma_s, on_edge.sigma_f, on_edge.radius)

    propagate = WeightedSum()
    degree = scatter(weight, target, dim=0, dim_size=len(x), reduce="sum")
    inner = normalized_weight(weight, degree[target], degree[source], laplacian)
    degree = degree[:, None]

    if laplacian == "unnormalized":
        max_degree = scatter(degree[:, 0], batch, dim=0, dim_size=len(parameters.tau), reduce="max")
        step_size = stable_step(parameters.tau, max_degree)[batch][:, None]
        passed_on = step_size * degree
    else:
        step_size = on_node.tau
        passed_on = step_size * is_joined(degree)

    def step(signal: Tensor) -> Tensor:
        return (1 - passed_on) * signal + step_size * propagate(signal, edge_index, inner)

    signal = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    signal = signal + propagate(signal, edge_index, similarity)
    signal = repeat_step(step, signal, on_node.smooth_steps)
    return signal[:, :-1] / signal[:, -1:]


def diffuse_patches_sparse(
    images: Tensor,
    guide: Tensor,
    parameters: DiffusionParameters,
    noise_std: Tensor,
    grid: PatchGrid,
    laplacian: Laplacian,
    reach: float,
    max_radius: float,
) -> Tensor:
    """`patch_operator.diffuse_patches` for graphs of any size: a block-diagonal graph over the patches of all images.

    Shape:
        - images: `[B, C, H, W]`; guide: `[B, F, H, W]`
        - parameters, noise_std: `[B]`
        - output: as images
    """
    size, nodes = len(images), grid.num_patches
    edge_index = _block_diagonal(_grid_edges(grid, max(reach, max_radius), images.device), size, nodes)
    batch = torch.arange(size, device=images.device).repeat_interleave(nodes)
    positions = grid.centers.to(images.device).repeat(size, 1)
    patches, features = (grid.extract(part).flatten(0, 1) for part in (images, guide))
    restored = _diffuse(patches, features, positions, edge_index, batch, parameters, noise_std, laplacian, reach)
    return grid.average(restored.view(size, nodes, -1))


def _block_diagonal(edge_index: Tensor, count: int, num_nodes: int) -> Tensor:
    """Edges of `count` equal graphs side by side, `[2, count·E]`."""
    first = torch.arange(count, device=edge_index.device) * num_nodes
    return (edge_index[:, None] + first[:, None]).flatten(1)


@cached_tensors(maxsize=8)
def _grid_edges(grid: PatchGrid, radius: float, device: torch.device) -> Tensor:
    return radius_graph(grid.centers, radius).to(device)


def mean_patch_similarity(
    images: Tensor, sigma: Tensor, noise_std: Tensor, grid: PatchGrid, radius: float
) -> tuple[Tensor, int]:
    """Mean similarity of each image's patches at most `radius` apart, and the number of edges, both directions counted.

    Shape:
        - images: `[B, C, H, W]`
        - sigma, noise_std: `[B]`
        - output: `[B]`
    """
    patches = grid.extract(images)
    source, target = _grid_edges(grid, radius, images.device)
    squared = (patches[:, source] - patches[:, target]).square().sum(2)
    distance = debias_distance(squared, white_noise_bias(noise_std, patches.shape[2])[:, None])
    num_edges = len(source)
    return gaussian(distance, sigma[:, None]).sum(1) / max(num_edges, 1), num_edges


def diffuse_image_reference(
    images: Tensor,
    guide: Tensor,
    parameters: DiffusionParameters,
    noise: Tensor,
    patch_size: int,
    reach: float,
    max_radius: float,
) -> Tensor:
    """The image operator (see `image_operator.diffuse_image`) in its plainest form: patches sent along edges, folded.

    Every pixel is a node whose patch is the window around it, clipped at the border. A step sends whole patches along
    the edges, weighted so that the weights of a node sum to one, and averages the overlapping results.

    Shape:
        - images: `[B, C, H, W]`; guide: `[B, F, H, W]`
        - parameters: `[B]`; σ and σ_f `[B]` or `[B, 1, H, W]`
        - noise: `[B]`, `[B, 1 or F, H, W]` or `[B, M]`
        - output: `[B, C, H, W]`
    """
    size, _, height, width = images.shape
    half, area = patch_size // 2, patch_size**2
    grid = PatchGrid(height + 2 * half, width + 2 * half, patch_size, 1)
    radius = within_image(max(reach, max_radius), height, width)
    edge_index = _grid_edges(grid, radius, images.device)
    source, target = _block_diagonal(edge_index, size, grid.num_patches)
    image_of_edge = target // grid.num_patches

    def windows(image: Tensor) -> Tensor:  # [B·N, C·p²], zeros outside the image
        return grid.extract(pad(image, (half,) * 4)).flatten(0, 1)

    inside = windows(torch.ones_like(guide[:, :1])) > 0  # [B·N, p²]
    both = (inside[source] & inside[target]).to(guide.dtype)
    terms = both.sum(1)

    def window_sum(values: Tensor) -> Tensor:  # [E, C·p²], over the valid terms
        return (values.unflatten(1, (-1, area)) * both[:, None]).sum((1, 2)) * area / terms

    features = windows(guide)
    centers = grid.centers.to(guide)
    offset = centers[edge_index[0]] - centers[edge_index[1]]
    length = offset.norm(dim=1).repeat(size)
    if noise.ndim == 4:
        variance = windows(noise.square().expand_as(guide))
        bias = window_sum(variance[source] + variance[target])
    elif noise.ndim == 2:
        index = {place: m for m, (a, b) in enumerate(half_offsets(radius)) for place in ((a, b), (-a, -b))}
        column = [index[(a, b)] for a, b in offset.int().tolist()]
        bias = noise[:, column].flatten()
    else:
        bias = white_noise_bias(noise, guide.shape[1] * area)[image_of_edge]
    distance = debias_distance(window_sum((features[source] - features[target]).square()), bias)

    def on_edge(value: Tensor) -> Tensor:
        if value.ndim == 1:
            return value[image_of_edge]
        square = value.square().flatten()
        return ((square[source] + square[target]) / 2).sqrt()

    def averaged(weight: Tensor, self_weight: float, image: Tensor) -> Tensor:
        total = self_weight + scatter(weight, target, dim=0, dim_size=len(inside), reduce="sum")
        edges = torch.stack([source, target])
        nodes = self_weight / total

        def folded(patches: Tensor) -> Tensor:
            sent = WeightedSum()(patches, edges, weight / total[target]) + nodes[:, None] * patches
            plane = grid.fold(sent.view(size, grid.num_patches, -1))
            return plane[..., half : half + height, half : half + width]

        return folded(windows(image)) / folded(inside.to(image.dtype))

    sigma, sigma_f, sigma_s, edge_radius = (
        on_edge(value) for value in (parameters.sigma, parameters.sigma_f, parameters.sigma_s, parameters.radius)
    )
    similarity = gaussian(distance, sigma) * (length <= reach)
    weight = edge_weight(distance, length, sigma_s, sigma_f, edge_radius)
    tau = parameters.tau.view(-1, 1, 1, 1)
    steps = parameters.smooth_steps

    def step(image: Tensor) -> Tensor:
        return (1 - tau) * image + tau * averaged(weight, SELF_WEIGHT, image)

    counts = steps.view(-1, 1, 1, 1) if torch.is_tensor(steps) else steps
    return repeat_step(step, averaged(similarity, 1.0, images), counts)
