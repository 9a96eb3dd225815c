"""Point clouds from files to learned parameters and back: data, module, callbacks, command; any processes, any kill."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cloud_runs import EPOCHS, STEPS, run
from lightning.pytorch import Trainer
from torch import Tensor
from torch_geometric.data import Data

from callbacks import PointCloudView, PointCloudWriter
from datamodules import PointCloudDataModule
from datamodules._formula_shapes import bracket, ellipsoid, torus
from lightning_modules import PointCloudDiffusion, PointCloudReconstruction
from lightning_modules.cli import build
from lightning_modules.point_clouds.files import CloudFile, read_cloud, write_ply

SCRIPT, PROJECT = Path(__file__).with_name("cloud_runs.py"), Path(__file__).parents[2]
CONFIG = str(PROJECT / "configs" / "point_clouds.yaml")
plyfile = pytest.importorskip("plyfile")


def launch(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), *map(str, words)],
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("single"))


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found["global_step"] == expected["global_step"] == EPOCHS * STEPS
    path, wanted = (torch.tensor(each["parameters"], dtype=torch.float64) for each in (found, expected))
    assert path.shape == wanted.shape
    assert (wanted[-1] - wanted[0]).abs().max() > 0.01  # something was learned
    torch.testing.assert_close(path, wanted, rtol=tolerance, atol=0)


def test_two_processes_equal_one(single: dict[str, Any], tmp_path: Path) -> None:
    done = launch("--devices", 2, "--batch-size", 1, "--out", tmp_path / "ddp.pt")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(torch.load(tmp_path / "ddp.pt", weights_only=True), single, 1e-5)


def test_a_killed_run_goes_on_as_if_nothing_had_been(single: dict[str, Any], tmp_path: Path) -> None:
    done = launch("--kill", "--out", tmp_path / "none.pt")
    assert done.returncode < 0
    checkpoint = max(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    resumed = run(tmp_path / "resumed", ckpt=checkpoint)
    assert resumed["parameters"] == single["parameters"]
    assert resumed["loss"] == single["loss"]


# Data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three meshes, and a scan with colors, a missing point and far coordinates."""
    root = tmp_path / "clouds"
    for shape in (ellipsoid, torus, bracket):
        vertices, faces = shape()
        write_ply(CloudFile(CloudFile.of(vertices).vertices, faces), root / f"{shape.__name__}.ply")
    vertices = np.empty(600, [("x", "f8"), ("y", "f8"), ("z", "f8"), ("red", "u1")])
    points = scan_points()
    for axis, values in zip("xyz", points.T, strict=True):
        vertices[axis] = values
    vertices["red"] = np.arange(600) % 256
    write_ply(CloudFile(vertices), root / "scans" / "scan.ply")
    return root


def scan_points() -> np.ndarray:
    generator = np.random.default_rng(0)
    points = generator.standard_normal((600, 3))
    points = 30 * points / np.linalg.norm(points, axis=1, keepdims=True) + 0.6 * generator.standard_normal((600, 3))
    points += [5e5, 5e6, 100]
    points[7] = np.nan
    return points


def test_clouds_depend_on_the_seed_alone() -> None:
    def first(seed: int, workers: int = 0) -> Tensor:
        data = PointCloudDataModule(num_points=200, batch_size=3, seed=seed, num_workers=workers)
        data.setup("fit")
        return next(iter(data.train_dataloader()))["cloud"].pos

    assert torch.equal(first(1), first(1))
    assert torch.equal(first(1), first(1, workers=1))
    assert not torch.equal(first(1), first(2))


def test_files_are_split_once_and_each_is_in_one_part(folder: Path) -> None:
    data = PointCloudDataModule(str(folder), num_points=100, clouds_per_shape=2, batch_size=1, val_fraction=0.5, seed=0)
    names: dict[str, set[str]] = {}
    for stage, loader in (("fit", "train"), ("fit", "val")):
        data.setup(stage)
        names[loader] = {name for batch in getattr(data, f"{loader}_dataloader")() for name in batch["name"]}
    assert not names["train"] & names["val"]
    assert names["train"] | names["val"] == {"ellipsoid.ply", "torus.ply", "bracket.ply", "scans/scan.ply"}


