"""The Python of README and pages, executed as it stands, and their files and commands, looked up."""

import inspect
import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.datasets import FakeData

from datamodules import CIFAR10DataModule, GeneratedImagesDataModule, ImageFolderDataModule, PatchDataModule
from lightning_modules import GaussianMixture, GeneratedImageDetector, GraphDiffusionReconstruction, Reconstruction

PROJECT = Path(__file__).parents[1]
PAGES = {
    page: page.read_text(encoding="utf-8")
    for page in [PROJECT / "README.md", *sorted((PROJECT / "docs" / "site").glob("*.md"))]
}
TEXT = "\n".join(PAGES.values())


def python_block(word: str) -> str:
    (block,) = (text for text in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if word in text)
    return block


def test_restoring_one_image(demo_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_run)
    generator = np.random.default_rng(0)
    noisy = np.clip(generator.normal(128, 25, (31, 37, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save("photo.jpg", quality=100)
    block = python_block("to_tensor")
    exec(compile(block, "README.md", "exec"), {})
    with Image.open("restored.png") as restored:
        assert restored.size == (37, 31)
        assert np.asarray(restored).std() < 0.5 * noisy.std()
    imports, code = block.rsplit("\n\n", 1)
    assert len(code.splitlines()) == 3
    assert all(line.startswith(("import", "from")) or not line for line in imports.splitlines())


def test_judging_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    detector = GeneratedImageDetector()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(detector)
    trainer.save_checkpoint("logs/detector/version_0/checkpoints/last.ckpt")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 101, 3), dtype=np.uint8)).save("photo.jpg")
    capsys.readouterr()
    exec(compile(python_block("predict_image"), "README.md", "exec"), {})
    label, probability = capsys.readouterr().out.split()
    assert float(probability) == pytest.approx(detector.predict_image("photo.jpg"), abs=1e-6)
    assert label == ("generated" if float(probability) > 0.5 else "photograph")


def test_the_module_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block = python_block("class Exposure")
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    table = names["module"].em_parameters
    phone, scanner = (table.get_parameters(row)["gain"] for row in (0, 1))
    assert 3 < phone / scanner < 5, "the true ratio of the exposures is 4"
    body = block[block.index("class Exposure") : block.index("\n\n\nclean")]
    assert len([line for line in body.splitlines() if line]) <= 20


def test_a_datamodule_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(root: str, split: str, transform: Any) -> FakeData:
        assert split in ("train", "val", "test")
        return FakeData(size=3, image_size=(3, 300, 280), transform=transform)

    monkeypatch.setattr(torchvision.datasets, "Flowers102", fake)
    names: dict[str, Any] = {"__name__": "flowers"}
    exec(compile(python_block("class Flowers"), "README.md", "exec"), names)
    data = names["Flowers"]()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.predict_dataloader()):
        batch = data.on_after_batch_transfer(next(iter(loader)), 0)
        assert batch["image"].shape == (3, 3, 256, 256)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_that_it_names_exists(page: Path) -> None:
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGES[page])
    for name in linked:
        assert (page.parent / name).is_file(), name
    named = re.findall(
        r"(?<![\w/])(?:configs|benchmarks|docs|callbacks|datamodules|lightning_modules)/[\w/]*\.(?:yaml|py|png|ipynb)",
        PAGES[page],
    )
    for name in {*named, "LICENSE", "CHANGELOG.md"}:
        assert (PROJECT / name).is_file(), name


def test_every_flag_that_it_names_exists() -> None:
    owners = (
        L.Trainer,
        CIFAR10DataModule,
        ImageFolderDataModule,
        GeneratedImagesDataModule,
        PatchDataModule,
        GaussianMixture,
        GraphDiffusionReconstruction,
        Reconstruction,
    )
    options = {name for owner in owners for name in inspect.signature(owner).parameters}
    flags = set(re.findall(r"--(?:data|model|trainer)\.(\w+)", TEXT))
    assert flags >= {"root", "devices", "noise_std"}
    assert flags <= options | {"help"}
