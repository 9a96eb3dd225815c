"""The mathematics of the mixtures against scikit-learn, enumeration and its own theorems."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as Reference
from torch import Tensor

from lightning_modules import em, mixtures
from lightning_modules.mixtures import (
    MixtureParameters,
    enumerated_log_likelihood,
    evidence_lower_bound,
    log_likelihood,
    posterior,
)
from lightning_modules.mixtures.gaussian.density import fold_quadratic, unfold_quadratic
from lightning_modules.mixtures.gaussian.em import (
    CovarianceType,
    e_step,
    expected_log_joint,
    m_step,
    statistics_of,
)
from lightning_modules.mixtures.gaussian.model import GaussianMixtureModel
from lightning_modules.mixtures.model import fit_in_memory

KINDS: tuple[CovarianceType, ...] = ("full", "diag", "tied", "spherical")


def blobs(samples: int = 300, width: int = 5, groups: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(groups, width, generator=generator, dtype=torch.float64)
    mixing = torch.randn(groups, width, width, generator=generator, dtype=torch.float64)
    labels = torch.arange(samples) % groups
    noise = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    return centers[labels] + torch.einsum("nd,nde->ne", noise, mixing[labels])


def start(kind: CovarianceType, x: Tensor, components: int = 3) -> tuple[MixtureParameters, dict[str, Any]]:
    reference = Reference(components, covariance_type=kind, max_iter=1, tol=0, random_state=0, init_params="random")
    with pytest.warns(ConvergenceWarning):
        reference.fit(x.numpy())
    theta = MixtureParameters(
        kind, *(torch.from_numpy(v) for v in (reference.weights_, reference.means_, reference.covariances_))
    )
    return theta, {
        "weights_init": reference.weights_,
        "means_init": reference.means_,
        "precisions_init": reference.precisions_,
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centered", [False, True])
def test_ten_iterations_equal_scikit_learn(kind: CovarianceType, centered: bool) -> None:
    x = blobs()
    theta, given_start = start(kind, x)
    theta = theta.batched()
    reg = torch.full((x.shape[1],), 1e-6, dtype=torch.float64)
    for _ in range(10):
        statistics = e_step(theta.components(centered), x)
        theta = m_step(statistics, reg, theta)
    reference = Reference(3, covariance_type=kind, max_iter=10, tol=0, **given_start)
    with pytest.warns(ConvergenceWarning):
        reference.fit(x.numpy())
    np.testing.assert_allclose(theta.means[0], reference.means_, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(theta.covariances[0], reference.covariances_, rtol=1e-5, atol=1e-6)
    assert float(statistics.log_likelihood) / len(x) == pytest.approx(reference.lower_bound_, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_model_equals_scikit_learn_from_a_given_start_without_a_pass_to_initialise(kind: CovarianceType) -> None:
    x = 1e3 + 50 * blobs()
    _, given_start = start(kind, x)
    model = GaussianMixtureModel(3, covariance_type=kind, tol=0, max_iter=8, **given_start)
    reports = fit_in_memory(model, x, batch_size=71)
    reference = Reference(3, covariance_type=kind, max_iter=8, tol=0, **given_start)
    with pytest.warns(ConvergenceWarning):
        reference.fit(x.numpy())
    assert int(model.initialization_passes) == 0
    assert reports[-1].objective == pytest.approx(reference.lower_bound_, abs=1e-8)
    np.testing.assert_allclose(model.best_parameters().means, reference.means_, rtol=1e-6)
    np.testing.assert_allclose(model.best_parameters().covariances, reference.covariances_, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        torch.logsumexp(model.log_joint(x), 1).numpy(), reference.score_samples(x.numpy()), rtol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_of_the_e_step_agree(kind: CovarianceType) -> None:
    x = blobs(width=11)
    theta, _ = start(kind, x)
    mask = torch.arange(len(x)) % 3 > 0
    product, centered = (e_step(theta.components(form), x, mask) for form in (False, True))
    for name in ("weight", "first", "second", "log_likelihood", "entropy", "count"):
        torch.testing.assert_close(getattr(product, name), getattr(centered.about_origin(), name), rtol=1e-9, atol=1e-8)
    only = e_step(theta.components(), x[mask])
    torch.testing.assert_close(product.flat(), only.flat())


def test_symmetric_features_fold_and_unfold() -> None:
    matrix = torch.randn(2, 19, 19, dtype=torch.float64)
    matrix = matrix + matrix.mT
    vector = torch.randn(19, dtype=torch.float64)
    outer = vector[:, None] * vector
    # coefficients count the stored half twice: folding the matrix against the features of the outer product is v'Mv
    features = fold_quadratic(outer) / fold_quadratic(torch.ones(19, 19, dtype=torch.float64))
    torch.testing.assert_close(fold_quadratic(matrix) @ features, vector @ matrix @ vector)
    torch.testing.assert_close(unfold_quadratic(features, 19), outer)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_a_mixture_give_the_mixture_back(kind: CovarianceType) -> None:
    theta = start(kind, blobs())[0].batched()
    again = m_step(statistics_of(theta, 50.0), torch.zeros(5, dtype=torch.float64))
    for name in ("weights", "means", "covariances"):
        torch.testing.assert_close(getattr(again, name), getattr(theta, name), rtol=1e-7, atol=1e-7)


# ------------------------------------------------------------------------------------------------ the bound


@pytest.mark.parametrize("kind", KINDS)
def test_bound_touches_the_likelihood_at_the_posterior_and_nowhere_else(kind: CovarianceType) -> None:
    x = blobs(40)
    theta, _ = start(kind, x)
    likelihood = log_likelihood(theta, x)
    q = posterior(theta, x)
    torch.testing.assert_close(evidence_lower_bound(q, theta, x), likelihood, rtol=1e-12, atol=1e-10)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = torch.rand(q.shape, generator=generator, dtype=torch.float64)
        other /= other.sum(1, keepdim=True)
        divergence = (torch.special.xlogy(other, other) - other * q.log()).sum()
        gap = likelihood - evidence_lower_bound(other, theta, x)
        assert gap > 0
        torch.testing.assert_close(
            gap, divergence, rtol=1e-9, atol=1e-9
        )  # the gap is the divergence from the posterior


def test_bound_from_statistics_is_the_bound_from_samples() -> None:
    x = blobs(60)
    for kind, centered in itertools.product(KINDS, (False, True)):
        theta = start(kind, x)[0].batched()
        statistics = e_step(theta.components(centered), x)
        moved = m_step(statistics, torch.full((5,), 1e-6, dtype=torch.float64), theta)
        by_samples = evidence_lower_bound(posterior(theta.select(0), x), moved.select(0), x)
        by_sums = expected_log_joint(statistics, moved) + statistics.entropy
        torch.testing.assert_close(by_sums[0], by_samples, rtol=1e-10, atol=1e-8)
        assert by_samples >= log_likelihood(theta.select(0), x) - 1e-9


def test_names_of_the_version_before_warn() -> None:
    with pytest.warns(FutureWarning, match=r"MixtureStatistics is now lightning_modules\.mixtures\.GaussianStatistics"):
        assert em.MixtureStatistics is mixtures.GaussianStatistics
    for name in (
        "MixtureParameters", "best_clustering", "enumerated_log_likelihood", "evidence_lower_bound", "log_likelihood",
        "posterior",
    ):  # fmt: skip
        with pytest.warns(FutureWarning, match=name):
            assert getattr(em, name) is getattr(mixtures, name)


def test_bound_refuses_what_is_no_distribution() -> None:
    x = blobs(10)
    theta, _ = start("diag", x)
    with pytest.raises(ValueError, match="sum to 1"):
        evidence_lower_bound(torch.ones(10, 3), theta, x)


@pytest.mark.parametrize("kind", KINDS)
def test_likelihood_equals_the_sum_over_all_assignments(kind: CovarianceType) -> None:
    x = blobs(11)
    theta, _ = start(kind, blobs())
    assert enumerated_log_likelihood(theta, x) == pytest.approx(float(log_likelihood(theta, x)), rel=1e-12)


# --------------------------------------------------------------------------------- the likelihood never falls


def inverse_traces(theta: MixtureParameters, reg: Tensor) -> Tensor:
    """`tr(R Σ_k⁻¹)` of each component, with `R` the regularisation."""
    covariances = theta.covariances.expand(
        len(theta.weights), *theta.covariances.shape[1 - (theta.covariance_type == "tied") :]
    )
    if theta.covariance_type == "spherical":
        return reg.sum() / covariances
    if theta.covariance_type == "diag":
        return (reg / covariances).sum(dim=1)
    return (torch.linalg.inv(covariances).diagonal(dim1=1, dim2=2) * reg).sum(dim=1)


def assert_never_falls(
    x: Tensor,
    components: int,
    kind: CovarianceType,
    reg_covar: float = 1e-6,
    weight: Tensor | None = None,
    **options: Any,
) -> None:
    """The penalized bound rises in every M-step, so the likelihood falls no further than the penalty does."""
    model = GaussianMixtureModel(components, covariance_type=kind, tol=0, max_iter=25, reg_covar=reg_covar, **options)
    model.initialize(lambda: [(x, weight, None)])
    values, allowed = [], []
    # moments about the origin hold no digit below this part of the data's variance, which is added there
    reg = model.standardized_variance(reg_covar).clamp(min=1e-12)
    while not model.finished:
        before = model.current_parameters(0)
        before = MixtureParameters(kind, before.weights.clone(), before.means.clone(), before.covariances.clone())
        model.start_epoch()
        model.add_batch(x, weight)
        values.append(model.end_epoch().objective)
        after = model.current_parameters(0)
        allowed.append(float(after.weights @ (inverse_traces(before, reg) - inverse_traces(after, reg))) / 2)
    assert np.isfinite(values).all()
    for before_value, after_value, fall in zip(values, values[1:], allowed, strict=False):
        assert after_value >= before_value - fall - 1e-9 * max(1.0, abs(before_value)), (values, allowed)


@settings(max_examples=50)
@given(
    rows=st.integers(1, 60),
    width=st.integers(1, 6),
    components=st.integers(1, 6),
    kind=st.sampled_from(KINDS),
    scale=st.sampled_from([1e-8, 1e-3, 1.0, 1e3, 1e8]),
    shape=st.sampled_from(["blobs", "duplicates", "constant feature", "few distinct", "line", "integers"]),
    init=st.sampled_from(["k-means++", "random"]),
    standardize=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_likelihood_never_falls(
    rows: int, width: int, components: int, kind: CovarianceType, scale: float, shape: str, init: str,
    standardize: bool, weighted: bool, seed: int,
) -> None:  # fmt: skip
    components = min(components, rows)
    generator = torch.Generator().manual_seed(seed)
    x = blobs(rows, width, 3, seed)
    weight = torch.rand(rows, generator=generator, dtype=torch.float64) if weighted else None
    if shape == "duplicates":
        x = x[torch.randint(rows, (rows,), generator=generator)]
    elif shape == "constant feature":
        x[:, 0] = 7.0
    elif shape == "few distinct":
        x = x[torch.randint(min(rows, 2), (rows,), generator=generator)]
    elif shape == "line":
        x = x[:, :1] * torch.arange(1.0, width + 1, dtype=torch.float64)
    elif shape == "integers":
        x = x.round()
    assert_never_falls(scale * x, components, kind, weight=weight, init=init, standardize=standardize, seed=seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_one_point_is_a_mixture(kind: CovarianceType, scale: float) -> None:
    assert_never_falls(torch.full((1, 3), scale, dtype=torch.float64), 1, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_likelihood_never_falls_where_the_regularisation_is_as_large_as_the_data(kind: CovarianceType) -> None:
    assert_never_falls(blobs(), 4, kind, reg_covar=1.0, init="random")


@pytest.mark.parametrize("kind", KINDS)
def test_without_regularisation_the_likelihood_never_falls_at_all(kind: CovarianceType) -> None:
    model = GaussianMixtureModel(4, covariance_type=kind, tol=0, max_iter=60, reg_covar=0.0, init="random")
    values = [report.objective for report in fit_in_memory(model, blobs())]
    for before, after in itertools.pairwise(values):
        assert after >= before - 1e-12 * abs(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reg_covar", [0.0, 1e-6, 0.1, 1.0])
def test_the_regularised_covariance_does_not_depend_on_the_start(kind: CovarianceType, reg_covar: float) -> None:
    x = blobs(5000, 3, 1)
    found = []
    for variance in (0.3, 1.0, 30.0):
        shape = MixtureParameters.shapes(kind, 1, 3)["covariances"]
        precisions = torch.eye(3).expand(shape) / variance if kind in ("full", "tied") else torch.ones(shape) / variance
        start = {"weights_init": [1.0], "means_init": [[0.0, 0, 0]], "precisions_init": precisions}
        model = GaussianMixtureModel(1, covariance_type=kind, reg_covar=reg_covar, **start)
        fit_in_memory(model, x)
        found.append(model.best_parameters().covariances)
    scatter = torch.cov(x.T, correction=0)
    expected = {
        "full": (scatter + reg_covar * torch.eye(3))[None],
        "tied": scatter + reg_covar * torch.eye(3),
        "diag": scatter.diagonal()[None] + reg_covar,
        "spherical": scatter.diagonal().mean()[None] + reg_covar,
    }[kind]
    for covariances in found:
        torch.testing.assert_close(covariances, expected, rtol=1e-9, atol=1e-9)


def test_far_from_the_origin_and_from_each_other_all_digits_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 2, generator=generator, dtype=torch.float64)
    noise = (noise - noise.mean(0)) / noise.std(0, correction=0)
    x = torch.cat([1e6 + 1e-3 * noise, -1e6 + 1e-3 * noise])
    model = GaussianMixtureModel(2, covariance_type="diag", reg_covar=0.0, max_iter=20)
    fit_in_memory(model, x)
    np.testing.assert_allclose(model.best_parameters().covariances, 1e-6, rtol=1e-6)


def test_an_empty_component_keeps_its_place_and_is_named() -> None:
    x = blobs(50, 2)
    far = torch.tensor([[1e4, 1e4]], dtype=torch.float64)
    model = GaussianMixtureModel(
        2,
        covariance_type="diag",
        max_iter=3,
        weights_init=[0.5, 0.5],
        means_init=torch.cat([x[:1], far]),
        precisions_init=torch.ones(2, 2),
    )
    reports = fit_in_memory(model, x)
    assert reports[0].empty == [1]
    torch.testing.assert_close(model.best_parameters().means[1], far[0])


def test_restarts_run_side_by_side_and_the_best_is_kept() -> None:
    x = blobs(400, 3, 5)
    together = GaussianMixtureModel(5, n_init=4, init="random", max_iter=40)
    fit_in_memory(together, x)
    assert together.objective.shape == (4,)
    assert together.objective[together.best] >= together.objective.max() - 1e-6
    alone = GaussianMixtureModel(5, n_init=1, init="random", max_iter=40)
    fit_in_memory(alone, x)
    torch.testing.assert_close(together.objective[0], alone.objective[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_standardised_parameters_are_reported_in_units_of_the_data(kind: CovarianceType) -> None:
    factor = torch.tensor([1.0, 100.0, 1e-3, 5.0, 1.0], dtype=torch.float64)
    x = blobs() * factor
    model = GaussianMixtureModel(3, covariance_type=kind, standardize=True, max_iter=50, means_init=x[:3])
    fit_in_memory(model, x)
    theta = model.best_parameters()
    density = log_likelihood(theta, x) / len(x)
    torch.testing.assert_close(density, torch.logsumexp(model.log_joint(x), 1).mean(), rtol=1e-8, atol=1e-8)
    rescaled = GaussianMixtureModel(3, covariance_type=kind, standardize=True, max_iter=50, means_init=x[:3] / factor)
    fit_in_memory(rescaled, x / factor)
    torch.testing.assert_close(theta.means, rescaled.best_parameters().means * factor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_stepwise_comes_close_to_exact(kind: CovarianceType) -> None:
    x = blobs(3000, 4, 3)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    exact, stepwise = (
        GaussianMixtureModel(3, covariance_type=kind, algorithm=name, max_iter=30, tol=1e-5)
        for name in ("exact", "stepwise")
    )
    fit_in_memory(exact, x)
    fit_in_memory(stepwise, x, batch_size=300)
    scores = [float(torch.logsumexp(model.log_joint(x), 1).mean()) for model in (exact, stepwise)]
    assert scores[1] > scores[0] - 0.02
    assert int(stepwise.steps) >= 10


def test_samples_have_the_moments_of_the_mixture() -> None:
    for kind in KINDS:
        model = GaussianMixtureModel(3, covariance_type=kind)
        x = blobs()
        fit_in_memory(model, x)
        samples, labels = model.sample(40_000, torch.Generator().manual_seed(0))
        theta = model.best_parameters()
        torch.testing.assert_close(samples.mean(0), theta.weights @ theta.means, rtol=0.05, atol=0.1)
        torch.testing.assert_close(labels.bincount() / 40_000, theta.weights.float(), rtol=0.05, atol=0.01)
        score = float(torch.logsumexp(model.log_joint(samples), 1).mean())
        assert score == pytest.approx(float(log_likelihood(theta, x)) / len(x), abs=0.3)
