"""EMHealth: for each finding a run that has it and one that does not."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from tables import bank_table, textbook_table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks import EMHealth, EMParameterCallback, EMReport, Rule
from callbacks.em_health import OSCILLATION, oscillation, still_moving
from callbacks.em_report import parameter_report
from lightning_modules import EStep, ParameterTable
from lightning_modules.em import SufficientStatistics, TableValues
from lightning_modules.em.rules import RuleState


class Script(Rule):
    """An M-step that follows a script: log σ of the global set, and log τ of the dog, by optimiser step."""

    def __init__(self, path: Any = lambda step: -1.2, dog: Any = lambda step: -2.0) -> None:
        self.path, self.dog = path, dog

    def initial_state(self, table: ParameterTable) -> RuleState:
        return {"steps": torch.zeros(1)}

    def m_step(
        self, table: ParameterTable, statistics: SufficientStatistics, state: RuleState
    ) -> tuple[TableValues, RuleState]:
        shared, offsets = table.shared.clone(), table.offsets.clone()
        shared[0] = self.path(int(state["steps"]))
        offsets[1, 1] = self.dog(int(state["steps"])) - shared[1]
        return TableValues(shared, offsets), {"steps": state["steps"] + 1}


class Sieve:
    """An operator that knows when it is clogged, by a number of its own, and when its input is."""

    def warnings(self, diagnostics: Mapping[str, float]) -> dict[str, str]:
        assert set(diagnostics) == {"similarity", "mesh"}  # means of what is known
        found = {}
        if diagnostics["mesh"] < 1e-3:
            found["sieve/clogged"] = f"the sieve is clogged: its mesh is {diagnostics['mesh']:.2g}"
        if diagnostics["similarity"] < 0.3:
            found["similarity"] = f"the similarity is {diagnostics['similarity']:.2g}"
        return found


class Patient(LightningModule):
    """A module whose statistics a test lays down."""

    def __init__(
        self,
        proxy: Any = None,
        similarity: float = 0.6,
        weight: float = 0.4,
        rows: Any = (0, 1),
        perceptual: float | None = None,
    ) -> None:
        super().__init__()
        self.em_parameters = textbook_table(
            learned=["sigma", "tau"], per_row=["tau"], row_names=["cat", "dog"], bounds={"sigma": (0.1, 0.5)}
        )
        self.proxy, self.similarity, self.weight, self.rows = proxy, similarity, weight, rows
        self.perceptual = perceptual  # times the reconstruction
        self.operator = Sieve()
        self.noise = torch.Generator().manual_seed(0)

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        loss = self.em_parameters.attach(torch.zeros(()))
        number = self.trainer.global_step
        value = torch.rand((), generator=self.noise).item() if self.proxy is None else self.proxy(number)
        rows = torch.eye(2)[torch.tensor(self.rows)].double()
        each = torch.full((2,), value)
        perceptual = None if self.perceptual is None else self.perceptual * each
        similarity = torch.full((2,), self.similarity)
        return {"loss": loss, "em": EStep(rows, None, each, perceptual, similarity=similarity)}

    def diagnose(self, batch: Tensor) -> dict[str, Tensor]:
        return {"mesh": torch.tensor([self.weight, torch.nan]), "unknown": torch.full((2,), torch.nan)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def run(
    tmp_path: Path,
    module: Patient,
    rule: Rule | None = None,
    steps: int = 150,
    log_every_n_steps: int = 5,
    report: bool = False,
) -> EMHealth:
    health = EMHealth()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        log_every_n_steps=log_every_n_steps,
        logger=TensorBoardLogger(str(tmp_path), name="", version="run"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[health, EMParameterCallback(Script() if rule is None else rule), *([EMReport()] * report)],
    )
    trainer.fit(module, DataLoader(torch.zeros(2 * steps, 1), 2))
    return health


@pytest.mark.parametrize("perceptual", [None, 20.0])
def test_a_sound_run_has_no_findings(perceptual: float | None, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="EMHealth")
        assert run(tmp_path, Patient(perceptual=perceptual)).findings == {}


SICK = {
    "bound/sigma/lower": ({}, Script(lambda step: -9.0), "sigma rests on its lower bound 0.1: widen"),
    "bound/sigma/upper": ({}, Script(lambda step: 9.0), "sigma rests on its upper bound 0.5: widen"),
    "bound/tau/upper": ({}, Script(dog=lambda step: 9.0), "tau of dog rests on its upper bound 0.3: widen"),
    "moving/tau": ({}, Script(dog=lambda step: -2.9 + 0.009 * step), r"tau of dog moved by \+\d+% over the last"),
    "oscillation": (
        {"proxy": lambda step: step % 4 // 2},
        Script(),
        r"oscillates, every 4 steps \(correlation 1",
    ),
    "similarity": ({"similarity": 0.1}, Script(), "the similarity is 0.1"),
    "sieve/clogged": ({"weight": 1e-5}, Script(), "the sieve is clogged: its mesh is 1e-05"),
    "perceptual": ({"perceptual": 1e5}, Script(), r"the perceptual loss is 1e\+05 times the reconstruction loss"),
    "empty/dog": ({"rows": (0, 0)}, Script(), "row 'dog' of the parameter table gets no images"),
    "moving/sigma": ({}, Script(lambda step: -2.2 + 0.009 * step), r"sigma moved by \+\d+% over the last fifth"),
}


@pytest.mark.parametrize("key", SICK)
def test_each_finding_is_said_once_with_its_remedy(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a warning at once, or by the report below its table."""
    arguments, rule, message = SICK[key]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    monkeypatch.setattr("callbacks.em_report.get_console", lambda: console)
    with pytest.warns(UserWarning, match=message) as caught:
        alone = run(tmp_path / "alone", Patient(**arguments), rule)
    assert sum("EMHealth" in str(warning.message) for warning in caught) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="EMHealth")
        health = run(tmp_path, Patient(**arguments), rule, report=True)
    assert list(health.findings) == list(alone.findings) == [key]
    finding = health.findings[key]
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    (text,) = events.Tensors("em/health/text_summary")
    assert finding in text.tensor_proto.string_val[0].decode()
    printed = " ".join(console.export_text().split())
    assert printed.count(finding) == 1


