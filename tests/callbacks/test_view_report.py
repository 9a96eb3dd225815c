"""EMReport: the table on the screen, and the file that starts the next run."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from tables import bank_table, textbook_table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks import EMParameterCallback, SignRule
from callbacks.em_report import EMReport, class_path, overlay, parameter_report, summary
from lightning_modules import EStep
from lightning_modules.em import ParameterTable


class Duck(LightningModule):
    def __init__(self, table: ParameterTable | None) -> None:
        super().__init__()
        self.em_parameters = table
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        for name, value in (("psnr", 28.0), ("psnr_noisy", 20.5), ("psnr_gain", 7.5)):
            self.log(f"val/{name}", value, batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def table() -> ParameterTable:
    table = textbook_table(
        learned=["sigma", "tau", "smooth_steps"],
        per_row=["tau", "smooth_steps"],
        row_names=["cat", "dog", "[bird]"],
        initial_rows={"dog": {"tau": 0.3, "smooth_steps": 7}},
    )
    column = table.names.index("sigma")
    with torch.no_grad():
        table.shared[column] = table.lower[column]  # the M-step has carried it to its bound
    return table


def render(value: Any, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(value)
    return console.export_text()


def fit(tmp_path: Path, module: LightningModule, **arguments: Any) -> Trainer:
    logger = TensorBoardLogger(str(tmp_path), name="", version="run [1]", default_hp_metric=False)
    settings = {"logger": logger, "callbacks": [EMReport(), ModelCheckpoint()], "max_epochs": 1} | arguments
    has_bar = any(isinstance(callback, ProgressBar) for callback in settings["callbacks"])
    trainer = Trainer(accelerator="cpu", enable_progress_bar=has_bar, enable_model_summary=False, **settings)
    trainer.fit(module, DataLoader(torch.rand(4, 2), 2), DataLoader(torch.rand(4, 2), 2))
    return trainer


def test_the_table_has_a_column_for_each_learned_parameter(table: ParameterTable) -> None:
    lines = [line for line in render(parameter_report(table)).splitlines() if line.strip()]
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in lines if "│" in line
    }
    assert rows == {
        "lower bound": ["0.1", "0.05", "2"],
        "upper bound": ["0.5", "0.3", "10"],
        "start": ["0.3", "0.1", "5"],
        "now": ["0.1*", "0.1", "5"],
        "cat": ["", "0.1", "5"],
        "dog": ["", "0.3*", "7"],
        "[bird]": ["", "0.1", "5"],
    }
    assert "* rests on a bound; fixed: radius 10, sigma_s 10, sigma_f 0.3" in " ".join(" ".join(lines).split())


def test_a_bank_is_summed_up_and_units_of_noise_are_shown_at_a_level(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = bank_table(30, per_row=["weight"], row_names=["cat"], bounds={"weight": (0.1, 1.0)})

    class Sieve(torch.nn.Module):
        def unit_factor(self, name: str, channels: int) -> float:
            assert (name, channels) == ("gain", 1)
            return 2.0

    class Noisy(Duck):
        reference_noise = 0.05
        operator = Sieve()

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch["image"], batch_idx)

    images = [{"image": torch.rand(1, 5, 7)} for _ in range(4)]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=TensorBoardLogger(str(tmp_path), name="", version="run"),
        callbacks=[EMReport()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Noisy(bank), DataLoader(images, 2))  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    lines = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in printed.splitlines() if "│" in line}
    cells = {label: [cell.strip() for cell in cells] for label, cells in lines.items()}
    assert cells["now"] == ["1", "0.1 … 0.148 … 0.197*"]
    assert cells["cat"] == ["", "0.1 … 0.148 … 0.197*"]
    assert cells["at noise 0.05"] == ["0.1", ""]
    assert "weight (30)" in printed
    assert "× noise" in printed
    written = yaml.safe_load((tmp_path / "run" / "em_parameters.yaml").read_text())
    following = bank_table(30, row_names=["cat"], **written["model"]["init_args"]["em_parameters"]["init_args"])
    torch.testing.assert_close(following.values(), bank.values(), rtol=1e-11, atol=0)


def test_without_rows_the_table_ends_with_the_global_set() -> None:
    assert render(parameter_report(textbook_table())).count("│") == 8 * 4


def test_six_parameters_and_ten_classes_fit_eighty_columns() -> None:
    names = [f"class number {k}" for k in range(10)]
    table = textbook_table(per_row=["sigma", "tau", "radius", "sigma_s", "sigma_f", "smooth_steps"], row_names=names)
    text = render(parameter_report(table))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_overlay_starts_the_next_table_where_this_one_ended(table: ParameterTable) -> None:
    config = yaml.safe_load(yaml.safe_dump(overlay(Duck(table), table)))
    assert config["model"]["class_path"] == f"{__name__}.Duck"
    written = config["model"]["init_args"]["em_parameters"]
    assert written["class_path"] == "lightning_modules.ParameterTable"
    assert set(written["init_args"]) == {"initial", "bounds", "learned", "per_row", "initial_rows"}
    following = textbook_table(
        row_names=["cat", "dog", "[bird]"],
        **written["init_args"],
    )
    torch.testing.assert_close(following.values(), table.values(), rtol=1e-12, atol=0)
    assert (following.learned, following.per_row) == (table.learned, table.per_row)
    assert following.bounds == table.bounds


@pytest.mark.parametrize("side", [0, 1])
def test_values_on_a_bound_are_accepted_by_the_next_run(side: int) -> None:
    bounds = {"sigma": (0.07, 0.7), "tau": (0.03, 0.29), "sigma_s": (0.3, 11.3), "sigma_f": (0.11, 0.77)}
    table = textbook_table(bounds=bounds)
    with torch.no_grad():
        table.shared.copy_((table.lower, table.upper)[side])
    initial = overlay(Duck(table), table)["model"]["init_args"]["em_parameters"]["init_args"]["initial"]
    assert initial["sigma"] == bounds["sigma"][side]
    assert isinstance(initial["smooth_steps"], int)
    textbook_table(initial=initial, bounds=bounds)


def test_class_paths_are_the_public_ones() -> None:
    assert class_path(ParameterTable) == "lightning_modules.ParameterTable"
    assert class_path(Trainer) == "lightning.Trainer"
    assert class_path(Path) in ("pathlib.Path", "pathlib._local.Path")


def test_fit_prints_the_report_and_writes_the_file(
    tmp_path: Path, table: ParameterTable, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = fit(tmp_path, Duck(table))
    printed = capsys.readouterr().out
    exported = tmp_path / "run [1]" / "em_parameters.yaml"
    assert yaml.safe_load(exported.read_text()) == overlay(Duck(table), table)
    assert "Learned parameters after 2 steps" in printed
    assert "validation PSNR: noisy 20.50 dB, restored 28.00 dB: +7.50 dB" in printed
    for path in (exported, tmp_path / "run [1]", trainer.checkpoint_callback.best_model_path):
        assert str(path) in printed, "in one piece, so that it can be copied"


@pytest.mark.parametrize("arguments", [{"logger": False}, {"fast_dev_run": True}])
def test_a_run_without_logs_writes_nothing(
    tmp_path: Path, table: ParameterTable, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    fit(tmp_path, Duck(table), callbacks=[EMReport()], enable_checkpointing=False, **arguments)
    assert not list(tmp_path.rglob("em_parameters.yaml"))


def test_the_summary_tells_what_there_is() -> None:
    assert summary({}, None, ("", ""), None) == []
    checkpoints = ("epoch=1-step=2.ckpt", "last.ckpt")
    lines = summary({"val/psnr": 28.0, "val/psnr_noisy": 20.5}, "logs", checkpoints, Path("logs/em_parameters.yaml"))
    assert [line.split(":")[0] for line in lines] == ["validation PSNR", "parameters", "logs", "best", "newest"]
    assert checkpoints[0] in lines[3]
    assert checkpoints[1] in lines[4]


def test_a_module_without_parameters_is_told_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duck has no em_parameters"):
        fit(tmp_path, Duck(None))


class Slipping(Duck):
    """A module whose score rises by one at each step, and whose table learns."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/psnr", 28.0 + self.trainer.global_step, batch_size=len(batch))
        self.log("val/psnr_noisy", 20.5, batch_size=len(batch))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.em_parameters.attach(super().training_step(batch, batch_idx))
        return {"loss": loss, "em": EStep(torch.zeros(len(batch), 3), None, torch.rand(len(batch)))}


