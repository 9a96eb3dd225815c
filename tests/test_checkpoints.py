"""Checkpoints: the newest state is kept, a write is whole or nothing, and what cannot be used is named in one line."""

import errno
import os
import shutil
import signal
import warnings
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.nn import functional as F

from callbacks import EMParameterCallback
from datamodules import PhotoCropsDataModule
from datamodules.image_data_module import ImageDataModule, Split, TensorImages
from lightning_modules import (
    BilateralFilter,
    EStep,
    GaussianMixture,
    GeneratedImageDetector,
    GraphDiffusionReconstruction,
    ParameterTable,
    PatchPrior,
    Reconstruction,
    TotalVariation,
)
from lightning_modules.checkpoints.file import CheckpointError, find_damage, read_checkpoint
from lightning_modules.checkpoints.module import AtomicCheckpointIO, LastCheckpoint, checkpoint_paths
from lightning_modules.cli import build

DEMO = str(Path(__file__).parents[1] / "configs" / "demo.yaml")
FEW = ["--data.train_crops=20", "--data.val_crops=10", "--trainer.accelerator=cpu"]


class SmoothImages(ImageDataModule):
    """Images of 11×9 pixels; five batches an epoch."""

    def __init__(self) -> None:
        super().__init__(4, num_workers=0, seed=0, augment=True)

    def load_split(self, split: Split) -> TensorImages:
        generator = torch.Generator().manual_seed(0)
        images = F.avg_pool2d(torch.rand(18 if split == "train" else 5, 3, 13, 11, generator=generator), 3, 1)
        return TensorImages((images * 255).round().to(torch.uint8))


class Worsening(Reconstruction):
    """Is best in its second epoch, by what it logs."""

    def on_validation_epoch_end(self) -> None:
        self.log("score", float(-abs(self.current_epoch - 1)))


class Plain(L.LightningModule):
    """A user's own module, with a table; best in its second epoch too."""

    def __init__(self) -> None:
        super().__init__()
        self.em_parameters = ParameterTable({"gain": 1.0}, {"gain": (0.1, 2.0)})

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        image = batch["image"]
        gain = self.em_parameters(image.new_zeros(len(image), 0))["gain"]
        error = (gain * image.mean((1, 2, 3)) - 1).square()
        return {"loss": error.mean(), "em": EStep(image.new_zeros(len(image), 0), None, error.detach())}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", float(-abs(self.current_epoch - 1)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Net(torch.nn.Module):
    accepts_diffusion = True

    def __init__(self, side: int) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, side, padding=side // 2)

    def forward(self, noisy: torch.Tensor, restore: Any) -> torch.Tensor:
        return restore(noisy) + self.layer(noisy)


def make(operator: Any = None, **options: Any) -> Worsening:
    torch.manual_seed(0)
    return Worsening(operator or TotalVariation(3), noise_std=0.1, **options)


