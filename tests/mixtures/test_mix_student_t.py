"""Mixtures of t distributions against SciPy, their own theorems, and the Gaussian among outliers."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import digamma, gammaln
from scipy.stats import multivariate_t
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules import GaussianMixtureEstimator, StudentTMixture, StudentTMixtureEstimator
from lightning_modules.mixtures import StudentTMixtureModel, fit_in_memory
from lightning_modules.mixtures.student_t.em import StudentTParameters, expected_log_scale, solve_degrees_of_freedom
from tests.mixtures.test_mix_family import trainer
from tests.mixtures.test_mix_mathematics import inverse_traces

KINDS = ("full", "tied", "diag", "spherical")


def t_samples(count: int, nu: float, seed: int = 0, width: int = 2) -> Tensor:
    """Samples of a t distribution about the origin."""
    generator = np.random.default_rng(seed)
    scale = np.sqrt(generator.chisquare(nu, (count, 1)) / nu)
    return torch.from_numpy(generator.normal(size=(count, width)) / scale)


@pytest.mark.parametrize("kind", KINDS)
def test_density_is_that_of_scipy(kind: Any) -> None:
    x = 30 + 4 * t_samples(400, 3.0).numpy()
    mixture = StudentTMixtureEstimator(2, covariance_type=kind, random_state=0, tol=0.1).fit(x)
    density = np.zeros(len(x))
    for k in range(2):
        covariance = mixture.covariances_ if kind == "tied" else mixture.covariances_[k]
        matrix = covariance if kind in ("full", "tied") else np.eye(2) * covariance
        distribution = multivariate_t(mixture.means_[k], matrix, df=mixture.degrees_of_freedom_[k])
        density += mixture.weights_[k] * distribution.pdf(x)
    np.testing.assert_allclose(mixture.score_samples(x), np.log(density), rtol=1e-9)


def test_degrees_of_freedom_solve_their_equation() -> None:
    nu = torch.tensor([0.1, 0.5, 2.0, 7.3, 40.0, 999.0], dtype=torch.float64)
    expected = torch.from_numpy(digamma(nu.numpy() / 2) - np.log(nu.numpy() / 2) - 1)
    torch.testing.assert_close(expected_log_scale(nu), expected)
    torch.testing.assert_close(solve_degrees_of_freedom(expected), nu, rtol=1e-9, atol=0)
    bounds = solve_degrees_of_freedom(torch.tensor([-1e9, -1.0], dtype=torch.float64))
    torch.testing.assert_close(bounds, torch.tensor([0.1, 1000.0], dtype=torch.float64))


@pytest.mark.parametrize("nu", [1.5, 4.0, 12.0])
def test_one_component_reaches_the_maximum_of_the_likelihood(nu: float) -> None:
    x = t_samples(4000, nu)
    model = StudentTMixtureModel(1, tol=0.0, max_iter=400, reg_covar=0.0)
    fit_in_memory(model, x)
    theta = model.best_parameters()
    difference = (x - theta.means[0]).numpy()
    square = (difference @ np.linalg.inv(theta.covariances[0].numpy()) * difference).sum(1)

    def negative(df: float) -> float:
        constant = gammaln((df + 2) / 2) - gammaln(df / 2) - np.log(df)
        return -float((constant - (df + 2) / 2 * np.log1p(square / df)).sum())

    best = minimize_scalar(negative, bounds=(0.5, 50), method="bounded", options={"xatol": 1e-9}).x
    assert float(theta.degrees_of_freedom[0]) == pytest.approx(best, rel=1e-4)
    assert float(theta.degrees_of_freedom[0]) == pytest.approx(nu, rel=0.25)
    # the fixed point of the weighted moments
    scale = torch.from_numpy((best + 2) / (best + square))
    torch.testing.assert_close((scale[:, None] * x).sum(0) / scale.sum(), theta.means[0], rtol=1e-5, atol=1e-5)


@settings(max_examples=20)
@given(
    count=st.integers(2, 50),
    width=st.integers(1, 4),
    components=st.integers(1, 4),
    kind=st.sampled_from(KINDS),
    known=st.sampled_from([None, 0.5, 4.0]),
    shape=st.sampled_from(["normal", "heavy tails", "duplicates", "constant feature"]),
    scale=st.sampled_from([1e-6, 1.0, 1e2]),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_likelihood_never_falls_but_by_the_regularisation(
    count: int, width: int, components: int, kind: Any, known: float | None, shape: str, scale: float, weighted: bool,
    seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator, dtype=torch.float64)
    if shape == "heavy tails":
        x = x / torch.rand(count, 1, generator=generator, dtype=torch.float64)
    elif shape == "duplicates":
        x = x[torch.randint(count, (count,), generator=generator)]
    elif shape == "constant feature":
        x[:, 0] = 7.0
    weight = torch.rand(count, generator=generator, dtype=torch.float64) if weighted else None
    options = {"covariance_type": kind, "degrees_of_freedom": known, "seed": seed}
    model = StudentTMixtureModel(min(components, count), tol=0.0, max_iter=20, **options)
    model.initialize(lambda: [(scale * x, weight, None)])
    reg = model.standardized_variance(1e-6).clamp(min=1e-12)
    values, allowed = [], []
    while not model.finished:
        before = model.current_parameters(0)
        before = StudentTParameters(kind, *(value.clone() for value in list(vars(before).values())[1:]))
        model.start_epoch()
        model.add_batch(scale * x, weight)
        values.append(model.end_epoch().objective)
        after = model.current_parameters(0)
        fall = after.weights @ (inverse_traces(before, reg) - inverse_traces(after, reg)) / 2
        # moments of standardized data have sixteen digits, however narrow a component is
        rounding = 1e-15 * float(inverse_traces(after, torch.ones_like(reg)).max())
        allowed.append(float(fall) + rounding)
    assert np.isfinite(values).all()
    for (earlier, later), fall in zip(itertools.pairwise(values), allowed, strict=False):
        assert later >= earlier - fall - 1e-9 * max(1.0, abs(earlier)), (values, allowed)


def test_many_degrees_of_freedom_are_the_gaussian() -> None:
    x = torch.cat([t_samples(200, 1e6), 9 + t_samples(200, 1e6, 1)]).numpy()
    start = {"means_init": [[0, 0], [9, 9]], "tol": 1e-9, "max_iter": 500}
    gaussian = GaussianMixtureEstimator(2, **start).fit(x)
    student = StudentTMixtureEstimator(2, degrees_of_freedom=1000, **start).fit(x)
    np.testing.assert_allclose(student.means_, gaussian.means_, atol=5e-3)
    np.testing.assert_allclose(student.covariances_, gaussian.covariances_, atol=2e-2)


def test_outliers_do_not_pull_the_means_along() -> None:
    generator = np.random.default_rng(0)
    centers = np.array([[-6.0, 0.0], [0.0, 6.0], [6.0, 0.0]])
    clean = centers[np.arange(3000) % 3] + generator.normal(size=(3000, 2))
    x = np.concatenate([clean, generator.uniform(20, 60, (150, 2))])  # 5 %, on one side
    error, standard_error = {}, 1 / np.sqrt(1000)
    for estimator in (StudentTMixtureEstimator, GaussianMixtureEstimator):
        means = estimator(3, means_init=centers, max_iter=500, tol=1e-6).fit(x).means_
        error[estimator] = np.abs(means - centers).max() / standard_error
    assert error[StudentTMixtureEstimator] < 2.5
    assert error[GaussianMixtureEstimator] > 10


def test_samples_have_the_tails_of_the_mixture() -> None:
    model = StudentTMixtureModel(1, degrees_of_freedom=5.0)
    fit_in_memory(model, 3 + t_samples(2000, 5.0, width=1))
    samples, _ = model.sample(100_000, torch.Generator().manual_seed(0))
    theta = model.best_parameters()
    standardized = ((samples - theta.means[0]) / theta.covariances[0, 0].sqrt()).abs()[:, 0]
    # quantiles of the absolute value of a t distribution with five degrees of freedom
    for share, quantile in ((0.5, 0.7267), (0.9, 2.015), (0.99, 4.032)):
        assert float(standardized.quantile(share)) == pytest.approx(quantile, rel=0.03)


@pytest.mark.parametrize("algorithm", ["exact", "stepwise"])
def test_the_module_learns_it_from_batches(algorithm: Any) -> None:
    x = torch.cat([t_samples(600, 3.0) - 12, t_samples(600, 30.0, 1) + 12])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    module = StudentTMixture(2, algorithm=algorithm, tol=1e-6)
    trainer(40).fit(module, DataLoader(x, 100))
    exact = StudentTMixtureEstimator(2, tol=1e-6, max_iter=300).fit(x.numpy())
    assert module.score(x) == pytest.approx(exact.score(x.numpy()), abs=1e-3 if algorithm == "exact" else 0.02)
    order = module.means[:, 0].argsort()
    assert float(module.degrees_of_freedom[order[0]]) < float(module.degrees_of_freedom[order[1]])
    assert module.hparams["degrees_of_freedom"] is None
    assert module.bic(x) == pytest.approx(-2 * float(module.score_samples(x).sum()) + 13 * np.log(1200))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), 1e9])
def test_degrees_of_freedom_that_are_impossible(value: float) -> None:
    with pytest.raises(ValueError, match=r"degrees_of_freedom must be from 0.1 to 1000, or None"):
        StudentTMixture(2, degrees_of_freedom=value)
    with pytest.raises(ValueError, match="'degrees_of_freedom' parameter"):
        StudentTMixtureEstimator(2, degrees_of_freedom=value).fit(np.eye(4))