@pytest.mark.parametrize("steps", [1, 7, 39])
@pytest.mark.parametrize("key", ["bound/sigma/lower", "bound/tau/upper", "similarity", "sieve/clogged"])
def test_a_short_run_is_judged_at_its_end(key: str, steps: int, tmp_path: Path) -> None:
    """With `log_every_n_steps` at 50, and so without a step that logs: what the closing table stars is said too."""
    arguments, rule, message = SICK[key]
    with pytest.warns(UserWarning, match=message) as caught:
        health = run(tmp_path, Patient(**arguments), rule, steps, log_every_n_steps=50)
    assert list(health.findings) == [key]
    assert sum("EMHealth" in str(warning.message) for warning in caught) == 1


def test_a_run_that_will_be_short_is_told_at_its_start(tmp_path: Path) -> None:
    told = "this run ends after 12 steps, and learning takes some hundred"
    with pytest.warns(UserWarning, match=told) as caught:
        assert run(tmp_path, Patient(), steps=12, log_every_n_steps=50, report=True).findings == {}
    assert sum(told in str(warning.message) for warning in caught) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this run ends")
        run(tmp_path, Patient(), steps=40, log_every_n_steps=50)


def test_what_the_last_look_no_longer_sees_is_not_said(tmp_path: Path) -> None:
    path = Script(lambda step: 9.0 if step < 8 else -1.2)
    assert run(tmp_path, Patient(), path, steps=12).findings == {}


def test_what_passes_by_is_not_said(tmp_path: Path) -> None:
    """Two looks at a bound, then away from it again: less than the patience."""
    path = Script(lambda step: 9.0 if 20 <= step < 30 else -1.2)
    assert run(tmp_path, Patient(), path).findings == {}


