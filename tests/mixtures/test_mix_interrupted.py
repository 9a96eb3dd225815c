"""Mixtures that resume in the middle of an epoch: what is learned is, bit for bit, that of the uninterrupted run."""

import itertools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules import PatchDataModule
from lightning_modules import GaussianMixture, KMeans
from lightning_modules.mixtures import model as mixture_model
from tests.mixtures.student_t import StudentTMixture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
EPOCHS, BATCH = 3, 50

FAMILIES: dict[str, Callable[[], Any]] = {
    "gaussian, restarts": lambda: GaussianMixture(3, n_init=2, init="random", tol=0.0),
    "gaussian, converging": lambda: GaussianMixture(3, covariance_type="diag", tol=0.05),
    "gaussian, stepwise": lambda: GaussianMixture(3, algorithm="stepwise", tol=0.0),
    "k-means": lambda: KMeans(5, init="random", n_init=2, tol=0.0),
    "k-means, stepwise": lambda: KMeans(5, algorithm="stepwise", tol=0.0),
    "a family of one's own": lambda: StudentTMixture(3, tol=0.0),
    "its steps": lambda: StudentTMixture(3, algorithm="stepwise", tol=0.0),
}


def samples() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = 3 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
    return centers[torch.arange(230) % 3] + torch.randn(230, 3, generator=generator, dtype=torch.float64)


def stream(folder: Path, shuffle: bool = True) -> PatchDataModule:
    np.save(folder / "samples.npy", samples().numpy())
    return PatchDataModule(
        array=str(folder / "samples.npy"), batch_size=BATCH, shuffle=shuffle, val_fraction=0.2, seed=7
    )


def fit(module: Any, data: Any, *callbacks: Callback, **options: Any) -> L.Trainer:
    resume = {name: options.pop(name) for name in ("ckpt_path",) if name in options}
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **({"max_epochs": EPOCHS} | options),
    )
    given = {"datamodule": data} if isinstance(data, L.LightningDataModule) else {"train_dataloaders": data}
    trainer.fit(module, **given, **resume, weights_only=True)
    return trainer


def every_step(folder: Path, **options: Any) -> ModelCheckpoint:
    settings = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"} | options
    return ModelCheckpoint(folder, **settings)


def assert_same(resumed: Any, whole: Any) -> None:
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


