"""Classes of a user's own, in a package outside the repository, by their class paths in a YAML file."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_modules.cli import build

PROJECT = Path(__file__).parents[1]
DEMO = str(PROJECT / "configs" / "demo.yaml")
FEW_CROPS = ["--data.train_crops=20", "--data.val_crops=10", "--data.batch_size=4"]

# One file for each kind of extension; CONTRIBUTING.md shows the same.
FILES = {
    "operator.py": '''
import torch

from lightning_modules.operators import ParameterSpec, RestorationOperator


class Blur(RestorationOperator):
    """A mean of each pixel and its four neighbours, a weight of the neighbours for each direction."""

    @property
    def parameter_specs(self):
        return (ParameterSpec("weight", start=0.05, bounds=(0.001, 0.5), shape=(2,)),)

    def forward(self, noisy, *, noise, guide=None, weight):
        weight = torch.as_tensor(weight).expand(len(noisy), 2)[..., None, None, None]
        padded = torch.nn.functional.pad(noisy, (1, 1, 1, 1), mode="replicate")
        rows = padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1]
        columns = padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]
        total = noisy + weight[:, 0] * rows + weight[:, 1] * columns
        return total / (1 + 2 * weight.sum(1))
''',
    "rule.py": '''
import torch

from lightning_modules.em import TableValues
from lightning_modules.em.rules import Rule


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
''',
    "assignment.py": '''
import torch

from lightning_modules.em import Assignment
from lightning_modules.em.image_features import ImageFeature


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
        light = (self.feature(images, noise_std) > self.threshold).long()
        return torch.nn.functional.one_hot(light, 2).double()
''',
    "family.py": (PROJECT / "tests" / "mixtures" / "student_t.py").read_text(),
    "data.py": '''
import torch

from datamodules import ImageDataModule


class Stripes(ImageDataModule):
    """Stripes of all widths, and the width's number for a label."""

    def load_split(self, split):
        column = torch.arange(16)
        images = [(column // (1 + k % 4) % 2).expand(3, 12, 16) for k in range(24 if split == "train" else 8)]
        return [(image.float(), k % 4) for k, image in enumerate(images)]

    @property
    def class_names(self):
        return ["one", "two", "three", "four"]
''',
}
TRAINER = """
trainer:
  accelerator: cpu
  max_epochs: 1
  enable_model_summary: false
  enable_progress_bar: false
  log_every_n_steps: 2
"""
OPERATOR = (
    TRAINER
    + """
  callbacks:
    - class_path: callbacks.EMParameterCallback
      init_args: {rule: callbacks.NewtonRule}
    - class_path: callbacks.EMHealth
    - class_path: callbacks.EMDashboard
    - class_path: callbacks.EMReport
model:
  class_path: lightning_modules.Reconstruction
  init_args:
    operator: my_lab.operator.Blur
    noise_std: 0.1
data:
  class_path: my_lab.data.Stripes
  init_args: {batch_size: 8}
"""
)
FAMILY = (
    TRAINER
    + """
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {save_top_k: -1, filename: "{epoch}", every_n_epochs: 1}
model:
  class_path: my_lab.family.StudentTMixture
  init_args: {num_components: 3, degrees_of_freedom: 4.0, n_init: 2, tol: 0.0}
data:
  class_path: datamodules.PatchDataModule
  init_args: {patch_size: 3, patches_per_image: 20, batch_size: 64}
"""
)
OVERLAY = """
trainer:
  callbacks:
    - class_path: callbacks.EMParameterCallback
      init_args:
        rule:
          class_path: my_lab.rule.ShrinkRule
          init_args: {names: [sigma], share: 0.1}
    - class_path: callbacks.EMReport
model:
  class_path: lightning_modules.GraphDiffusionReconstruction
  init_args:
    em_parameters:
      class_path: lightning_modules.ParameterTable
      init_args: {row_names: [dark, light]}
    assignment:
      class_path: my_lab.assignment.LightAndShade
      init_args:
        threshold: -100
        feature:
          class_path: my_lab.assignment.Brightness
          init_args: {unit: 0.5}
"""


@pytest.fixture
def my_lab(tmp_path: Path) -> Path:
    """A folder with the user's package, somewhere on the Python path."""
    package = tmp_path / "home" / "my_lab"
    package.mkdir(parents=True)
    for name, text in {"__init__.py": "", **FILES}.items():
        (package / name).write_text(text)
    (tmp_path / "mine.yaml").write_text(OVERLAY)
    (tmp_path / "operator.yaml").write_text(OPERATOR)
    (tmp_path / "family.yaml").write_text(FAMILY)
    return package.parent


def fit(my_lab: Path, folder: Path, *words: str) -> dict[str, Any]:
    """Run `lightning-em fit` as the user would; what em_parameters.yaml says of the table."""
    result = subprocess.run(
        [sys.executable, "-m", "lightning_modules.cli", "fit", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(my_lab), str(PROJECT)]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    exported = list(folder.rglob("em_parameters.yaml"))
    if not exported:
        return {}
    learned: dict[str, Any] = yaml.safe_load(exported[0].read_text())["model"]["init_args"]["em_parameters"][
        "init_args"
    ]
    return learned


def test_an_operator_and_a_data_module_of_ones_own_train(my_lab: Path, tmp_path: Path) -> None:
    learned = fit(my_lab, tmp_path, "-c", "operator.yaml", "--trainer.max_epochs=6")
    rows, columns = learned["initial"]["weight"]
    # Stripes do not change from row to row: the mean over rows takes off noise, and that over columns the stripes.
    assert rows > 0.2
    assert columns < 0.05
    (saved,) = tmp_path.rglob("*.ckpt")
    assert torch.load(saved, weights_only=True)["state_dict"]["em_parameters.shared"].shape == (2,)


def test_a_rule_and_an_assignment_of_ones_own_train(my_lab: Path, tmp_path: Path) -> None:
    words = ["-c", DEMO, "-c", "mine.yaml", *FEW_CROPS, "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    learned = fit(my_lab, tmp_path, *words, "--trainer.enable_model_summary=false", "--trainer.limit_val_batches=0")
    assert learned["initial"]["sigma"] == pytest.approx(1.1 * 0.9**5)  # five steps of its own share
    assert learned["initial"]["tau"] == pytest.approx(0.1)  # not among its names
    # Every image is above the threshold: the other row, of fewer images, shrinks twice.
    assert learned["initial_rows"]["light"]["sigma"] == pytest.approx(1.1 * 0.9**5)
    assert learned["initial_rows"]["dark"]["sigma"] == pytest.approx(1.1 * 0.9**10)
    (saved,) = tmp_path.rglob("*.ckpt")
    checkpoint = torch.load(saved, weights_only=True)
    assert checkpoint["callbacks"]["EMParameterCallback"]["rule_state"]["steps"].item() == 5


def test_a_mixture_family_of_ones_own_streams_restarts_and_resumes(my_lab: Path, tmp_path: Path) -> None:
    fit(my_lab, tmp_path, "-c", "family.yaml", "--trainer.max_epochs=4")
    states = {path.name: torch.load(path, weights_only=True) for path in tmp_path.rglob("*.ckpt")}
    assert set(states) == {f"epoch={epoch}.ckpt" for epoch in range(4)}
    whole = states["epoch=3.ckpt"]["state_dict"]
    assert whole["model.objective"].shape == (2,)  # two restarts, side by side
    assert whole["model.objective"].isfinite().all()
    (second,) = tmp_path.rglob("epoch=1.ckpt")
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    fit(my_lab, resumed, "-c", "../family.yaml", "--trainer.max_epochs=4", "--ckpt_path", str(second))
    (last,) = resumed.rglob("epoch=3.ckpt")
    for name, value in torch.load(last, weights_only=True)["state_dict"].items():
        assert torch.equal(value, whole[name]), name


def test_a_feature_of_ones_own_tells_regimes_apart(my_lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(my_lab))
    blind = str(PROJECT / "configs" / "blind.yaml")
    feature = "{class_path: my_lab.assignment.Brightness, init_args: {unit: 0.25}}"
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
