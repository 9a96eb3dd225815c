"""Topology of graphs: exact radius graphs, nearest neighbors, and the offsets of a pixel neighbourhood."""

import math
from functools import lru_cache

import torch
from torch import Tensor


def radius_graph(positions: Tensor, radius: float, batch: Tensor | None = None) -> Tensor:
    """Edges between all pairs of distinct nodes of a graph at most `radius` apart.

    The result is exact, without the limit on neighbours (32 by default) at which `torch_geometric.nn.radius_graph`
    truncates silently. That function is used where its back end `pyg-lib`, which is not on PyPI, is installed,
    with the limit lifted; elsewhere a k-d tree is. Both give the same edges in the same order.

    Args:
        positions: Node positions.
        radius: Largest distance of joined nodes, in the unit of `positions`; positive.
        batch: Graph of each node, in any order; None where there is one graph.

    Shape:
        - positions: `[N, D]`
        - batch: `[N]`
        - output: `[2, E]` (source, target), sorted by target and then by source, PyG's `source_to_target` convention

    Raises:
        ValueError: If the radius is not positive.
    """
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}: a graph of radius 0 has no edge")
    build = _pyg_radius_graph if _has_pyg_lib() else _tree_radius_graph
    if batch is None or bool((batch.diff() >= 0).all()):
        return build(positions, radius, batch)
    order = batch.argsort(stable=True)
    return _sorted_by_target(order[build(positions[order], radius, batch[order])], len(positions))


def nearest_neighbors(sources: Tensor, targets: Tensor, count: int) -> Tensor:
    """The `count` nearest of the sources to each target, nearest first.

    By PyG where its back end `pyg-lib` is installed, elsewhere by a k-d tree; the same but for the order of neighbors
    that are equally far.

    Args:
        sources: Where neighbors are looked for.
        targets: Whose neighbors are looked for.
        count: Number k of neighbors; no more than there are sources.

    Shape:
        - sources: `[M, D]`; targets: `[N, D]`
        - output: `[N, k]`, int64

    Raises:
        ValueError: If there are fewer sources.
    """
    if not 0 < count <= len(sources):
        raise ValueError(f"count must be between 1 and the {len(sources)} points that there are, got {count}")
    find = _pyg_neighbors if _has_pyg_lib() else _tree_neighbors
    return find(sources.detach(), targets.detach(), count)


def knn_graph(positions: Tensor, count: int, batch: Tensor | None = None) -> Tensor:
    """Edges from the `count` nearest distinct nodes of its graph to each node; from all where there are fewer.

    Args:
        positions: Node positions.
        count: Number k of neighbors.
        batch: Graph of each node, in any order; None where there is one graph.

    Shape:
        - positions: `[N, D]`
        - batch: `[N]`
        - output: `[2, E]` (source, target), sorted by target and then by source, as `radius_graph`

    Raises:
        ValueError: If the number is not positive.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1 neighbor, got {count}")
    graphs = torch.zeros(len(positions), dtype=torch.long) if batch is None else batch
    edges = [torch.empty(2, 0, dtype=torch.long, device=positions.device)]
    for graph in graphs.unique():
        nodes = (graphs == graph).nonzero()[:, 0].to(positions.device)
        own = min(count, len(nodes) - 1)
        if own:
            # Of nodes in one place any may come first: the node itself goes, wherever it is, or else the last.
            found = nearest_neighbors(positions[nodes], positions[nodes], own + 1)
            itself = found == torch.arange(len(nodes), device=found.device)[:, None]
            itself[:, -1] |= ~itself.any(1)
            sources = found[~itself].view(len(nodes), own)
            edges.append(torch.stack([nodes[sources.flatten()], nodes.repeat_interleave(own)]))
    return _sorted_by_target(torch.cat(edges, 1), len(positions))


def _has_pyg_lib() -> bool:
    from lightning_modules._pyg import typing

    return bool(typing.WITH_PYG_LIB)


def _pyg_radius_graph(positions: Tensor, radius: float, batch: Tensor | None) -> Tensor:
    from lightning_modules._pyg import radius_graph as pyg_radius_graph

    edge_index = pyg_radius_graph(positions, radius, batch, loop=False, max_num_neighbors=max(len(positions), 1))
    return _sorted_by_target(edge_index, len(positions))


def _tree_radius_graph(positions: Tensor, radius: float, batch: Tensor | None) -> Tensor:
    from scipy.spatial import KDTree  # takes a while, and images need none

    points = positions.detach().double().cpu()
    sizes = [len(points)] if batch is None else torch.bincount(batch).tolist()
    edges, first = [], 0
    for size in sizes:
        if size > 1:
            # query_pairs gives each pair once; both directions are edges.
            pairs = torch.from_numpy(
                KDTree(points[first : first + size].numpy()).query_pairs(radius, output_type="ndarray")
            )
            edges.append(torch.cat([pairs, pairs.flip(1)]).long().view(-1, 2) + first)
        first += size
    edge_index = torch.cat(edges).T if edges else torch.empty(2, 0, dtype=torch.long)
    return _sorted_by_target(edge_index, len(points)).to(positions.device)


def _pyg_neighbors(sources: Tensor, targets: Tensor, count: int) -> Tensor:
    from lightning_modules._pyg import knn

    target, source = knn(sources, targets, count)
    distance = (sources[source] - targets[target]).square().sum(1).view(len(targets), count)
    return source.view(len(targets), count).gather(1, distance.argsort(dim=1, stable=True))


def _tree_neighbors(sources: Tensor, targets: Tensor, count: int) -> Tensor:
    from scipy.spatial import KDTree

    tree = KDTree(sources.cpu().numpy())
    index = torch.from_numpy(tree.query(targets.cpu().numpy(), count)[1])  # without the last axis for one neighbor
    return index.long().view(len(targets), count).to(sources.device)


def _sorted_by_target(edge_index: Tensor, num_nodes: int) -> Tensor:
    order = (edge_index[1] * num_nodes + edge_index[0]).argsort()
    return edge_index[:, order].contiguous()


@lru_cache(maxsize=64)
def half_offsets(radius: float) -> tuple[tuple[int, int], ...]:
    """One of each pair ±δ of the pixel offsets δ = (row, column) with 0 < ‖δ‖ ≤ `radius`.

    Raises:
        ValueError: If the radius is under 1, so that no pixel has a neighbour.
    """
    if radius < 1:
        raise ValueError(f"radius={radius} joins no pixels: the nearest neighbour is 1 pixel away; give a radius ≥ 1")
    reach = int(radius)
    square = ((row, column) for row in range(reach + 1) for column in range(-reach, reach + 1))
    return tuple(offset for offset in square if offset > (0, 0) and offset[0] ** 2 + offset[1] ** 2 <= radius**2)


def within_image(radius: float, height: int, width: int) -> float:
    """The radius, or the least that joins all pixels of an image of this size as well."""
    return min(radius, float(math.ceil(math.hypot(height, width))))
