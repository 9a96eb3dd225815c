"""Regimes and prototypes: against scikit-learn, by hand, and with input that cannot be right."""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

from lightning_modules import ParameterTable
from lightning_modules.em import MixtureAssignment, SimilarityAssignment
from lightning_modules.em.assignments.mixture import _largest_spread
from lightning_modules.em.image_features import (
    ColourSpread,
    GradientEnergy,
    ImageFeature,
    ImageFeatures,
    NoiseLevel,
    Texture,
)
from lightning_modules.mixtures.gaussian.em import statistics_of

YES = torch.tensor(True)


class Table(ImageFeature):
    """Features that a test lays down: the first pixels of each image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, images: Tensor, noise_std: Tensor) -> Tensor:
        return images.flatten(1)[:, : self.width]


def learn(assignment: MixtureAssignment, rows: Tensor, accepted: Tensor = YES) -> None:
    """One step on images whose features are `rows` `[N, F]`."""
    images, labels, noise = as_images(rows)
    r = assignment(images, labels, noise, assignment.num_regimes)
    assignment.m_step(assignment.e_step(images, labels, noise, r).sum(0), accepted)


def as_images(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.zeros(len(rows), 3, 4, 4, dtype=rows.dtype)
    images.view(len(rows), -1)[:, : rows.shape[1]] = rows
    return images, torch.full((len(rows),), -1), torch.ones(len(rows))


def clusters(seed: int, width: int = 2, spread: float = 0.2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.tensor([[-3.0, 1.0], [0.0, -2.0], [4.0, 2.0]], dtype=torch.float64)[:, :width]
    labels = torch.randint(3, (60,), generator=generator)
    return centers[labels] + spread * torch.randn(60, width, generator=generator, dtype=torch.float64)


def test_posteriors_are_those_of_scikit_learn_under_the_learned_mixture() -> None:
    assignment = MixtureAssignment(3, [Table(2)])
    for step in range(200):
        learn(assignment, clusters(step))
    reference = GaussianMixture(3)
    reference.weights_ = assignment.weights.numpy()
    scale = assignment.scale.numpy()
    reference.means_ = assignment.means.numpy() * scale + assignment.offset.numpy()
    covariances = assignment.covariances.numpy() * scale[:, None] * scale
    reference.precisions_cholesky_ = np.stack([np.linalg.cholesky(np.linalg.inv(c)) for c in covariances])
    rows = clusters(99, spread=1.5)
    found = assignment(*as_images(rows), 3)
    np.testing.assert_allclose(found.numpy(), reference.predict_proba(rows.numpy()), atol=1e-9)
    # and they are the clusters' own
    order = reference.means_[:, 0].argsort()
    np.testing.assert_allclose(reference.means_[order], [[-3, 1], [0, -2], [4, 2]], atol=0.1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 3), st.sampled_from([1e-6, 1.0, 1e6]))
def test_the_likelihood_never_falls_on_a_full_batch(seed: int, regimes: int, width: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(20, width, generator=generator, dtype=torch.float64)
    rows = scale * (rows + 3 * (rows[:, :1] > 0))
    assignment = MixtureAssignment(regimes, [Table(width)])
    assignment.step_exponent = 0.0  # nothing is remembered of earlier steps: exact EM
    last, fall = -torch.inf, 0.0
    seen = []
    for _ in range(25):
        assignment.age.fill_(0)  # no regime is re-seeded on the way
        before = torch.linalg.inv(assignment.covariances)
        learn(assignment, rows)
        now = assignment.diagnostics().get("log_likelihood")  # none before the start
        if now is not None:
            # what is added to the variances may cost as much as its penalty falls: see `gaussian.em.m_step`
            assert now >= last - fall - 1e-9 * abs(last)
            traces = (before - torch.linalg.inv(assignment.covariances)).diagonal(dim1=1, dim2=2).sum(dim=1)
            last, fall = now, float(assignment.reg_covar * (assignment.weights @ traces) / 2)
            seen.append(now)
    assert len(seen) >= 20


def test_an_m_step_is_that_of_the_running_means() -> None:
    assignment = MixtureAssignment(2, [Table(2)], step_exponent=0.8)
    learn(assignment, clusters(0))
    z0, s0 = assignment.average.clone(), assignment.steps.item()
    rows = clusters(1)
    r = assignment(*as_images(rows), 2).numpy()
    z = ((rows - assignment.offset) / assignment.scale).numpy()
    learn(assignment, rows)
    rate = (s0 + 2) ** -0.8
    moments = [r.sum(0), np.einsum("nk,nd->kd", r, z), np.einsum("nk,nd,ne->kde", r, z, z)]
    start = np.split(z0.numpy()[:14], [2, 6])
    n, first, second = (
        (1 - rate) * old.reshape(new.shape) + rate * new / len(rows) for old, new in zip(start, moments, strict=True)
    )
    means = first / n[:, None]
    covariances = second / n[:, None, None] - np.einsum("kd,ke->kde", means, means) + 1e-3 * np.eye(2)
    np.testing.assert_allclose(assignment.weights, n / n.sum(), rtol=1e-12)
    np.testing.assert_allclose(assignment.means, means, rtol=1e-9)
    np.testing.assert_allclose(assignment.covariances, covariances, rtol=1e-9)


def test_the_start_is_uniform_and_a_rejected_step_changes_nothing() -> None:
    assignment = MixtureAssignment(4, [Table(2)])
    images = as_images(clusters(0))
    assert torch.equal(assignment(*images, 4), torch.full((60, 4), 0.25, dtype=torch.float64))
    before = {name: tensor.clone() for name, tensor in assignment.state_dict().items()}
    learn(assignment, clusters(0), accepted=torch.tensor(False))
    assert all(torch.equal(before[name], tensor) for name, tensor in assignment.state_dict().items())


def test_regimes_of_noise_are_found_from_few_images_a_step() -> None:
    levels = torch.tensor([5.0, 15.0, 25.0, 50.0]) / 255
    assignment = MixtureAssignment(4)
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(3, 3, 8, 8)  # three images a step: fewer than regimes
    for _ in range(300):
        noise = levels[torch.randint(4, (3,), generator=generator)]
        noise = noise * (1 + 0.05 * torch.randn(3, generator=generator))
        r = assignment(images, torch.full((3,), -1), noise, 4)
        assignment.m_step(assignment.e_step(images, torch.full((3,), -1), noise, r).sum(0), YES)
    r = assignment(images[:1].expand(4, -1, -1, -1), torch.full((4,), -1), levels, 4)
    assert sorted(r.argmax(1).tolist()) == [0, 1, 2, 3]
    assert (r.amax(1) > 0.9).all()


def test_the_largest_spread_is_the_first_eigenvector_and_no_matter_of_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    for width in (1, 2, 3, 5):
        factor = torch.randn(width, 8, generator=generator, dtype=torch.float64)
        covariance = factor @ factor.T
        axis, deviation = _largest_spread(covariance)
        values, vectors = torch.linalg.eigh(covariance)
        assert abs(float(axis @ vectors[:, -1])) == pytest.approx(1, abs=1e-6)
        assert float(deviation) == pytest.approx(float(values[-1]) ** 0.5, rel=1e-6)
    for sign in (1, -1):  # two standardised features: entries of equal size, the direction open to chance
        for rounding in (-1e-15, 0.0, 1e-15):
            correlation = torch.tensor([[1.0 + rounding, sign * 0.1], [sign * 0.1, 1.0]], dtype=torch.float64)
            axis, _ = _largest_spread(correlation)
            expected = torch.tensor([sign, 1.0], dtype=torch.float64) / 2**0.5
            torch.testing.assert_close(axis, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(_largest_spread(torch.zeros(2, 2).double())[1], torch.zeros(()).double())


@pytest.mark.parametrize("batch", [1, 2])
def test_small_batches_start_from_enough_images(batch: int) -> None:
    assignment = MixtureAssignment(3, [Table(1)])
    rows = torch.cat([clusters(step, width=1) for step in range(10)])
    for part in rows.split(batch):
        learn(assignment, part)
    places = (assignment.means * assignment.scale + assignment.offset).flatten().sort().values
    torch.testing.assert_close(places, torch.tensor([-3.0, 0.0, 4.0]).double(), atol=0.6, rtol=0)


def test_the_likelihood_is_that_of_the_images_it_has_seen_even_past_a_rescue() -> None:
    assignment = MixtureAssignment(3, [Table(1)])
    for step in range(60):
        learn(assignment, clusters(step, width=1))
    before = assignment.diagnostics()["log_likelihood"]
    rows = clusters(100, width=1)
    z = (rows - assignment.offset) / assignment.scale
    truth = float(torch.logsumexp(assignment._log_joint(z), 1).mean() - assignment.scale.log().sum())
    assert abs(before - truth) < 0.2
    assignment.means[0] = -60.0
    assignment.average.copy_(statistics_of(assignment._theta()).flat())
    values = []
    for step in range(60):
        learn(assignment, clusters(step, width=1))
        values.append(assignment.diagnostics()["log_likelihood"])
    assert assignment.reseeded >= 1
    assert max(abs(b - a) for a, b in itertools.pairwise(values)) < 3  # no fall to an invented value


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_casting_a_module_leaves_the_state_its_digits(cast: str) -> None:
    rows = clusters(0)
    images, labels, noise = as_images(rows)
    for assignment in (MixtureAssignment(3, [Table(2)]), SimilarityAssignment(nn.Flatten(), 48, 3)):
        getattr(assignment, cast)()
        assert all(b.dtype == torch.float64 for b in assignment.buffers(recurse=False))
        r = assignment(images, labels, noise, 3)
        assignment.m_step(assignment.e_step(images, labels, noise, r).sum(0), YES)


def test_features_are_measures_that_do_not_drift() -> None:
    class Learned(ImageFeature):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())

        def forward(self, images: Tensor, noise_std: Tensor) -> Tensor:
            return self.layers(images)

    feature = Learned()
    assignment = MixtureAssignment(2, [feature], channels=1).train()
    assignment(torch.rand(3, 1, 8, 8), torch.full((3,), -1), torch.ones(3), 2)
    assert int(feature.layers[1].num_batches_tracked) == 0
    assert not any(parameter.requires_grad for parameter in assignment.parameters())
    with pytest.raises(ValueError, match=r"images of 3 channels.*Set `channels`"):
        MixtureAssignment(2, [feature])


def test_a_starving_regime_is_reseeded_and_finds_images() -> None:
    assignment = MixtureAssignment(3, [Table(1)])
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randn(40, 1, generator=generator) * 0.1 - 2, torch.randn(40, 1, generator=generator) + 2])
    learn(assignment, rows)
    assignment.means[0] = -60.0  # out of reach
    assignment.average.copy_(statistics_of(assignment._theta()).flat())
    for _ in range(60):
        learn(assignment, rows)
    assert assignment.diagnostics()["reseeded"] >= 1
    assert assignment.weights.min() > 0.05


def test_a_constant_feature_is_left_out_and_said() -> None:
    assignment = MixtureAssignment(2, [Table(2)])
    for step in range(10):
        rows = clusters(step)
        rows[:, 1] = 0.1 + 0.2
        learn(assignment, rows)
    (notice,) = assignment.warnings()
    assert notice.startswith("feature column(s) [1] had one value for all of the first images")
    rows = clusters(0)
    both = assignment(*as_images(rows), 2)
    rows[:, 1] = -7.0
    torch.testing.assert_close(assignment(*as_images(rows), 2), both)


def test_regimes_that_never_start_are_said_at_the_end() -> None:
    assignment = MixtureAssignment(3, [Table(2)])
    rows = clusters(0)[:20]
    learn(assignment, rows)
    assert assignment.warnings() == []
    (notice,) = assignment.warnings(ended=True)
    assert notice.startswith("the regimes never started: they wait for 48 images, and the run had 20")
    for _ in range(2):
        learn(assignment, rows)
    assert assignment.warnings(ended=True) == []


def test_features_measure_what_they_are_named_after() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 3, 64, 64, generator=generator, dtype=torch.float64)
    level = torch.tensor([0.1], dtype=torch.float64)
    ramp = torch.linspace(0, 1, 64, dtype=torch.float64).expand(1, 3, 64, 64)
    # of noise alone little is left
    for feature in (Texture(), GradientEnergy(), ColourSpread()):
        assert feature(0.5 + 0.1 * noise, level).exp().item() < 0.003
    torch.testing.assert_close(
        GradientEnergy()(ramp, level * 0).exp(), torch.tensor([1 / 63**2], dtype=torch.float64), rtol=1e-6, atol=0
    )
    colours = torch.tensor([0.2, 0.4, 0.9], dtype=torch.float64).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    torch.testing.assert_close(
        ColourSpread()(colours, level * 0).exp(), colours[0, :, 0, 0].var(correction=0)[None], rtol=1e-9, atol=0
    )
    checks = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    torch.testing.assert_close(
        Texture(4)(checks.double().expand(1, 3, 64, 64), level * 0).exp(), torch.tensor([0.25]).double()
    )
    torch.testing.assert_close(NoiseLevel()(ramp, level).exp(), level)


def test_a_feature_of_the_wrong_shape_or_not_finite_is_named() -> None:
    images, _, noise = as_images(clusters(0))
    with pytest.raises(ValueError, match=r"Whole returned \[60, 3, 4, 4\] for 60 images; expected \[60\] or \[60, F\]"):
        ImageFeatures([Whole()])(images, noise)
    images[7, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Table is not finite for image\(s\) \[7\].*look for NaN"):
        ImageFeatures([Table(2)])(images, noise)
    with pytest.raises(ValueError, match="at least one, such as NoiseLevel"):
        ImageFeatures([])


class Whole(ImageFeature):
    def forward(self, images: Tensor, noise_std: Tensor) -> Tensor:
        return images


@pytest.mark.parametrize("assignment", [MixtureAssignment(3), SimilarityAssignment(nn.Flatten(), 48, 3)])
def test_rows_and_assignment_must_agree(assignment: MixtureAssignment | SimilarityAssignment) -> None:
    with pytest.raises(ValueError, match=r"the parameter table has 0 rows.*row_names"):
        assignment(*as_images(clusters(0)), len(ParameterTable().row_names))


def test_arguments_out_of_range() -> None:
    for wrong, message in (
        ({"num_regimes": 0}, "num_regimes must be at least 1"),
        ({"step_exponent": 0.5}, "step_exponent"),
        ({"reg_covar": 0.0}, "reg_covar must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            MixtureAssignment(**wrong)  # type: ignore[arg-type]
    for wrong, message in (
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"decay": 1.0}, "decay"),
        ({"num_classes": 0}, "num_classes"),
    ):
        with pytest.raises(ValueError, match=message):
            SimilarityAssignment(**{"embedding": nn.Flatten(), "embedding_size": 48, "num_classes": 2, **wrong})  # type: ignore[arg-type]


def test_similarity_is_the_softmax_of_cosines_to_running_means() -> None:
    images = torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 1, 0, -1, 1, 0, 0, 1])
    assignment = SimilarityAssignment(nn.Flatten(), 48, num_classes=3, temperature=0.05, decay=0.5).train()
    noise = torch.zeros(9)
    unit = nn.functional.normalize(images.double().flatten(1), dim=1)
    for _ in range(2):
        assert assignment.check_labels(labels, 3) is None
        r = assignment(images, labels, noise, 3)
        assignment.m_step(assignment.e_step(images, labels, noise, r).sum(0), YES)
    means = torch.stack([unit[labels == k].mean(0) for k in range(2)])
    cosine = nn.functional.cosine_similarity(unit[:, None], means[None], dim=2)
    found = assignment(images, torch.full((9,), -1), noise, 3)  # no label needed now
    torch.testing.assert_close(found[:, :2], torch.softmax(cosine / 0.05, dim=1))
    assert (found[:, 2] == 0).all()  # a class never seen takes no part
    with pytest.raises(ValueError, match="label 3 has no row"):
        assignment.check_labels(torch.tensor([3]), 3)


def test_the_embedding_stays_as_it_is() -> None:
    embedding = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assignment = SimilarityAssignment(embedding, 4, num_classes=2).train()
    before = {name: tensor.clone() for name, tensor in embedding.state_dict().items()}
    assignment(torch.rand(5, 3, 8, 8), torch.zeros(5, dtype=torch.long), torch.zeros(5), 2)
    assert all(torch.equal(before[name], tensor) for name, tensor in embedding.state_dict().items())
    assert not any(parameter.requires_grad for parameter in assignment.parameters())


def test_the_embedding_stays_out_of_checkpoints_old_and_new_ones_load(tmp_path: Path) -> None:
    tower = nn.Sequential(nn.Flatten(), nn.Linear(48, 1000))
    assignment = SimilarityAssignment(tower, 1000, 3)
    module = nn.Sequential(assignment)
    assert list(module.state_dict()) == ["0.totals"]
    assert "0.embedding.1.weight" in dict(module.named_parameters())  # it goes to the device with the module
    torch.save(module.state_dict(), tmp_path / "new.ckpt")
    assert (tmp_path / "new.ckpt").stat().st_size < 100_000
    images, labels = torch.rand(6, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    e_step = assignment.e_step(images, labels, torch.zeros(6), torch.zeros(6, 3))
    assignment.m_step(e_step.sum(0), YES)
    again = nn.Sequential(SimilarityAssignment(copy.deepcopy(tower), 1000, 3))
    again.load_state_dict(module.state_dict())
    for batch in (images, torch.rand(5, 3, 4, 4)):
        empty = torch.full((len(batch),), -1), torch.zeros(len(batch)), 3
        torch.testing.assert_close(again[0](batch, *empty), assignment(batch, *empty))
    old = {**module.state_dict(), **{f"0.embedding.{k}": v + 1 for k, v in tower.state_dict().items()}}
    again.load_state_dict(old)  # of version 0.1, which holds its tower
    assert torch.equal(again[0].embedding[1].weight, tower[1].weight + 1)


def test_an_embedding_of_the_wrong_shape_is_named() -> None:
    assignment = SimilarityAssignment(nn.Identity(), 48, num_classes=2)
    with pytest.raises(ValueError, match=r"Identity returned \[5, 3, 4, 4\].*expected \[5, 48\].*embedding_size"):
        assignment(torch.rand(5, 3, 4, 4), torch.zeros(5, dtype=torch.long), torch.zeros(5), 2)
