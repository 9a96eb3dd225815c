"""A family of one's own is its mathematics: everything else is the base's (`student_t.py`)."""

import itertools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.stats import multivariate_t
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules import GaussianMixture
from lightning_modules.mixtures import fit_in_memory
from tests.mixtures.student_t import StudentTMixture, StudentTMixtureEstimator, StudentTMixtureModel

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PROJECT = Path(__file__).parents[2]
CENTERS = torch.tensor([[-6.0, 0.0], [0.0, 6.0], [6.0, 0.0]], dtype=torch.float64)


def samples(count: int = 300, outliers: int = 0, seed: int = 0) -> Tensor:
    """Three clusters; some samples are far from all of them, and on one side."""
    generator = torch.Generator().manual_seed(seed)
    x = CENTERS[torch.arange(count) % 3] + torch.randn(count, 2, generator=generator, dtype=torch.float64)
    x[:outliers] += 15 * torch.rand(outliers, 2, generator=generator, dtype=torch.float64)
    return x


def trainer(epochs: int = 60, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(max_epochs=epochs, accelerator="cpu", **{**quiet, **options})


def error_of_means(means: Tensor) -> float:
    distances = [(means[list(order)] - CENTERS).norm(dim=1).max() for order in itertools.permutations(range(3))]
    return float(min(distances))


# ------------------------------------------------------------------------------------------------ mathematics


@settings(max_examples=30)
@given(
    count=st.integers(1, 60),
    width=st.integers(1, 5),
    components=st.integers(1, 5),
    degrees_of_freedom=st.sampled_from([0.5, 1.0, 4.0, 100.0]),
    covariance_type=st.sampled_from(["full", "diag"]),
    shape=st.sampled_from(["normal", "heavy tails", "duplicates", "constant feature"]),
    scale=st.sampled_from([1e-6, 1.0, 1e3]),
    init=st.sampled_from(["k-means++", "k-means||", "random"]),
    seed=st.integers(0, 1000),
)
def test_likelihood_never_falls(
    count: int, width: int, components: int, degrees_of_freedom: float, covariance_type: Any, shape: str, scale: float,
    init: Any, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator, dtype=torch.float64)
    if shape == "heavy tails":
        x = x / torch.rand(count, 1, generator=generator, dtype=torch.float64)
    elif shape == "duplicates":
        x = x[torch.randint(count, (count,), generator=generator)]
    elif shape == "constant feature":
        x[:, 0] = 7.0
    options = {"degrees_of_freedom": degrees_of_freedom, "covariance_type": covariance_type, "init": init, "seed": seed}
    model = StudentTMixtureModel(min(components, count), tol=0.0, max_iter=25, **options)
    values = [result.objective for result in fit_in_memory(model, scale * x, batch_size=17)]
    assert np.isfinite(values).all()
    theta = model.best_parameters()
    matrices = theta.covariances if covariance_type == "full" else torch.diag_embed(theta.covariances)
    # what is added to the variances lowers the likelihood by at most its share of the smallest
    share = 1e-6 / float(torch.linalg.eigvalsh(matrices).min())
    for before, after in itertools.pairwise(values):
        assert after >= before - (1e-9 + width * share) * max(1.0, abs(before)), values


@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_density_is_that_of_scipy(covariance_type: Any) -> None:
    x = 100 + 5 * samples()
    estimator = StudentTMixtureEstimator(3, covariance_type=covariance_type, random_state=0).fit(x.numpy())
    density = np.zeros(len(x))
    for weight, mean, covariance in zip(estimator.weights_, estimator.means_, estimator.covariances_, strict=True):
        matrix = covariance if covariance_type == "full" else np.diag(covariance)
        density += weight * multivariate_t(mean, matrix, df=4.0).pdf(x.numpy())
    np.testing.assert_allclose(estimator.score_samples(x.numpy()), np.log(density), rtol=1e-10)


def test_one_component_is_the_fixed_point_of_the_weighted_moments() -> None:
    x = samples(outliers=30)
    # the likelihood is flat at its maximum: it no longer changes while the parameters have eight digits
    model = StudentTMixtureModel(1, tol=0.0, max_iter=300, reg_covar=0.0)
    fit_in_memory(model, x)
    theta = model.best_parameters()
    difference = x - theta.means[0]
    square = (difference @ torch.linalg.inv(theta.covariances[0]) * difference).sum(1)
    scale = (4 + 2) / (4 + square)
    torch.testing.assert_close((scale[:, None] * x).sum(0) / scale.sum(), theta.means[0], rtol=1e-6, atol=1e-6)
    scatter = (scale[:, None] * difference).T @ difference / len(x)
    torch.testing.assert_close(scatter, theta.covariances[0], rtol=1e-6, atol=1e-6)


def test_outliers_move_its_means_less_than_those_of_the_gaussian() -> None:
    x = samples(600, outliers=60)
    data, errors = DataLoader(x, 100), {}
    for module in (StudentTMixture(3, n_init=3, degrees_of_freedom=3.0), GaussianMixture(3, n_init=3)):
        trainer(100).fit(module, data)
        errors[type(module)] = error_of_means(module.model.best_parameters().means)
    assert errors[StudentTMixture] < 0.3
    assert errors[StudentTMixture] < 0.5 * errors[GaussianMixture]


# --------------------------------------------------------------------------------------- what the base carries


def test_batches_and_restarts_are_the_bases() -> None:
    x = samples(outliers=20)
    whole, batches = (StudentTMixture(3, n_init=3, init="random", tol=1e-6) for _ in range(2))
    trainer(100).fit(whole, DataLoader(x, 300))
    run = trainer(100)
    run.fit(batches, DataLoader(x, 37), DataLoader(x, 50))
    assert batches.converged
    assert run.current_epoch < 100
    assert batches.model.objective.shape == (3,)
    assert batches.lower_bound == pytest.approx(float(batches.model.objective.max()), rel=1e-6)
    torch.testing.assert_close(
        whole.model.best_parameters().means, batches.model.best_parameters().means, rtol=1e-8, atol=1e-8
    )
    value = run.validate(batches, DataLoader(x, 50), verbose=False)[0]["val/log_likelihood"]
    assert value == pytest.approx(batches.score(x), rel=1e-6)
    parts: Any = run.predict(batches, DataLoader(x, 50))
    torch.testing.assert_close(torch.cat([part["probability"] for part in parts]), batches.predict_proba(x))
    assert batches.bic(x) == pytest.approx(-2 * float(batches.score_samples(x).sum()) + 17 * math.log(300))


@pytest.mark.parametrize("algorithm", ["exact", "stepwise"])
def test_resumed_equals_uninterrupted(algorithm: Any, tmp_path: Path) -> None:
    def module() -> StudentTMixture:
        return StudentTMixture(3, n_init=3, init="random", tol=0.0, algorithm=algorithm, degrees_of_freedom=2.5)

    data = DataLoader(samples(outliers=20), 50)
    whole, first, second = module(), module(), module()
    trainer(6).fit(whole, data)
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer(3, callbacks=[saver], enable_checkpointing=True).fit(first, data)
    trainer(6).fit(second, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
    loaded = StudentTMixture.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.model.degrees_of_freedom == 2.5
    torch.testing.assert_close(loaded.predict_proba(samples()), first.predict_proba(samples()), rtol=0, atol=0)


def test_stepwise_comes_close_to_exact() -> None:
    x = samples(3000, outliers=100)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    scores = []
    for algorithm in ("exact", "stepwise"):
        module = StudentTMixture(3, algorithm=algorithm, tol=1e-5)
        trainer(20).fit(module, DataLoader(x, 300))
        scores.append(module.score(x))
    assert scores[1] > scores[0] - 0.02


def test_samples_of_weight_zero_do_not_count() -> None:
    x = samples()
    padded = [{"x": sample, "weight": torch.tensor(1.0)} for sample in x]
    padded += [{"x": torch.full((2,), 1e3, dtype=torch.float64), "weight": torch.tensor(0.0)}] * 9
    means = []
    for data in (x, padded):
        module = StudentTMixture(3, tol=0.0)
        trainer(4).fit(module, DataLoader(data, 64))  # type: ignore[arg-type]
        means.append(module.model.best_parameters().means)
    torch.testing.assert_close(means[0], means[1], rtol=1e-10, atol=1e-10)


def test_the_estimator_is_the_bases() -> None:
    x = samples(outliers=20).numpy()
    estimator = StudentTMixtureEstimator(3, degrees_of_freedom=3.0, n_init=2, random_state=0)
    assert estimator.get_params() == {
        "n_components": 3, "degrees_of_freedom": 3.0, "covariance_type": "full", "tol": 1e-3, "max_iter": 100,
        "n_init": 2, "init_params": "k-means++", "algorithm": "exact", "batch_size": None, "step_exponent": 0.7,
        "warm_start": False, "standardize": False, "verbose": False, "random_state": 0, "device": "cpu",
    }  # fmt: skip
    assert "degrees_of_freedom=3.0" in repr(estimator)
    copy = clone(estimator.set_params(degrees_of_freedom=5.0)).fit(x)
    assert copy.degrees_of_freedom == 5.0
    assert copy.converged_
    assert copy.means_.shape == (3, 2)
    assert copy.covariances_.shape == (3, 2, 2)
    np.testing.assert_allclose(copy.predict_proba(x).sum(axis=1), 1.0)
    assert (copy.predict(x) == copy.predict_proba(x).argmax(axis=1)).all()
    assert copy.score(x) == pytest.approx(copy.score_samples(x).mean())
    with pytest.raises(ValueError, match="degrees_of_freedom must be above 0"):
        StudentTMixtureEstimator(2, degrees_of_freedom=-1.0).fit(x)
    with pytest.raises(ValueError, match="'n_init' parameter"):
        StudentTMixtureEstimator(2, n_init=0).fit(x)
    with pytest.raises(TypeError, match="momentum"):
        StudentTMixtureEstimator(2, momentum=0.9)
    with pytest.warns(ConvergenceWarning, match="did not converge in 1 iterations"):
        StudentTMixtureEstimator(3, max_iter=1).fit(x)


CONFIG = """
trainer:
  max_epochs: 30
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  callbacks:
    - class_path: callbacks.MixtureDashboard
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: checkpoints, save_last: true}
model:
  class_path: my_lab.student_t.StudentTMixture
  init_args: {num_components: 3, degrees_of_freedom: 3.5, covariance_type: diag, n_init: 3}
data:
  class_path: datamodules.PatchDataModule
  init_args: {rows: samples.npy, batch_size: 50}
"""


def test_the_command_line_fits_it_from_a_yaml(tmp_path: Path) -> None:
    package = tmp_path / "home" / "my_lab"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(PROJECT / "tests/mixtures/student_t.py", package)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(yaml.safe_load(CONFIG)))
    np.save(tmp_path / "samples.npy", samples(outliers=20).numpy())
    result = subprocess.run(
        [sys.executable, "-m", "lightning_modules.cli", "fit", "-c", "mine.yaml"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(package.parent), str(PROJECT)]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "StudentTMixture converged" in result.stdout + result.stderr
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["degrees_of_freedom"] == 3.5
    assert checkpoint["state_dict"]["model.covariances"].shape == (3, 3, 2)