def make_trainer(root: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(
        **{**quiet, "devices": 1, "max_epochs": 4, **options},
        default_root_dir=root,
        callbacks=[EMParameterCallback(), *callbacks],
    )


def usual(root: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(**{"dirpath": root, "monitor": "score", "mode": "max", "save_last": True, **options})


def fit(trainer: L.Trainer, module: L.LightningModule, ckpt: Path | None = None) -> L.Trainer:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*is not empty")
        trainer.fit(module, SmoothImages(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


def state(path: str | Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `Reconstruction` with total variation."""
    root = tmp_path_factory.mktemp("written")
    fit(make_trainer(root, usual(root), max_epochs=2), make())
    return root / "last.ckpt"


class TestTheNewestState:
    def test_the_usual_callback_keeps_the_last_state_and_the_best(self, tmp_path: Path) -> None:
        leader = usual(tmp_path, filename="{epoch}")
        trainer = fit(make_trainer(tmp_path, leader), make())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=1.ckpt", "last.ckpt"]
        assert state(tmp_path / "last.ckpt")["global_step"] == 20
        assert checkpoint_paths(trainer) == (str(tmp_path / "epoch=1.ckpt"), str(tmp_path / "last.ckpt"))
        assert trainer.checkpoint_callback is leader
        assert leader.last_model_path == str(tmp_path / "last.ckpt")

    def test_so_does_that_of_a_module_of_ones_own(self, tmp_path: Path) -> None:
        leader = usual(tmp_path, filename="{epoch}")
        trainer = fit(make_trainer(tmp_path, leader), Plain())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=1.ckpt", "last.ckpt"]
        assert state(tmp_path / "last.ckpt")["global_step"] == 20
        assert checkpoint_paths(trainer) == (str(tmp_path / "epoch=1.ckpt"), str(tmp_path / "last.ckpt"))
        resumed = fit(make_trainer(tmp_path, usual(tmp_path), max_epochs=5), Plain(), tmp_path / "last.ckpt")
        assert state(tmp_path / "last.ckpt")["global_step"] == resumed.global_step == 25

    def test_without_help_lightning_keeps_the_best(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Worsening, "configure_callbacks", lambda self: [])
        monkeypatch.setattr("callbacks.em_parameter.keep_newest", lambda trainer: None)
        fit(make_trainer(tmp_path, usual(tmp_path)), make())
        assert state(tmp_path / "last.ckpt")["global_step"] == 10, "upstream is mended: LastCheckpoint can go"

    @pytest.mark.parametrize(
        "options",
        [{"every_n_train_steps": 3}, {"save_top_k": 0}, {"monitor": None}, {"save_last": "link"}],
        ids=lambda options: next(iter(options)),
    )
    def test_other_forms_of_it_keep_the_last_state_too(self, tmp_path: Path, options: dict[str, Any]) -> None:
        fit(make_trainer(tmp_path, usual(tmp_path, **options)), make())
        assert state(tmp_path / "last.ckpt")["global_step"] == 20

    def test_epochs_without_validation_count(self, tmp_path: Path) -> None:
        fit(make_trainer(tmp_path, usual(tmp_path), check_val_every_n_epoch=3), make())
        assert state(tmp_path / "last.ckpt")["epoch"] == 3

    def test_nobody_who_asks_for_no_last_state_gets_one(self, tmp_path: Path) -> None:
        trainer = fit(make_trainer(tmp_path, usual(tmp_path, save_last=None)), make())
        assert not (tmp_path / "last.ckpt").exists()
        assert not any(isinstance(callback, LastCheckpoint) for callback in trainer.callbacks)

    @pytest.mark.parametrize("start", ["last", "best"])
    def test_a_resumed_run_keeps_the_best_score_and_its_files(self, tmp_path: Path, start: str) -> None:
        whole, part = tmp_path / "whole", tmp_path / "part"
        reached = make()
        fit(make_trainer(whole, usual(whole, filename="{epoch}")), reached)
        fit(make_trainer(part, usual(part, filename="{epoch}"), max_epochs=3), make())
        leader, module = usual(part, filename="{epoch}"), make()
        stopping = EarlyStopping("score", mode="max", patience=9)
        first = part / ("last.ckpt" if start == "last" else "epoch=1.ckpt")
        fit(make_trainer(part, leader, stopping), module, first)
        assert sorted(path.name for path in part.iterdir()) == ["epoch=1.ckpt", "last.ckpt"]
        assert (leader.best_model_path, float(leader.best_model_score)) == (str(part / "epoch=1.ckpt"), 0.0)
        assert state(part / "last.ckpt")["global_step"] == 20
        for name, value in reached.state_dict().items():
            assert torch.equal(module.state_dict()[name], value), name

    def test_a_new_run_does_not_replace_the_last_state_of_another(self, tmp_path: Path) -> None:
        for _ in range(2):
            fit(make_trainer(tmp_path, usual(tmp_path), max_epochs=1), make())
        assert {"last.ckpt", "last-v1.ckpt"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("step", [7, 10])  # in the middle of an epoch of five steps, and after its last
@pytest.mark.parametrize("network", [False, True])
def test_a_run_resumed_at_a_step_is_the_uninterrupted_one(tmp_path: Path, network: bool, step: int) -> None:
    def steps(root: Path) -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=root, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    def model() -> Worsening:
        return make(backbone=Net(3) if network else None)

    whole, module = model(), model()
    trainer = fit(make_trainer(tmp_path, usual(tmp_path), steps(tmp_path)), whole)
    other = tmp_path / "other"
    resumed = fit(make_trainer(other, usual(other), steps(other)), module, tmp_path / f"step={step}.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    one, two = (state(root / "step=20.ckpt") for root in (tmp_path, other))
    assert one["epoch"] == two["epoch"]
    assert str(one["optimizer_states"]) == str(two["optimizer_states"])
    assert str(one["callbacks"]["EMParameterCallback"]) == str(two["callbacks"]["EMParameterCallback"])
    for name, value in trainer.callback_metrics.items():
        assert resumed.callback_metrics[name] == value, name


class TestWriting:
    def test_nothing_goes_by_way_of_another_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TMPDIR", "/nonexistent")
        target = tmp_path / "below" / "a.ckpt"
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"a": torch.ones(3)}}, target)
        assert torch.equal(AtomicCheckpointIO().load_checkpoint(target)["state_dict"]["a"], torch.ones(3))
        assert [path.name for path in target.parent.iterdir()] == ["a.ckpt"]

    @pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
    def test_what_was_there_stays_where_the_disk_is_full(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        target = tmp_path / "last.ckpt"
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"a": torch.zeros(1)}}, target)

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        if moment == "write":
            resource = pytest.importorskip("resource")
            before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        else:
            monkeypatch.setattr(os, moment, full)
        try:
            with pytest.raises(OSError, match=r"disk is full|too large"):
                AtomicCheckpointIO().save_checkpoint({"state_dict": {"a": torch.zeros(100000)}}, target)
        finally:
            if moment == "write":
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                signal.signal(signal.SIGXFSZ, before)
        assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
        assert len(state(target)["state_dict"]["a"]) == 1

    def test_a_killed_write_leaves_what_was_there(self, tmp_path: Path) -> None:
        target = tmp_path / "last.ckpt"
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"a": torch.zeros(1)}}, target)
        child = os.fork()
        if child == 0:
            os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
            AtomicCheckpointIO().save_checkpoint({"state_dict": {"a": torch.zeros(9)}}, target)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert len(list(tmp_path.iterdir())) == 2, "killed on the way"
        assert len(state(target)["state_dict"]["a"]) == 1
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"a": torch.zeros(9)}}, target)
        assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"], "nor does a leftover stay"

    def test_the_command_line_writes_so(self) -> None:
        assert isinstance(build(["-c", DEMO, *FEW]).trainer.strategy.checkpoint_io, AtomicCheckpointIO)


def attempt(path: Path) -> dict[str, Any] | str:
    try:
        return read_checkpoint(path)["state_dict"]
    except CheckpointError as error:
        return str(error)


def damaged(written: Path, kind: str, folder: Path) -> Path:
    path, content = folder / f"{kind}.ckpt", written.read_bytes()
    if kind == "directory":
        path.mkdir()
    elif kind == "flipped":  # in the numbers of a tensor
        with zipfile.ZipFile(written) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size if "/data/" in entry.filename else 0)
        entry = content.index(largest.filename.encode()) + len(largest.filename) + 64 + largest.file_size // 2
        path.write_bytes(content[:entry] + bytes([content[entry] ^ 4]) + content[entry + 1 :])
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "weights":
        torch.save({"a": torch.ones(2)}, path)
    else:
        path.write_bytes({"empty": b"", "csv": b"path,label\n", "truncated": content[: len(content) // 2]}[kind])
    return path


DAMAGE = {
    "empty": "is empty",
    "directory": "is a directory",
    "csv": "is not a checkpoint",
    "truncated": "is damaged: it ends too early",
    "flipped": "is damaged: the checksum of",
    "list": "holds a list",
    "weights": "has no state_dict of a Lightning module: it holds a",
}


class TestDamagedFiles:
    @pytest.mark.parametrize("kind", DAMAGE)
    def test_every_door_names_it_and_a_sound_one(self, written: Path, kind: str, tmp_path: Path) -> None:
        path = damaged(written, kind, tmp_path)
        shutil.copy(written, tmp_path / "sound.ckpt")
        module = make()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        doors = {
            "load": lambda: Reconstruction.load_from_checkpoint(path, operator=TotalVariation()),
            "detector": lambda: GeneratedImageDetector.load_from_checkpoint(path),
        }
        for verb in ("fit", "validate", "test", "predict"):
            trainer = make_trainer(tmp_path, plugins=[AtomicCheckpointIO()], enable_checkpointing=False)
            doors[verb] = lambda verb=verb, trainer=trainer: getattr(trainer, verb)(
                module, SmoothImages(), ckpt_path=path, weights_only=True
            )
        for door, enter in doors.items():
            with pytest.raises(CheckpointError) as error:
                enter()
            message = str(error.value)
            assert message.startswith(f"{path} {DAMAGE[kind]}"), door
            assert "\n" not in message
            if kind != "weights":
                assert message.endswith(f"{tmp_path / 'sound.ckpt'} beside it is sound: give that")
        assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())

    @pytest.mark.parametrize("kind", ["truncated", "directory"])
    def test_the_command_says_one_line(self, written: Path, kind: str, tmp_path: Path) -> None:
        with pytest.raises(SystemExit) as error:
            build(["fit", "-c", DEMO, *FEW, f"--ckpt_path={tmp_path / 'none.ckpt'}"], run=True)
        assert str(error.value.code).startswith(f"lightning-em: Checkpoint file not found: {tmp_path / 'none.ckpt'}; ")
        path = damaged(written, kind, tmp_path)
        with pytest.raises(SystemExit) as error:
            build(["validate", "-c", DEMO, *FEW, f"--ckpt_path={path}"], run=True)
        assert error.value.code == f"lightning-em: {path} {DAMAGE[kind]}" + (
            ", or its directory is broken; there is no sound checkpoint beside it"
            if kind == "truncated"
            else "; there is no sound checkpoint beside it"
        )

    def test_any_flipped_bit_is_found_or_harmless(self, written: Path, tmp_path: Path) -> None:
        whole, content = state(written)["state_dict"], written.read_bytes()
        generator = torch.Generator().manual_seed(0)
        found = 0
        for place in torch.randint(len(content), (150,), generator=generator).tolist():
            path = tmp_path / "flipped.ckpt"
            path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
            loaded = attempt(path)
            if isinstance(loaded, str):
                found += loaded.startswith(f"{path} is ")
                continue
            assert loaded.keys() == whole.keys()
            assert all(torch.equal(loaded[name], value) for name, value in whole.items()), place
        assert found > 75

    def test_every_truncation_is_found(self, written: Path, tmp_path: Path) -> None:
        content = written.read_bytes()
        for length in range(0, len(content), 997):
            (tmp_path / "cut.ckpt").write_bytes(content[:length])
            assert find_damage(tmp_path / "cut.ckpt")

    def test_a_missing_file_is_named_with_what_is_beside_it(self, written: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"none.ckpt; .*last.ckpt beside it is sound"):
            Reconstruction.load_from_checkpoint(written.parent / "none.ckpt")

    def test_a_pickle_that_would_run_is_refused_by_name(self, tmp_path: Path) -> None:
        torch.save({"state_dict": {}, "payload": Path("x")}, tmp_path / "a.ckpt")
        with pytest.raises(CheckpointError, match=r"a\.ckpt holds more than tensors and plain data"):
            read_checkpoint(tmp_path / "a.ckpt")

    def test_the_patch_prior_names_it_too(self, written: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"truncated.ckpt is damaged"):
            PatchPrior.from_checkpoint(damaged(written, "truncated", tmp_path))


class TestOtherModels:
    @pytest.mark.parametrize(
        ("module", "match"),
        [
            (lambda: make(BilateralFilter()), "was trained with the operator TotalVariation, expected BilateralFilter"),
            (
                lambda: make(em_parameters=ParameterTable(per_row=["weight"], row_names=["cat", "dog"])),
                r"parameter table has 0 rows and 1 parameters, this one has 2 rows \(cat, dog\)",
            ),
            (lambda: make(backbone=Net(1)), "it lacks backbone.layer.weight, backbone.layer.bias"),
            (GeneratedImageDetector, "is that of a Worsening, expected GeneratedImageDetector"),
            (lambda: GaussianMixture(2), "is that of a Worsening, expected GaussianMixture"),
        ],
        ids=["operator", "table", "network", "detector", "mixture"],
    )
    def test_one_line_names_the_file_and_what_differs(
        self, written: Path, module: Any, match: str, tmp_path: Path
    ) -> None:
        other = module()
        before = {name: value.clone() for name, value in other.state_dict().items()}
        trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_checkpointing=False)
        with pytest.raises(CheckpointError, match=f"last.ckpt does not fit: .*{match}") as error:
            trainer.validate(other, SmoothImages(), ckpt_path=written, weights_only=True)
        assert "\n" not in str(error.value)
        after = other.state_dict()
        assert before.keys() == after.keys()
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, rtol=0, atol=0, equal_nan=True, msg=f"{name}: half-changed")

    def test_so_does_loading_in_python(self, written: Path) -> None:
        with pytest.raises(CheckpointError, match=r"last.ckpt does not fit: .*operator TotalVariation, expected Bilat"):
            Reconstruction.load_from_checkpoint(written, operator=BilateralFilter())
        with pytest.raises(CheckpointError, match=r"last.ckpt does not fit: .*is that of a Worsening, expected Gen"):
            GeneratedImageDetector.load_from_checkpoint(written)
        with pytest.raises(CheckpointError, match=r"last.ckpt does not fit: .*missing .* 'operator'"):
            Reconstruction.load_from_checkpoint(written)
        with pytest.raises(CheckpointError, match=r"it lacks backbone.layer.weight, backbone.layer.bias"):
            Reconstruction.load_from_checkpoint(written, operator=TotalVariation(), backbone=Net(1))
        loaded = Reconstruction.load_from_checkpoint(written, operator=TotalVariation(3))
        assert torch.equal(loaded.em_parameters.shared, state(written)["state_dict"]["em_parameters.shared"])
        Reconstruction.load_from_checkpoint(written, operator=TotalVariation(), backbone=Net(1), strict=False)

    def test_sizes_and_versions_are_named(self, tmp_path: Path) -> None:
        module = make(backbone=Net(3))
        trainer = make_trainer(tmp_path, max_steps=1, enable_checkpointing=False)
        trainer.fit(module, SmoothImages())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        content = state(tmp_path / "a.ckpt")
        content["lightning-em"]["version"] = "0.0.9"
        torch.save(content, tmp_path / "a.ckpt")
        with pytest.raises(CheckpointError) as error:
            Worsening.load_from_checkpoint(tmp_path / "a.ckpt", operator=TotalVariation(), backbone=Net(1))
        message = str(error.value)
        assert "(lightning-em 0.0.9 wrote it, " in message
        assert "backbone.layer.weight is [3, 3, 3, 3] in it and [3, 3, 1, 1] here" in message
        assert "\n" not in message

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda h: h.update(gone=3), "unexpected keyword argument 'gone'"),
            (
                lambda h: h["diffusion"]["init_args"].update(gone=3),
                "hyperparameter diffusion: Option 'gone' is not accep",
            ),
            (lambda h: h.update(data_range="x"), "hyperparameter data_range: Expected a <class 'float'>. Got value: x"),
        ],
    )
    def test_hyperparameters_of_another_version_are_named(
        self, demo_run: Path, change: Any, says: str, tmp_path: Path
    ) -> None:
        content = state(demo_run / "logs" / "demo" / "version_0" / "checkpoints" / "last.ckpt")
        change(content["hyper_parameters"])
        torch.save(content, tmp_path / "old.ckpt")
        with pytest.raises(CheckpointError) as error:
            GraphDiffusionReconstruction.load_from_checkpoint(tmp_path / "old.ckpt")
        assert str(error.value).startswith(f"{tmp_path / 'old.ckpt'} does not fit: ")
        assert says in str(error.value)
        assert len(str(error.value)) < 400
        assert "\n" not in str(error.value)
        if "unexpected" in says:
            return  # not the parser's to find
        with pytest.raises(SystemExit) as stopped:
            build(["validate", "-c", DEMO, *FEW, f"--ckpt_path={tmp_path / 'old.ckpt'}"], run=True)
        said = str(stopped.value.code)
        assert said.startswith(f"lightning-em: {tmp_path / 'old.ckpt'} does not fit: ")
        assert says.split(": ")[-1][:20] in said
        assert "\n" not in said
        assert len(said) < 400

    def test_the_command_compares_with_the_configuration(self, demo_run: Path) -> None:
        (path,) = (demo_run / "logs" / "demo" / "version_0" / "checkpoints").glob("last.ckpt")
        detector = str(Path(DEMO).with_name("detector.yaml"))
        with pytest.raises(SystemExit) as error:
            build(["validate", "-c", detector, f"--ckpt_path={path}"], run=True)
        assert str(error.value.code) == (
            f"lightning-em: {path} does not fit the configuration: the checkpoint is that of a "
            "GraphDiffusionReconstruction, expected GeneratedImageDetector"
        )


def changed(written: Path, folder: Path, **entries: Any) -> Path:
    """A checkpoint with other entries; None leaves one out."""
    content = {**state(written), **entries}
    path = folder / "other.ckpt"
    torch.save({name: value for name, value in content.items() if value is not None}, path)
    return path


def load(path: Any) -> Worsening:
    return Worsening.load_from_checkpoint(path, operator=TotalVariation(3))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [[], ["cat", "dog"]])
@pytest.mark.parametrize("name", ["shared", "offsets"])
def test_a_table_that_is_not_finite_is_refused_at_every_door(
    written: Path, tmp_path: Path, name: str, rows: list[str], wrong: float
) -> None:
    if name == "offsets" and not rows:
        return
    table = {"em_parameters": ParameterTable(per_row=["weight"] if rows else [], row_names=rows)}
    module, key = make(**table), f"em_parameters.{name}"
    weights = module.state_dict()
    path = changed(written, tmp_path, state_dict={**weights, key: weights[key] + wrong})
    before = weights[key].clone()
    with pytest.raises(CheckpointError, match=f"other.ckpt does not fit: {key} is not finite"):
        Worsening.load_from_checkpoint(path, operator=TotalVariation(3), **table)
    with pytest.raises(CheckpointError, match=f"other.ckpt does not fit: {key} is not finite"):
        make_trainer(tmp_path, enable_checkpointing=False).fit(module, SmoothImages(), ckpt_path=path)
    with pytest.raises(ValueError, match=f"{key} is not finite"):
        module.load_state_dict({**weights, key: weights[key] + wrong})
    assert torch.equal(module.state_dict()[key], before)


def test_values_outside_the_bounds_warn_but_not_those_that_a_run_can_have() -> None:
    def table() -> ParameterTable:
        return ParameterTable({"gain": 1.0, "off": 0.5}, {"gain": (0.1, 2.0), "off": (0.1, 1.0)}, None, ["gain"], ["a"])

    content = table().state_dict()
    for name in ("shared", "offsets"):
        moved = content[name].clone()
        moved[..., 0] += 4.0
        with pytest.warns(UserWarning, match="outside its bounds in the checkpoint, of gain: they are clamped"):
            table().load_state_dict({**content, name: moved})
    carried = {**content, "shared": content["shared"] + 0.5, "offsets": content["offsets"] + 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table().load_state_dict(carried)
        table().load_state_dict({name: value.bfloat16().double() for name, value in carried.items()})


def test_malformed_checkpoints_are_named(written: Path, tmp_path: Path) -> None:
    weights = state(written)["state_dict"]
    named = {name: value for name, value in weights.items() if name != "em_parameters.layout"}
    for entries, says in (
        ({"hyper_parameters": [1]}, "is malformed: its hyper_parameters is a list, expected a dict"),
        ({"lightning-em": "x"}, "is malformed: its lightning-em is a str, expected a dict"),
        ({"pytorch-lightning_version": None}, "no checkpoint of Lightning: its pytorch-lightning_version is missing"),
        ({"pytorch-lightning_version": "abc"}, "its pytorch-lightning_version is 'abc'"),
        ({"state_dict": dict.fromkeys(weights, "a")}, "is a str in it, expected a tensor"),
        ({"state_dict": {**weights, "em_parameters.shared": None}}, "shared is a NoneType in it, expected a tensor"),
        ({"state_dict": named}, "does not fit: it lacks em_parameters.layout"),
    ):
        path = changed(written, tmp_path, **entries)
        with pytest.raises(CheckpointError, match="other.ckpt .*" + says) as error:
            load(path)
        assert "\n" not in str(error.value)
    content = {**state(written), "hyper_parameters": None}
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"other.ckpt is malformed: its hyper_parameters is a NoneType"):
        load(path)
    for nothing in (None, 3):
        with pytest.raises(CheckpointError, match=f"must be the path of a file or an open file, got {nothing}"):
            load(nothing)


def test_open_files_are_read_and_named(written: Path, tmp_path: Path) -> None:
    with written.open("rb") as file:
        assert torch.equal(load(file).em_parameters.shared, state(written)["state_dict"]["em_parameters.shared"])
    path = damaged(written, "truncated", tmp_path)
    with path.open("rb") as file, pytest.raises(CheckpointError, match=r"truncated.ckpt is damaged"):
        load(file)


def test_a_resumed_run_names_what_its_checkpoint_lacks(written: Path, tmp_path: Path) -> None:
    for missing, says in ((["callbacks"], "no callbacks:"), (["callbacks", "loops"], "no callbacks and no loops:")):
        path = changed(written, tmp_path, **dict.fromkeys(missing))
        trainer = make_trainer(tmp_path, max_epochs=3, enable_checkpointing=False)
        with pytest.warns(UserWarning, match=f"other.ckpt has {says} the run goes on from its weights"):
            trainer.fit(make(), SmoothImages(), ckpt_path=path, weights_only=True)


def test_the_class_to_load_with_is_named(tmp_path: Path) -> None:
    content = {"state_dict": {}, "pytorch-lightning_version": L.__version__, "hyper_parameters": {}}
    origin = {"version": "0.1.0", "class": "lightning_modules.reconstruction.GraphDiffusionReconstruction"}
    torch.save({**content, "lightning-em": origin}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"a.ckpt .*load it with GraphDiffusionReconstruction.load_from_ch"):
        Reconstruction.load_from_checkpoint(tmp_path / "a.ckpt")
    for parameters, says in (
        ([1], "is malformed: its datamodule_hyper_parameters is a list"),
        ({"train_crops": {"class_path": "evilmod.Evil"}}, "does not fit: "),
        (
            {"_class_path": "datamodules.ImageFolderDataModule"},
            "does not fit: .* a ImageFolderDataModule, expected Ph",
        ),
    ):
        torch.save({**content, "datamodule_hyper_parameters": parameters}, tmp_path / "a.ckpt")
        with pytest.raises(CheckpointError, match=f"a.ckpt {says}"):
            PhotoCropsDataModule.load_from_checkpoint(tmp_path / "a.ckpt")
