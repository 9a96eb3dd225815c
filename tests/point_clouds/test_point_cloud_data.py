"""Point clouds from files and back: data, module, callbacks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from numpy.typing import NDArray
from torch_geometric.data import Data

from callbacks import PointCloudView, PointCloudWriter
from datamodules import PointCloudDataModule
from datamodules._formula_shapes import bracket, ellipsoid, torus
from lightning_modules import PointCloudDiffusion, PointCloudReconstruction
from lightning_modules.point_clouds.files import CloudFile, read_cloud, write_ply

plyfile = pytest.importorskip("plyfile")


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
        ({"objective": "sure"}, "objective must be 'supervised' or 'held_out'"),
        ({"add_noise": False}, "choose objective='held_out'"),
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
    with pytest.raises(ValueError, match="would be restored again"):
        predict(folder / "scans", folder / "scans")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.full((40, 3), np.nan), "it has no point with finite coordinates"),
        (np.random.default_rng(0).random((400, 3)).astype("f4") + np.float32(5e6), r"as large as 5e\+06 have steps of"),
        (1e30 * np.random.default_rng(0).random((400, 3)), "squares that are out of the range of torch.float32"),
    ],
)
def test_a_file_that_cannot_be_denoised_is_named(points: NDArray[Any], message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "bad.npy", points)
    with pytest.raises(ValueError, match=rf"bad\.npy cannot be taken: .*{message}"):
        predict(tmp_path, tmp_path / "out")


def test_a_stray_point_does_not_cost_a_scan_its_digits(tmp_path: Path) -> None:
    points = np.random.default_rng(0).random((400, 3))
    np.save(tmp_path / "near.npy", points)
    np.save(tmp_path / "stray.npy", np.append(points + np.array([5e5, 5e6, 100]), np.zeros((1, 3)), 0))
    data = PointCloudDataModule(str(tmp_path), batch_size=1)
    data.setup("predict")
    near, stray = (batch["cloud"].pos for batch in data.predict_dataloader())
    shift = stray[:-1] - near
    torch.testing.assert_close(shift, shift[:1].expand_as(shift), atol=1e-6, rtol=0)


def test_the_view_needs_counts() -> None:
    with pytest.raises(ValueError, match="num_clouds"):
        PointCloudView(num_clouds=0)


def test_names_that_differ_in_their_suffix_only_get_files_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    points = np.random.default_rng(0).random((3, 20, 3))
    np.savetxt(tmp_path / "scans" / "a.xyz", points[0])
    write_ply(CloudFile.of(points[1]), tmp_path / "scans" / "a.ply")
    write_ply(CloudFile.of(points[2]), tmp_path / "scans" / "a.xyz.ply")
    predict(tmp_path / "scans", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.ply"))) == 3


def test_the_next_run_replaces_what_a_killed_one_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scans").mkdir()
    for name in ("a", "b"):
        np.save(tmp_path / "scans" / f"{name}.npy", np.random.default_rng(0).random((40, 3)))
    with monkeypatch.context() as patch:
        patch.setattr(PointCloudWriter, "on_predict_epoch_end", lambda *_: None)  # as if killed before the table
        predict(tmp_path / "scans", tmp_path / "out")
    assert not (tmp_path / "out" / "restored.csv").exists()
    predict(tmp_path / "scans", tmp_path / "out")
    assert (tmp_path / "out" / "restored.csv").read_text().count("\n") == 3


def test_a_cloud_that_cannot_be_written_is_listed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scans").mkdir()
    for name in ("a", "b"):
        np.save(tmp_path / "scans" / f"{name}.npy", np.random.default_rng(0).random((40, 3)))

    def write(file: CloudFile, path: Path) -> None:
        if path.name == "a.ply":
            raise PermissionError("a.ply: no")
        write_ply(file, path)

    monkeypatch.setattr("callbacks.point_cloud_writer.write_ply", write)
    with pytest.raises(RuntimeError, match=r"1 clouds could not be written, all others are: a\.npy: a\.ply: no"):
        predict(tmp_path / "scans", tmp_path / "out")
    assert (tmp_path / "out" / "b.ply").is_file()
