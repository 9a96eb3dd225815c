"""The result depends on the parameters and the operator's reach, not on the bound of the radius."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Data

from lightning_modules.graph import GraphDiffusion
from lightning_modules.graph.message_passing import diffuse_graph
from lightning_modules.graph.parameters import DiffusionParameters

NAMES = ("sigma", "tau", "radius", "sigma_s", "sigma_f")


def results(diffusion: GraphDiffusion, data: Any, radius: float, max_radius: float) -> list[Tensor]:
    """Restored signal and the gradients of all that has one."""
    signal = data.x if isinstance(data, Data) else data
    leaves = [
        torch.full((1 if isinstance(data, Data) else len(data),), value, dtype=signal.dtype, requires_grad=True)
        for value in (0.7, 0.2, radius, 2.0, 0.8)
    ]
    values = dict(zip(NAMES, leaves, strict=True))
    if isinstance(data, Data):
        parameters = DiffusionParameters.of_each(leaves[0], **values, smooth_steps=3)
        noise = torch.full_like(leaves[0], 0.05)
        restored = diffuse_graph(data, parameters, noise, diffusion.laplacian, diffusion.reach, max_radius)
    else:
        diffusion.set_bounds({"radius": (2.5, max_radius)})
        restored = diffusion(data, **values, smooth_steps=3, noise=0.05)
    return [restored, *torch.autograd.grad((restored * restored.detach().cos()).sum(), (signal, *leaves))]


@pytest.mark.usefixtures("graph_backend")
@pytest.mark.filterwarnings("ignore:.*exceeds the stable step")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("implementation", ["auto", "message_passing"])
@pytest.mark.parametrize("signal", ["image", "dense", "sparse", "unnormalized", "cloud"])
def test_the_bound_of_the_radius_changes_nothing(
    signal: str, implementation: Any, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 13, 11, dtype=dtype, generator=generator)
    if signal == "image":
        diffusion, data = GraphDiffusion(3, implementation=implementation), images.requires_grad_()
    elif signal == "cloud":
        diffusion = GraphDiffusion(1, 1, "patches", implementation=implementation, reach=3.0)
        x = torch.rand(40, 2, dtype=dtype, generator=generator).requires_grad_()
        data = Data(x=x, pos=8 * torch.rand(40, 3, dtype=dtype, generator=generator))
    else:
        geometry = (3, 1) if signal == "sparse" else (3, 2)
        laplacian: Any = "unnormalized" if signal == "unnormalized" else None
        diffusion = GraphDiffusion(*geometry, "patches", laplacian, implementation, reach=3.0)
        data = images.requires_grad_()
    for radius in (2.6, 4.0):  # under and over the reach
        expected = results(diffusion, data, radius, radius)
        for bound in (4.0, 6.0, 10.0):
            for one, other in zip(results(diffusion, data, radius, bound), expected, strict=True):
                scale = max(1.0, float(other.detach().abs().max()))
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.usefixtures("graph_backend")
def test_the_smoothness_is_that_of_the_edges_within_reach() -> None:
    images = torch.rand(2, 3, 13, 11, generator=torch.Generator().manual_seed(0))
    for geometry in ((3, 1, "image"), (3, 2, "patches")):
        near, far = (GraphDiffusion(*geometry, reach=reach).smoothness(images, sigma=0.7) for reach in (2.0, 5.0))
        assert (near.similarity - far.similarity).abs().min() > 1e-6


@pytest.mark.parametrize(("reach", "signal"), [(0.5, "image"), (float("inf"), "image"), (-1.0, "patches")])
def test_refuses_an_impossible_reach(reach: float, signal: Any) -> None:
    with pytest.raises(ValueError, match="reach must be a finite number of pixels"):
        GraphDiffusion(3, signal=signal, reach=reach)


class Gray:
    """White noise in the form of an object."""

    def variance(self, images: torch.Tensor) -> torch.Tensor:
        return torch.full_like(images[:, :1], 0.01)

    def distance_bias(self, offset: tuple[int, int]) -> torch.Tensor:
        return torch.tensor(0.02)


@pytest.mark.parametrize("noise", [0.1, Gray()])
@pytest.mark.parametrize("implementation", ["auto", "message_passing"])
@pytest.mark.parametrize("radius", [9.0, torch.tensor([1e9, 30.0])])  # the diagonal is 7.8
def test_a_radius_or_reach_far_beyond_the_image_joins_all_its_pixels(
    implementation: Any, noise: Any, radius: Any
) -> None:
    images = torch.rand(2, 1, 6, 5, generator=torch.Generator().manual_seed(0))
    values = {"sigma": 0.5, "tau": 0.2, "radius": radius, "sigma_s": 2.0, "sigma_f": 0.5, "smooth_steps": 2}
    for reach in (2.0, 1e9):
        plain = GraphDiffusion(3, implementation="message_passing", reach=min(reach, 20.0))
        diffusion = GraphDiffusion(3, implementation=implementation, reach=reach)
        torch.testing.assert_close(diffusion(images, noise=noise, **values), plain(images, noise=0.1, **values))
    smoothness = [GraphDiffusion(3, reach=reach).smoothness(images, sigma=0.5).score for reach in (8.0, 1e9)]
    torch.testing.assert_close(*smoothness)