@pytest.mark.parametrize(
    ("sanity", "line"), [(-1, "start values 28.00 dB, learned 30.00 dB: +2.00 dB (noisy"), (2, "+9.50")]
)
def test_the_closing_line_compares_to_the_start_values_where_all_were_validated(
    sanity: int, line: str, tmp_path: Path, table: ParameterTable, capsys: pytest.CaptureFixture[str]
) -> None:
    learner = EMParameterCallback(SignRule())
    trainer = fit(tmp_path, Slipping(table), num_sanity_val_steps=sanity, callbacks=[learner, EMReport()])
    assert line in capsys.readouterr().out
    events = EventAccumulator(str(tmp_path / "run [1]")).Reload()
    gains = [e.value for e in events.Scalars("val/psnr_over_start")] if sanity < 0 else []
    assert gains == ([2.0] if sanity < 0 else [])
    assert ("val/psnr_over_start" in events.Tags()["scalars"]) == (sanity < 0)
    state = learner.state_dict()
    resumed = EMParameterCallback(SignRule())
    resumed.load_state_dict(state)
    assert resumed.start_score == learner.start_score == (28.0 if sanity < 0 else None)
    assert trainer.global_step == 2


def test_an_interrupted_run_is_reported_after_its_bar(
    tmp_path: Path, table: ParameterTable, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopped(Duck):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if self.trainer.global_step == 1:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    class Bar(ProgressBar):
        def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            print("the bar ends")

    with pytest.raises(SystemExit):
        fit(tmp_path, Stopped(table), callbacks=[EMReport(), Bar()], enable_checkpointing=False)
    printed = capsys.readouterr().out
    assert 0 <= printed.find("the bar ends") < printed.find("Learned parameters after 1 steps")
    assert (tmp_path / "run [1]" / "em_parameters.yaml").is_file()


def test_a_run_that_has_taken_no_step_reports_nothing(
    tmp_path: Path, table: ParameterTable, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopped(Duck):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fit(tmp_path, Stopped(table))
    assert "Learned" not in capsys.readouterr().out


def test_the_legend_has_what_the_table_shows() -> None:
    table = textbook_table(learned=["sigma"])
    assert "rests" not in render(parameter_report(table))
    deviation = torch.full((1, len(table.shared)), torch.nan)
    assert "±" not in render(parameter_report(table, deviation))
    deviation[0, 0] = 0.1
    assert "± one standard deviation" in " ".join(render(parameter_report(table, deviation), 160).split())
    assert "of a bank" in " ".join(render(parameter_report(bank_table(3)), 160).split())
