"""Graphs of a user: loops, repeated edges, batches in any order, isolated nodes, and what is refused."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Batch, Data
from torch_geometric.utils import add_self_loops

from lightning_modules.graph import GraphDiffusion, radius_graph

VALUES: dict[str, Any] = {"sigma": 0.5, "tau": 0.2, "radius": 2.0, "sigma_s": 2.0, "sigma_f": 0.5, "smooth_steps": 3}
LAPLACIANS = ("symmetric", "random_walk", "unnormalized")


def cloud() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(40, 3, generator=generator), 5 * torch.rand(40, 2, generator=generator)


@pytest.mark.filterwarnings("ignore:.*exceeds the stable step")
@pytest.mark.parametrize("laplacian", LAPLACIANS)
def test_loops_repeated_edges_their_order_and_direction_count_for_nothing(laplacian: Any) -> None:
    x, pos = cloud()
    edges = radius_graph(pos, 2.0)
    diffusion = GraphDiffusion(3, signal="patches", laplacian=laplacian, reach=2.0)
    expected = diffusion(Data(x=x, pos=pos), **VALUES)
    order = torch.randperm(edges.shape[1], generator=torch.Generator().manual_seed(1))
    one_way = edges[:, edges[0] < edges[1]]
    for other in (add_self_loops(edges)[0], torch.cat([edges, edges[:, :50]], 1), edges[:, order], one_way):
        torch.testing.assert_close(diffusion(Data(x=x, pos=pos, edge_index=other), **VALUES), expected)


def test_a_batch_in_any_order() -> None:
    x, pos = cloud()
    batch = torch.arange(40) % 2
    order = batch.argsort(stable=True)
    diffusion = GraphDiffusion(3, signal="patches")
    found = diffusion(Data(x=x, pos=pos, batch=batch), **VALUES)
    sorted_ = diffusion(Data(x=x[order], pos=pos[order], batch=batch[order]), **VALUES)
    torch.testing.assert_close(found[order], sorted_)
    for graph in (0, 1):
        own = batch == graph
        torch.testing.assert_close(found[own], diffusion(Data(x=x[own], pos=pos[own]), **VALUES))


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_graph_without_nodes_has_its_place_in_a_batch(empty: int) -> None:
    x, pos = cloud()
    graphs = [Data(x=x[:15], pos=pos[:15]), Data(x=x[15:], pos=pos[15:])]
    graphs.insert(empty, Data(x=x[:0], pos=pos[:0]))
    sigma = torch.tensor([0.3, 0.5, 0.7])
    expected = [
        GraphDiffusion(3)(graph, **{**VALUES, "sigma": float(own)}) for graph, own in zip(graphs, sigma, strict=True)
    ]
    found = GraphDiffusion(3)(Batch.from_data_list(graphs), **{**VALUES, "sigma": sigma})
    torch.testing.assert_close(found, torch.cat(expected))


@pytest.mark.filterwarnings("ignore:.*exceeds the stable step")
@pytest.mark.parametrize("laplacian", LAPLACIANS)
@pytest.mark.parametrize(("tau", "steps"), [(0.3, 10), (0.9, 60), (1.0, 2), (1.0, 500)])
def test_isolated_nodes_keep_their_value(tau: float, steps: int, laplacian: Any) -> None:
    x = torch.tensor([[0.0, 0, 0], [0.01, 0, 0], [5, 5, 5]], requires_grad=True)
    sigma = torch.tensor(0.1, requires_grad=True)
    values = {**VALUES, "sigma": sigma, "sigma_f": 0.1, "radius": 0.1, "sigma_s": 0.1, "tau": torch.tensor([tau])}
    diffusion = GraphDiffusion(1, signal="patches", laplacian=laplacian, reach=0.1)
    restored = diffusion(Data(x=x, pos=x.detach()), **{**values, "smooth_steps": steps})
    torch.testing.assert_close(restored[2], x[2])
    assert (restored[:2] - x[:2]).abs().max() > 1e-3
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(restored.sum(), (x, sigma)))


@pytest.mark.parametrize("size", [13, 60])
def test_isolated_patches_keep_their_value_on_the_sparse_path_too(size: int) -> None:
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    values = {**VALUES, "sigma": 1.0, "tau": 0.5, "radius": 3.0, "sigma_f": 1.0}
    diffusion = GraphDiffusion(5, 4, "patches", reach=4.5)
    untouched, smoothed = (diffusion(images, **{**values, "smooth_steps": steps}) for steps in (0, 200))
    torch.testing.assert_close(smoothed, untouched)


@pytest.mark.parametrize("implementation", ["auto", "message_passing"])
@pytest.mark.parametrize("tau", [0.95, 0.99, 0.999])
def test_long_steps_on_unlike_patches_keep_their_digits(tau: float, implementation: Any) -> None:
    board = ((torch.arange(32)[:, None] // 8 + torch.arange(32) // 8) % 2).double()
    images = board.expand(1, 3, -1, -1) + 0.01 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    diffusion = GraphDiffusion(8, 5, "patches", implementation=implementation)
    values = {"sigma": 1.0, "sigma_f": 1.0, "radius": 10.0, "sigma_s": 20.0, "tau": tau, "smooth_steps": 10}
    single, double = (diffusion(images.to(dtype), **values) for dtype in (torch.float32, torch.float64))
    assert (single - double).abs().max() < 1e-3


@pytest.mark.parametrize("signal", ["patches", "image"])
@pytest.mark.parametrize("size", [10, 12])  # patches: dense and sparse
@pytest.mark.parametrize("name", [*VALUES, "noise"])
def test_one_rule_for_the_shapes_of_parameters(name: str, size: int, signal: Any) -> None:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    diffusion = GraphDiffusion(3, signal=signal)
    values = {**VALUES, "noise": 0.1}
    expected = diffusion(images, **values)
    for shape in ((), (1,), (2,), (2, 1, 1, 1)):
        torch.testing.assert_close(diffusion(images, **{**values, name: torch.full(shape, values[name])}), expected)
    with pytest.raises(ValueError, match=r"for each of 2 images.*got \[3\]"):
        diffusion(images, **{**values, name: torch.full((3,), values[name])})
    x, pos = cloud()
    with pytest.raises(ValueError, match=rf"{name} must be one number or one for each of 1 graphs, got \[3\]"):
        diffusion(Data(x=x, pos=pos), **{**values, name: torch.full((3,), values[name])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(40, 3, dtype=torch.uint8)}, "x of the graph must be floating-point, got torch.uint8"),
        ({"pos": torch.zeros(40, 2, dtype=torch.long)}, "pos of the graph must be floating-point, got torch.int64"),
        ({"x": torch.zeros(40)}, r"x of the graph must be \[N, D\] .*got \[40\]: a column of numbers is \[N, 1\]"),
        ({"pos": torch.zeros(39, 2)}, r"pos of the graph must be \[N, D\] with the N = 40 of x, got \[39, 2\]"),
        ({"batch": torch.zeros(3, dtype=torch.long)}, r"batch of the graph must be \[N\] with N = 40, got \[3\]"),
        ({"batch": torch.arange(40) - 1}, "batch of the graph must be integers, counted from 0, .* the least -1"),
        ({"batch": torch.zeros(40)}, "batch of the graph must be integers, counted from 0, got torch.float32"),
        ({"pos": torch.full((40, 2), torch.nan)}, "pos of the graph has NaN or infinite entries"),
        ({"pos": torch.eye(40, 2).log()}, "pos of the graph has NaN or infinite entries"),
        ({"edge_index": torch.tensor([[0, -1], [1, 0]])}, "edge_index must name the 40 nodes of x.*got -1"),
        ({"edge_index": torch.tensor([[0, 1], [1, 40]])}, "edge_index must name the 40 nodes of x.*got 40"),
        (
            {"edge_index": torch.tensor([[0, 2], [1, 3]]), "batch": torch.arange(40) // 3},
            "edge_index joins nodes of different graphs of the batch, 2 of graph 0 and 3 of graph 1",
        ),
        ({"edge_index": torch.zeros(2, 5)}, r"edge_index must be int64 \[2, E\], got torch.float32 \[2, 5\]"),
    ],
)
def test_refuses_what_is_not_a_graph(change: dict[str, Tensor], message: str) -> None:
    x, pos = cloud()
    with pytest.raises(ValueError, match=message):
        GraphDiffusion(3)(Data(**{"x": x, "pos": pos, **change}), **VALUES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"smooth_steps": -3}, "smooth_steps must not be negative, got -3"),
        ({"smooth_steps": torch.tensor([1.5])}, "smooth_steps must be whole numbers"),
        ({"radius": float("inf")}, "radius must be finite and not negative, got inf"),
        ({"sigma": -1.0}, "sigma must be finite and not negative, got -1"),
        ({"sigma_f": float("nan")}, "sigma_f must be finite and not negative, got nan"),
        ({"tau": torch.tensor([-0.1])}, "tau must be finite and not negative, got -0.1"),
        ({"noise": -0.1}, "got -0.1"),
    ],
)
def test_refuses_impossible_parameters(change: dict[str, Any], message: str) -> None:
    x, pos = cloud()
    for diffusion in (GraphDiffusion(3), GraphDiffusion(3, signal="patches"), GraphDiffusion(3, 2, "patches")):
        for noisy in (torch.rand(1, 3, 8, 8), Data(x=x, pos=pos)):
            with pytest.raises(ValueError, match=message):
                diffusion(noisy, **{**VALUES, **change})


@pytest.mark.usefixtures("graph_backend")
def test_second_derivatives_are_right_or_refused() -> None:
    images = torch.rand(1, 1, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain = GraphDiffusion(3, implementation="message_passing", reach=1.0)
    assert torch.autograd.gradgradcheck(lambda y: plain(y, **VALUES).square().sum(), (images,))
    fast = GraphDiffusion(3, reach=1.0)
    smoothness = fast.smoothness(images, sigma=0.5).similarity
    for result in (fast(images, **VALUES), smoothness):
        (gradient,) = torch.autograd.grad(result.square().sum(), images, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(gradient.square().sum(), images)


def test_former_names_warn_and_work() -> None:
    images, guide = torch.rand(1, 3, 8, 8), torch.rand(1, 2, 8, 8)
    with pytest.warns(FutureWarning, match="reference=True is now implementation='message_passing'"):
        assert GraphDiffusion(3, reference=True).implementation == "message_passing"
    expected = GraphDiffusion(3)(images, **VALUES, guide=guide)
    with pytest.warns(FutureWarning, match="features is now guide"):
        assert torch.equal(GraphDiffusion(3)(images, **VALUES, features=guide), expected)
    x, pos = cloud()
    expected = GraphDiffusion(3)(Data(x=x, pos=pos, guide=pos), **VALUES)
    with pytest.warns(FutureWarning, match="features of the graph is now guide"):
        assert torch.equal(GraphDiffusion(3)(Data(x=x, pos=pos, features=pos), **VALUES), expected)
    assert not torch.equal(expected, GraphDiffusion(3)(Data(x=x, pos=pos), **VALUES))
    with pytest.raises(ValueError, match="implementation must be"):
        GraphDiffusion(3, implementation="slow")  # type: ignore[arg-type]


def test_importing_the_graph_package_imports_neither_pyg_nor_lightning() -> None:
    code = (
        "import sys, torch, lightning_modules.graph as graph\n"
        "graph.GraphDiffusion(3)(torch.rand(1, 3, 8, 8), sigma=1.0, tau=0.1, radius=2.0, sigma_s=1.0, sigma_f=1.0, "
        "smooth_steps=1)\n"
        "assert not {'torch_geometric', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
