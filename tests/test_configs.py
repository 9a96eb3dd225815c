"""Every configuration runs, and so does every verb of the command on the demo."""

import csv
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import lightning_modules
from callbacks import EMParameterCallback
from lightning_modules import GeneratedImageDetector, GraphDiffusionReconstruction
from lightning_modules.cli import build, folds, main
from lightning_modules.cli.stopping import StopBetweenSteps
from lightning_modules.graph.message_passing import WeightedSum

PROJECT = Path(__file__).parents[1]
CONFIGS = sorted((PROJECT / "configs").glob("*.yaml"))
OVERLAYS = sorted((PROJECT / "configs" / "trainer").glob("*.yaml"))
DEMO = str(PROJECT / "configs" / "demo.yaml")
COMMAND = str(Path(sys.executable).parent / "lightning-em")
QUICK = ["--trainer.accelerator=cpu", "--trainer.fast_dev_run=1"]
FEW_CROPS = ["--data.train_crops=20", "--data.val_crops=10", "--data.batch_size=4"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a run writes, it writes into the test's own folder."""
    monkeypatch.chdir(tmp_path)


def checkpoint(demo_run: Path) -> str:
    (path,) = (demo_run / "logs" / "demo" / "version_0" / "checkpoints").glob("epoch=*.ckpt")
    return str(path)


def assert_fits(words: list[str]) -> None:
    trainer = build(["fit", *words, *QUICK], run=True).trainer
    assert trainer.state.finished
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 1


def small(config: Path, fake_cifar: Callable[..., Path], fake_photographs: Callable[..., Path]) -> list[str]:
    data = yaml.safe_load(config.read_text())["data"]["class_path"]
    if data == "datamodules.CIFAR10DataModule":
        return [f"--data.root={fake_cifar()}", "--data.val_size=4", "--data.batch_size=2"]
    if data == "datamodules.PatchDataModule":
        return ["--data.patches_per_image=1", "--model.num_components=3"]
    if data == "datamodules.GeneratedImagesDataModule":
        return [f"--data.root={fake_photographs()}", "--data.crop_size=32", "--data.eval_crops=2"]
    if data == "datamodules.PointCloudDataModule":
        return ["--data.num_points=200", "--data.batch_size=2"]
    if data == "datamodules.ImageFolderDataModule":
        return [f"--data.root={fake_photographs()}", "--data.crop_size=16", "--data.batch_size=2"]
    return FEW_CROPS


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_fits(
    config: Path, fake_cifar: Callable[..., Path], fake_photographs: Callable[..., Path]
) -> None:
    assert_fits(["-c", str(config), *small(config, fake_cifar, fake_photographs)])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_names_its_run_and_has_its_callback(config: Path) -> None:
    content = yaml.safe_load(config.read_text())
    assert content["trainer"]["logger"]["init_args"]["name"] == config.stem
    expected = {
        # Mixtures take their M-step at the end of an epoch, by themselves: theirs is closed form.
        "datamodules.PatchDataModule": "callbacks.MixtureDashboard",
        # The detector's restoration has fixed parameters by default.
        "datamodules.GeneratedImagesDataModule": "lightning.pytorch.callbacks.EMAWeightAveraging",
    }.get(content["data"]["class_path"], "callbacks.EMParameterCallback")
    assert expected in [entry["class_path"] for entry in content["trainer"]["callbacks"]]


def test_a_progress_bar_that_is_not_wanted_goes() -> None:
    command = build(["-c", DEMO, "--trainer.enable_progress_bar=false", *FEW_CROPS])
    assert command.trainer.progress_bar_callback is None
    assert any(isinstance(callback, EMParameterCallback) for callback in command.trainer.callbacks)
    assert build(["-c", DEMO, *FEW_CROPS]).trainer.progress_bar_callback is not None


@pytest.mark.parametrize("overlay", [path for path in OVERLAYS if path.stem != "ddp"], ids=lambda path: path.stem)
def test_every_overlay_fits(overlay: Path) -> None:
    assert_fits(["-c", DEMO, "-c", str(overlay), *FEW_CROPS])


def test_the_command_runs_two_processes_under_the_ddp_overlay() -> None:
    overlay = str(PROJECT / "configs" / "trainer" / "ddp.yaml")
    words = ["fit", "-c", DEMO, "-c", overlay, *FEW_CROPS, *QUICK, "--trainer.devices=2"]
    result = subprocess.run([COMMAND, *words], capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 processes" in result.stderr


def test_there_is_no_overlay_that_is_not_run() -> None:
    assert [path.stem for path in OVERLAYS] == ["cpu", "ddp", "debug"]


def test_a_name_is_the_configuration_of_that_name(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for words in (["-c", DEMO], ["-c", "demo"], ["-c=demo"], ["--config", "demo"], ["--config=demo.yaml"]):
        with pytest.raises(SystemExit):
            main(["fit", *words, "--print_config"])
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 1
    assert "PhotoCropsDataModule" in printed[0]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "-c", "dmeo"])
    assert stopped.value.code == 2
    assert "no configuration dmeo: it is neither a file nor one of blind, " in capsys.readouterr().err


def test_fit_leaves_checkpoints_parameters_and_the_config(demo_run: Path) -> None:
    folder = demo_run / "logs" / "demo" / "version_0"
    assert {"config.yaml", "em_parameters.yaml", "checkpoints"} <= {path.name for path in folder.iterdir()}
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert any(path.name.startswith("events.out.tfevents") for path in folder.iterdir())


@pytest.mark.parametrize(("verb", "prefix"), [("validate", "val"), ("test", "test")])
def test_evaluation_of_a_checkpoint(demo_run: Path, verb: str, prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([verb, "-c", DEMO, "--ckpt_path", checkpoint(demo_run), *FEW_CROPS, "--trainer.accelerator=cpu"])
    assert f"{prefix}/psnr_noisy" in capsys.readouterr().out


def test_predict_without_images_of_ones_own_shows_the_effect(demo_run: Path) -> None:
    main(["predict", "-c", DEMO, "--ckpt_path", checkpoint(demo_run), *FEW_CROPS, "--trainer.accelerator=cpu"])
    table = max(demo_run.rglob("restored.csv"), key=os.path.getmtime)
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 10
    assert all(float(row["psnr"]) > float(row["psnr_noisy"]) for row in rows)


def test_predict_restores_a_folder_of_ones_own(demo_run: Path) -> None:
    generator = np.random.default_rng(0)
    sizes = {"a.png": (37, 31), "below/b.jpg": (24, 40)}
    for name, (width, height) in sizes.items():
        (Path("photos") / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(Path("photos") / name)
    words = ["--data=datamodules.ImageFolderDataModule", "--data.root=photos", "--trainer.accelerator=cpu"]
    main(["predict", "-c", DEMO, "--ckpt_path", checkpoint(demo_run), *words])
    table = max(demo_run.rglob("restored.csv"), key=os.path.getmtime)
    rows = {row["name"]: row for row in csv.DictReader(table.open())}
    assert set(rows) == set(sizes)
    for name, size in sizes.items():
        written = table.parent / name  # a JPEG file is one again
        assert written == table.parent / rows[name]["output"]
        with Image.open(written) as image:
            assert image.size == size
        assert float(rows[name]["noise_std"]) > 0.1, "estimated: the pixels are pure noise"


def test_the_detector_from_its_configuration_to_one_image(fake_photographs: Callable[..., Path]) -> None:
    config, root = str(PROJECT / "configs" / "detector.yaml"), fake_photographs(20)
    words = ["-c", config, f"--data.root={root}", "--data.crop_size=32", "--data.eval_crops=2"]
    words += ["--trainer.accelerator=cpu", "--trainer.enable_model_summary=false"]
    main(["fit", *words, "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"])
    (saved,) = Path("logs").rglob("last.ckpt")
    main(["test", *words, f"--ckpt_path={saved}", "--data.conditions=[clean, jpeg 75]"])
    main(["predict", *words, f"--ckpt_path={saved}"])
    (report,), (table,) = Path("logs").rglob("detector_report.csv"), Path("logs").rglob("predictions.csv")
    assert {row["condition"] for row in csv.DictReader(report.open())} == {"clean", "jpeg 75"}
    detector = GeneratedImageDetector.load_from_checkpoint(saved)
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 80
    said = float(next(row["probability"] for row in rows if row["path"] == "val/generated/0.png"))
    assert detector.predict_image(root / "val" / "generated" / "0.png") == pytest.approx(said, abs=1e-4)
    assert detector.crops.tolist() == [2, 32]
    assert bool(detector.densities.fitted)


def test_the_parameters_of_a_run_start_the_next(demo_run: Path) -> None:
    exported = demo_run / "logs" / "demo" / "version_0" / "em_parameters.yaml"
    following = build(["-c", DEMO, "-c", str(exported), *FEW_CROPS, *QUICK]).model.em_parameters
    reached = GraphDiffusionReconstruction.load_from_checkpoint(checkpoint(demo_run)).em_parameters
    torch.testing.assert_close(following.values(), reached.values(), rtol=1e-11, atol=0)
    assert following.get_parameters()["sigma"] != 0.3
    main(["fit", "-c", DEMO, "-c", str(exported), *FEW_CROPS, *QUICK])


def test_the_rows_are_named_by_the_data_unless_the_config_names_them(
    fake_cifar: Callable[..., Path], fake_photographs: Callable[..., Path]
) -> None:
    config = PROJECT / "configs" / "cifar10_textbook.yaml"
    words = ["-c", str(config), *small(config, fake_cifar, fake_photographs), *QUICK]
    assert build(words).model.em_parameters.row_names[3:5] == ("cat", "deer")
    names = [f"row {i}" for i in range(10)]
    named = build([*words, f"--model.em_parameters.row_names={names}"])
    assert named.model.em_parameters.row_names == tuple(names)


@pytest.mark.parametrize(
    ("words", "shows"),
    [
        (["--help"], "  validate  evaluate it on its validation data"),
        (["--help"], "  restore   restore photographs"),
        (["-h"], "student_t_mixture, trainer/cpu"),
        (["fit", "--help"], "--trainer.max_epochs"),
        (["fit", "-c", DEMO, "--print_config"], "PhotoCropsDataModule"),
        (["fit", "--model.help", "GraphDiffusionReconstruction"], "--model.smoothness_weight"),
        (["fit", "--data.help", "ImageFolderDataModule"], "--data.crop_size"),
        (["fit", "-c", DEMO, "--model.backbone.help", "ResidualDenoiser"], "graph_features"),
        (["fit", "--trainer.callbacks.help", "EMParameterCallback"], "--trainer.callbacks.update_rows"),
    ],
    ids=" ".join,
)
def test_help(words: list[str], shows: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(words)
    assert exit_info.value.code in (0, None)
    assert shows in capsys.readouterr().out


@pytest.mark.parametrize(("words", "code"), [(["restor", "a.jpg"], 2), (["fits"], 2), ([], 2)], ids=str)
def test_a_command_that_is_none(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == code
    said = capsys.readouterr()
    if words:
        known = "fit, validate, test, predict, restore, adapt, detect"
        meant = {"restor": "restore", "fits": "fit"}[words[0]]
        assert said.err == f"lightning-em: no command {words[0]}: there are {known}: did you mean {meant}?\n"
    else:
        assert "usage: lightning-em COMMAND" in said.out


def test_every_argument_of_the_public_classes_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "GraphDiffusionReconstruction"])
    text = " ".join(capsys.readouterr().out.split())
    for argument, words in (("estimate_noise", "Estimate each image's noise level"), ("assignment", "Which row")):
        assert f"--model.{argument}" in text
        assert words in text


def test_version() -> None:
    result = subprocess.run([COMMAND, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == lightning_modules.__version__
    assert result.stderr == "", "nothing but the answer"


@pytest.mark.parametrize("shadow", ["callbacks/__init__.py", "datamodules/mine.py"])
def test_a_package_of_the_users_own_that_shadows_ours_is_named(shadow: str, tmp_path: Path) -> None:
    (tmp_path / shadow).parent.mkdir(exist_ok=True)
    (tmp_path / shadow).touch()
    command = [sys.executable, "-m", "lightning_modules.cli", "fit", "-c", DEMO]
    result = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert result.returncode == 1
    assert f"{Path(shadow).parent} in {tmp_path.resolve()} shadows" in result.stderr
    assert "Traceback" not in result.stderr


def environment() -> dict[str, str]:
    """That of a user's shell: without what pytest or an earlier distributed run has left."""
    leftovers = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
    return {**{name: value for name, value in os.environ.items() if name not in leftovers}, "OMP_NUM_THREADS": "1"}


def test_a_learning_rate_finder_in_a_configuration_finds_a_rate(tmp_path: Path) -> None:
    overlay = tmp_path / "finder.yaml"
    finder = {"class_path": "lightning.pytorch.callbacks.LearningRateFinder", "init_args": {"num_training_steps": 3}}
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks+": [finder]}}))
    words = ["-c", DEMO, "-c", str(overlay), *FEW_CROPS, "--trainer.max_steps=2", "--trainer.limit_val_batches=0"]
    command = build(["fit", *words, "--trainer.logger=false"], run=True)
    (found,) = (c for c in command.trainer.callbacks if type(c).__name__ == "LearningRateFinder")
    assert len(found.optimal_lr.results["lr"]) == 3
    command.model.lr = 0.125  # what it sets where the curve has points enough
    assert command.model.configure_optimizers().param_groups[0]["lr"] == 0.125


def test_the_textbook_run_improves_on_its_start(cifar_root: Path) -> None:
    """20 steps on 1,280 images of CIFAR-10, and the mean over 100 others, which are restored by the global set."""
    config = str(PROJECT / "configs" / "cifar10_textbook.yaml")
    words = ["-c", config, f"--data.root={cifar_root}", "--data.val_size=100", "--trainer.logger=false"]
    words.append("--model.diffusion.implementation=auto")  # the same, in less time; see below
    command = build(words)
    module, data = command.model, command.datamodule
    (em,) = (callback for callback in command.trainer.callbacks if isinstance(callback, EMParameterCallback))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=20, callbacks=[em], enable_model_summary=False, **quiet)
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    (after,) = trainer.validate(module, data, verbose=False)
    assert after["val/psnr"] > before["val/psnr"] + 0.05
    steps = {module.em_parameters.get_parameters(row)["smooth_steps"] for row in range(10)}
    assert len(steps) > 1, "rows that differ"


def test_the_textbook_configuration_passes_messages_and_equals_the_dense_form(
    fake_cifar: Callable[..., Path], fake_photographs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = WeightedSum.forward
    monkeypatch.setattr(WeightedSum, "forward", lambda *words: (calls.append(None), forward(*words))[1])
    config = PROJECT / "configs" / "cifar10_textbook.yaml"
    words = ["-c", str(config), *small(config, fake_cifar, fake_photographs), *QUICK]
    literal, dense = (build([*words, *more]) for more in ([], ["--model.diffusion.implementation=auto"]))
    literal.datamodule.setup("fit")
    batch = literal.datamodule.on_after_batch_transfer(next(iter(literal.datamodule.train_dataloader())), 0)
    results = []
    for command, messages in ((literal, True), (dense, False)):
        calls.clear()
        command.model.log = lambda *_, **__: None
        step = command.model.training_step(batch, 0)
        assert bool(calls) == messages
        step["loss"].backward()
        gradient = command.model.em_parameters.pop_gradient()
        results.append((command.model(batch["image"], noise_std=0.1), step["em"].proxy, gradient))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_each_source_is_left_out_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    for name, kind, number in itertools.product("abcd", ("photographic", "generated"), range(12)):
        path = tmp_path / "data" / name / kind / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = generator.integers(0, 256, (40, 44, 3), dtype=np.uint8)
        Image.fromarray(noise // (1 if kind == "generated" else 2)).save(path)
    words = ["test", "-c", str(PROJECT / "configs" / "detector.yaml"), f"--data.root={tmp_path / 'data'}"]
    words += ["--data.crop_size=32", "--data.eval_crops=1", "--data.conditions=[history]", "--trainer.max_epochs=1"]
    words += ["--trainer.check_val_every_n_epoch=1", "--trainer.enable_progress_bar=false"]
    words += ["--trainer.enable_model_summary=false", "--leave_one_source_out", "true"]
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(StopBetweenSteps, "on_train_batch_end", lambda *_: signal.raise_signal(signal.SIGINT))
        patch.setattr(StopBetweenSteps, "on_train_start", lambda *_: None)
        patch.setattr(folds, "rank_zero_info", said.append)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        with pytest.raises(SystemExit) as stopped:
            main(words)
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130
    assert said[-1] == "\nstopped: the same command goes on"
    assert not [*Path("logs").rglob("detector_report.csv")], "what was stopped is not tested"
    main(words)
    (table,) = Path("logs").rglob("leave_one_source_out.csv")
    lines = {row["left_out"]: row for row in csv.DictReader(table.open())}
    assert list(lines) == ["a", "b", "c", "d"]
    assert all(row["n"] == "2" and row["color_auroc"] == "1.0" for row in lines.values())
    report = table.parent / "without_b" / "detector_report.csv"
    assert "Each source left out" in capsys.readouterr().out
    config = (report.parent / "config.yaml").read_text()
    assert "test_sources:\n    - b\n" in config
    assert "val_sources:\n    - c\n" in config
    times = {path: path.stat().st_mtime_ns for path in table.parent.rglob("detector_report.csv")}
    report.unlink()
    main(words)
    again = {path: path.stat().st_mtime_ns for path in table.parent.rglob("detector_report.csv")}
    assert {path for path, when in again.items() if times[path] != when} == {report}, (
        "its fit is there, its test is done"
    )
    with pytest.raises(SystemExit, match="has one source, a: there is none to leave out"):
        main([word.replace(str(tmp_path / "data"), str(tmp_path / "data" / "a")) for word in words])
