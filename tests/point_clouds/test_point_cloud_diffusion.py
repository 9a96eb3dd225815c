"""Diffusion of point clouds against dense matrices, brute force and what a surface must keep."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial import KDTree
from torch import Tensor
from torch_geometric.data import Batch, Data

from lightning_modules import PointCloudDiffusion
from lightning_modules.point_clouds.neighborhoods import (
    compact_groups,
    median_spacing,
    smallest_eigenvector,
    thinned_neighbors,
    thinning,
)

LEVEL = 0.05
Array = NDArray[np.float64]


def start(**others: float) -> dict[str, float]:
    return {spec.name: spec.start for spec in PointCloudDiffusion().parameter_specs} | others


def bumpy(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Noisy points of a bumpy sphere."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator, dtype=torch.float64), dim=1)
    points = direction * (1 + 0.1 * (4 * direction).sin().prod(1, keepdim=True))
    return (points + LEVEL * torch.randn(count, 3, generator=generator, dtype=torch.float64)).to(dtype)


def sphere(count: int, level: float, seed: int = 0) -> Tensor:
    """Evenly spread points of the unit sphere, with noise."""
    number = torch.arange(count, dtype=torch.float64) + 0.5
    z, angle = 1 - 2 * number / count, math.pi * (1 + 5**0.5) * number
    flat = (1 - z**2).sqrt()
    points = torch.stack([flat * angle.cos(), flat * angle.sin(), z], 1)
    return points + level * torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(
    points: Array, features: Array | None, width: float, height: float, s: float, tau: float, steps: int
) -> Array:
    """Steps on one graph, by matrices over all pairs of points."""
    offset = points[None] - points[:, None]
    square = (offset**2).sum(2)
    near = np.exp(-square / (2 * width**2)) * np.maximum(1 - square / (2 * width) ** 2, 0) ** 2
    normals = []
    for weights in near:
        mean = weights @ points / weights.sum()
        spread = (points - mean).T @ (weights[:, None] * (points - mean)) / weights.sum()
        normals.append(np.linalg.eigh(spread)[1][:, 0])
    normal = np.array(normals)
    for _ in range(2):  # the weights once with the raw normals, to smooth them, and once with the smooth ones
        cosine = normal @ normal.T
        unlike = 1 - abs(cosine)
        if features is not None:
            unlike = 0.5 * ((features[None] - features[:, None]) ** 2).sum(2)
        weights, sign = near * np.exp(-unlike / s**2), np.sign(cosine)
        smooth = (weights * sign) @ normal
        normal, former = smooth / np.linalg.norm(smooth, axis=1, keepdims=True), normal
    normal = former
    for _ in range(steps):
        offset = points[None] - points[:, None]
        above = 0.5 * ((normal[:, None] * offset).sum(2) + sign * (normal[None] * offset).sum(2))
        final = weights * np.exp(-(above**2) / (2 * height**2))
        points = points + tau * ((final * above).sum(1) / final.sum(1))[:, None] * normal
    return points


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_steps_equal_dense_matrices(steps: int, guided: bool) -> None:
    points = bumpy(90)
    values = start(width_noise=2.0, width_spacing=1.0)
    guide = torch.rand(90, 2, generator=torch.Generator().manual_seed(3)).double() if guided else None
    operator = PointCloudDiffusion(num_neighbors=90, graphs=1, steps=steps)
    restored = operator(Data(pos=points), noise=LEVEL, guide=guide, **values)
    features = None
    if guide is not None:
        features = (guide - guide.mean(0)).numpy()
        features /= math.sqrt((features**2).sum(1).mean())
    expected = dense(
        points.numpy(),
        features,
        width=math.hypot(2 * LEVEL, median_spacing(KDTree(points.numpy()))),
        height=values["sigma_height"] * LEVEL,
        s=values["sigma_normal"],
        tau=values["tau"],
        steps=steps,
    )
    np.testing.assert_allclose(restored.numpy(), expected, atol=1e-9)
    assert (restored - points).norm(dim=1).mean() > 0.05 * LEVEL


@pytest.mark.parametrize(("neighbors", "free"), [(150, 0), (60, 2)])
def test_parameters_have_the_derivatives_of_finite_differences(neighbors: int, free: int) -> None:
    points = bumpy(150)
    # With all points as neighbors nothing jumps. With fewer, a second graph may be another one, and so may the first
    # under other widths.
    operator = PointCloudDiffusion(num_neighbors=neighbors, graphs=1 if free else 2, steps=2)
    names, numbers = zip(*start().items(), strict=True)

    def restored(*values: Tensor) -> Tensor:
        parameters = dict(zip(names, numbers[:free] + values, strict=True))
        return operator(Data(pos=points), noise=LEVEL, **parameters)

    values = [torch.tensor(number, dtype=torch.float64, requires_grad=True) for number in numbers[free:]]
    assert torch.autograd.gradcheck(restored, values, fast_mode=True)


@given(
    seed=st.integers(0, 2**31),
    scale=st.floats(1e-3, 1e3),
    shift=st.tuples(*[st.floats(-100, 100)] * 3),
)
@hypothesis_settings(max_examples=12)
def test_size_place_and_turn_do_not_matter(seed: int, scale: float, shift: tuple[float, float, float]) -> None:
    points = bumpy(80, seed % 7)
    operator = PointCloudDiffusion(num_neighbors=80)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)).double())[0]
    other = scale * points @ turn.T + scale * torch.tensor(shift, dtype=torch.float64)
    expected = operator(Data(pos=points), noise=LEVEL, **start())
    found = operator(Data(pos=other), noise=scale * LEVEL, **start())
    back = (found / scale - torch.tensor(shift, dtype=torch.float64)) @ turn
    torch.testing.assert_close(back, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("level", [0.01, 0.02, 0.03])
def test_a_sphere_keeps_its_volume(level: float) -> None:
    points = sphere(4000, level)
    restored = PointCloudDiffusion()(Data(pos=points), noise=level, **start())
    before, after = (each.norm(dim=1) for each in (points, restored))
    assert (after - 1).square().mean() < 0.1 * (before - 1).square().mean()
    assert abs(float(after.pow(3).mean()) - 1) < 0.005


def test_a_sphere_keeps_its_volume_over_many_rounds() -> None:
    points = sphere(2000, 0.02)
    for _ in range(8):
        points = PointCloudDiffusion()(Data(pos=points), noise=0.02, **start())
    # Means of the neighbors alone would take as much as this in one of them.
    assert abs(float(points.norm(dim=1).pow(3).mean()) - 1) < 0.025


def test_points_do_not_slide_along_the_surface() -> None:
    points = sphere(3000, 0.02)
    shift = PointCloudDiffusion()(Data(pos=points), noise=0.02, **start()) - points
    normal = torch.nn.functional.normalize(points, dim=1)
    along = shift - (shift * normal).sum(1, keepdim=True) * normal
    assert along.square().sum(1).mean() < 0.02 * shift.square().sum(1).mean()


def test_far_coordinates_are_as_good_as_near_ones() -> None:
    near = bumpy(400)
    origin = torch.tensor([5e5, 5e6, 300.0], dtype=torch.float64)  # as UTM has them
    operator = PointCloudDiffusion()
    expected = operator(Data(pos=near), noise=LEVEL, **start())
    found = operator(Data(pos=near + origin), noise=LEVEL, **start()) - origin
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"coordinates as large as 5e\+06 .* give them in float64"):
        operator(Data(pos=(near + origin).float()), noise=LEVEL, **start())


def test_a_point_at_the_origin_costs_far_coordinates_no_digits() -> None:
    near = bumpy(400)
    far = torch.cat([near, torch.tensor([[-5e5, -5e6, -300.0]])])
    operator = PointCloudDiffusion()
    expected = operator(Data(pos=far), noise=LEVEL, **start())[:-1]
    found = operator(Data(pos=far.float()), noise=LEVEL, **start())[:-1]
    # Rounding may choose another neighbor; without a center that the point leaves alone all of them are off.
    assert (found - expected).norm(dim=1).median() < 1e-5
    utm = (far + torch.tensor([5e5, 5e6, 300.0])).float()
    with pytest.raises(ValueError, match=r"coordinates as large as 5e\+06 have steps of"):
        operator(Data(pos=utm), noise=LEVEL, **start())


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_units_out_of_the_range_of_the_type_are_named(scale: float) -> None:
    with pytest.raises(ValueError, match=r"have squares that are out of the range of torch\.float32"):
        PointCloudDiffusion()(Data(pos=bumpy(50).float() * scale), noise=LEVEL * scale, **start())
    restored = PointCloudDiffusion()(Data(pos=bumpy(50) * scale), noise=LEVEL * scale, **start())
    expected = PointCloudDiffusion()(Data(pos=bumpy(50)), noise=LEVEL, **start())
    torch.testing.assert_close(restored / scale, expected, atol=1e-7, rtol=0)


def test_clouds_of_a_batch_do_not_see_each_other() -> None:
    clouds = [bumpy(count, count) for count in (70, 3, 120)]
    levels = torch.tensor([0.05, 0.05, 0.02]).double()
    operator = PointCloudDiffusion(num_neighbors=16)
    taus = torch.tensor([0.3, 0.5, 0.9]).double()
    alone = [
        operator(Data(pos=cloud), noise=level, **start() | {"tau": tau})
        for cloud, level, tau in zip(clouds, levels, taus, strict=True)
    ]
    batch = Batch.from_data_list([Data(pos=cloud) for cloud in clouds])
    together = operator(batch, noise=levels, **start() | {"tau": taus})
    torch.testing.assert_close(together, torch.cat(alone))
    order = batch.batch.new_tensor([i for triple in zip(range(70), range(73, 143), strict=True) for i in triple])
    rest = torch.tensor([i for i in range(193) if i not in set(order.tolist())])
    woven = torch.cat([order, rest])
    found = operator(Data(pos=batch.pos[woven], batch=batch.batch[woven]), noise=levels, **start() | {"tau": taus})
    torch.testing.assert_close(found, together[woven])


def test_no_noise_is_the_identity() -> None:
    points = bumpy(100)
    assert torch.equal(PointCloudDiffusion()(Data(pos=points), noise=0, **start()), points)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 20])
def test_few_points_for_many_neighbors(count: int) -> None:
    points = bumpy(count)
    restored = PointCloudDiffusion(num_neighbors=48)(Data(pos=points), noise=LEVEL, **start())
    assert restored.shape == points.shape
    assert restored.isfinite().all()
    if count < 4:
        assert torch.equal(restored, points)


@pytest.mark.parametrize("kind", ["all the same", "each twice", "on a line", "on a plane"])
def test_degenerate_clouds_stay_finite(kind: str) -> None:
    points = bumpy(64, dtype=torch.float32)
    points = {
        "all the same": points[:1].expand(64, 3).clone(),
        "each twice": points[:32].repeat(2, 1),
        "on a line": points * torch.tensor([1.0, 0, 0]),
        "on a plane": points * torch.tensor([1.0, 1, 0]),
    }[kind]
    parameters = {name: torch.tensor(value, requires_grad=True) for name, value in start().items()}
    restored = PointCloudDiffusion(num_neighbors=12)(Data(pos=points), noise=LEVEL, **parameters)
    assert restored.isfinite().all()
    restored.square().sum().backward()
    assert all(value.grad is None or value.grad.isfinite() for value in parameters.values())
    if kind in ("all the same", "on a plane"):
        torch.testing.assert_close(restored, points)


def test_an_outlier_stays_and_leaves_the_others_alone() -> None:
    points = bumpy(500)
    operator = PointCloudDiffusion()
    far = torch.cat([points, torch.tensor([[400.0, -300, 100]]).double()])
    restored = operator(Data(pos=far), noise=LEVEL, **start())
    assert torch.equal(restored[-1], far[-1])
    plain = operator(Data(pos=points), noise=LEVEL, **start())

    def error(cloud: Tensor) -> float:
        return float((cloud.norm(dim=1) - 1).std())

    assert abs(error(restored[:-1]) - error(plain)) < 0.1 * error(plain)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.zeros(0, 3), "the cloud is empty"),
        (torch.zeros(5, 2), r"must be \[N, 3\], got \[5, 2\].*plane"),
        (torch.zeros(5), r"must be \[N, 3\], got \[5\]"),
        (torch.zeros(5, 3, dtype=torch.long), "floating-point, got torch.int64"),
        (torch.tensor([[0.0, 0, 0], [1, float("nan"), 0]]), "1 of 2 points have NaN or infinite"),
        (torch.tensor([[0.0, 0, 0], [1, float("inf"), 0]]), "1 of 2 points have NaN or infinite"),
    ],
)
def test_what_is_no_cloud_is_named(points: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PointCloudDiffusion()(Data(pos=points), noise=LEVEL, **start())


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({"x": torch.zeros(5, 3)}, {}, "no pos"),
        ({"pos": torch.rand(5, 3), "batch": torch.zeros(4, dtype=torch.long)}, {}, "batch of the cloud"),
        ({"pos": torch.rand(5, 3), "batch": torch.tensor([-1, 0, 0, 0, 0])}, {}, "batch of the cloud"),
        ({"pos": torch.rand(5, 3), "guide": torch.zeros(4, 1)}, {}, "guide must be"),
        ({"pos": torch.rand(5, 3)}, {"noise": -1.0}, "noise must be finite and not negative"),
        ({"pos": torch.rand(5, 3)}, {"tau": float("nan")}, "tau must be finite"),
        ({"pos": torch.rand(5, 3)}, {"tau": torch.ones(2)}, "tau"),
        ({"pos": torch.rand(5, 3)}, {"noise": torch.ones(5)}, "noise"),
    ],
)
def test_wrong_arguments_are_named(data: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PointCloudDiffusion()(Data(**data), **{"noise": LEVEL, **start(), **options})


@pytest.mark.parametrize("option", ["num_neighbors", "graphs", "steps"])
def test_counts_are_positive(option: str) -> None:
    with pytest.raises(ValueError, match=option):
        PointCloudDiffusion(**{option: 0})


# Neighbors and groups


@given(st.integers(1, 300), st.integers(1, 16))
@hypothesis_settings(max_examples=40)
def test_groups_hold_every_point(count: int, size: int) -> None:
    groups, place = compact_groups(torch.rand(count, 3, generator=torch.Generator().manual_seed(count)), size)
    assert torch.equal(groups.flatten()[place], torch.arange(count))
    assert groups.unique().tolist() == list(range(count))
    assert groups.shape[1] <= 2 * size or count < 2 * size


@pytest.mark.parametrize("radius", [0.1, 0.6, 1.5])
def test_thinned_neighbors_are_the_nearest_of_a_part(radius: float) -> None:
    points, centers, count = bumpy(600), bumpy(50, 1), 12
    parts = thinning(KDTree(points.numpy()), centers, radius, count)
    found = thinned_neighbors(points, centers, count, parts, 1)
    distance = torch.cdist(centers, points)
    within = (distance < radius).sum(1).double().median()
    if within <= count:
        assert torch.equal(found, distance.argsort(1)[:, :count])
    for place, own in enumerate(found):
        assert len(own.unique()) == count
        # No more of all nearer points than their number over that of the parts, but for chance.
        nearer = int((distance[place] <= distance[place, own].max()).sum())
        assert nearer <= 4 * max(count, count * round(float(within) / count))
    spread = distance.gather(1, found).amax(1).median()
    assert spread < 1.6 * max(radius, float(distance.sort(1).values[:, count - 1].median()))


def test_smallest_eigenvector_is_that_of_eigh() -> None:
    roots = torch.randn(200, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices = roots @ roots.mT
    found = smallest_eigenvector(matrices)
    expected = torch.linalg.eigh(matrices)[1][..., 0]
    torch.testing.assert_close((found * expected).sum(1).abs(), torch.ones(200).double(), atol=1e-9, rtol=0)
    assert torch.autograd.gradcheck(
        lambda root: smallest_eigenvector(root @ root.mT)[:, :, None] * smallest_eigenvector(root @ root.mT)[:, None],
        roots[:5].clone().requires_grad_(),
    )


def test_spacing_is_the_root_of_the_area_of_a_point() -> None:
    points = sphere(3000, 0.0)
    near, far = (median_spacing(KDTree(scale * points.numpy())) for scale in (1, 100))
    assert near == pytest.approx(math.sqrt(4 * math.pi / 3000), rel=0.1)
    assert far == pytest.approx(100 * near)
