"""Fixtures that every test may use."""

import contextlib
import importlib.util
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

PROJECT = Path(__file__).parents[1]

settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data beside the project, or wherever LIGHTNING_EM_DATA says."""
    folder = Path(os.environ.get("LIGHTNING_EM_DATA", PROJECT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set LIGHTNING_EM_DATA")
    return folder


@pytest.fixture(scope="session")
def cifar_root(shared_data: Path) -> Path:
    """A folder that holds a real, partial copy of CIFAR-10."""
    if not (shared_data / "cifar-10-batches-py").is_dir():
        pytest.skip(f"no cifar-10-batches-py in {shared_data}")
    return shared_data


@pytest.fixture
def fake_cifar(tmp_path: Path) -> Callable[..., Path]:
    """Writes CIFAR-10's official layout with a few random rows and returns its root.

    `fake_cifar(rows=4, test_rows=6)`: rows in each of the five training batches and in the test batch.
    """

    def write(rows: int = 4, test_rows: int = 6, seed: int = 0) -> Path:
        root = tmp_path / "fake_cifar"
        folder = root / "cifar-10-batches-py"
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(seed)
        for name, count in [*((f"data_batch_{i}", rows) for i in range(1, 6)), ("test_batch", test_rows)]:
            entry = {
                "batch_label": name,
                "labels": [i % 10 for i in range(count)],
                "data": generator.integers(0, 256, (count, 3072), dtype=np.uint8),
                "filenames": [f"{name}_{i}.png" for i in range(count)],
            }
            (folder / name).write_bytes(pickle.dumps(entry))
        names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        meta = {"num_cases_per_batch": 10000, "label_names": names, "num_vis": 3072}
        (folder / "batches.meta").write_bytes(pickle.dumps(meta))
        return root

    return write


@pytest.fixture
def fake_photographs(tmp_path: Path) -> Callable[..., Path]:
    """Writes photographs and generated images, train/ and val/ with as many a class, and returns their root.

    `fake_photographs(count=2)`: images of each class; the generated ones are smoother.
    """

    def write(count: int = 2, seed: int = 0) -> Path:
        root = tmp_path / "fake photographs"
        generator = np.random.default_rng(seed)
        for part in ("train", "val"):
            for name, repeat in (("photographic", 1), ("generated", 2)):
                folder = root / part / name
                folder.mkdir(parents=True, exist_ok=True)
                for number in range(count):
                    pixels = generator.integers(0, 256, (40 + number, 52, 3), dtype=np.uint8)
                    smooth = pixels[: len(pixels) // repeat, : 52 // repeat].repeat(repeat, 0).repeat(repeat, 1)
                    Image.fromarray(smooth).save(folder / f"{number}.png")
        return root

    return write


@pytest.fixture(scope="session")
def docs_script() -> Callable[[str], ModuleType]:
    """Imports a script of docs/, which is not a package: `docs_script("em_pictures")`."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, PROJECT / "docs" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(params=["torch", "kernel"])
def graph_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test of the image operator twice, in torch and compiled; neither stands in for the other."""
    from lightning_modules.graph import image_operator, stencil_diffusion
    from lightning_modules.graph.cpu import kernel

    if request.param == "torch":
        monkeypatch.setattr(image_operator, "is_supported", lambda *_, **__: False)
    elif None in [kernel.library(dtype) for dtype in (torch.float32, torch.float64)]:
        pytest.skip("no compiled kernel: no C compiler, or LIGHTNING_EM_COMPILE=0")
    else:
        monkeypatch.delattr(stencil_diffusion, "restore")
        monkeypatch.delattr(stencil_diffusion, "similarity_sum")
    return str(request.param)


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `lightning-em fit -c demo` has run, on little data: configs/ and logs/demo/."""
    from lightning_modules.cli import main

    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(PROJECT / "configs", folder / "configs")
    words = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"]
    with contextlib.chdir(folder):
        main(["fit", "-c", "configs/demo.yaml", *words, "--data.train_crops=40", "--data.val_crops=10"])
    return folder


@pytest.fixture(autouse=True)
def seed_of_its_own() -> Iterator[None]:
    """Takes away what `seed_everything` leaves in the environment: data follow it where they have no seed."""
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
