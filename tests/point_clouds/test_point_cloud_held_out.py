"""The error that held-out points show, against the surface that it is estimated without."""

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Data

from lightning_modules import PointCloudDiffusion
from lightning_modules.point_clouds import halves, held_out_error

LEVEL = 0.03


def sphere(count: int, seed: int) -> Tensor:
    points = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(points, dim=1)


def noise(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_halves_are_all_points_once_and_others_for_each_key() -> None:
    first, rest = halves(101, torch.tensor(3))
    assert (len(first), len(rest)) == (51, 50)
    assert sorted([*first.tolist(), *rest.tolist()]) == list(range(101))
    assert not torch.equal(first, halves(101, torch.tensor(4))[0])


@pytest.mark.parametrize("count", [5000, 20_000])
@pytest.mark.parametrize("left", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("shift", [0.0, -0.4])
def test_it_is_the_squared_distance_to_the_surface(count: int, left: float, shift: float) -> None:
    """Of points that are off the unit sphere by so many standard deviations of the noise, at random and all the same
    way, as where a surface has shrunk; the noise shorter than the points are apart, and longer.
    """
    surface = sphere(count, 0)
    off = LEVEL * (shift + left * noise(count, 1)[:, :1])
    others = sphere(count, 2) + LEVEL * noise(count, 3)
    error = held_out_error(surface * (1 + off), others, torch.tensor(LEVEL).double())
    truth = float((off / LEVEL).square().mean())
    # Heights are those of points on a sphere, not on a plane, and normals have errors.
    assert float(error) == pytest.approx(truth, abs=0.03)


def test_its_gradient_is_that_of_the_distance_to_the_surface() -> None:
    names = [spec.name for spec in PointCloudDiffusion().parameter_specs]
    bad = torch.tensor([1.5, 1.5, 4.0, 1.0, 0.8], dtype=torch.float64).log().requires_grad_()
    sums = []
    for number in range(4):
        noisy = sphere(3000, number) + LEVEL * noise(3000, 10 + number)
        own, left = halves(3000, torch.tensor(number))
        parameters = dict(zip(names, bad.exp(), strict=True))
        restored = PointCloudDiffusion()(Data(pos=noisy[own]), noise=LEVEL, **parameters)
        truth = (restored.norm(dim=1) - 1).square().mean() / LEVEL**2
        estimate = held_out_error(restored, noisy[left], torch.tensor(LEVEL).double())
        sums.append(torch.stack([torch.autograd.grad(e, bad, retain_graph=True)[0] for e in (estimate, truth)]))
    estimated, true = torch.stack(sums).mean(0)
    assert float(torch.cosine_similarity(estimated, true, dim=0)) > 0.9
    assert float(estimated.norm() / true.norm()) == pytest.approx(1, abs=0.3)


def test_edges_and_thin_walls_count_to_a_limit() -> None:
    surface = sphere(500, 0)
    far = surface[:20] * 40
    level = torch.tensor(LEVEL).double()
    assert float(held_out_error(surface, far, level)) <= 24 + 1e-9


def test_nothing_held_out_is_no_error() -> None:
    assert float(held_out_error(sphere(5, 0), sphere(5, 0)[:0], torch.tensor(0.1))) == 0
