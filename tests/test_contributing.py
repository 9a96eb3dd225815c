"""The code of CONTRIBUTING.md runs as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_modules import EStep, ParameterTable
from lightning_modules.cli import build
from lightning_modules.em import SufficientStatistics

PROJECT = Path(__file__).parents[1]
TEXT = (PROJECT / "CONTRIBUTING.md").read_text()
BLOCKS = {language: re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL) for language in ("python", "yaml")}


def block(language: str, word: str) -> str:
    (found,) = (text for text in BLOCKS[language] if word in text)
    return str(found)


def test_the_operator_trains_by_its_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "median.py").write_text(block("python", "SoftMedian"))
    (tmp_path / "mine.yaml").write_text(block("yaml", "median.SoftMedian"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    few = ["--data.train_crops=40", "--data.val_crops=10", "--data.batch_size=8", "--trainer.accelerator=cpu"]
    command = build(["-c", "mine.yaml", *few, "--trainer.logger=false", "--trainer.enable_checkpointing=false"])
    before = command.model.em_parameters.get_parameters()
    assert before == {"distance": 1.0}
    command.trainer.fit(command.model, command.datamodule)
    assert command.model.em_parameters.get_parameters()["distance"] > 1.2
    noisy = torch.rand(2, 3, 9, 8)
    assert torch.equal(command.model.operator(noisy, noise=0.0, distance=1.0), noisy)
    assert command.model.operator(noisy, noise=torch.full((2, 1, 9, 8), 0.1), distance=1.0).shape == noisy.shape


def test_the_rule_steps_by_its_lr() -> None:
    scope: dict[str, Any] = {}
    exec(block("python", "SignDescent"), scope)
    arguments = yaml.safe_load(block("yaml", "mine.SignDescent"))[0]["init_args"]["rule"]["init_args"]
    rule = scope["SignDescent"](**arguments)
    table = ParameterTable({"a": 1.0, "b": 1.0}, {"a": (0.1, 10.0), "b": (0.1, 10.0)})
    statistics = SufficientStatistics(num_rows=0, num_parameters=2)
    statistics.add(EStep(torch.zeros(1, 0), None, torch.ones(1)), gradient=torch.tensor([[3.0, -0.001]]))
    proposal, state = rule.m_step(table, statistics, rule.initial_state(table))
    assert proposal.shared.tolist() == pytest.approx([-0.05, 0.05])
    assert state == {}


def test_the_assignment_looks_at_the_images() -> None:
    scope: dict[str, Any] = {}
    exec(block("python", "LightAndShade"), scope)
    images = torch.tensor([0.2, 0.8]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    rows = scope["LightAndShade"]()(images, torch.full((2,), -1), torch.zeros(2), 2)
    assert rows.tolist() == [[1, 0], [0, 1]]


def test_the_data_module_hands_its_splits_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchvision import datasets

    class Photographs(datasets.FakeData):
        def __init__(self, root: str, split: str, transform: Any) -> None:
            super().__init__(4 if split == "train" else 2, (3, 300, 280), 5, transform)

    monkeypatch.setattr(datasets, "Flowers102", Photographs)
    scope: dict[str, Any] = {}
    exec(block("python", "Flowers102"), scope)
    data = scope["Flowers"](batch_size=2)
    for loader in (data.train_dataloader(), data.predict_dataloader()):
        batch = data.on_after_batch_transfer(next(iter(loader)), 0)
        assert batch["image"].shape == (2, 3, 256, 256)


def test_files_that_it_names_exist() -> None:
    for name in re.findall(r"`((?:lightning_modules|callbacks|datamodules|tests|benchmarks|docs)/[\w/.]+)`", TEXT):
        assert (PROJECT / name).exists(), name
