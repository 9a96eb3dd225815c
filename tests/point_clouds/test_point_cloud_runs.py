"""Parameters of point clouds learned by any number of processes, after any kill, and by the command."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cloud_runs import EPOCHS, STEPS, run
from launching import PROJECT, launch
from torch import Tensor

from datamodules import PointCloudDataModule
from lightning_modules import PointCloudReconstruction
from lightning_modules.cli import build
from lightning_modules.point_clouds.files import read_cloud

SCRIPT = Path(__file__).with_name("cloud_runs.py")
pytest.importorskip("plyfile")


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
    done = launch(SCRIPT, "--devices", 2, "--batch-size", 1, "--out", tmp_path / "ddp.pt")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(torch.load(tmp_path / "ddp.pt", weights_only=True), single, 1e-5)


def test_a_killed_run_goes_on_as_if_nothing_had_been(single: dict[str, Any], tmp_path: Path) -> None:
    done = launch(SCRIPT, "--kill", "--out", tmp_path / "none.pt")
    assert done.returncode < 0
    checkpoint = max(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    resumed = run(tmp_path / "resumed", ckpt=checkpoint)
    assert resumed["parameters"] == single["parameters"]
    assert resumed["loss"] == single["loss"]


def test_clouds_depend_on_the_seed_alone() -> None:
    def first(seed: int, workers: int = 0) -> Tensor:
        data = PointCloudDataModule(num_points=200, batch_size=3, seed=seed, num_workers=workers)
        data.setup("fit")
        return next(iter(data.train_dataloader()))["cloud"].pos

    assert torch.equal(first(1), first(1))
    assert torch.equal(first(1), first(1, workers=1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize("way", [[], ["--model.objective=held_out"]])
def test_the_command_learns_shows_and_writes(way: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--data.num_points=120", "--data.clouds_per_shape=1", "--trainer.max_epochs=2"]
    small += ["--trainer.enable_progress_bar=false", *way]
    build(["fit", "-c", "point_clouds", *small], run=True)
    run_folder = tmp_path / "logs" / "point_clouds" / "version_0"
    checkpoint = run_folder / "checkpoints" / "last.ckpt"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder)).Reload()
    assert {"val/chamfer", "val/surface", "val/surface_noisy"} <= set(events.Tags()["scalars"])
    assert any(tag.startswith("val/0/restored") for tag in events.Tags()["tensors"])  # the page Mesh
    build(["validate", "-c", "point_clouds", *small, f"--ckpt_path={checkpoint}"], run=True)
    build(["predict", "-c", "point_clouds", *small, f"--ckpt_path={checkpoint}"], run=True)
    written = list((tmp_path / "logs").rglob("gear*.ply"))
    assert len(written) == 1
    assert len(read_cloud(written[0]).points) == 120
    again = PointCloudReconstruction.load_from_checkpoint(checkpoint)
    start = {spec.name: spec.start for spec in again.operator.parameter_specs}
    assert {name: float(value) for name, value in again._theta(1).items() if name in start} != start


def test_the_command_learns_from_scans_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    points = torch.nn.functional.normalize(torch.randn(2, 400, 3, generator=torch.Generator().manual_seed(0)), dim=2)
    noisy = points + 0.05 * torch.randn(2, 400, 3, generator=torch.Generator().manual_seed(1))
    (tmp_path / "scans").mkdir()
    for number, cloud in enumerate(noisy):
        np.save(tmp_path / "scans" / f"{number}.npy", cloud.numpy())
    words = ["--data.root=scans", "--model.objective=held_out", "--model.add_noise=false", "--data.num_points=300"]
    words += ["--data.val_fraction=0.5", "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"]
    build(["fit", "-c", "point_clouds", *words], run=True)
    checkpoint = tmp_path / "logs" / "point_clouds" / "version_0" / "checkpoints" / "last.ckpt"
    build(["predict", "-c", "point_clouds", *words, f"--ckpt_path={checkpoint}"], run=True)
    written = read_cloud(next((tmp_path / "logs").rglob("0.ply"))).points
    assert abs(np.linalg.norm(written, axis=1) - 1).std() < 0.6 * float((noisy[0].norm(dim=1) - 1).std())


def test_a_large_scan_is_denoised_in_little_memory() -> None:
    script = """
import math, torch
from torch_geometric.data import Data
from lightning_modules import PointCloudDiffusion

def peak():  # not ru_maxrss, which begins at the parent's
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

number = torch.arange(200_000) + 0.5
z, angle = 1 - number / 100_000, math.pi * (1 + 5**0.5) * number.double()
flat = (1 - z**2).sqrt()
points = torch.stack([flat * angle.cos(), flat * angle.sin(), z], 1).float()
points += 0.01 * torch.randn(points.shape, generator=torch.Generator().manual_seed(0))
operator = PointCloudDiffusion()
before = peak()
with torch.no_grad():
    restored = operator(Data(pos=points), noise=0.01, **{spec.name: spec.start for spec in operator.parameter_specs})
print(peak(), before, float((restored.norm(dim=1) - 1).std()))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    peak, before, error = map(float, done.stdout.split())
    assert error < 0.25 * 0.01
    assert peak > before  # the peak is that of the denoising, not of an import
    assert peak < 2 * 2**20  # KiB