def test_what_an_operator_no_longer_warns_of_begins_anew(tmp_path: Path) -> None:
    class Passing(Patient):
        def diagnose(self, batch: Tensor) -> dict[str, Tensor]:
            clogged = self.trainer.global_step % 15 != 0  # two looks of three
            return {"mesh": torch.full((2,), 1e-5 if clogged else 0.4)}

    assert run(tmp_path, Passing()).findings == {}


def test_a_bank_and_the_global_set_are_watched(tmp_path: Path) -> None:
    class Bank(Patient):
        def __init__(self) -> None:
            super().__init__()
            self.em_parameters = bank_table(3, per_row=["weight"], row_names=["cat", "dog"], learned=["weight"])

    class Fall(Script):
        def m_step(self, table: ParameterTable, *args: Any) -> tuple[TableValues, RuleState]:
            shared = table.shared.clone()
            shared[2] = table.lower[2]
            return TableValues(shared, (-1.0 - shared) * torch.ones(2, 1)), args[1]

    with pytest.warns(UserWarning, match=r"weight of the global set rests on its lower bound 0\.01"):
        health = run(tmp_path, Bank(), Fall())
    assert list(health.findings) == ["bound/weight/lower"]


def test_bounds_that_leave_no_room_stop_nothing(tmp_path: Path) -> None:
    """The closing table does not mark such a parameter either."""
    module = Patient()
    module.em_parameters = textbook_table(
        learned=["sigma", "tau"], per_row=["tau"], row_names=["cat", "dog"], bounds={"sigma": (0.3, 0.3)}
    )
    assert run(tmp_path, module, Script(lambda step: 0.0)).findings == {}
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(parameter_report(module.em_parameters))
    assert "0.3*" not in console.export_text()


@pytest.mark.parametrize("period", range(2, 11))
@pytest.mark.parametrize("shape", ["wave", "saw", "draws"])
def test_oscillation_of_any_period_is_seen_with_it(period: int, shape: str) -> None:
    generator = torch.Generator().manual_seed(period)
    drawn = torch.rand(period, generator=generator, dtype=torch.float64)
    values = []
    for step in range(40):
        phase = step % period
        wave = {"wave": math.cos(2 * math.pi * phase / period), "saw": phase / period, "draws": float(drawn[phase])}[
            shape
        ]
        values.append(1 - 0.02 * step + wave + 0.1 * torch.randn((), generator=generator).item() * drawn.std().item())
    found, correlation = oscillation(values)
    assert found == period
    assert correlation > OSCILLATION
    assert oscillation(values, num_batches=2 * period - 1)[0] != period  # the batches of an epoch that come again


def test_oscillation_is_not_seen_in_chance_trend_or_drift() -> None:
    generator = torch.Generator().manual_seed(0)
    assert max(oscillation(row.tolist())[1] for row in torch.rand(2000, 40, generator=generator)) < OSCILLATION
    walks = torch.randn(500, 40, generator=generator).cumsum(1)
    assert max(oscillation(row.tolist())[1] for row in walks) < OSCILLATION
    assert oscillation([math.exp(-0.1 * step) for step in range(40)]) == (0, 0.0)
    assert oscillation([0.1 * step for step in range(40)])[1] < OSCILLATION
    assert oscillation([1.0] * 40) == (0, 0.0)


def test_shaking_about_a_place_is_rest() -> None:
    table = textbook_table(learned=["sigma"])
    rest = [[[0.3 * (1.1 if step % 2 else 0.9), 0.1, 10.0, 10.0, 0.3, 5.0]] for step in range(50)]
    assert still_moving(table, list(enumerate(rest)), 49) == {}
    moving = [[[0.3 * 1.05**step, 0.1, 10.0, 10.0, 0.3, 5.0]] for step in range(50)]
    assert list(still_moving(table, list(enumerate(moving)), 49)) == [("sigma", 0)]
    assert still_moving(table, list(enumerate(moving[:3])), 2) == {}  # too few looks to tell


def test_arguments() -> None:
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        EMHealth(patience=0)
    with pytest.raises(ValueError, match=r"window must be at least 40 steps.*got 5"):
        EMHealth(window=5)
