"""Mixtures under a real Trainer: any data, processes, resumption, checkpoints, the stop."""

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from sklearn.mixture import GaussianMixture as Reference
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_modules import GaussianMixture, KMeans
from tests.mixtures import two_processes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PROJECT = Path(__file__).parents[2]


def trainer(epochs: int = 50, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(max_epochs=epochs, accelerator="cpu", **{**quiet, **options})


def samples(count: int = 300, width: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = 4 * torch.randn(3, width, generator=generator, dtype=torch.float64)
    return centers[torch.arange(count) % 3] + torch.randn(count, width, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- processes


def test_two_processes_equal_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = [sys.executable, "-m", "tests.mixtures.two_processes", str(tmp_path / "result")]
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "NODE_RANK": "0",
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
        }
        processes.append(subprocess.Popen(script, env=environment, cwd=PROJECT, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors[0][-3000:] + errors[1][-3000:]
    ranks = [torch.load(tmp_path / f"result.{rank}") for rank in range(2)]
    for case in ("weighted", "mini-batch"):
        for step in (10, 35):
            for rank in ranks:
                for name, value in rank[case].items():
                    resumed = rank[f"{case}, resumed at {step}"][name]
                    assert torch.equal(resumed.nan_to_num(), value.nan_to_num()), f"{case}, resumed at {step}: {name}"
        other = two_processes.fit(case, 1, 0, resume_from=str(tmp_path / f"result.{case}" / "step=10.ckpt"))
        assert "was written by 2 process(es), not 1: that epoch starts again" in caplog.text
        caplog.clear()
        for name, value in ranks[0][case].items():
            torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-9, equal_nan=True)
    for case in two_processes.CASES:
        alone = two_processes.fit(case, 1, 0)
        for name, value in alone.items():
            first, second = (rank[case][name] for rank in ranks)
            assert torch.equal(first, second), f"{case}: {name} differs between the ranks"
            torch.testing.assert_close(
                first, value, rtol=1e-9, atol=1e-9, msg=lambda m, c=case, n=name: f"{c}, {n}: {m}"
            )


# ---------------------------------------------------------------------------------------------- any data


class Samples(IterableDataset[Tensor]):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __iter__(self) -> Any:
        return iter(self.x)


class SamplesDataModule(L.LightningDataModule):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x

    def train_dataloader(self) -> Any:
        return DataLoader(
            self.x, batch_size=64, collate_fn=lambda samples: {"image": torch.stack(samples).view(-1, 1, 1, 3)}
        )


def test_every_source_gives_the_same_mixture() -> None:
    x = samples()
    sources: list[Any] = [
        DataLoader(x, 300),
        DataLoader(TensorDataset(x, torch.arange(300)), 7, shuffle=True),
        DataLoader(Samples(x), 50),
        DataLoader([{"x": sample, "weight": torch.tensor(1.0)} for sample in x], 32),
        SamplesDataModule(x),
    ]
    means = []
    for source in sources:
        module = GaussianMixture(3, tol=0.0)
        trainer(4).fit(module, source)
        means.append(module.means)
    for other in means[1:]:
        torch.testing.assert_close(other, means[0], rtol=1e-9, atol=1e-9)


def test_samples_of_weight_zero_do_not_count() -> None:
    x = samples()
    padded = [{"x": sample, "weight": torch.tensor(1.5)} for sample in x]
    padded += [{"x": torch.full((3,), 1e3, dtype=torch.float64), "weight": torch.tensor(0.0)}] * 9
    modules = []
    for data in (x, padded):
        module = GaussianMixture(3, tol=0.0)
        trainer(4).fit(module, DataLoader(data, 64))  # type: ignore[arg-type]
        modules.append(module)
    torch.testing.assert_close(modules[0].means, modules[1].means, rtol=1e-10, atol=1e-10)
    assert int(modules[1].model.num_samples) == 300


def test_trainer_equals_scikit_learn_and_says_what_it_took() -> None:
    x = samples()
    start = {
        "weights_init": np.full(3, 1 / 3),
        "means_init": x[:3].numpy(),
        "precisions_init": np.stack([np.eye(3)] * 3),
    }
    module = GaussianMixture(3, tol=1e-6, max_iter=200, **start)
    trainer(200).fit(module, DataLoader(x, 37))
    reference = Reference(3, tol=1e-6, max_iter=200, **start).fit(x.numpy())
    assert module.initialization_passes == 0
    assert module.n_iter == reference.n_iter_
    assert module.converged
    assert module.lower_bound == pytest.approx(reference.lower_bound_, abs=1e-9)
    np.testing.assert_allclose(module.predict_proba(x), reference.predict_proba(x.numpy()), atol=1e-6)
    np.testing.assert_allclose(module.score_samples(x), reference.score_samples(x.numpy()), atol=1e-6)
    np.testing.assert_allclose(module.precisions, reference.precisions_, rtol=1e-4)
    assert (module.predict(x).numpy() == reference.predict(x.numpy())).all()
    assert module.bic(x) == pytest.approx(reference.bic(x.numpy()), rel=1e-8)
    assert module.aic(x) == pytest.approx(reference.aic(x.numpy()), rel=1e-8)
    assert module.sample(5, seed=0)[0].shape == (5, 3)
    torch.testing.assert_close(module.sample(5, seed=0)[0], module.sample(5, seed=0)[0])


def test_the_run_stops_at_tol_or_warns_at_the_ceiling(recwarn: pytest.WarningsRecorder) -> None:
    module = GaussianMixture(3)
    run = trainer(1000)
    run.fit(module, DataLoader(samples(), 64))
    assert run.current_epoch < 100
    assert module.converged
    short = GaussianMixture(3, tol=0.0, max_iter=3, init="random")
    run = trainer(1000)
    with pytest.warns(UserWarning, match=r"did not converge.*tol 0, 300 samples, 1 initialisation pass"):
        run.fit(short, DataLoader(samples(), 64))
    assert run.current_epoch == 3
    assert not short.converged


def test_stepwise_updates_once_an_optimiser_step() -> None:
    module = GaussianMixture(3, algorithm="stepwise", tol=0.0)
    trainer(2, accumulate_grad_batches=2).fit(module, DataLoader(samples(), 50))
    assert int(module.model.steps) == 2 * 3
    bigger = GaussianMixture(3, algorithm="stepwise", tol=0.0)
    trainer(2).fit(bigger, DataLoader(samples(), 100))
    torch.testing.assert_close(module.means, bigger.means, rtol=1e-9, atol=1e-9)


def test_validate_test_and_predict() -> None:
    x = samples()
    for module in (GaussianMixture(3), KMeans(3)):
        run = trainer()
        run.fit(module, DataLoader(x, 64), DataLoader(x, 50))
        metric = {"GaussianMixture": "log_likelihood", "KMeans": "squared_distance"}[type(module).__name__]
        value = run.validate(module, DataLoader(x, 50), verbose=False)[0][f"val/{metric}"]
        expected = module.score(x) if isinstance(module, GaussianMixture) else -module.score(x) / len(x)
        assert value == pytest.approx(expected, rel=1e-6)
        assert run.test(module, DataLoader(x, 50), verbose=False)[0][f"test/{metric}"] == pytest.approx(value, rel=1e-6)
        parts = run.predict(module, DataLoader(x, 50))
        assert parts is not None
        torch.testing.assert_close(torch.cat([part["component"] for part in parts]), module.predict(x))  # type: ignore[index,misc]


# -------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "make",
    [
        lambda: GaussianMixture(3, n_init=2, init="random", tol=0.0),
        lambda: GaussianMixture(3, algorithm="stepwise", tol=0.0),
        lambda: KMeans(5, init="random", n_init=2, tol=0.0),
        lambda: KMeans(5, algorithm="stepwise", tol=0.0),
    ],
)
def test_resumed_equals_uninterrupted_and_checkpoints_are_plain(make: Any, tmp_path: Path) -> None:
    data = DataLoader(samples(), 50)
    whole = make()
    trainer(6).fit(whole, data)
    first = make()
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer(3, callbacks=[saver], enable_checkpointing=True).fit(first, data)
    second = make()
    trainer(6).fit(second, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
    loaded = type(first).load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    torch.testing.assert_close(loaded.predict(samples()), first.predict(samples()))
    assert {k for k, v in vars(loaded.model).items() if isinstance(v, Tensor)} <= {"_counts"}


def test_given_start_survives_the_checkpoint(tmp_path: Path) -> None:
    module = GaussianMixture(2, means_init=np.array([[0.0, 0, 0], [1, 1, 1]]), covariance_type="diag")  # type: ignore[arg-type]
    run = trainer(2)
    run.fit(module, DataLoader(samples(), 50))
    run.save_checkpoint(tmp_path / "mixture.ckpt")
    loaded = GaussianMixture.load_from_checkpoint(tmp_path / "mixture.ckpt", weights_only=True)
    torch.testing.assert_close(loaded.means, module.means)


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("module_class", [GaussianMixture, KMeans])
def test_data_that_is_not_finite(value: float, module_class: Any) -> None:
    x = samples()
    x[17, 1] = value
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 sample.*Remove them, impute.*look at"):
        trainer().fit(module_class(3), DataLoader(x, 50))
    module = module_class(3)
    trainer(3).fit(module, DataLoader(samples(), 50))
    with pytest.raises(ValueError, match="NaN or infinity"):
        module.predict(x)


def test_a_sample_that_turns_bad_after_the_start_changes_nothing() -> None:
    module = GaussianMixture(3, means_init=samples()[:3].tolist(), covariance_type="diag")
    trainer(2).fit(module, DataLoader(samples(), 50))
    before = module.means
    x = samples()
    x[3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        trainer(4).fit(module, DataLoader(x, 50))
    torch.testing.assert_close(module.means, before, rtol=0, atol=0)


@pytest.mark.parametrize("module_class", [GaussianMixture, KMeans])
def test_shapes_and_counts(module_class: Any) -> None:
    with pytest.raises(ValueError, match="num_components must be an integer of at least 1, got 0"):
        module_class(0)
    with pytest.raises(ValueError, match=r"n_components = 9, n_samples = 4.*fewer components"):
        trainer().fit(module_class(9), DataLoader(samples(4), 2))
    with pytest.raises(ValueError, match="0 sample"):
        trainer().fit(module_class(2), DataLoader(Samples(samples(0)), 2))
    with pytest.raises(ValueError, match=r"X has 3 features, but .* is expecting 5"):
        trainer().fit(module_class(2, num_features=5), DataLoader(samples(), 50))
    module = module_class(2)
    with pytest.raises(RuntimeError, match="not fitted"):
        module.predict(samples())
    trainer(2).fit(module, DataLoader(samples(), 50))
    with pytest.raises(ValueError, match=r"X has 4 features, but .* is expecting 3"):
        module.predict(torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"means_init": [[0.0, 0.0]]}, r"'means_init' should have the shape of \(2, 2\), but got \(1, 2\)"),
        ({"weights_init": [0.9, 0.9]}, "weights_init must be non-negative and sum to 1"),
        ({"precisions_init": [[[1.0, 2.0], [2.0, 1.0]]] * 2}, "symmetric, positive-definite"),
        ({"means_init": [[0.0], [float("nan")]]}, "means_init must be finite"),
        ({"means_init": [[0.0], [1.0]], "n_init": 3}, "use n_init=1"),
        ({"covariance_type": "round"}, "covariance_type must be"),
        ({"reg_covar": -1.0}, "reg_covar must be at least 0"),
        ({"tol": -1.0}, "tol must be at least 0"),
        ({"init": "magic"}, "init must be one of"),
        ({"step_exponent": 0.3}, "step_exponent"),
        ({"init_size": 1}, "init_size must be at least"),
    ],
)
def test_arguments_that_are_impossible(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixture(2, **options)


@pytest.mark.parametrize("kind", ["full", "diag", "tied"])
def test_singular_covariance_names_components_and_remedies(kind: Any) -> None:
    x = samples()
    x[:, 1] = 3.0
    module = GaussianMixture(2, covariance_type=kind, reg_covar=0.0)
    with pytest.raises(
        ValueError,
        match=r"component\(s\) \[0.*reg_covar=0.*decrease the number of components, increase reg_covar, or scale",
    ):
        trainer().fit(module, DataLoader(x, 50))


def test_k_means_start_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"shape of the initial centers \(1, 2\)"):
        KMeans(2, centers_init=[[0.0, 0.0]])
    with pytest.raises(ValueError, match="number of features of the data 3"):
        trainer().fit(KMeans(1, centers_init=[[0.0, 0.0]]), DataLoader(samples(), 50))


def test_more_components_than_distinct_points_is_named() -> None:
    x = samples(2).repeat(20, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(3).fit(KMeans(4), DataLoader(x, 50))
    assert any("have no samples" in str(warning.message) for warning in caught)


def test_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision='bf16-true'"):
        trainer(precision="bf16-true").fit(GaussianMixture(2), DataLoader(samples().float(), 50))


@pytest.mark.parametrize("module_class", [GaussianMixture, KMeans])
def test_weight_averaging_is_refused_by_name(module_class: Any) -> None:
    with pytest.raises(ValueError, match=f"EMAWeightAveraging has nothing to average in {module_class.__name__}"):
        trainer(callbacks=[EMAWeightAveraging()]).fit(module_class(2), DataLoader(torch.rand(20, 2), 10))
