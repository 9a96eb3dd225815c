"""What users ran into, each as its kind: weights, units, order, repeated rows, refits, views, files."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array, csr_matrix
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from datamodules import PatchDataModule
from lightning_modules import (
    GaussianMixture,
    GaussianMixtureEstimator,
    KMeans,
    KMeansEstimator,
    StudentTMixtureEstimator,
)
from lightning_modules.mixtures import KMeansModel, StudentTMixtureModel, choose_num_components, fit_in_memory
from lightning_modules.mixtures.gaussian.model import GaussianMixtureModel
from lightning_modules.mixtures.initialization import kmeans_plus_plus, random_samples
from lightning_modules.mixtures.lloyd import lloyd
from tests.mixtures.test_mix_family import trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ESTIMATORS = (GaussianMixtureEstimator, StudentTMixtureEstimator, KMeansEstimator)


def blobs(count: int = 600, width: int = 3, groups: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = 4 * torch.randn(groups, width, generator=generator, dtype=torch.float64)
    return centers[torch.arange(count) % groups] + torch.randn(count, width, generator=generator, dtype=torch.float64)


def repeated() -> Tensor:
    """400 rows around 20 places, each row ten times."""
    centers = 10 * torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    x = centers.repeat_interleave(20, 0) + 0.2 * torch.randn(400, 2, generator=torch.Generator().manual_seed(1))
    return x.double().repeat(10, 1)


def stream(x: Tensor, order: Tensor, size: int, weight: Tensor | None = None) -> Any:
    return lambda: ((x[i], None if weight is None else weight[i], i) for i in order.split(size))


def fitted(model: Any, batches: Any) -> Any:
    model.initialize(batches)
    while not model.finished:
        model.start_epoch()
        for x, weight, _ in batches():
            model.add_batch(x, weight)
        model.end_epoch()
    return model


# ------------------------------------------------------------------------------------------- order, units, rows


@pytest.mark.parametrize("init", ["k-means++", "k-means||", "random"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("family", [KMeansModel, GaussianMixtureModel, StudentTMixtureModel])
def test_with_an_index_neither_batches_nor_order_change_the_fit(family: Any, weighted: bool, init: Any) -> None:
    x = blobs()
    weight = torch.rand(len(x), generator=torch.Generator().manual_seed(2), dtype=torch.float64) if weighted else None
    options = {"init": init, "init_size": 100, "max_iter": 12, "tol": 0.0, "seed": 1}
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    runs = [(torch.arange(len(x)), len(x)), (torch.arange(len(x)), 7), (shuffled, 64)]
    models = [fitted(family(6, **options), stream(x, order, size, weight)) for order, size in runs]
    for model in models[1:]:
        for name in model.parameter_shapes(0):
            torch.testing.assert_close(getattr(model, name), getattr(models[0], name), rtol=1e-9, atol=1e-9)


def test_without_an_index_batches_change_nothing_either() -> None:
    x = blobs()
    for family in (KMeansModel, GaussianMixtureModel):
        values = []
        for size in (600, 64, 32):
            model = family(6, init="k-means||", init_size=100, tol=0.0, max_iter=12)
            fit_in_memory(model, x, size)
            values.append(model.objective)
        torch.testing.assert_close(values[1:], [values[0]] * 2, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", [KMeansModel, GaussianMixtureModel])
def test_the_parallel_start_is_as_good_on_repeated_rows(family: Any) -> None:
    quality = {}
    for init in ("k-means++", "k-means||"):
        objectives = []
        for seed in range(8):
            model = family(20, init=init, seed=seed)
            fit_in_memory(model, repeated(), 500)
            objectives.append(float(model.objective[model.best]))
        quality[init] = np.median(objectives)
    if family is KMeansModel:
        assert quality["k-means||"] < 1.5 * quality["k-means++"]
    else:
        assert quality["k-means||"] > quality["k-means++"] - 0.15


def test_a_sample_for_the_start_of_repeated_rows_is_a_sample() -> None:
    ages = torch.arange(100.0).repeat(2000)[:, None].double()  # integers, each many times
    model = GaussianMixtureModel(1, init_size=5000)
    _, chosen, _ = model._first_pass(lambda: [(ages, None, torch.arange(len(ages)))], _alone())
    assert len(chosen.unique()) == 100
    assert float(chosen.mean()) == pytest.approx(49.5, abs=2)
    zeros = torch.cat([torch.zeros(50_000, 1), torch.randn(50_000, 1)]).double()
    _, chosen, _ = GaussianMixtureModel(1, init_size=5000)._first_pass(
        lambda: [(zeros, None, torch.arange(len(zeros)))], _alone()
    )
    assert float((chosen == 0).double().mean()) == pytest.approx(0.5, abs=0.04)


def test_a_weighted_sample_for_the_start_has_the_moments_of_the_data() -> None:
    x = torch.arange(20_000.0)[:, None].double()
    weight = 1 + 9 * (x[:, 0] > 15_000).double()
    model = GaussianMixtureModel(1, init_size=4000)
    total, chosen, weights = model._first_pass(lambda: [(x, weight, torch.arange(len(x)))], _alone())
    assert float(total.count) == pytest.approx(float(weight.sum()))
    assert float(weights.sum()) == pytest.approx(float(weight.sum()), rel=0.02)
    assert float(weights @ chosen[:, 0] / weights.sum()) == pytest.approx(float(total.mean), rel=0.02)


def _alone() -> Any:
    from lightning_modules.mixtures import Collectives

    return Collectives()


@pytest.mark.parametrize("unit", [1e-9, 1e-6, 1e-3, 1e3, 1e9])
def test_the_best_restart_is_the_best_in_any_unit(unit: float) -> None:
    x = blobs(300, 2, 12)
    plain, scaled = (KMeansModel(12, n_init=8, init="random", seed=0) for _ in range(2))
    fit_in_memory(plain, x)
    fit_in_memory(scaled, x * unit)
    assert int(scaled.best) == int(plain.best)
    assert float(scaled.objective[scaled.best]) == float(scaled.objective.min())
    torch.testing.assert_close(scaled.objective / unit**2, plain.objective, rtol=1e-9, atol=0)
    theirs = KMeansEstimator(12, n_init=8, init="random", random_state=0).fit((x * unit).numpy())
    ours = KMeansEstimator(12, n_init=8, init="random", random_state=0).fit(x.numpy())
    assert theirs.inertia_ / unit**2 == pytest.approx(ours.inertia_, rel=1e-9)


@settings(max_examples=12)
@given(
    unit=st.sampled_from([1e-9, 1e-4, 1e4, 1e9]),
    offset=st.sampled_from([0.0, 1e2, 1e4]),
    kind=st.sampled_from(["full", "tied", "diag", "spherical"]),
    estimator=st.sampled_from(ESTIMATORS),
    init=st.sampled_from(["k-means++", "random"]),
)
def test_units_and_offsets_change_nothing(unit: float, offset: float, kind: Any, estimator: Any, init: str) -> None:
    x = blobs(240, 2, 3)
    x = ((x - x.mean(0)) / x.std()).numpy()
    if estimator is KMeansEstimator:
        options: dict[str, Any] = {"init": init}
        first, second = (estimator(3, random_state=0, **options) for _ in range(2))
    else:
        options = {"init_params": init, "covariance_type": kind}
        first, second = (estimator(3, reg_covar=1e-6 * s**2, random_state=0, **options) for s in (1.0, unit))
    labels = first.fit(x).predict(x)
    moved = (x + offset) * unit
    assert (second.fit(moved).predict(moved) == labels).all()
    centers = [e.cluster_centers_ if estimator is KMeansEstimator else e.means_ for e in (first, second)]
    np.testing.assert_allclose(centers[1] / unit - offset, centers[0], rtol=1e-6, atol=1e-6)


# -------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("given_start", [True, False])
@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_whole_weights_equal_repeated_rows(estimator: Any, given_start: bool, kind: Any) -> None:
    x = blobs(120, 2, 3).numpy()
    weight = np.random.default_rng(0).integers(0, 5, len(x))
    many = np.repeat(x, weight, axis=0)[np.random.default_rng(1).permutation(weight.sum())]
    if estimator is KMeansEstimator:
        options: dict[str, Any] = {"init": x[:3]} if given_start else {"init": "random", "n_init": 2}
        model = estimator(3, random_state=0, tol=0, **options)
        names = ["cluster_centers_"]
    else:
        model = estimator(3, covariance_type=kind, random_state=0, tol=0, max_iter=15)
        model.set_params(**({"means_init": x[:3]} if given_start else {"init_params": "random", "n_init": 2}))
        names = ["weights_", "means_", "covariances_", "lower_bound_"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        weighted, plain = clone(model).fit(x, sample_weight=weight), clone(model).fit(many)
        halved = clone(model).fit(x, sample_weight=weight / 2)
    for name in names:
        np.testing.assert_allclose(getattr(weighted, name), getattr(plain, name), rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(getattr(weighted, name), getattr(halved, name), rtol=1e-10, atol=1e-10)
    assert weighted.score(x, sample_weight=weight) == pytest.approx(plain.score(many), rel=1e-10)
    if estimator is not KMeansEstimator:
        assert weighted.bic(x, sample_weight=weight) == pytest.approx(plain.bic(many), rel=1e-10)


@pytest.mark.parametrize("choose", [kmeans_plus_plus, random_samples])
def test_random_starts_draw_weighted_rows_as_often_as_repeated_ones(choose: Any) -> None:
    x = torch.tensor([[0.0], [1.0], [5.0], [9.0]], dtype=torch.float64)
    weight = torch.tensor([1.0, 6.0, 2.0, 0.0], dtype=torch.float64)
    many = x.repeat_interleave(weight.long(), dim=0)
    counts = torch.zeros(2, 10)
    for seed in range(400):
        for row, (samples, w) in enumerate(((x, weight), (many[torch.randperm(9)], None))):
            drawn = choose(samples, 2, torch.Generator().manual_seed(seed), w)
            counts[row, drawn[:, 0].long()] += 1
    assert torch.equal(counts[0], counts[1])  # not only alike: the same draws
    assert counts[0, 9] == 0
    first = torch.stack([choose(x, 1, torch.Generator().manual_seed(seed), weight)[0, 0] for seed in range(2000)])
    assert float((first == 1).double().mean()) == pytest.approx(6 / 9, abs=0.04)


def _weighted_batches(x: Tensor, weight: Tensor) -> DataLoader[Any]:
    return DataLoader([{"x": row, "weight": w} for row, w in zip(x, weight, strict=True)], 32)  # type: ignore[arg-type]


@pytest.mark.parametrize("algorithm", ["exact", "stepwise"])
def test_a_weight_in_a_batch_is_a_weight(algorithm: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(300, 1, generator=generator) - 9, torch.randn(100, 1, generator=generator) + 9]).double()
    shuffled = torch.randperm(400, generator=generator)
    for second, expected in ((3.0, 0.5), (0.03, 0.0099)):
        weight = torch.cat([torch.ones(300), torch.full((100,), second)])
        module = GaussianMixture(2, algorithm=algorithm, tol=1e-9)
        trainer(20).fit(module, _weighted_batches(x[shuffled], weight[shuffled]))
        share = module.weights[module.means[:, 0].argmax()]
        assert float(share) == pytest.approx(expected, abs=1e-3 if algorithm == "exact" else 0.05)
    centers = KMeans(1, tol=0.0)
    trainer(5).fit(centers, _weighted_batches(x, torch.cat([torch.ones(300), torch.full((100,), 3.0)])))
    assert float(centers.centers) == pytest.approx(float((x[:300].sum() + 3 * x[300:].sum()) / 600), rel=1e-9)


@pytest.mark.parametrize("algorithm", ["exact", "stepwise"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("module_class", [GaussianMixture, KMeans])
def test_a_row_of_weight_zero_may_hold_anything(module_class: Any, value: float, algorithm: Any) -> None:
    x, weight = blobs(200), torch.ones(200)
    weight[5] = 0
    x[5] = value
    clean, dirty = (module_class(2, tol=0.0, algorithm=algorithm) for _ in range(2))
    trainer(3).fit(dirty, _weighted_batches(x, weight))
    x[5] = 0
    trainer(3).fit(clean, _weighted_batches(x, weight))
    first, second = (m.model.best_parameters() for m in (clean, dirty))
    assert int(dirty.model.num_samples) == 199
    for one, other in zip(vars(first).values(), vars(second).values(), strict=True):
        assert one == other if isinstance(one, str) else torch.allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_impossible(value: float) -> None:
    x, weight = blobs(60), torch.ones(60)
    weight[3] = value
    with pytest.raises(ValueError, match=r"1 weight\(s\) are negative, NaN or infinite"):
        trainer(2).fit(GaussianMixture(2), _weighted_batches(x, weight))
    for estimator in ESTIMATORS:
        for bad, message in (
            (weight.numpy(), "Negative|NaN|infinity"),
            (np.zeros(60), "non-zero number"),
            (np.ones(59), r"sample_weight.shape == \(59,\)"),
        ):
            with pytest.raises(ValueError, match=message):
                estimator(2).fit(x.numpy(), sample_weight=bad)
    with pytest.raises(ValueError, match="no sample has a weight above 0"):
        trainer(2).fit(GaussianMixture(2), _weighted_batches(x, torch.zeros(60)))


# ------------------------------------------------------------------------------------------- the end of a fit


def test_rest_in_the_last_allowed_iteration_is_rest() -> None:
    x = load_iris().data
    for estimator in (GaussianMixtureEstimator, StudentTMixtureEstimator):
        needed = estimator(2, random_state=0).fit(x).n_iter_
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            assert estimator(2, random_state=0, max_iter=needed).fit(x).converged_
        with pytest.warns(ConvergenceWarning):
            assert not estimator(2, random_state=0, max_iter=needed - 1).fit(x).converged_
    needed = KMeans(3)
    trainer(100).fit(needed, DataLoader(torch.from_numpy(x), 50))
    again = KMeans(3, max_iter=needed.n_iter)
    trainer(100).fit(again, DataLoader(torch.from_numpy(x), 50))
    assert again.converged


def test_after_one_iteration_there_is_no_change_to_speak_of() -> None:
    with pytest.warns(UserWarning, match="no change to measure yet"):
        trainer(1).fit(GaussianMixture(2), DataLoader(blobs(), 64))


@pytest.mark.parametrize("module_class", [GaussianMixture, KMeans])
def test_a_fitted_module_goes_on_with_new_data(module_class: Any) -> None:
    x = blobs(300, 3, 3)
    module = module_class(3)
    trainer(60).fit(module, DataLoader(x, 64))
    before = module.model.best_parameters()
    trainer(200).fit(module, DataLoader(x + 1, 64))
    after = module.model.best_parameters()
    place = "centers" if module_class is KMeans else "means"
    moved = getattr(after, place).mean(0) - getattr(before, place).mean(0)
    assert float((moved - 1).abs().max()) < 0.2
    assert module.converged


def test_pickles_hold_no_scratch_memory() -> None:
    x = np.random.default_rng(0).normal(size=(20_000, 30))
    for estimator in (GaussianMixtureEstimator(4, random_state=0, max_iter=3), KMeansEstimator(4, random_state=0)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            pickled = pickle.dumps(estimator.fit(x))
        kept = getattr(estimator, "labels_", np.zeros(0)).nbytes
        assert len(pickled) - kept < 300_000
        assert (pickle.loads(pickled).predict(x[:9]) == estimator.predict(x[:9])).all()


def test_a_warm_start_goes_on_and_refuses_another_shape() -> None:
    x = blobs(300).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warm = GaussianMixtureEstimator(3, warm_start=True, max_iter=2, tol=0, random_state=0).fit(x).fit(x)
        cold = GaussianMixtureEstimator(3, max_iter=4, tol=0, random_state=0).fit(x)
    np.testing.assert_allclose(warm.means_, cold.means_, rtol=1e-10)
    np.testing.assert_allclose([warm.lower_bound_, *warm.lower_bounds_], [cold.lower_bound_, *cold.lower_bounds_[2:]])
    with pytest.raises(ValueError, match=r"warm_start goes on with .*Set warm_start=False"):
        warm.set_params(n_components=4).fit(x)


# --------------------------------------------------------------------------------------------- one more batch


@pytest.mark.parametrize("estimator", [GaussianMixtureEstimator, StudentTMixtureEstimator])
def test_partial_fit_follows_a_drift(estimator: Any) -> None:
    generator = np.random.default_rng(0)
    centers = np.array([[-5.0, 0.0], [5.0, 0.0]])
    model = estimator(2, random_state=0)
    for step in range(120):
        drift = np.array([0.0, 0.1 * step])
        model.partial_fit(centers[generator.integers(0, 2, 200)] + generator.normal(size=(200, 2)) + drift)
    for x_place in (-5.0, 5.0):
        nearest = model.means_[np.abs(model.means_[:, 0] - x_place).argmin()]
        assert np.abs(nearest - [x_place, 11.9]).max() < 3  # a stationary mean would be at 6
    restored = pickle.loads(pickle.dumps(model))
    batch = generator.normal(size=(50, 2))
    np.testing.assert_array_equal(restored.partial_fit(batch).means_, model.partial_fit(batch).means_)


@pytest.mark.parametrize("estimator", [GaussianMixtureEstimator, KMeansEstimator])
def test_partial_fit_after_a_fit_forgets_no_more_than_its_share(estimator: Any) -> None:
    x = blobs(3000, 2, 3).numpy()
    model = estimator(3, random_state=0).fit(x)
    before = model.cluster_centers_ if estimator is KMeansEstimator else model.means_
    model.partial_fit(x[:30] + 1.0)
    after = model.cluster_centers_ if estimator is KMeansEstimator else model.means_
    shift = np.abs(after - before).max()
    assert 1e-4 < shift < 0.1


def test_centers_that_are_dead_start_again() -> None:
    x = blobs(2000, 2, 4).numpy()
    start = np.concatenate([x[:3], [[500.0, 500.0]]])
    kept = KMeansEstimator(4, init=start, algorithm="stepwise", batch_size=100, reassignment_ratio=0, random_state=0)
    alive = clone(kept).set_params(reassignment_ratio=0.01)
    with pytest.warns(ConvergenceWarning, match="distinct clusters"):
        kept.fit(x)
    alive.fit(x)
    assert alive.inertia_ < 0.6 * kept.inertia_
    assert len(np.unique(alive.labels_)) == 4


# ----------------------------------------------------------------------------------------------- what comes in


@pytest.mark.parametrize("view", [lambda x: x[::-1], lambda x: x[:, ::-1], np.flip, lambda x: x.T[::-1].T])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_views_with_negative_strides(estimator: Any, view: Any) -> None:
    x = load_iris().data
    model, same = (estimator(2, random_state=0) for _ in range(2))
    model.fit(view(x))
    same.fit(view(x).copy())
    np.testing.assert_array_equal(model.predict(view(x)), same.predict(view(x).copy()))
    assert model.score(view(x)) == same.score(view(x).copy())
    name = "init" if estimator is KMeansEstimator else "means_init"
    estimator(2, **{name: view(x)[:2][::-1]}).fit(view(x))
    module = KMeans(2, centers_init=x[:2][::-1])  # type: ignore[arg-type]
    trainer(2).fit(module, DataLoader(torch.from_numpy(x), 50))
    assert len(module.predict(view(x))) == len(x)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_starts_that_are_not_finite(value: float) -> None:
    x = load_iris().data
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        KMeansEstimator(3, init=np.full((3, 4), value)).fit(x)
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        KMeansEstimator(3, init=lambda X, k, random_state: np.full((k, 4), value)).fit(x)
    with pytest.raises(ValueError, match="means_init must be finite"):
        GaussianMixtureEstimator(3, means_init=np.full((3, 4), value)).fit(x)


def test_one_start_of_given_places_is_said_alike() -> None:
    x = load_iris().data
    with pytest.warns(RuntimeWarning, match="performing only one"):
        one = GaussianMixtureEstimator(3, means_init=x[:3], n_init=3).fit(x)
    np.testing.assert_allclose(one.means_, GaussianMixtureEstimator(3, means_init=x[:3]).fit(x).means_, rtol=1e-9)
    with pytest.warns(RuntimeWarning, match="performing only one"):
        KMeansEstimator(3, init=x[:3], n_init=10).fit(x)


@pytest.mark.parametrize("dtype", ["i8", "i4", ">f8", ">f4", ">i8", "u2"])
def test_rows_of_a_file_keep_their_digits(dtype: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    offset, step = (0, 100) if dtype == "u2" else (2_000_000, 1) if dtype.endswith("f4") else (1_700_000_000, 100)
    rows = np.concatenate([generator.normal(5, 1, (300, 2)), generator.normal(13, 1, (300, 2))])
    rows = (offset + step * rows).astype(dtype)
    np.save(tmp_path / "rows.npy", rows)
    module = GaussianMixture(2, tol=1e-9)
    trainer(60).fit(module, PatchDataModule(array=str(tmp_path / "rows.npy"), batch_size=100))
    exact = GaussianMixtureEstimator(2, tol=1e-9, random_state=0).fit(rows.astype(np.float64))
    ours, theirs = (
        c[np.argsort(m[:, 0])] for c, m in ((module.covariances, module.means), (exact.covariances_, exact.means_))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_float32_is_kept_and_sums_are_float64(estimator: Any) -> None:
    x = blobs(4000, 3, 3)
    single, double = (estimator(3, random_state=0).fit(x.to(dtype).numpy()) for dtype in (torch.float32, torch.float64))
    names = {KMeansEstimator: ["cluster_centers_"]}.get(
        estimator, ["weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_"]
    )
    for name in names:
        assert getattr(single, name).dtype == np.float32
        np.testing.assert_allclose(getattr(single, name), getattr(double, name), rtol=2e-5, atol=2e-5)
    kept = (
        single.transform(x.float().numpy()) if estimator is KMeansEstimator else single.predict_proba(x.float().numpy())
    )
    assert kept.dtype == np.float32


@pytest.mark.parametrize("container", [csr_matrix, csr_array])
@pytest.mark.parametrize(
    "options", [{}, {"init": "k-means||"}, {"init": "random", "n_init": 2}, {"algorithm": "stepwise"}]
)
def test_sparse_rows_are_clustered_as_dense_ones(container: Any, options: dict[str, Any]) -> None:
    generator = np.random.default_rng(0)
    x = np.where(generator.random((500, 40)) < 0.1, generator.normal(3, 1, (500, 40)), 0.0)
    weight = generator.random(500)
    # about the same origin, the starts are the same
    dense, sparse = (KMeansEstimator(5, random_state=0, **options) for _ in range(2))
    dense.fit(x, sample_weight=weight)
    sparse.fit(container(x), sample_weight=weight)
    np.testing.assert_allclose(sparse.cluster_centers_, dense.cluster_centers_, rtol=1e-8, atol=1e-8)
    np.testing.assert_array_equal(sparse.labels_, dense.labels_)
    np.testing.assert_array_equal(sparse.predict(container(x)), dense.predict(x))
    np.testing.assert_allclose(sparse.transform(container(x)), dense.transform(x), rtol=1e-7, atol=1e-7)
    sparse.partial_fit(container(x[:50]))
    with pytest.raises(ValueError, match="standardize=True would make sparse data dense"):
        KMeansEstimator(2, standardize=True).fit(container(x))
    with pytest.raises(TypeError, match=r"toarray"):
        GaussianMixtureEstimator(2).fit(container(x))


def test_sparse_rows_are_never_dense_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = csr_array((np.ones(6000), (np.arange(6000) % 3000, np.arange(6000) * 7919 % 200_000)), shape=(3000, 200_000))
    sizes: list[int] = []
    original = csr_array.toarray

    def recorded(self: Any, *args: Any, **options: Any) -> Any:
        sizes.append(self.shape[0])
        return original(self, *args, **options)

    monkeypatch.setattr(csr_array, "toarray", recorded)
    model = KMeansEstimator(4, random_state=0, max_iter=5).fit(x)  # dense: 4.8 GB
    assert model.cluster_centers_.shape == (4, 200_000)
    assert max(sizes) < 300


@pytest.mark.parametrize("algorithm", ["exact", "stepwise"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_take_loaders_and_data_modules(estimator: Any, algorithm: str, tmp_path: Path) -> None:
    x = blobs(600, 2, 3)
    model = estimator(3, algorithm=algorithm, random_state=0, batch_size=100)
    memory = clone(model).fit(x.numpy())
    np.save(tmp_path / "rows.npy", x.numpy())
    for source in (
        DataLoader(TensorDataset(x), 100),
        PatchDataModule(array=str(tmp_path / "rows.npy"), batch_size=100),
    ):
        streamed = clone(model).fit(source)
        assert streamed.n_features_in_ == 2
        assert (streamed.score(x.numpy()) - memory.score(x.numpy())) / abs(memory.score(x.numpy())) > -0.05


def test_max_iter_zero_is_the_start() -> None:
    x = blobs(200, 2, 3).numpy()
    start = GaussianMixtureEstimator(3, max_iter=0, means_init=x[:3]).fit(x)
    np.testing.assert_allclose(start.means_, x[:3], rtol=1e-12)
    assert start.n_iter_ == 0
    assert start.lower_bounds_ == []
    assert not start.converged_


def test_lower_bounds_are_those_of_the_best_restart() -> None:
    x = blobs(300, 2, 5).numpy()
    several = GaussianMixtureEstimator(5, n_init=5, init_params="random", random_state=3, max_iter=300).fit(x)
    assert len(several.lower_bounds_) == several.n_iter_
    assert several.lower_bounds_[-1] == several.lower_bound_
    assert (np.diff(several.lower_bounds_) > -1e-6).all()


def test_starts_in_more_than_one_way() -> None:
    x = blobs(600, 2, 6).numpy()
    assert KMeansEstimator(6, init="random", random_state=0).fit(x)._n_init == 10
    assert KMeansEstimator(6, random_state=0).fit(x)._n_init == 1
    best = KMeansEstimator(6, n_init=20, random_state=0).fit(x).inertia_
    assert KMeansEstimator(6, init="k-means||", n_init=3, random_state=0).fit(x).inertia_ < 1.3 * best
    called = KMeansEstimator(6, init=lambda X, k, random_state: X[random_state.permutation(len(X))[:k]], n_init=5)
    assert called.fit(x).inertia_ < 3 * best
    names = KMeansEstimator(6, random_state=0).fit(x).get_feature_names_out()
    assert list(names) == [f"kmeansestimator{k}" for k in range(6)]


def test_one_row_more_components_than_points_and_more_features_than_rows() -> None:
    wide = np.random.default_rng(0).normal(size=(5, 20))
    assert KMeansEstimator(2, random_state=0).fit(wide).labels_.shape == (5,)
    assert GaussianMixtureEstimator(2, covariance_type="diag", random_state=0).fit(wide).means_.shape == (2, 20)
    with pytest.raises(ValueError, match="minimum of 2 is required"):
        GaussianMixtureEstimator(1).fit(wide[:1])
    assert KMeansEstimator(1).fit(wide[:1]).inertia_ == 0
    with pytest.warns(ConvergenceWarning, match="distinct clusters"):
        KMeansEstimator(4, random_state=0).fit(np.repeat(wide[:2], 10, axis=0))


@pytest.mark.parametrize("criterion", ["bic", "icl", "held-out"])
@pytest.mark.parametrize("family", [GaussianMixtureModel, StudentTMixtureModel])
def test_the_number_of_components_by_each_criterion(criterion: Any, family: Any, tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    x = blobs(450, 2, 3)
    choice = choose_num_components(
        x, range(1, 5), family=family, criterion=criterion, covariance_type="diag", max_iter=40
    )
    assert choice.best == 3
    with SummaryWriter(str(tmp_path)) as writer:
        choice.log(writer)
    assert list(tmp_path.iterdir())


def test_overlapping_components_are_one_cluster_to_icl() -> None:
    generator = torch.Generator().manual_seed(0)
    narrow, wide = (s * torch.randn(1500, 1, generator=generator, dtype=torch.float64) for s in (0.4, 3.0))
    x = torch.cat([narrow, wide])
    found = {c: choose_num_components(x, [1, 2], criterion=c, max_iter=300).best for c in ("bic", "icl")}  # type: ignore[arg-type]
    assert found == {"bic": 2, "icl": 1}


def test_weighted_lloyd_is_lloyd_on_repeated_rows_at_every_iteration() -> None:
    x = blobs(200, 2, 4)
    weight = torch.randint(1, 4, (200,), generator=torch.Generator().manual_seed(0))
    for iterations in (1, 2, 3, 10):
        weighted = lloyd(x, x[:4], iterations, weights=weight)
        many = lloyd(x.repeat_interleave(weight, 0), x[:4], iterations)
        torch.testing.assert_close(weighted.centers, many.centers, rtol=1e-12, atol=1e-12)
        assert weighted.inertia == pytest.approx(many.inertia, rel=1e-12)


def test_rows_that_are_no_array_of_numbers_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("1.0,2.0\n3.0,4.0\n")
    np.save(tmp_path / "objects.npy", np.array([{}, None]), allow_pickle=True)
    for name in ("rows.csv", "objects.npy"):
        with pytest.raises(ValueError, match=rf"{name} holds no array of numbers .* numpy\.loadtxt\('rows\.csv'"):
            PatchDataModule(array=str(tmp_path / name)).setup("fit")
    np.save(tmp_path / "rows.npy", np.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"give predict_root, .* load_from_checkpoint\(CHECKPOINT\)\.predict\(rows\)"):
        PatchDataModule(array=str(tmp_path / "rows.npy")).setup("predict")
