"""Topology: exact radius graphs in PyG's convention."""

import pytest
import torch
import torch_geometric.typing
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.graph import knn_graph, radius_graph
from lightning_modules.graph.topology import half_offsets, nearest_neighbors


def brute_force(positions: torch.Tensor, radius: float, batch: torch.Tensor) -> set[tuple[int, int]]:
    distance = (positions[:, None] - positions[None]).norm(dim=2)
    joined = (distance <= radius) & (batch[:, None] == batch[None])
    joined.fill_diagonal_(False)
    return set(map(tuple, joined.nonzero().tolist()))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.floats(0.5, 6), st.integers(0, 10**6))
def test_equals_brute_force(sizes: list[int], radius: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    # Whole numbers: distances exactly equal to the radius, and nodes in one place, occur.
    positions = torch.randint(0, 6, (len(batch), 2), generator=generator).double()
    radius = round(radius) or 1
    edge_index = radius_graph(positions, radius, batch)
    assert set(map(tuple, edge_index.T.tolist())) == brute_force(positions, radius, batch)
    assert edge_index.dtype == torch.long
    order = edge_index[1] * len(batch) + edge_index[0]
    assert (order.diff() > 0).all()  # sorted by target, then source; no edge twice


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 10**6))
def test_nearest_neighbors_equal_brute_force(sizes: list[int], count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    batch = batch[torch.randperm(len(batch), generator=generator)]
    positions = torch.rand(len(batch), 3, generator=generator).double()
    distance = (positions[:, None] - positions[None]).norm(dim=2)
    distance[batch[:, None] != batch[None]] = torch.inf
    distance.fill_diagonal_(torch.inf)
    expected = set()
    for node, row in enumerate(distance):
        order = row.argsort()[:count]
        expected |= {(int(source), node) for source in order if row[source].isfinite()}
    edge_index = knn_graph(positions, count, batch)
    assert set(map(tuple, edge_index.T.tolist())) == expected
    assert edge_index.dtype == torch.long
    order = edge_index[1] * max(len(batch), 1) + edge_index[0]
    assert (order.diff() > 0).all()  # sorted by target, then source; no edge twice


def test_nodes_in_one_place_are_neighbors_of_each_other_and_not_of_themselves() -> None:
    positions = torch.zeros(7, 3)
    edge_index = knn_graph(positions, 3)
    assert (edge_index[0] != edge_index[1]).all()
    assert torch.bincount(edge_index[1]).tolist() == [3] * 7


def test_more_than_32_neighbours_are_kept() -> None:
    edge_index = radius_graph(torch.rand(100, 2), radius=2.0)
    assert edge_index.shape[1] == 100 * 99


@pytest.mark.skipif(not torch_geometric.typing.WITH_PYG_LIB, reason="pyg-lib, which is not on PyPI, is not installed")
def test_equals_pyg() -> None:
    from lightning_modules.graph.topology import (
        _pyg_neighbors,
        _pyg_radius_graph,
        _tree_neighbors,
        _tree_radius_graph,
    )

    positions, batch = torch.rand(60, 2), torch.arange(3).repeat_interleave(20)
    expected = _pyg_radius_graph(positions, 0.4, batch)
    assert torch.equal(_tree_radius_graph(positions, 0.4, batch), expected)
    sources, targets = torch.rand(80, 3), torch.rand(50, 3)
    assert torch.equal(_tree_neighbors(sources, targets, 7), _pyg_neighbors(sources, targets, 7))


@given(st.floats(1, 8))
def test_half_offsets_hold_one_of_each_pair(radius: float) -> None:
    half = half_offsets(radius)
    opposite = {(-a, -b) for a, b in half}
    assert not opposite & set(half)
    reach = range(-9, 10)
    disc = {(a, b) for a in reach for b in reach if 0 < a * a + b * b <= radius**2}
    assert set(half) | opposite == disc


def test_refuses_radii_without_an_edge() -> None:
    with pytest.raises(ValueError, match="radius must be positive"):
        radius_graph(torch.rand(3, 2), 0.0)
    with pytest.raises(ValueError, match="count must be at least 1 neighbor, got 0"):
        knn_graph(torch.rand(3, 2), 0)
    with pytest.raises(ValueError, match="between 1 and the 3 points that there are, got 4"):
        nearest_neighbors(torch.rand(3, 2), torch.rand(5, 2), 4)
    with pytest.raises(ValueError, match="joins no pixels"):
        half_offsets(0.9)
