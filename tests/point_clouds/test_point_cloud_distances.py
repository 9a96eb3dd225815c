"""Distances, noise levels and surface samples of point clouds against brute force."""

import math

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch, Data

from datamodules._formula_shapes import SHAPES, bracket, ellipsoid, pebble
from datamodules._surface_samples import sample_surface
from lightning_modules.point_clouds import chamfer_distance, estimate_cloud_noise, surface_distance

KEY = torch.tensor(12345)


def test_chamfer_is_that_of_all_pairs() -> None:
    first, second = torch.rand(200, 3).double().requires_grad_(), torch.rand(150, 3).double()
    pairs = torch.cdist(first, second).square()
    expected = pairs.amin(1).mean() + pairs.amin(0).mean()
    found = chamfer_distance(first, second)
    torch.testing.assert_close(found, expected)
    for own, other in zip(torch.autograd.grad(found, first), torch.autograd.grad(expected, first), strict=True):
        torch.testing.assert_close(own, other)


def test_distance_to_a_surface_is_that_to_its_triangles() -> None:
    trimesh = pytest.importorskip("trimesh")
    vertices, faces = pebble()
    surface, normals = sample_surface(vertices, faces, 60000, KEY)
    points = sample_surface(vertices, faces, 40, KEY + 1)[0]
    points = points + 0.03 * torch.randn(points.shape, generator=torch.Generator().manual_seed(0)).double()
    _, distances, _ = trimesh.proximity.closest_point_naive(trimesh.Trimesh(vertices, faces), points.numpy())
    expected = float(np.square(distances).mean())
    assert float(surface_distance(points, surface, normals)) == pytest.approx(expected, rel=0.02)
    assert float(surface_distance(points, surface)) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("sampling", ["even", "uniform"])
def test_samples_are_on_the_surface_and_spread_by_area(sampling: str) -> None:
    vertices, faces = bracket()
    points, normals = sample_surface(vertices, faces, 2000, KEY, sampling)
    again = sample_surface(vertices, faces, 2000, KEY, sampling)[0]
    assert torch.equal(points, again)
    assert not torch.equal(points, sample_surface(vertices, faces, 2000, KEY + 1, sampling)[0])
    torch.testing.assert_close(normals.norm(dim=1), torch.ones(2000).double())
    # Every point is on a plane of the bracket: its normal is an axis, and so is the face that it comes from.
    assert (normals.abs().amax(1) > 1 - 1e-9).all()
    corners = vertices[faces]
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2
    ends = areas[np.ptp(corners[..., 2], axis=1) < 1e-9].sum() / areas.sum()
    part = float((normals[:, 2].abs() > 0.5).double().mean())
    assert part == pytest.approx(ends, abs=4 * math.sqrt(ends * (1 - ends) / 2000))
    least = torch.cdist(points, points).fill_diagonal_(torch.inf).amin(1)
    side = math.sqrt(areas.sum() / 2000)
    assert bool(least.min() > 0.6 * side) == (sampling == "even")


def test_a_mesh_without_area_is_named() -> None:
    with pytest.raises(ValueError, match="the mesh of 1 triangles has no area"):
        sample_surface(np.zeros((3, 3)), np.array([[0, 1, 2]]), 10, KEY)


@pytest.mark.parametrize("name", [shape.__name__ for shape in {s: 0 for part in SHAPES.values() for s in part}])
def test_formula_shapes_are_closed(name: str) -> None:
    shape = next(shape for part in SHAPES.values() for shape in part if shape.__name__ == name)
    vertices, faces = shape()
    assert np.isfinite(vertices).all()
    _, number = np.unique(np.round(vertices, 9), axis=0, return_inverse=True)  # the poles of a star are many vertices
    corners = number.ravel()[faces]
    corners = corners[(corners != np.roll(corners, 1, axis=1)).all(1)]
    edges = np.concatenate([corners[:, [i, (i + 1) % 3]] for i in range(3)])
    _, count = np.unique(np.sort(edges, axis=1), axis=0, return_counts=True)
    assert (count == 2).all()


@pytest.mark.parametrize("level", [0.01, 0.02, 0.03])
@pytest.mark.parametrize("shape", [ellipsoid, pebble])
def test_the_noise_level_is_found(level: float, shape: object) -> None:
    points = sample_surface(*shape(), 6000, KEY, "even")[0]  # type: ignore[operator]
    noise = torch.randn(points.shape, generator=torch.Generator().manual_seed(1)).double()
    found = estimate_cloud_noise(Data(pos=points + level * noise))
    assert found.shape == (1,)
    assert float(found) == pytest.approx(level, rel=0.15)


def test_noise_levels_are_of_each_cloud_in_its_own_unit() -> None:
    points = sample_surface(*ellipsoid(), 3000, KEY, "even")[0]
    noisy = points + 0.02 * torch.randn(points.shape, generator=torch.Generator().manual_seed(1)).double()
    far = torch.tensor([5e5, 5e6, 0]).double()
    batch = Batch.from_data_list([Data(pos=each) for each in (noisy, 1000 * noisy + far, noisy[:5])])
    found = estimate_cloud_noise(batch)
    assert float(found[1]) == pytest.approx(1000 * float(found[0]), rel=1e-3)
    assert float(found[2]) == 0  # too few points to know