class Ends(Callback):
    """Epochs whose end and whose validation were run, and the batches of each."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.validated: list[int] = []
        self.batches = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches += 1

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.epochs.append(trainer.current_epoch)


@pytest.mark.parametrize("family", FAMILIES)
def test_resumed_from_any_step_equals_uninterrupted(family: str, tmp_path: Path) -> None:
    whole, seen = FAMILIES[family](), Ends()
    run = fit(whole, stream(tmp_path), every_step(tmp_path), seen)
    files = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    steps = run.global_step
    assert len(files) == steps == seen.batches
    assert seen.validated == seen.epochs
    for file in files[1::3] + files[3::8]:  # amid an epoch; at its last step
        step = int(file.stem.split("=")[1])
        resumed, rest = FAMILIES[family](), Ends()
        again = fit(resumed, stream(tmp_path), rest, ckpt_path=file)
        assert_same(resumed, whole)
        assert (again.global_step, again.current_epoch) == (steps, run.current_epoch)
        assert rest.batches == steps - step, "a part of the data was seen twice, or not at all"
        assert rest.epochs == rest.validated == [epoch for epoch in seen.epochs if epoch >= (step - 1) // 4]


def test_a_loader_that_cannot_go_on_starts_the_epoch_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for family in ("gaussian, restarts", "gaussian, stepwise", "k-means, stepwise"):
        folder = tmp_path / family
        whole = FAMILIES[family]()
        run = fit(whole, DataLoader(samples(), BATCH), every_step(folder))
        for step in (2, 5, 14):
            resumed = FAMILIES[family]()
            caplog.clear()
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*not resumable.*")
                again = fit(resumed, DataLoader(samples(), BATCH), ckpt_path=folder / f"step={step}.ckpt")
            assert caplog.text.count("cannot go on there") == 1
            assert_same(resumed, whole)
            assert (again.global_step, again.current_epoch) == (run.global_step, run.current_epoch)


def test_accumulation_and_a_limit_of_steps(tmp_path: Path) -> None:
    options = {"max_epochs": -1, "max_steps": 7, "accumulate_grad_batches": 2}
    whole = FAMILIES["gaussian, stepwise"]()
    saver = ModelCheckpoint(tmp_path, filename="end-{step}", save_top_k=-1)
    fit(whole, stream(tmp_path), every_step(tmp_path), saver, **options)
    files = [file for file in tmp_path.glob("*.ckpt") if file.stem != "step=7"]  # from there nothing is left to do
    assert len(files) == 6 + 4
    for file in files:
        resumed = FAMILIES["gaussian, stepwise"]()
        assert fit(resumed, stream(tmp_path), ckpt_path=file, **options).global_step == 7
        assert_same(resumed, whole)


class InterruptionError(Exception):
    pass


MOMENTS = {
    "gaussian, restarts": "_first_pass 1, _start 1, e_step 3, e_step 8, _plus 6, _write 2, _settle 1, end_epoch 3",
    "gaussian, stepwise": "e_step 7, _plus 5, _write 5, _forget 7, stepwise_m_step 6, _settle 2, end_epoch 1",
    "k-means": "e_step 6, _plus 2, _write 3, _settle 2",
}


@pytest.mark.parametrize("family", MOMENTS)
def test_written_at_any_moment(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a signal of the queue has it: the checkpoint is written where the run happens to be."""
    whole = FAMILIES[family]()
    fit(whole, stream(tmp_path))
    for moment in MOMENTS[family].split(", "):
        name, count = moment.split()
        first, path = FAMILIES[family](), tmp_path / f"{moment}.ckpt"
        interrupt(first, name, int(count), path, monkeypatch)
        with pytest.raises(InterruptionError):
            fit(first, stream(tmp_path))
        monkeypatch.undo()
        resumed = FAMILIES[family]()
        caplog.clear()
        fit(resumed, stream(tmp_path), ckpt_path=path)
        assert_same(resumed, whole)
        # the E-step is where a run spends its time: from there it goes on with the same batch
        assert (name == "e_step") <= ("starts again" not in caplog.text)


def interrupt(module: Any, name: str, count: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes a checkpoint at the end of the `count`-th call of a method, in the middle of its caller; ends the run."""
    home = mixture_model if name == "_plus" else module.model
    method = getattr(home, name)
    calls = itertools.count(1)

    def broken(*arguments: Any, **options: Any) -> Any:
        result = method(*arguments, **options)
        if next(calls) == count:
            module.trainer.save_checkpoint(path)
            raise InterruptionError
        return result

    monkeypatch.setattr(home, name, broken)


def test_an_older_checkpoint_without_sums_starts_the_epoch_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = FAMILIES["gaussian, restarts"]()
    fit(whole, stream(tmp_path), every_step(tmp_path))
    checkpoint = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    del checkpoint["clustering_epoch"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    resumed = FAMILIES["gaussian, restarts"]()
    fit(resumed, stream(tmp_path), ckpt_path=tmp_path / "old.ckpt")
    assert re.search("GaussianMixture: .*holds no sums of it: that epoch starts again", caplog.text)
    assert_same(resumed, whole)


def test_workers_that_persist_see_every_sample(tmp_path: Path) -> None:
    module = GaussianMixture(2, tol=0.0)
    loader: Any = DataLoader(samples(), BATCH, num_workers=1, persistent_workers=True)
    fit(module, loader, max_epochs=2)
    assert int(module.model.num_samples) == 230
