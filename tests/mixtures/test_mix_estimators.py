"""The estimators in scikit-learn's hands."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans as ReferenceKMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as ReferenceMixture
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from lightning_modules import GaussianMixtureEstimator, KMeansEstimator, StudentTMixtureEstimator
from lightning_modules.mixtures.model_selection import choose_num_components


@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks(
    [
        GaussianMixtureEstimator(),
        GaussianMixtureEstimator(n_components=3, covariance_type="diag", init_params="random"),
        StudentTMixtureEstimator(),
        KMeansEstimator(),
        KMeansEstimator(init="random", standardize=True),
    ]
)
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def samples() -> Any:
    generator = np.random.default_rng(0)
    return np.concatenate([generator.normal(m, 1, (80, 3)) for m in (-4, 0, 5)])


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_mixture_equals_the_reference_from_the_same_start(kind: Any) -> None:
    x = samples()
    theirs = ReferenceMixture(3, covariance_type=kind, max_iter=1, tol=0, random_state=0)
    with pytest.warns(ConvergenceWarning):
        theirs.fit(x)
    start = {"weights_init": theirs.weights_, "means_init": theirs.means_, "precisions_init": theirs.precisions_}
    ours = GaussianMixtureEstimator(3, covariance_type=kind, **start).fit(x)
    theirs = ReferenceMixture(3, covariance_type=kind, **start).fit(x)
    np.testing.assert_allclose(ours.means_, theirs.means_, atol=1e-6)
    np.testing.assert_allclose(ours.covariances_, theirs.covariances_, atol=1e-5)
    np.testing.assert_allclose(ours.precisions_, theirs.precisions_, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours.score_samples(x), theirs.score_samples(x), atol=1e-5)
    assert ours.n_iter_ == theirs.n_iter_
    assert ours.bic(x) == pytest.approx(theirs.bic(x), rel=1e-7)
    assert ours.aic(x) == pytest.approx(theirs.aic(x), rel=1e-7)
    assert ours.sample(4)[0].shape == (4, 3)


def test_k_means_equals_the_reference_from_the_same_start() -> None:
    x = samples()
    ours = KMeansEstimator(3, init=x[:3], tol=0).fit(x)
    theirs = ReferenceKMeans(3, init=x[:3], n_init=1, tol=0).fit(x)
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-9)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-9)
    assert (ours.labels_ == theirs.labels_).all()
    np.testing.assert_allclose(ours.transform(x), theirs.transform(x), rtol=1e-6, atol=1e-6)
    assert ours.score(x) == pytest.approx(theirs.score(x), rel=1e-9)


def test_clones_pipelines_and_searches() -> None:
    x = samples()
    for estimator in (GaussianMixtureEstimator(3, random_state=0), KMeansEstimator(3, random_state=0)):
        fitted = clone(estimator).fit(x)
        piped = make_pipeline(StandardScaler(), clone(estimator)).fit(x)
        assert len(np.unique(fitted.predict(x))) == len(np.unique(piped.predict(x))) == 3
    search = GridSearchCV(GaussianMixtureEstimator(random_state=0), {"n_components": [1, 3]}, cv=3)
    search.fit(x[np.random.default_rng(1).permutation(len(x))])
    assert search.best_params_ == {"n_components": 3}


@pytest.mark.parametrize("kind", [GaussianMixtureEstimator, StudentTMixtureEstimator])
def test_an_argument_that_there_is_not_is_refused_by_the_class_that_was_called(kind: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"^{kind.__name__}.__init__\(\) got an unexpected keyword argument 'n_component'"
    ):
        kind(n_component=3)
    assert kind(n_components=3).n_components == 3


def test_errors_are_of_scikit_learns_kinds() -> None:
    x = samples()
    for estimator in (GaussianMixtureEstimator, KMeansEstimator):
        with pytest.raises(ValueError, match="must be an int in the range"):
            estimator(0).fit(x)
        with pytest.raises(ValueError, match="n_samples"):
            estimator(500).fit(x)
        with pytest.raises(ValueError, match="NaN"):
            estimator(2).fit(np.full_like(x, np.nan))
        with pytest.raises(ValueError, match="infinity"):
            estimator(2).fit(np.full_like(x, np.inf))
        with pytest.raises(ValueError, match="0 sample"):
            estimator(2).fit(x[:0])
        with pytest.raises(ValueError, match="expecting 3 features"):
            estimator(2).fit(x).predict(x[:, :2])
    with pytest.raises(ValueError, match=r"positive definite.*decrease .*increase reg_covar, or scale"):
        GaussianMixtureEstimator(2, reg_covar=0.0).fit(np.concatenate([x, np.ones((len(x), 1))], axis=1))
    with pytest.raises(ValueError, match="shape of the initial centers"):
        KMeansEstimator(2, init=x[:2, :2]).fit(x)
    with pytest.raises(ValueError, match="'means_init' should have the shape"):
        GaussianMixtureEstimator(2, means_init=x[:2, :2]).fit(x)
    with pytest.warns(ConvergenceWarning, match=r"did not converge in 1 iterations"):
        GaussianMixtureEstimator(2, max_iter=1).fit(x)
    with pytest.warns(ConvergenceWarning, match="distinct clusters"):
        KMeansEstimator(3).fit(np.repeat(x[:2], 10, axis=0))


def test_choosing_the_number_of_components() -> None:
    choice = choose_num_components(torch.from_numpy(samples()), range(1, 6), covariance_type="diag", n_init=2)
    assert choice.best == 3
    axes = choice.figure().axes[0]
    assert axes.get_lines()[0].get_xdata().tolist() == [1, 2, 3, 4, 5]
