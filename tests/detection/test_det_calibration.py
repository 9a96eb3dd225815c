"""Temperature, threshold and densities against other libraries; scores against scikit-learn."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import multivariate_normal
from sklearn import metrics
from sklearn.mixture import GaussianMixture
from torch import Tensor

from lightning_modules.detection import (
    BufferedPredictions,
    Calibration,
    ClassDensities,
    PredictionBuffer,
    cross_fit,
    evaluate,
    scores,
)
from lightning_modules.detection.calibration import best_threshold, fit_temperature


def evaluated(count: int = 120, spread: float = 2.0, width: int = 6) -> BufferedPredictions:
    generator = torch.Generator().manual_seed(0)
    label = (torch.arange(count) % 3 == 0).long()
    logit = (2.0 * label - 1) + spread * torch.randn(count, generator=generator)
    features = torch.randn(count, width, generator=generator) + 3 * label[:, None]
    return BufferedPredictions(logit.double(), label, features.double(), torch.arange(count) % 5 == 0)


class TestTemperature:
    @pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
    def test_it_is_that_of_scipy(self, scale: float) -> None:
        seen = evaluated()
        z, y = scale * seen.logit.numpy(), seen.label.numpy()
        target = np.where(y > 0, (y.sum() + 1) / (y.sum() + 2), 1 / ((1 - y).sum() + 2))

        def loss(log_t: float) -> float:
            s = z * np.exp(-log_t)
            return float(np.mean(np.logaddexp(0, s) - target * s))

        expected = np.exp(minimize_scalar(loss, bounds=(-6, 6), method="bounded", options={"xatol": 1e-10}).x)
        assert float(fit_temperature(torch.from_numpy(z), seen.label)) == pytest.approx(expected, rel=1e-5)

    def test_logits_without_a_mistake_do_not_make_it_certain(self) -> None:
        label = torch.arange(200) % 2
        calibration = Calibration()
        calibration.fit(20.0 * label - 10, label)
        assert float(calibration(torch.tensor(10.0))) == pytest.approx(101 / 102, abs=1e-6)

    def test_useless_logits_become_undecided(self) -> None:
        label = torch.arange(100) % 2
        calibration = Calibration()
        calibration.fit(-5.0 * label + 2, label)  # worse than useless
        assert float(calibration(torch.tensor(2.0))) == pytest.approx(0.5, abs=1e-2)


class TestThreshold:
    def test_no_threshold_is_better(self) -> None:
        seen = evaluated(spread=3.0)
        accuracy, threshold = best_threshold(seen.logit - 1.5, seen.label)
        candidates = [float(z) + step for z in seen.logit - 1.5 for step in (-1e-9, 1e-9)]
        right = ((seen.logit - 1.5 > threshold) == (seen.label > 0)).sum()
        assert float(accuracy) == int(right) / len(seen.label)
        assert right == max(((seen.logit - 1.5 > c) == (seen.label > 0)).sum() for c in candidates)

    @pytest.mark.parametrize(
        ("logit", "label", "expected"),
        [
            ([-2.0, -1.0, 3.0, 5.0], [0, 0, 1, 1], 0.0),
            ([1.0, 2.0, 3.0, 5.0], [0, 0, 1, 1], 2.5),
            ([1.0, 1.0, 1.0], [0, 1, 1], 0.5),
        ],
        ids=["zero where it separates", "halfway", "never between equals"],
    )
    def test_by_hand(self, logit: list[float], label: list[int], expected: float) -> None:
        assert float(best_threshold(torch.tensor(logit), torch.tensor(label))[1]) == pytest.approx(expected)


class TestDensities:
    def test_one_gaussian_a_class_is_that_of_scipy(self) -> None:
        seen = evaluated(width=4)
        densities = ClassDensities(4, num_directions=4)
        assert densities.fit(seen.features, seen.label)
        rows = (((seen.features - densities.offset) / densities.scale) @ densities.directions).numpy()
        for number in (0, 1):
            own = rows[seen.label.numpy() == number]
            covariance = np.cov(own.T, bias=True) + 1e-2 * np.eye(4)
            expected = multivariate_normal(own.mean(0), covariance).logpdf(rows)
            np.testing.assert_allclose(densities.log_densities(seen.features)[:, number], expected, rtol=1e-6)

    def test_several_gaussians_explain_as_well_as_those_of_scikit_learn(self) -> None:
        generator = torch.Generator().manual_seed(1)
        features = torch.randn(300, 3, generator=generator) + 4 * (torch.arange(300) % 4)[:, None]
        label = torch.arange(300) % 2
        densities = ClassDensities(3, num_directions=3, num_components=2)
        densities.fit(features, label)
        rows = (((features.double() - densities.offset) / densities.scale) @ densities.directions).numpy()
        for number in (0, 1):
            own = label == number
            peer = GaussianMixture(2, reg_covar=1e-2, random_state=0, n_init=5).fit(rows[own])
            ours = float(densities.log_densities(features[own])[:, number].mean())
            assert ours == pytest.approx(peer.score(rows[own]), abs=0.01)

    def test_an_image_like_no_other_is_out_of_distribution(self) -> None:
        seen = evaluated()
        densities = ClassDensities(6, inlier_quantile=0.9)
        densities.fit(seen.features, seen.label)
        assert float((densities.ood_score(seen.features) > 0).double().mean()) == pytest.approx(0.1, abs=0.01)
        assert (densities.ood_score(torch.full((1, 6), 20.0)) > 0).all()

    def test_too_few_images_change_nothing(self) -> None:
        seen = evaluated(24)  # 8 generated ones, of 9 that 8 directions ask for
        densities = ClassDensities(16)
        before = {name: value.clone() for name, value in densities.state_dict().items()}
        assert not densities.fit(seen.features.repeat(1, 3)[:, :16], seen.label)
        for name, value in densities.state_dict().items():
            torch.testing.assert_close(value, before[name], equal_nan=True)
        assert densities.ood_score(torch.zeros(2, 16)).isnan().all()

    def test_features_that_are_constant_do_no_harm(self) -> None:
        seen = evaluated()
        densities = ClassDensities(8)
        densities.fit(torch.cat([seen.features, torch.ones(120, 2)], dim=1), seen.label)
        assert densities.log_densities(torch.ones(3, 8)).isfinite().all()

    def test_what_is_constant_but_for_rounding_says_nothing(self) -> None:
        """One feature is constant to seven digits; a copy of another leaves a direction without variance."""
        seen = evaluated()
        rounding = 1e-3 * (1 + 6e-8 * torch.randn(120, 1, generator=torch.Generator().manual_seed(2)).double())
        features = torch.cat([seen.features, rounding, seen.features[:, :1]], dim=1)
        densities = ClassDensities(8)
        densities.fit(features, seen.label)
        other = features.clone()
        other[:, 6] += 1e-8
        other[:, 7] += 1e-3
        torch.testing.assert_close(densities.ood_score(other), densities.ood_score(features), rtol=0, atol=1e-2)


def test_what_is_fitted_keeps_its_digits_in_a_module_of_lower_precision() -> None:
    seen = evaluated()
    calibration, densities = Calibration(), ClassDensities(6)
    calibration.fit(seen.logit, seen.label)
    densities.fit(seen.features, seen.label)
    expected = evaluate(seen, calibration, densities)
    lower = torch.nn.ModuleList([calibration, densities]).bfloat16()
    for name, value in lower.named_buffers():
        assert not value.is_floating_point() or value.dtype == torch.float64, name
    for found, wanted in zip(evaluate(seen, calibration, densities), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_repeats_and_unlabelled_images_are_left_out_and_the_rest_put_in_order() -> None:
    buffer = PredictionBuffer()
    label, weight = torch.tensor([1, 0, -1, 0]), torch.tensor([1.0, 2.0, 1.0, 0.0])
    buffer.update(torch.tensor([5, 2, 3, 2]), torch.arange(4.0), label, torch.arange(8.0).view(4, 2), weight)
    buffer.update(torch.tensor([0]), torch.tensor([9.0]), torch.tensor([1]), torch.zeros(1, 2), torch.ones(1))
    seen = buffer.compute()
    assert seen.logit.tolist() == [9.0, 1.0, 0.0]
    assert seen.label.tolist() == [1, 0, 1]
    assert seen.features.tolist() == [[0.0, 0.0], [2.0, 3.0], [0.0, 1.0]]


def test_scores_are_those_of_scikit_learn() -> None:
    seen = evaluated()
    calibration, densities = Calibration(), ClassDensities(6)
    calibration.fit(seen.logit, seen.label)
    densities.fit(seen.features, seen.label)
    evaluation = evaluate(seen, calibration, densities)
    found = {name: float(value) for name, value in scores(seen, evaluation).items()}
    z, y, p = seen.logit.numpy(), seen.label.numpy(), evaluation.probability.numpy()
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(y, z > 0), abs=1e-6)
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(y, z), abs=1e-6)
    assert found["average_precision"] == pytest.approx(metrics.average_precision_score(y, z), abs=1e-6)
    assert found["loss"] == pytest.approx(metrics.log_loss(y, p), abs=1e-6)
    threshold = float(calibration.threshold)
    assert found["accuracy_at_threshold"] == pytest.approx(metrics.accuracy_score(y, p > threshold), abs=1e-6)
    place = np.minimum((p * 15).astype(int), 14)
    gaps = [abs(p[place == b].mean() - y[place == b].mean()) * (place == b).mean() for b in set(place)]
    assert found["ece"] == pytest.approx(sum(gaps), abs=1e-6)
    assert found["generative_accuracy"] > 0.95


def test_one_class_alone_has_an_accuracy_but_no_curve() -> None:
    seen = evaluated().select(torch.arange(0, 120, 3))
    found = scores(seen, evaluate(seen, Calibration(), ClassDensities(6)))
    assert found["accuracy"].isfinite()
    assert found["auroc"].isnan()
    assert found["average_precision"].isnan()


@pytest.mark.parametrize(
    ("generated", "undefined"),
    [
        (1, {"loss", "ece", "accuracy_at_threshold", "generative_accuracy", "ood_fraction"}),
        (10, {"generative_accuracy", "ood_fraction"}),
        (14, set()),
    ],
)
def test_what_a_half_is_too_small_to_fit_is_not_defined(generated: int, undefined: set[str]) -> None:
    """Six directions take seven images of a class. An earlier fit was made to these very images."""
    seen = evaluated(count=120)
    seen = seen.select((seen.label == 0) | ((seen.label == 1).cumsum(0) <= generated))
    calibration, densities = Calibration(), ClassDensities(6)
    calibration.fit(seen.logit, seen.label)
    densities.fit(seen.features, seen.label)
    found = scores(seen, cross_fit(seen, calibration, densities))
    assert {name for name, value in found.items() if value.isnan()} == undefined
    assert densities.fitted == (generated > 1), "the fit itself is left alone"


def test_images_of_one_class_are_evaluated_by_what_there_is() -> None:
    whole = evaluated()
    seen, calibration = whole.select(whole.label == 1), Calibration()
    calibration.fit(whole.logit, whole.label)
    evaluation = cross_fit(seen, calibration, ClassDensities(6))
    torch.testing.assert_close(evaluation.probability, calibration(seen.logit))


@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_one_order_of_the_images_everywhere(shift: float) -> None:
    """What is logged, and what any reader of the probabilities computes; also where they come near 1."""
    seen = evaluated()
    seen = seen._replace(logit=seen.logit.float().double() + shift)
    calibration = Calibration()
    calibration.temperature.fill_(1.5)
    evaluation = evaluate(seen, calibration, ClassDensities(6))
    expected = metrics.roc_auc_score(seen.label.numpy(), evaluation.probability.numpy())
    assert float(scores(seen, evaluation)["auroc"]) == pytest.approx(expected, abs=1e-6)
    assert expected == pytest.approx(metrics.roc_auc_score(seen.label.numpy(), seen.logit.numpy()), abs=1e-6)


def test_no_image_is_evaluated_by_a_fit_to_itself() -> None:
    seen = evaluated(count=120)
    first, second = seen.halves()
    assert seen.label[first].sum() == seen.label[second].sum() == 20
    evaluation = cross_fit(seen, Calibration(), ClassDensities(6))

    def changed(where: Tensor) -> Tensor:
        """Probabilities with the logits of one half changed, in the other half."""
        other = seen._replace(logit=torch.where(where, 3 * seen.logit + 1, seen.logit))
        return cross_fit(other, Calibration(), ClassDensities(6)).probability

    assert not torch.equal(changed(first)[second], evaluation.probability[second]), "the fit to the first half is used"
    alone = Calibration()
    alone.fit(seen.logit[first], seen.label[first])
    torch.testing.assert_close(evaluation.probability[second], alone(seen.logit[second]))
