"""Imports run one way; the contracts stand in setup.cfg."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


def check_contracts(root: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)


def test_imports_run_one_way() -> None:
    result = check_contracts(PROJECT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ", 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("file", "forbidden"),
    [
        ("lightning_modules/graph/weights.py", "import lightning"),
        ("lightning_modules/networks/conv_autoencoder.py", "from lightning_modules.em import EStep"),
        ("lightning_modules/networks/gated_unet.py", "import lightning_modules.graph_denoiser"),
        ("lightning_modules/graph_denoiser.py", "import lightning"),
        ("lightning_modules/em/e_step.py", "def late():\n    import callbacks"),
        ("lightning_modules/reconstruction.py", "import callbacks.em_parameter"),
        ("lightning_modules/reconstruction.py", "import lightning_modules.cli"),
        ("callbacks/em_health.py", "import lightning_modules.reconstruction"),
        ("lightning_modules/em/rules/sign.py", "import lightning"),
        ("lightning_modules/em/rules/rule.py", "import callbacks"),
        ("callbacks/em_report.py", "import datamodules"),
        ("lightning_modules/detection/inputs.py", "import datamodules.image_folder"),
        ("datamodules/labels.py", "import lightning_modules.graph.weights"),
        ("lightning_modules/imaging/discovery.py", "import lightning"),
        ("lightning_modules/restoration.py", "import lightning"),
        ("lightning_modules/cli/restore.py", "import callbacks"),
        ("lightning_modules/imaging/crops.py", "def late():\n    import lightning_modules.graph.weights"),
        ("lightning_modules/mixtures/model.py", "import lightning_modules.mixtures.module"),
        ("lightning_modules/mixtures/gaussian/em.py", "import lightning_modules.mixtures.kmeans.em"),
    ],
)
def test_a_forbidden_import_breaks_a_contract(tmp_path: Path, file: str, forbidden: str) -> None:
    for package in ("lightning_modules", "callbacks", "datamodules"):
        shutil.copytree(PROJECT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "setup.cfg", tmp_path)
    with (tmp_path / file).open("a") as text:
        text.write(f"\n{forbidden}\n")
    result = check_contracts(tmp_path)
    assert result.returncode == 1
    assert "BROKEN" in result.stdout
