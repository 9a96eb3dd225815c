"""ResidualDenoiser: identity at the start, the graph's place in it, and a gradient for every parameter."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.networks import ResidualDenoiser


def blend(signal: Tensor, features: Tensor | None) -> Tensor:
    """A stand-in for graph diffusion: a 3x3 mean, weighted by the similarity of the features to their mean."""
    features = signal if features is None else features
    weight = torch.exp(-features.square().mean(1, keepdim=True))
    return F.avg_pool2d(signal * weight, 3, 1, 1) / F.avg_pool2d(weight, 3, 1, 1)


@pytest.fixture
def noisy() -> Tensor:
    return torch.rand(2, 3, 37, 31, generator=torch.Generator().manual_seed(0))


def test_starts_at_the_diffused_image(noisy: Tensor) -> None:
    for graph in (True, False):
        network = ResidualDenoiser(width=8, depth=4, graph=graph, graph_on="features")
        expected = blend(noisy, network.projection(network.stem(noisy))) if graph else noisy
        torch.testing.assert_close(network(noisy, blend), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("graph", "graph_on"), [(True, "features"), (True, "patches"), (False, "features")])
def test_every_parameter_has_a_gradient_after_one_step(noisy: Tensor, graph: bool, graph_on) -> None:
    torch.manual_seed(0)
    network = ResidualDenoiser(width=8, depth=4, graph=graph, graph_on=graph_on)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for step in range(3):
        optimizer.zero_grad()
        (network(noisy, blend) - 0.5).square().mean().backward()
        assert all(p.grad is not None for p in network.parameters()), "distributed training needs one at every step"
        if step == 2:
            silent = [name for name, p in network.named_parameters() if not p.grad.abs().sum() > 0]
            assert not silent
        optimizer.step()


def test_as_many_parameters_without_the_graph() -> None:
    with_graph, without = (ResidualDenoiser(graph=graph).state_dict() for graph in (True, False))
    assert {k: v.shape for k, v in with_graph.items()} == {k: v.shape for k, v in without.items()}


def test_the_noisy_image_is_what_is_diffused(noisy: Tensor) -> None:
    calls = []

    def diffuse(signal: Tensor, features: Tensor | None) -> Tensor:
        calls.append((signal, features))
        return signal

    network = ResidualDenoiser(width=8, depth=4, graph_features=5, graph_on="features")
    network(noisy, diffuse)
    ((signal, features),) = calls
    assert signal is noisy
    assert features.shape == (2, 5, 37, 31)
    assert features.requires_grad
    calls.clear()
    ResidualDenoiser(width=8, depth=4, graph_on="patches")(noisy, diffuse)
    ((signal, features),) = calls
    assert signal is noisy
    assert features is None


def test_without_the_graph_equals_a_diffusion_that_does_nothing(noisy: Tensor) -> None:
    torch.manual_seed(0)
    network, plain = ResidualDenoiser(width=8, depth=4), ResidualDenoiser(width=8, depth=4, graph=False)
    state = {k: torch.randn_like(v) * 0.1 for k, v in network.state_dict().items()}
    network.load_state_dict(state)
    plain.load_state_dict(state)
    expected = network(noisy, lambda signal, features: signal)
    torch.testing.assert_close(plain(noisy), expected)
    assert not torch.allclose(network(noisy, blend), expected)


def test_the_graph_term_of_the_gradient_reaches_the_features(noisy: Tensor) -> None:
    torch.manual_seed(0)
    network = ResidualDenoiser(width=8, depth=4, graph_on="features")
    network.load_state_dict({k: torch.randn_like(v) * 0.3 for k, v in network.state_dict().items()})

    def gradient(diffuse) -> Tensor:
        network.zero_grad()
        network(noisy, diffuse).square().mean().backward()
        return network.projection.weight.grad.clone()

    through_graph = gradient(blend)
    beside_it = gradient(lambda signal, features: blend(signal, features.detach()))
    assert (through_graph - beside_it).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"depth": 3}, "depth must be at least 4, got 3"),
        ({"graph_on": "edges"}, "graph_on must be 'features' or 'patches', got 'edges'"),
        ({"graph_features": 0}, "graph_features must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResidualDenoiser(**arguments)


def test_wrong_channels_and_a_missing_diffusion_are_errors(noisy: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expects images of shape \[B, 1, H, W\], got \[2, 3, 37, 31\]"):
        ResidualDenoiser(in_channels=1)(noisy)
    with pytest.raises(ValueError, match="graph=False"):
        ResidualDenoiser()(noisy)
