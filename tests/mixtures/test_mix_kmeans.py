"""K-means against brute force, scikit-learn and the plain algorithm."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans as Reference
from torch import Tensor

from lightning_modules.mixtures import best_clustering
from lightning_modules.mixtures.brute_force import all_clusterings
from lightning_modules.mixtures.initialization import Reservoir, kmeans_plus_plus, random_samples, sample_keys
from lightning_modules.mixtures.kmeans.em import e_step, m_step
from lightning_modules.mixtures.kmeans.model import KMeansModel
from lightning_modules.mixtures.lloyd import assign, lloyd
from lightning_modules.mixtures.model import fit_in_memory


def blobs(samples: int = 500, width: int = 4, groups: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = 4 * torch.randn(groups, width, generator=generator, dtype=torch.float64)
    return centers[torch.arange(samples) % groups] + torch.randn(
        samples, width, generator=generator, dtype=torch.float64
    )


def test_enumeration_counts_the_partitions() -> None:
    stirling = {(4, 1): 1, (4, 2): 8, (4, 3): 14, (4, 4): 15, (7, 3): 1 + 63 + 301}
    for (points, clusters), count in stirling.items():
        labels = all_clusterings(points, clusters)
        assert len(labels) == count == len(torch.unique(labels, dim=0))
    with pytest.raises(ValueError, match="1 to 12 points"):
        all_clusterings(13, 2)


@settings(max_examples=10)
@given(samples=st.integers(3, 9), clusters=st.integers(1, 3), seed=st.integers(0, 1000))
def test_many_restarts_reach_the_optimum_of_brute_force(samples: int, clusters: int, seed: int) -> None:
    x = torch.randn(samples, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    _, optimum = best_clustering(x, clusters)
    # There are samples of which one start in 150 reaches the optimum, in scikit-learn as here.
    model = KMeansModel(clusters, n_init=60, tol=0.0)
    fit_in_memory(model, x)
    inertia = float(model.assign(x)[1].sum())
    assert inertia >= optimum - 1e-9
    assert inertia <= optimum + 1e-9


def test_twelve_points_by_brute_force() -> None:
    x = blobs(12, 2, 3)
    labels, optimum = best_clustering(x, 3)
    by_hand = sum(float((x[labels == k] - x[labels == k].mean(0)).square().sum()) for k in range(3))
    assert optimum == pytest.approx(by_hand, rel=1e-10)
    model = KMeansModel(3, n_init=5)
    fit_in_memory(model, x)
    assert float(model.assign(x)[1].sum()) == pytest.approx(optimum, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("iterations", [1, 2, 5, 40])
def test_lloyd_equals_scikit_learn_at_every_iteration(dtype: torch.dtype, iterations: int) -> None:
    x = torch.randn(800, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    reference = Reference(9, init=x[:9].numpy(), n_init=1, max_iter=iterations, tol=0, algorithm="lloyd").fit(x.numpy())
    result = lloyd(x, x[:9], iterations)
    rounding = 1e-10 if dtype == torch.float64 else 1e-5
    assert result.inertia == pytest.approx(reference.inertia_, rel=rounding)
    np.testing.assert_allclose(result.centers, reference.cluster_centers_, atol=1e-9 if rounding < 1e-9 else 1e-4)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e12, 1e25])
@pytest.mark.parametrize("components", [1, 5, 8])
def test_lloyd_is_the_plain_algorithm_at_any_scale(scale: float, components: int) -> None:
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centers = x[:components].clone()
    for _ in range(20):
        labels = torch.cdist(x, centers).argmin(1)
        centers = torch.stack([x[labels == k].mean(0) for k in range(components)])
    result = lloyd(x * scale, x[:components] * scale, 20)
    np.testing.assert_allclose(result.centers / scale, centers, atol=1e-9)


def test_a_start_out_of_reach_of_single_precision() -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.cat([x[:4], torch.full((1, 3), 1e25, dtype=torch.float64)])
    result = lloyd(x, start)
    assert result.converged
    labels = torch.cdist(x, result.centers).argmin(1)
    assert torch.equal(labels, result.labels)
    assert len(labels.unique()) == 5  # the lost center has been restarted


@pytest.mark.parametrize("standardize", [False, True])
def test_streaming_equals_lloyd(standardize: bool) -> None:
    x = 1e4 + 30 * blobs()
    model = KMeansModel(5, centers_init=x[:5], tol=0.0, max_iter=7, standardize=standardize)
    fit_in_memory(model, x, batch_size=64)
    z = model.standardizer.transform(x)
    result = lloyd(z, z[:5], int(model.iterations))
    centers = model.standardizer.inverse_transform(result.centers)
    torch.testing.assert_close(model.best_parameters().centers, centers, rtol=1e-12, atol=1e-9)


@settings(max_examples=40)
@given(
    samples=st.integers(1, 50),
    clusters=st.integers(1, 6),
    scale=st.sampled_from([1e-8, 1.0, 1e8]),
    kind=st.sampled_from(["blobs", "duplicates", "constant"]),
    init=st.sampled_from(["k-means++", "k-means||", "random"]),
    seed=st.integers(0, 1000),
)
def test_inertia_never_rises(samples: int, clusters: int, scale: float, kind: str, init: Any, seed: int) -> None:
    clusters = min(clusters, samples)
    x = blobs(samples, 3, 3, seed)
    if kind == "duplicates":
        x = x[torch.randint(min(samples, 3), (samples,), generator=torch.Generator().manual_seed(seed))]
    elif kind == "constant":
        x[:, :2] = 5.0
    x = scale * x
    spread = float((x - x.mean(0)).square().sum())
    model = KMeansModel(clusters, init=init, tol=0.0, max_iter=30, seed=seed)
    values = [report.objective for report in fit_in_memory(model, x)]
    assert np.isfinite(values).all()
    for before, after in itertools.pairwise(values):
        assert after <= before + 1e-9 * abs(before) + 1e-14 * spread


def test_a_center_without_samples_restarts_far_away() -> None:
    x = torch.cat([torch.zeros(50, 2), torch.tensor([[10.0, 0.0]])]).double()
    x += 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centers = torch.tensor([[[0.0, 0.0], [-99.0, -99.0]]], dtype=torch.float64)
    moved = m_step(e_step(centers, x), centers)
    torch.testing.assert_close(moved[0, 1], x[50])


def test_sample_of_a_stream_depends_on_neither_order_nor_batches() -> None:
    x = blobs(700)
    samples = []
    for order, size in ((torch.arange(700), 700), (torch.randperm(700), 13)):
        sample = Reservoir(50)
        for part in order.split(size):
            sample.add(x[part], sample_keys(part, 3))
        samples.append(sample.result()[0])
    torch.testing.assert_close(samples[0], samples[1], rtol=0, atol=0)
    keys = sample_keys(torch.arange(20_000), 0)
    assert float(keys.mean()) == pytest.approx(0.5, abs=0.01)
    histogram = torch.histc(keys.float(), 20, 0, 1)
    assert float((histogram - 1000).abs().max()) < 150


def test_starts_are_samples_of_the_data() -> None:
    x = blobs(100)
    for choose in (kmeans_plus_plus, random_samples):
        centers = choose(x, 7, torch.Generator().manual_seed(0))
        _, squares = assign(x[None], centers)
        assert float(squares.max()) == 0.0
        assert len(torch.unique(centers, dim=0)) == 7


def test_parallel_start_is_as_good_as_k_means_plus_plus() -> None:
    x = blobs(2000, 3, 12)
    finals = {}
    for init in ("k-means++", "k-means||", "random"):
        model = KMeansModel(12, init=init, init_size=300, n_init=4, max_iter=50)
        finals[init] = fit_in_memory(model, x, batch_size=128)[-1].objective
    assert finals["k-means||"] <= 1.1 * finals["k-means++"]


def test_mini_batches_come_close_to_exact() -> None:
    x = blobs(4000)
    x = x[torch.randperm(4000, generator=torch.Generator().manual_seed(0))]
    exact, stepwise = (KMeansModel(5, algorithm=name, n_init=3) for name in ("exact", "stepwise"))
    fit_in_memory(exact, x)
    fit_in_memory(stepwise, x, batch_size=200)
    inertia = [float(model.assign(x)[1].sum()) for model in (exact, stepwise)]
    assert inertia[1] < 1.02 * inertia[0]
