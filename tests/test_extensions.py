"""Classes of a user's own, in a package outside the repository, by their class paths in a YAML file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_modules.cli import build

PROJECT = Path(__file__).parents[1]
DEMO = str(PROJECT / "configs" / "demo.yaml")
FEW_CROPS = ["--data.train_crops=20", "--data.val_crops=10", "--data.batch_size=4"]

PACKAGE = '''
import torch

from callbacks import Rule
from lightning_modules.em import Assignment, TableValues
from lightning_modules.em.image_features import ImageFeature


class ShrinkRule(Rule):
    """Takes the same share off some parameters at every step, and more off the rows of few images."""

    def __init__(self, names: list[str], share: float = 0.5):
        self.names, self.share = names, share

    def initial_state(self, table):
        return {"steps": torch.zeros(1)}

    def m_step(self, table, statistics, state):
        factor = torch.where(table.mask(self.names), 1 - self.share, 1.0)
        fewer = statistics.count[1:, None] < statistics.count[1:].mean()
        offsets = table.offsets + torch.where(fewer, factor.log(), 0.0)
        return TableValues(table.shared + factor.log(), offsets), {"steps": state["steps"] + 1}


class Brightness(ImageFeature):
    """Mean of the pixels, in a unit of one's choice."""

    def __init__(self, unit: float = 1.0):
        super().__init__()
        self.unit = unit

    def forward(self, images, noise_std):
        return images.mean((1, 2, 3)) / self.unit


class LightAndShade(Assignment):
    """Row 0 for images darker than a threshold, row 1 for the others."""

    def __init__(self, feature: ImageFeature, threshold: float = 0.5):
        super().__init__()
        self.feature, self.threshold = feature, threshold

    def forward(self, images, labels, noise_std, num_rows):
        light = self.feature(images, noise_std) > self.threshold
        return torch.stack([~light, light], dim=1).double()
'''

OVERLAY = """
trainer:
  callbacks:
    - class_path: callbacks.EMParameterCallback
      init_args:
        rule:
          class_path: my_lab.learning.ShrinkRule
          init_args: {names: [sigma], share: 0.1}
    - class_path: callbacks.EMReport
model:
  class_path: lightning_modules.GraphDiffusionReconstruction
  init_args:
    em_parameters:
      class_path: lightning_modules.ParameterTable
      init_args: {row_names: [dark, light]}
    assignment:
      class_path: my_lab.learning.LightAndShade
      init_args:
        threshold: -100
        feature:
          class_path: my_lab.learning.Brightness
          init_args: {unit: 0.5}
"""


@pytest.fixture
def my_lab(tmp_path: Path) -> Path:
    """A folder with the user's package, as it lies on the Python path."""
    package = tmp_path / "home" / "my_lab"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "learning.py").write_text(PACKAGE)
    (tmp_path / "mine.yaml").write_text(OVERLAY)
    return package.parent


def test_a_rule_and_an_assignment_of_ones_own_train(my_lab: Path, tmp_path: Path) -> None:
    words = ["fit", "-c", DEMO, "-c", "mine.yaml", *FEW_CROPS, "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    words += ["--trainer.enable_model_summary=false", "--trainer.limit_val_batches=0"]
    python_path = os.pathsep.join([str(my_lab), str(PROJECT)])
    result = subprocess.run(
        [sys.executable, "-m", "lightning_modules.cli", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (exported,) = tmp_path.rglob("em_parameters.yaml")
    learned = yaml.safe_load(exported.read_text())["model"]["init_args"]["em_parameters"]["init_args"]
    assert learned["initial"]["sigma"] == pytest.approx(0.3 * 0.9**5)  # five steps of its own share
    assert learned["initial"]["tau"] == pytest.approx(0.1)  # not among its names
    # Every image is above the threshold: the other row, of fewer images, shrinks twice.
    assert learned["initial_rows"]["light"]["sigma"] == pytest.approx(0.3 * 0.9**5)
    assert learned["initial_rows"]["dark"]["sigma"] == pytest.approx(0.3 * 0.9**10)
    (saved,) = tmp_path.rglob("*.ckpt")
    checkpoint = torch.load(saved, weights_only=True)
    assert checkpoint["callbacks"]["EMParameterCallback"]["rule_state"]["steps"].item() == 5


def test_a_feature_of_ones_own_tells_regimes_apart(my_lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(my_lab))
    blind = str(PROJECT / "configs" / "blind.yaml")
    feature = "{class_path: my_lab.learning.Brightness, init_args: {unit: 0.25}}"
    words = [f"--model.assignment.init_args.features=[{feature}, lightning_modules.em.image_features.Texture]"]
    assignment = build(["-c", blind, *words, *FEW_CROPS, "--trainer.logger=false"]).model.assignment
    found = assignment.features(torch.full((2, 3, 16, 16), 0.5), torch.full((2,), 0.1))
    assert found.shape == (2, 2)
    assert found[:, 0].tolist() == pytest.approx([2.0, 2.0])


def test_a_class_that_cannot_be_imported_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text(OVERLAY.replace("my_lab", "no_lab"))
    with pytest.raises(SystemExit) as exit_info:
        build(["-c", DEMO, "-c", str(tmp_path / "mine.yaml"), *FEW_CROPS])
    assert exit_info.value.code == 2
    assert "no_lab" in capsys.readouterr().err
