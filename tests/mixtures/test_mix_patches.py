"""Patches: the data, the prior that restores images, the configurations, and memory."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules import PatchDataModule, PhotoCropsDataModule
from lightning_modules import (
    GaussianMixture,
    GraphDiffusion,
    GraphDiffusionReconstruction,
    ParameterTable,
    PatchPrior,
)
from lightning_modules.cli import main

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    steps = np.linspace(0, 6, 37 * 31).reshape(37, 31)
    for number in range(3):
        pixels = (127 + 100 * np.sin(steps * (number + 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def patches_of(data: PatchDataModule) -> torch.Tensor:
    data.prepare_data()
    data.setup("fit")
    return torch.cat([data.on_after_batch_transfer(batch, 0)["image"] for batch in data.train_dataloader()])


def test_patches_are_pieces_of_the_images_and_the_same_every_time(photographs: Path) -> None:
    data = PatchDataModule(str(photographs), patches_per_image=20, batch_size=16, remove_mean=False)
    patches = patches_of(data)
    assert patches.shape == (60, 1, 8, 8)
    image = torch.from_numpy(np.array(Image.open(photographs / "0.png"))).float() / 255
    windows = image.unfold(0, 8, 1).unfold(1, 8, 1).reshape(-1, 64)
    nearest = torch.cdist(patches[:20].flatten(1), windows).amin(dim=1)
    assert float(nearest.max()) < 0.02  # grey values are rounded once more
    torch.testing.assert_close(
        patches_of(PatchDataModule(str(photographs), patches_per_image=20, remove_mean=False)), patches
    )
    centred = patches_of(PatchDataModule(str(photographs), patches_per_image=20))
    torch.testing.assert_close(centred.mean(dim=(1, 2, 3)), torch.zeros(60), atol=1e-6, rtol=0)


def test_patches_of_another_data_module() -> None:
    images = PhotoCropsDataModule(train_crops=20, val_crops=10)
    assert patches_of(PatchDataModule(images=images, patches_per_image=3)).shape == (60, 1, 8, 8)
    assert patches_of(PatchDataModule(images=images, patches_per_image=3, gray=False)).shape == (60, 3, 8, 8)
    held = PatchDataModule(images=images, patches_per_image=3, val_fraction=0.4)
    training = len(patches_of(held))
    assert 0 < training < 60
    assert training + sum(len(batch["image"]) for batch in held.val_dataloader()) == 60  # type: ignore[union-attr]


@pytest.mark.parametrize("shuffle", [False, True])
def test_rows_of_a_file(tmp_path: Path, shuffle: bool) -> None:
    x = np.random.default_rng(0).normal(size=(103, 5)).astype(np.float32)
    np.save(tmp_path / "rows.npy", x)
    read = patches_of(PatchDataModule(array=str(tmp_path / "rows.npy"), batch_size=10, shuffle=shuffle))
    assert sorted(read[:, 0].tolist()) == sorted(x[:, 0].tolist())
    assert (torch.equal(read, torch.from_numpy(x))) != shuffle


def test_former_names_warn_and_work(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.ones((3, 5), np.float32))
    with pytest.warns(FutureWarning, match="rows is now array"):
        assert patches_of(PatchDataModule(rows=str(tmp_path / "rows.npy"))).shape == (3, 5)
    with pytest.warns(FutureWarning, match="grey is now gray"):
        assert not PatchDataModule(grey=False).gray


def test_the_images_follow_the_seed_of_the_patches() -> None:
    def patches(of_images: int | None) -> torch.Tensor:
        images = PhotoCropsDataModule(train_crops=20, val_crops=10, seed=of_images)
        return patches_of(PatchDataModule(images=images, patches_per_image=3, seed=1))

    assert torch.equal(patches(None), patches(1))
    assert not torch.equal(patches(None), patches(2))


def test_without_a_source_the_photographs_of_the_installation_serve() -> None:
    data = PatchDataModule(patches_per_image=1)
    assert isinstance(data.images, PhotoCropsDataModule)
    assert patches_of(data).shape == (2000, 1, 8, 8)


def test_impossible_sources(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one of root, images and array, got \['root', 'array'\]"):
        PatchDataModule(str(photographs), array="rows.npy")
    with pytest.raises(ValueError, match=r"37×31 is smaller than patch_size=40"):
        patches_of(PatchDataModule(str(photographs), patch_size=40))
    with pytest.raises(FileNotFoundError, match=r"numpy\.save"):
        patches_of(PatchDataModule(array=str(tmp_path / "absent.npy")))
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match=r"must hold numbers \[N, D\]"):
        patches_of(PatchDataModule(array=str(tmp_path / "cube.npy")))


# --------------------------------------------------------------------------------------------- the prior


def gaussian_prior(side: int = 4, noise_std: float = 0.1, **options: Any) -> PatchPrior:
    factor = torch.randn(2, side**2, side**2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariances = 0.002 * factor @ factor.mT
    return PatchPrior(torch.tensor([0.3, 0.7]), torch.zeros(2, side**2), covariances, noise_std=noise_std, **options)


def test_estimates_are_wiener_filters_of_the_best_component() -> None:
    prior = gaussian_prior()
    rows = torch.randn(50, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.3
    rows -= rows.mean(1, keepdim=True)
    covariances = prior.vectors @ torch.diag_embed(prior.values) @ prior.vectors.mT
    noise = 0.02 * torch.eye(16, dtype=torch.float64)
    scores = torch.stack(
        [
            weight.log() + torch.distributions.MultivariateNormal(torch.zeros(16).double(), c + noise).log_prob(rows)
            for weight, c in zip(torch.tensor([0.3, 0.7]).double(), covariances, strict=True)
        ]
    )
    expected = torch.stack(
        [
            covariances[k] @ torch.linalg.solve(covariances[k] + noise, row)
            for k, row in zip(scores.argmax(0), rows, strict=True)
        ]
    )
    estimates = prior._wiener(rows, torch.tensor(0.02, dtype=torch.float64))
    torch.testing.assert_close(estimates, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", [(1, 1, 37, 31), (2, 3, 13, 22)])
@pytest.mark.parametrize("stride", [1, 3])
def test_any_size_and_colour(shape: tuple[int, ...], stride: int) -> None:
    prior = gaussian_prior(stride=stride)
    noisy = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    restored = prior(noisy, torch.full((shape[0],), 0.1))
    assert restored.shape == noisy.shape
    assert restored.dtype == noisy.dtype
    torch.testing.assert_close(prior(noisy[:1]), restored[:1])
    # nothing to remove where there is no noise
    torch.testing.assert_close(prior(noisy, 1e-5), noisy, atol=1e-3, rtol=0)
    flat = torch.full(shape, 0.4)
    torch.testing.assert_close(prior(flat), flat, atol=1e-5, rtol=0)


def test_prior_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="square"):
        PatchPrior(torch.ones(1), torch.zeros(1, 15), torch.eye(15)[None])
    with pytest.raises(ValueError, match="smaller than the patch size"):
        gaussian_prior()(torch.rand(1, 1, 3, 9))
    with pytest.raises(ValueError, match="stride"):
        gaussian_prior(stride=5)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"it lacks 'model\.best'"):
        PatchPrior.from_checkpoint(tmp_path / "other.ckpt")


# -------------------------------------------------------------------------------------- the command line


def test_patches_are_learned_and_a_folder_is_restored(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = ["-c", str(PROJECT / "configs/patch_prior.yaml"), f"--data.root={photographs}"]
    config += ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    main(["fit", *config, "--model.num_components=4", "--data.patches_per_image=200", "--data.batch_size=100"])
    checkpoint = tmp_path / "logs/patch_prior/version_0/checkpoints/last.ckpt"
    main(["predict", *config, f"--ckpt_path={checkpoint}"])
    written = sorted(path.name for path in (tmp_path / "logs").rglob("restored/*.png"))
    assert written == ["0.png", "1.png", "2.png"]
    assert PatchPrior.from_checkpoint(checkpoint).means.shape == (4, 64)
    events = EventAccumulator(str(tmp_path / "logs/patch_prior/version_0"))
    events.Reload()
    tags = events.Tags()
    assert {"mixture/components", "mixture/projection"} <= set(tags["images"])
    assert {"train/log_likelihood", "mixture/effective_components", "train/entropy"} <= set(tags["scalars"])
    assert "mixture/weights" in tags["histograms"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_rows_stream_through_the_command_line_in_flat_memory(tmp_path: Path) -> None:
    """A file three times as large as another raises the peak memory of the process by far less than its own size."""
    peaks = {}
    script = (
        # not ru_maxrss, which counts the parent's memory too: Linux takes it over in exec
        "import sys; from lightning_modules.cli import main; main(sys.argv[1:]);"
        "print('PEAK', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    for count in (200_000, 600_000):  # both long enough for the allocator to have settled
        np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(count, 64)).astype(np.float32))
        words = ["fit", "-c", str(PROJECT / "configs/gaussian_mixture.yaml")]
        words += [f"--data.array={tmp_path / 'rows.npy'}", "--trainer.max_epochs=1", "--model.num_components=2"]
        words += ["--model.covariance_type=diag", "--model.init_size=5000", "--trainer.logger=false"]
        words += ["--trainer.callbacks=null", "--trainer.enable_checkpointing=false", "--trainer.accelerator=cpu"]
        words += ["--trainer.enable_progress_bar=false"]
        done = subprocess.run(
            [sys.executable, "-c", script, *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        peaks[count] = int(done.stdout.split("PEAK")[1]) / 1024
    assert peaks[600_000] < peaks[200_000] + 50  # MiB; the larger file is 98 MiB larger
    assert peaks[600_000] < 1200


def test_a_prior_is_a_backbone() -> None:
    """`GraphDiffusionReconstruction` takes it like any network."""
    module = GraphDiffusionReconstruction(GraphDiffusion(patch_size=3), ParameterTable(), backbone=gaussian_prior())
    assert module(torch.rand(1, 3, 24, 16), noise_std=0.1).shape == (1, 3, 24, 16)


def test_mixture_of_patches_beats_one_gaussian() -> None:
    data = PatchDataModule(images=PhotoCropsDataModule(train_crops=40), patches_per_image=30)
    patches = patches_of(data).flatten(1)
    scores = []
    for count in (1, 4):
        module = GaussianMixture(count)
        trainer = L.Trainer(
            max_epochs=20, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        trainer.fit(module, data)
        scores.append(module.score(patches))
    assert scores[1] > scores[0] + 5
