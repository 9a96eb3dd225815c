"""Topology of graphs: exact radius graphs and the offsets of a pixel neighbourhood."""

import math
from functools import lru_cache

import torch
from scipy.spatial import KDTree
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


def _has_pyg_lib() -> bool:
    import torch_geometric.typing

    return bool(torch_geometric.typing.WITH_PYG_LIB)


def _pyg_radius_graph(positions: Tensor, radius: float, batch: Tensor | None) -> Tensor:
    from torch_geometric.nn import radius_graph as pyg_radius_graph

    edge_index = pyg_radius_graph(positions, radius, batch, loop=False, max_num_neighbors=max(len(positions), 1))
    return _sorted_by_target(edge_index, len(positions))


def _tree_radius_graph(positions: Tensor, radius: float, batch: Tensor | None) -> Tensor:
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