def test_a_scan_gives_neighboring_points_without_the_missing_one(folder: Path) -> None:
    data = PointCloudDataModule(str(folder / "scans"), num_points=100, batch_size=1, val_fraction=0, seed=0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    cloud = batch["cloud"]
    assert cloud.pos.shape == (100, 3)
    assert cloud.pos.isfinite().all()
    assert torch.pdist(cloud.pos).max() < 50  # a piece of a ball of radius 30
    assert float(cloud.radius) == pytest.approx(31, abs=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_points": 3}, "num_points must be at least 16"),
        ({"clouds_per_shape": 0}, "clouds_per_shape"),
        ({"sampling": "grid"}, "sampling must be 'even' or 'uniform'"),
        ({"val_fraction": 2.0}, "val_fraction"),
        ({"noise_std": -1.0}, "noise_std must be a length"),
    ],
)
def test_wrong_arguments_of_the_data_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PointCloudDataModule(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_std": 0.0}, "noise_std must be a part"),
        ({"noise_std": (0.03, 0.01)}, "noise_std must be a part"),
    ],
)
def test_wrong_arguments_of_the_module_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PointCloudReconstruction(PointCloudDiffusion(), **options)


def test_a_cloud_of_an_unknown_level_is_denoised() -> None:
    points = torch.nn.functional.normalize(torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    noisy = points + 0.02 * torch.randn(2000, 3, generator=torch.Generator().manual_seed(1))
    module = PointCloudReconstruction(PointCloudDiffusion()).eval()
    for restored in (module(noisy), module(Data(pos=noisy), noise_std=0.02)):
        assert (restored.norm(dim=1) - 1).square().mean() < 0.2 * (noisy.norm(dim=1) - 1).square().mean()


# What predict writes


def predict(folder: Path, output: Path) -> None:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[PointCloudWriter(str(output))]
    )
    module = PointCloudReconstruction(PointCloudDiffusion())
    trainer.predict(module, PointCloudDataModule(str(folder), noise_std=0.6), return_predictions=False)


def test_predict_keeps_all_but_the_coordinates(folder: Path, tmp_path: Path) -> None:
    predict(folder / "scans", tmp_path / "out")
    before, after = read_cloud(folder / "scans" / "scan.ply"), read_cloud(tmp_path / "out" / "scan.ply")
    assert before.vertices.dtype == after.vertices.dtype
    np.testing.assert_array_equal(before.vertices["red"], after.vertices["red"])
    assert np.isnan(after.points[7]).all()
    assert after.finite.sum() == 599

    def error(file: CloudFile) -> float:
        points = file.points[file.finite] - [5e5, 5e6, 100]
        return float(np.square(np.linalg.norm(points, axis=1) - 30).mean())

    assert error(after) < 0.4 * error(before)
    assert (tmp_path / "out" / "restored.csv").read_text().count("\n") == 2


def test_files_of_others_are_not_overwritten_and_results_not_denoised_again(folder: Path, tmp_path: Path) -> None:
    predict(folder / "scans", tmp_path / "out")
    predict(folder / "scans", tmp_path / "out")  # its own results are
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "scan.ply").write_text("mine")
    with pytest.raises(FileExistsError, match="is not an earlier result"):
        predict(folder / "scans", tmp_path / "other")
    assert (tmp_path / "other" / "scan.ply").read_text() == "mine"
    with pytest.raises(ValueError, match="would be denoised again"):
        predict(folder / "scans", folder / "scans")


def test_a_file_without_finite_points_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "holes.npy", np.full((40, 3), np.nan))
    with pytest.raises(ValueError, match=r"holes\.npy has no point with finite coordinates"):
        predict(tmp_path, tmp_path / "out")


# The command


def test_the_command_learns_shows_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--data.num_points=120", "--data.clouds_per_shape=1", "--trainer.max_epochs=2"]
    small += ["--trainer.enable_progress_bar=false"]
    build(["fit", "-c", CONFIG, *small], run=True)
    run_folder = tmp_path / "logs" / "point_clouds" / "version_0"
    checkpoint = run_folder / "checkpoints" / "last.ckpt"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder)).Reload()
    assert {"val/chamfer", "val/surface", "val/surface_noisy"} <= set(events.Tags()["scalars"])
    assert any(tag.startswith("val/0/restored") for tag in events.Tags()["tensors"])  # the page Mesh
    build(["validate", "-c", CONFIG, *small, f"--ckpt_path={checkpoint}"], run=True)
    build(["predict", "-c", CONFIG, *small, f"--ckpt_path={checkpoint}"], run=True)
    written = list((tmp_path / "logs").rglob("gear*.ply"))
    assert len(written) == 1
    assert len(read_cloud(written[0]).points) == 120
    again = PointCloudReconstruction.load_from_checkpoint(checkpoint)
    start = {spec.name: spec.start for spec in again.operator.parameter_specs}
    assert {name: float(value) for name, value in again._theta(1).items() if name in start} != start


def test_the_view_needs_counts() -> None:
    with pytest.raises(ValueError, match="num_clouds"):
        PointCloudView(num_clouds=0)
