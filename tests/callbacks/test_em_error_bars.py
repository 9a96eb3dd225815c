"""A rule that knows how well it knows the parameters: its error bars in TensorBoard, the dashboard and the report."""

from pathlib import Path
from typing import Any

import pytest
import torch
from em_runs import CLASSES, SmoothImages, make_module, make_rule, make_trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import EMDashboard, EMParameterCallback
from callbacks.em_dashboard import custom_scalars_layout
from callbacks.em_report import parameter_report


def fit(tmp_path: Path, rule: str, log_every_n_steps: int = 1) -> tuple[EMParameterCallback, EventAccumulator]:
    torch.set_num_threads(1)
    logger = TensorBoardLogger(str(tmp_path), name="", version="run", default_hp_metric=False)
    callback, module = EMParameterCallback(make_rule(rule)), make_module(network=False)
    options: dict[str, Any] = {"logger": logger, "log_every_n_steps": log_every_n_steps}
    options["callbacks"] = [EMDashboard(every_n_epochs=100)]
    make_trainer(tmp_path, callback, epochs=1, **options).fit(module, SmoothImages(16))
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return callback, events


def test_tensorboard_gets_deviations_and_bands(tmp_path: Path) -> None:
    callback, events = fit(tmp_path, "bayesian")
    tags = set(events.Tags()["scalars"])
    assert {"em/std/sigma", "em/std/sigma/cat", "em/interval/sigma/lower", "em/interval/sigma/upper"} <= tags
    assert not any("smooth_steps" in tag for tag in tags if tag.startswith(("em/std", "em/interval")))
    value, lower, upper, deviation = (
        events.Scalars(tag)[-1].value
        for tag in ("em/sigma", "em/interval/sigma/lower", "em/interval/sigma/upper", "em/std/sigma")
    )
    assert lower < value < upper
    known = callback.standard_deviation()
    assert known is not None
    assert known.shape == (1 + len(CLASSES), 6)
    assert deviation == pytest.approx(float(known[0, 0]), rel=1e-6)
    # What is written was learned: training steps stray, the table does not.
    assert value == pytest.approx(callback.get_parameters()["sigma"], rel=1e-6)


def test_the_three_curves_of_a_band_have_the_same_steps(tmp_path: Path) -> None:
    """Or TensorBoard shows a red box in its place."""
    callback, events = fit(tmp_path, "bayesian", log_every_n_steps=3)
    for _, tags in custom_scalars_layout(callback._require_table(), with_bars=True)["90 % intervals"].values():
        value, lower, upper = ([event.step for event in events.Scalars(tag)] for tag in tags)
        assert value == lower == upper
        assert len(set(value)) == len(value) > 0


class Stop(Callback):
    """Interrupts a run in its second step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            raise ValueError("interrupted")


def test_an_interrupted_run_leaves_what_was_learned(tmp_path: Path) -> None:
    callback, module = EMParameterCallback(make_rule("bayesian")), make_module(network=False)
    with pytest.raises(ValueError, match="interrupted"):
        make_trainer(tmp_path, callback, callbacks=[Stop()]).fit(module, SmoothImages(16))
    table, rows = module.em_parameters.train(), torch.zeros(1, len(CLASSES))
    assert table(rows)["sigma"].item() == pytest.approx(table.get_parameters()["sigma"], rel=1e-6)


def test_the_state_of_a_checkpoint_may_lie_elsewhere_than_the_table() -> None:
    """Before training the table is on the accelerator and the state on the host; afterwards the other way round."""
    table = make_module(network=False).em_parameters
    callback = EMParameterCallback(make_rule("bayesian"))
    callback._rule_state = callback.rule.initial_state(table)
    callback._table = table.to("meta")
    known = callback.standard_deviation()
    assert known is not None
    assert known.device.type == "meta"


def test_other_rules_have_none(tmp_path: Path) -> None:
    callback, events = fit(tmp_path, "gradient")
    assert callback.standard_deviation() is None
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith(("em/std", "em/interval"))]


def test_the_dashboard_has_a_band_for_each_learned_parameter() -> None:
    table = make_module(network=False).em_parameters
    layout = custom_scalars_layout(table, with_bars=True)["90 % intervals"]
    assert layout["sigma"] == ["Margin", ["em/sigma", "em/interval/sigma/lower", "em/interval/sigma/upper"]]
    assert "smooth_steps" not in layout
    assert "90 % intervals" not in custom_scalars_layout(table)


def test_the_closing_table_shows_them() -> None:
    table = make_module(network=False).em_parameters
    deviation = torch.full((1 + len(CLASSES), 6), 0.1, dtype=torch.float64)
    deviation[:, table.names.index("smooth_steps")] = torch.nan
    deviation[0, table.names.index("sigma_s")] = 5.0
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(parameter_report(table, deviation))
    lines = console.export_text().splitlines()
    now = next(line for line in lines if "now" in line)
    assert "0.3 ±0.03" in now
    assert "2 ±10 " in now  # sigma_s, without an exponent
    assert now.count("±") == 5  # not the number of steps
    assert sum("0.3 ±0.03" in line for line in lines) >= 1 + len(CLASSES)
