"""What a start loads, and that it warns of nothing; how long it takes is measured by benchmarks/starting.py."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PROJECT = Path(__file__).parents[1]
PACKAGES = ("lightning_modules", "callbacks", "datamodules")
# What takes as long to load as torch, or nearly so.
HEAVY = {"lightning", "pytorch_lightning", "torch_geometric", "torchvision", "torchmetrics", "torch._dynamo"}
HEAVY |= {"scipy", "sympy", "sklearn", "skimage", "matplotlib", "pandas", "tensorboard"}


def loaded(code: str, folder: Path) -> set[str]:
    """The modules that a fresh process has loaded after some code, which runs with every warning as an error."""
    script = f"import sys\n{code}\nprint('LOADED', *sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["restor"], []], ids=str)
def test_help_loads_nothing(words: list[str], tmp_path: Path) -> None:
    code = f"from lightning_modules.cli import main\ntry:\n    main({words})\nexcept SystemExit:\n    pass"
    assert not loaded(code, tmp_path) & (HEAVY | {"torch", "numpy"})


def test_restoring_loads_torch_and_little_else(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    assert not loaded("from lightning_modules import restore", tmp_path) & HEAVY
    code = "from lightning_modules.cli import main\nmain(['restore', 'photo.jpg'])"
    modules = loaded(code, tmp_path)
    assert (tmp_path / "photo.restored.jpg").is_file()
    assert "lightning_modules.graph_denoiser" in modules, "with the weights of the package"
    assert not modules & HEAVY


def test_training_loads_what_it_trains_with(tmp_path: Path) -> None:
    modules = loaded("import lightning_modules.cli.training", tmp_path)
    assert "lightning" in modules
    assert {"callbacks.point_cloud_writer", "datamodules.point_clouds", "callbacks.detector_report"} <= modules
    assert not modules & {"torch_geometric", "sklearn", "pandas"}


def test_no_module_warns_as_it_is_imported(tmp_path: Path) -> None:
    """Each of the three packages, PyG's users among them, with every warning an error."""
    code = f"""
import importlib, pkgutil
for package in {PACKAGES}:
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(found.name)
"""
    modules = loaded(code, tmp_path)
    assert {"torch_geometric", "lightning_modules.graph.message_passing", "lightning_modules.cli.training"} <= modules


def test_a_warning_would_be_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"torch\.jit\.script"):
        loaded("import warnings; warnings.warn('`torch.jit.script` is deprecated')", tmp_path)


def test_pyg_has_one_door() -> None:
    """Where it is imported, its own warning is kept back."""
    doors = set()
    for path in (path for package in PACKAGES for path in (PROJECT / package).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for_types = {id(node) for block in ast.walk(tree) if _is_for_types(block) for node in ast.walk(block)}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if id(node) not in for_types and any(re.match(r"torch_geometric\b", name) for name in names):
                doors.add(path.relative_to(PROJECT).as_posix())
    assert doors == {"lightning_modules/_pyg.py"}


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
