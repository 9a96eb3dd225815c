"""The callback's manners: what it refuses, skips, logs, and lives together with."""

import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from em_runs import SmoothImages, make_module, make_rule, make_trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    WeightAveraging,
)
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tables import bank_table, textbook_table

from callbacks import EMParameterCallback, EMReport, GradientRule, Rule, SignRule
from callbacks.em_report import overlay
from lightning_modules import EStep, ParameterTable
from lightning_modules.em import TableValues


class Toy(L.LightningModule):
    """The smallest module of the protocol: scales its input by a learned gain; the best gain is 0.5."""

    def __init__(self, poison: range = range(0), table: ParameterTable | None = None) -> None:
        super().__init__()
        self.em_parameters = table or ParameterTable(initial={"gain": 1.0}, bounds={"gain": (0.01, 10.0)})
        self.poison = poison
        self.batches = 0

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> dict[str, Any]:
        gain = self.em_parameters(torch.zeros(len(batch), 0))["gain"]
        loss = (gain[:, None] * batch - 0.5 * batch).square().mean(1)
        if self.batches in self.poison:
            loss = loss * torch.nan
        self.batches += 1
        return {"loss": loss.mean(), "em": EStep(torch.zeros(len(batch), 0), None, loss.detach())}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


class Notebook(DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append({**metrics, "step": step})


def loader(batches: int = 10, size: int = 4) -> torch.utils.data.DataLoader[Any]:
    data = torch.rand(batches * size, 3, generator=torch.Generator().manual_seed(0)) + 0.5
    return torch.utils.data.DataLoader(data, batch_size=size)  # type: ignore[arg-type]


def fit(
    module: L.LightningModule, callback: EMParameterCallback, root: Path, batches: int = 10, **options: Any
) -> L.Trainer:
    trainer = make_trainer(root, callback, epochs=1, **options)
    trainer.fit(module, loader(batches))
    return trainer


def test_learns_the_best_parameter(tmp_path: Path) -> None:
    module, callback = Toy(), EMParameterCallback()
    fit(module, callback, tmp_path, batches=60)
    assert callback.get_parameters()["gain"] == pytest.approx(0.5, rel=0.05)
    assert callback.loss_history[-1] < 0.01 * callback.loss_history[0]
    assert len(callback.parameter_history) == len(callback.loss_history) == 60
    status = callback.get_status()
    assert set(status) == {"global_gain", "avg_loss"}
    assert all(isinstance(value, str) for value in status.values())
    assert float(status["global_gain"]) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("rule", ["gradient", "sign", "newton", "bayesian"])
def test_rows_rest_where_they_are_told_to(rule: str, tmp_path: Path) -> None:
    module, callback = make_module(), EMParameterCallback(make_rule(rule), update_rows=False)
    ratios = []

    class Watch(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            handed = module.em_parameters(torch.tensor([[0.0, 0, 0], [0, 1, 0]]))["tau"]  # to this step's forward
            ratios.append(float(handed[1] / handed[0]))

    table = module.em_parameters
    with torch.no_grad():
        table.offsets[1, table.names.index("tau")] = 0.2
    before = table.offsets.clone()
    make_trainer(tmp_path, callback, epochs=1, callbacks=[Watch()]).fit(module, SmoothImages(16))
    assert torch.equal(table.offsets, before)
    assert ratios == pytest.approx([math.exp(0.2)] * 3, rel=1e-6)  # an exploring rule strays with the global set alone
    assert callback.get_parameters(0) == callback.get_parameters()
    assert callback.get_parameters()["tau"] != pytest.approx(0.1, rel=1e-3)
    with pytest.raises(ValueError, match="row 3 is not in the table"):
        callback.get_parameters(class_idx=3)


@pytest.mark.parametrize("rule", ["gradient", "sign", "newton", "bayesian"])
def test_a_second_run_of_the_same_callback_starts_afresh(rule: str, tmp_path: Path) -> None:
    """As if the first had never been: another objective has other curvatures, moments and proxies."""
    runs = []
    for callback in (used := EMParameterCallback(make_rule(rule)), EMParameterCallback(make_rule(rule)), used):
        module = make_module(network=callback is used and not runs)
        trainer = make_trainer(tmp_path / str(len(runs)), callback, epochs=2)
        trainer.fit(module, SmoothImages(16))
        runs.append((module.em_parameters.values().clone(), callback.state_dict()))
    _, (fresh, fresh_state), (second, second_state) = runs
    assert torch.equal(second, fresh)
    assert torch.equal(second_state["proxies"][:, 0], fresh_state["proxies"][:, 0])
    assert all(torch.equal(second_state["rule_state"][name], t) for name, t in fresh_state["rule_state"].items())


def test_a_used_callback_resumes_from_a_checkpoint_as_a_new_one(tmp_path: Path) -> None:
    reached = []
    for callback in (used := EMParameterCallback(make_rule("newton")), EMParameterCallback(make_rule("newton")), used):
        module, ckpt = make_module(network=False), tmp_path / "epoch=0.ckpt" if reached else None
        trainer = make_trainer(tmp_path, callback, epochs=2)
        trainer.fit(module, SmoothImages(16), ckpt_path=ckpt, weights_only=True if ckpt else None)
        reached.append((module.em_parameters.values().clone(), len(callback.loss_history)))
    assert all(torch.equal(values, reached[0][0]) and steps == 6 for values, steps in reached)


def test_a_step_that_is_not_finite_is_skipped_counted_and_said_once(tmp_path: Path) -> None:
    module, callback = Toy(poison=range(4, 7)), EMParameterCallback()
    tables: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            tables.append(module.em_parameters.get_parameters()["gain"])

    with pytest.warns(UserWarning, match="an M-step was skipped") as warned:
        fit(module, callback, tmp_path, callbacks=[Watch()])
    assert len([w for w in warned if "M-step was skipped" in str(w.message)]) == 1
    assert tables[3] == tables[4] == tables[6] != tables[7]
    assert callback.skipped_steps == 3
    assert callback.state_dict()["rule_state"]["steps"].item() == 7
    assert [loss == loss for loss in callback.loss_history] == [True] * 4 + [False] * 3 + [True] * 3


def test_twenty_on_end_stop_the_run_and_nineteen_do_not(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="skipped"):
        fit(Toy(poison=range(2, 21)), EMParameterCallback(), tmp_path, batches=24)
    with (
        pytest.raises(RuntimeError, match=r"20 M-steps on end .* Look at the loss"),
        pytest.warns(UserWarning, match="skipped"),
    ):
        fit(Toy(poison=range(2, 22)), EMParameterCallback(), tmp_path, batches=24)


def test_history_has_a_length(tmp_path: Path) -> None:
    callback = EMParameterCallback(history_size=3)
    fit(Toy(), callback, tmp_path)
    assert len(callback.loss_history) == 3


def test_logs_every_parameter_of_the_set_and_of_each_class_by_name(tmp_path: Path) -> None:
    logger = Notebook()
    callback = EMParameterCallback(make_rule("gradient"))
    module = make_module()
    make_trainer(tmp_path, callback, epochs=2, logger=logger, log_every_n_steps=2).fit(module, SmoothImages(16))
    logged = logger.rows
    steps = [row["step"] for row in logged if "em/sigma" in row]
    assert steps == [1, 3, 5]  # that of train/loss
    last = next(row for row in reversed(logged) if "em/sigma" in row)
    for name, value in callback.get_parameters().items():
        assert last[f"em/{name}"] == pytest.approx(value)
    for name in ("sigma", "tau", "smooth_steps"):
        assert last[f"em/{name}/owl"] == pytest.approx(callback.get_parameters(2)[name])
    for name in ("loss_proxy", "reconstruction", "perceptual", "smoothness", "similarity", "skipped_steps"):
        assert f"em/{name}" in last
    expected = last["em/reconstruction"] - 0.001 * last["em/smoothness"]
    assert last["em/loss_proxy"] == pytest.approx(expected)


def test_status_averages_the_last_five_steps(tmp_path: Path) -> None:
    callback = EMParameterCallback()
    fit(Toy(poison=range(57, 58)), callback, tmp_path, batches=60)
    losses = callback.loss_history
    expected = sum(losses[k] for k in (54, 55, 56, 58, 59)) / 5  # NaN marks the step that was skipped
    assert float(callback.get_status()["avg_loss"]) == pytest.approx(expected, rel=1e-5)


def test_every_class_has_its_history(tmp_path: Path) -> None:
    callback, module = EMParameterCallback(make_rule("gradient")), make_module(network=False)
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            step = outputs["em"]
            used = step.responsibilities[:, 1] * (step.weight > 0)
            seen.append(float((used * step.proxy).sum() / used.sum()))

    options = {"callbacks": [Watch()], "limit_val_batches": 0}
    make_trainer(tmp_path, callback, epochs=1, **options).fit(module, SmoothImages(4))
    assert callback.class_loss_history(1) == pytest.approx(seen, nan_ok=True)
    assert any(value == value for value in seen)
    history = callback.class_parameter_history(1)
    assert history[-1] == callback.get_parameters(1) != callback.parameter_history[-1]
    assert len(history) == len(callback.loss_history) == len(seen)
    with pytest.raises(ValueError, match="row 3 is not in the table"):
        callback.class_loss_history(3)
    again = EMParameterCallback(make_rule("gradient"))
    again.load_state_dict(callback.state_dict())
    again._table = callback._table
    assert again.class_loss_history(1) == pytest.approx(callback.class_loss_history(1), nan_ok=True)
    assert again.class_parameter_history(1) == history


def test_what_is_logged_has_the_step_of_the_modules_own_and_can_be_monitored(tmp_path: Path) -> None:
    """Also in epochs shorter than `log_every_n_steps`, and where a monitor stands before the callback."""

    class Logging(Toy):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> dict[str, Any]:
            output = super().training_step(batch, batch_idx)
            self.log("train/loss", output["loss"])
            return output

    logger, callback, module = Notebook(), EMParameterCallback(), Logging()
    stop = EarlyStopping("em/loss_proxy", stopping_threshold=0.02, check_on_train_epoch_end=True)
    best = ModelCheckpoint(
        tmp_path / "best", monitor="em/gain", filename="{em/gain:.3f}", auto_insert_metric_name=False
    )
    seen = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
            seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})
            assert seen[-1]["em/gain"] == pytest.approx(callback.get_parameters()["gain"])
            assert seen[-1]["em/loss_proxy"] == pytest.approx(callback.loss_history[-1])

    trainer = make_trainer(
        tmp_path, callback, epochs=20, callbacks=[stop, best, Watch()], logger=logger, log_every_n_steps=4
    )
    trainer.fit(module, loader(3))
    assert 1 < len(seen) < 20
    assert seen[-1]["em/loss_proxy"] < 0.02 <= seen[-2]["em/loss_proxy"]
    assert Path(best.best_model_path).name == f"{seen[-1]['em/gain']:.3f}.ckpt"
    steps = {name: [row["step"] for row in logger.rows if name in row] for name in ("train/loss", "em/loss_proxy")}
    assert steps["train/loss"] == steps["em/loss_proxy"] == list(range(3, trainer.global_step, 4))
    losses = {row["step"]: row["train/loss"] for row in logger.rows if "train/loss" in row}
    for row in logger.rows:
        if "em/loss_proxy" in row:
            assert row["em/loss_proxy"] == pytest.approx(losses[row["step"]])


@pytest.mark.parametrize("size", [3, 16, 17])
def test_a_bank_is_learned_and_logged_whole_or_by_its_spread(size: int, tmp_path: Path) -> None:
    best = torch.linspace(0.05, 0.5, size)
    table = bank_table(size, per_row=["weight"], row_names=["cat", "dog"])
    module = Toy(table=table)

    def training_step(batch: torch.Tensor, batch_idx: int) -> dict[str, Any]:
        share = torch.tensor([[1.0, 0.0]]).expand(len(batch), -1)
        theta = table(share)
        loss = (theta["weight"].log() - best.log()).square().mean(1) + (theta["gain"] - 2).square()
        return {"loss": loss.mean(), "em": EStep(share, None, loss.detach())}

    module.training_step = training_step  # type: ignore[method-assign]
    logger, callback = Notebook(), EMParameterCallback(GradientRule(lr=0.1, pseudo_count=0))
    fit(module, callback, tmp_path, batches=80, logger=logger, log_every_n_steps=80)
    learned = callback.get_parameters(0)
    assert learned["weight"] == pytest.approx(best.tolist(), rel=0.1)
    assert learned["gain"] == pytest.approx(2, rel=0.1)
    (logged,) = [row for row in logger.rows if "em/gain" in row]
    if size > 16:
        tags = {"min": min(learned["weight"]), "max": max(learned["weight"])}
        assert not any("[" in tag for tag in logged)
        assert logged["em/weight/median/cat"] == pytest.approx(sorted(learned["weight"])[size // 2])
        assert {f"em/weight/{part}/cat": pytest.approx(value) for part, value in tags.items()}.items() <= logged.items()
    else:
        assert [logged[f"em/weight[{k}]/cat"] for k in range(size)] == pytest.approx(learned["weight"])
        assert f"em/weight[{size - 1}]/dog" in logged
        assert callback.get_status()["global_weight[0]"] == f"{callback.get_parameters()['weight'][0]:.6g}"


def test_validation_repeats_exactly_and_needs_no_callback(tmp_path: Path) -> None:
    module, callback = make_module(), EMParameterCallback(make_rule("gradient"))
    trainer = make_trainer(tmp_path, callback, epochs=2, limit_val_batches=1.0)
    trainer.fit(module, SmoothImages(16))
    trained = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert {"val/psnr", "val/psnr_noisy", "val/psnr_gain", "val/ssim", "val/loss"} <= set(trained)
    plain = L.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    [found] = plain.validate(
        make_module(), SmoothImages(5), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True, verbose=False
    )
    for name, value in trained.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def test_checkpoint_holds_plain_data_only(tmp_path: Path) -> None:
    callback = EMParameterCallback(make_rule("sign"))
    make_trainer(tmp_path, callback, epochs=1).fit(make_module(), SmoothImages(16))
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["EMParameterCallback"]
    assert state["rule"] == "SignRule"
    assert all(tensor.device.type == "cpu" for tensor in state["rule_state"].values())


def test_another_rule_takes_over_from_the_parameters_reached(tmp_path: Path) -> None:
    make_trainer(tmp_path, EMParameterCallback(make_rule("sign")), epochs=1).fit(make_module(), SmoothImages(16))
    module, callback = make_module(), EMParameterCallback(make_rule("gradient"))
    trainer = make_trainer(tmp_path, callback, epochs=2)
    with pytest.warns(UserWarning, match="written under SignRule, this run uses GradientRule"):
        trainer.fit(module, SmoothImages(16), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert callback.state_dict()["rule_state"]["steps"][0].item() == 3


def test_learning_rate_finder_leaves_the_table_alone(tmp_path: Path) -> None:
    module = make_module()
    module.lr = 1e-3
    before = module.em_parameters.values().clone()
    seen = []

    class Watch(L.Callback):
        def on_train_start(self, *args: Any) -> None:
            seen.append(module.em_parameters.values().clone())

    finder = LearningRateFinder(num_training_steps=4, update_attr=False)
    callback = EMParameterCallback(make_rule("gradient"))
    make_trainer(tmp_path, callback, epochs=1, callbacks=[finder, Watch()]).fit(module, SmoothImages(16))
    assert torch.equal(seen[-1], before)
    assert len(callback.loss_history) == 3  # the training's own steps


def test_overfit_batches_learns_on_the_same_images(tmp_path: Path) -> None:
    callback = EMParameterCallback(make_rule("gradient"))
    make_trainer(tmp_path, callback, epochs=30, overfit_batches=1).fit(make_module(), SmoothImages(16))
    assert len(callback.loss_history) == 30
    assert callback.loss_history[-1] < 0.9 * callback.loss_history[0]


class Validated(L.Callback):
    """The table as validation has it, and the network's weights there."""

    def __init__(self) -> None:
        self.tables: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.tables.append(pl_module.em_parameters.values().clone())
            self.weights.append(next(pl_module.backbone.parameters()).detach().clone())


AVERAGES: dict[str, Any] = {
    "equal": WeightAveraging,
    "defaults": EMAWeightAveraging,
    "network only": lambda: EMAWeightAveraging(use_buffers=False),
    "beyond the run": lambda: EMAWeightAveraging(update_starting_at_step=1000),
    "from an epoch": lambda: EMAWeightAveraging(decay=0.5, update_every_n_steps=0, update_starting_at_epoch=1),
}


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("average", "assignment"), [*((name, "label") for name in AVERAGES), ("defaults", "similarity")]
)
def test_averages_of_the_network_leave_what_the_m_step_learns(
    average: str, assignment: str, first: bool, tmp_path: Path
) -> None:
    """Table, assignment, checkpoint, export and validation are those of the last M-step; the network is averaged."""
    torch.set_num_threads(1)
    module = make_module(assignment=assignment)
    callback, validated = EMParameterCallback(make_rule("gradient")), Validated()
    averaging = AVERAGES[average]()
    options: dict[str, Any] = {"limit_val_batches": 1.0, "callbacks": [averaging, EMReport(), validated]}
    trainer = make_trainer(tmp_path, callback, epochs=2, **options)
    if not first:
        trainer.callbacks.remove(callback)
        trainer.callbacks.insert(trainer.callbacks.index(averaging) + 1, callback)
    trainer.fit(module, SmoothImages(16))
    table, path = module.em_parameters, callback._states
    assert all(torch.equal(*pair) for pair in zip(table.state, path[-1], strict=True))
    assert callback.get_parameters() == callback.parameter_history[-1] != table.initial_parameters()
    at_validation = [table._natural(path[step]) for step in (2, 5)]  # after three and six steps
    assert all(torch.equal(found, wanted) for found, wanted in zip(validated.tables, at_validation, strict=True))
    for epoch, step in ((0, 2), (1, 5)):
        state = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(state["em_parameters.shared"], path[step].shared)
        assert torch.equal(state["em_parameters.offsets"], path[step].offsets)
    exported = overlay(module, table)["model"]["init_args"]["em_parameters"]["init_args"]
    assert exported["initial"]["sigma"] == pytest.approx(callback.get_parameters()["sigma"])
    learned = dict(module.assignment.named_buffers(recurse=False))
    assert all(torch.equal(state[f"assignment.{name}"], buffer) for name, buffer in learned.items())
    assert assignment == "label" or any(buffer.any() for buffer in learned.values())
    network = next(module.backbone.parameters()).detach()
    assert torch.equal(
        network,
        averaging._average_model.module.backbone.get_parameter(
            next(name for name, _ in module.backbone.named_parameters())
        ),
    )


def test_under_an_average_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    states = []
    for folder, epochs, ckpt in (
        ("whole", 4, None),
        ("part", 2, None),
        ("part", 4, tmp_path / "part" / "epoch=1.ckpt"),
    ):
        torch.set_num_threads(1)
        L.seed_everything(7, verbose=False)
        module, callback = make_module(), EMParameterCallback(make_rule("newton"))
        trainer = make_trainer(tmp_path / folder, callback, epochs, callbacks=[EMAWeightAveraging()])
        trainer.fit(module, SmoothImages(16), ckpt_path=ckpt, weights_only=True if ckpt else None)
        states.append((module.state_dict(), callback.parameter_history))
    (whole, path), _, (resumed, again) = states
    assert again == path
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("network", [True, False])
def test_true_precisions_run(precision: str, network: bool, tmp_path: Path) -> None:
    module, callback = make_module(network), EMParameterCallback(make_rule("gradient"))
    trainer = make_trainer(tmp_path, callback, epochs=1, precision=precision, limit_val_batches=1.0)
    trainer.fit(module, SmoothImages(16))
    assert module.em_parameters.shared.dtype == torch.float64
    assert callback.skipped_steps == 0
    assert callback.get_parameters()["tau"] != pytest.approx(0.1, rel=1e-3)


def test_a_finder_after_the_callback_and_a_resume_keep_one_history(tmp_path: Path) -> None:
    options = {"callbacks": [LearningRateFinder(num_training_steps=4, update_attr=False)]}
    for epochs, ckpt in ((1, None), (2, tmp_path / "epoch=0.ckpt")):
        module, callback = make_module(), EMParameterCallback(make_rule("gradient"))
        module.lr = 1e-3
        trainer = make_trainer(tmp_path, callback, epochs=epochs, **options)
        options = {}
        trainer.fit(module, SmoothImages(16), ckpt_path=ckpt, weights_only=True if ckpt else None)
    assert len(callback.loss_history) == len(callback.parameter_history) == 6


def test_two_forwards_in_a_user_module_and_gradient_clipping(tmp_path: Path) -> None:
    callback = EMParameterCallback(GradientRule(lr=0.1))
    fit(Toy(), callback, tmp_path, batches=60, gradient_clip_val=1e-6)
    assert callback.get_parameters()["gain"] == pytest.approx(
        0.5, rel=0.05
    )  # the table's gradient is not the optimiser's


class NoTable(Toy):
    def __init__(self) -> None:
        super().__init__()
        del self.em_parameters


class NoStatistics(Toy):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)["loss"]


class Manual(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Bfgs(Toy):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (NoTable, "NoTable has no attribute `em_parameters`"),
        (NoStatistics, r"needs `training_step` to return .* but it returned dict|\['loss'\]"),
        (Manual, "needs automatic optimisation"),
        (Bfgs, "does not work with LBFGS"),
    ],
)
def test_refuses_modules_it_would_be_wrong_on(module: type[Toy], message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(module(), EMParameterCallback(), tmp_path)


class Mistaken(Toy):
    """Rows without a class, and a mistake in what it returns."""

    def __init__(self, **wrong: Any) -> None:
        super().__init__(table=ParameterTable({"gain": 1.0, "idle": 1.0}, {"gain": (0.01, 10.0), "idle": (0.1, 10)}))
        self.wrong = wrong

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> dict[str, Any]:
        output = super().training_step(batch, batch_idx)
        return {**output, "em": output["em"]._replace(**self.wrong)}


class Double(Toy):
    """Statistics of half of the images that the loss is the mean of."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> dict[str, Any]:
        output = super().training_step(batch, batch_idx)
        half = output["em"].reconstruction[::2]
        return {**output, "em": EStep(torch.zeros(len(half), 0), None, half)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"reconstruction": torch.tensor(0.5)},
            r"EStep\.reconstruction must be \[4\], one number for each .* got \[\]",
        ),
        ({"weight": torch.ones(4, 1)}, r"EStep\.weight must be \[4\], .* got \[4, 1\]"),
        ({"smoothness": torch.ones(1)}, r"EStep\.smoothness must be \[4\], .* got \[1\]"),
        ({"reconstruction": 0.5}, r"EStep\.reconstruction must be a tensor .* got float"),
        ({"responsibilities": [[1.0]]}, r"EStep\.responsibilities must be a tensor .* got list"),
        ({"smoothness": 1}, r"EStep\.smoothness must be a tensor .* got int"),
        ({"responsibilities": torch.zeros(4, 2)}, r"EStep\.responsibilities must be \[B, 0\], .* got \[4, 2\]"),
    ],
)
def test_statistics_of_the_wrong_shape_are_named(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        fit(Mistaken(**wrong), EMParameterCallback(), tmp_path)


def test_statistics_of_other_images_than_the_loss_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gave parameters to 4 images, and EStep has statistics of 2"):
        fit(Double(), EMParameterCallback(), tmp_path)


@pytest.mark.parametrize("rows", [[[0.7, 0.5]], [[1.2, -0.2]], [[1.0, torch.nan]]])
def test_responsibilities_that_are_none_stop_the_run(rows: list[list[float]], tmp_path: Path) -> None:
    module = Toy(table=ParameterTable({"gain": 1.0}, {"gain": (0.01, 10.0)}, row_names=["cat", "dog"]))

    def training_step(batch: torch.Tensor, batch_idx: int) -> dict[str, Any]:
        share = torch.tensor(rows).expand(len(batch), -1)
        loss = (module.em_parameters(share.nan_to_num())["gain"][:, None] * batch).square().mean(1)
        return {"loss": loss.mean(), "em": EStep(share, None, loss.detach())}

    module.training_step = training_step  # type: ignore[method-assign]
    what = "were NaN" if rows[0][1] != rows[0][1] else r"were off by 0\.2"
    with pytest.raises(ValueError, match=rf"responsibilities must be in \[0, 1\] and sum to 1 at most .* {what}"):
        fit(module, EMParameterCallback(), tmp_path)


@pytest.mark.parametrize("batches", [9, 10])
def test_a_learned_parameter_without_a_gradient_is_said_after_ten_steps(batches: int, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Mistaken(), EMParameterCallback(), tmp_path, batches=batches)
    said = [str(warning.message) for warning in caught if "has had no gradient" in str(warning.message)]
    assert len(said) == (batches >= 10)
    assert all(text.startswith("idle has had no gradient in 10 steps") for text in said)


def test_a_rule_that_needs_no_gradient_does_not_miss_one(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has had no gradient")
        callback = EMParameterCallback(SignRule())
        fit(Mistaken(), callback, tmp_path, batches=12)
    assert len(callback.loss_history) == 12  # it came past the ten steps after which one is missed


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_refuses_strategies_by_name(strategy: type, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, EMParameterCallback())
    # Neither can be built on a machine without an accelerator; what `setup` sees is its type.
    trainer.strategy.__class__ = type(strategy.__name__, (strategy,), {})
    with pytest.raises(MisconfigurationException, match=f"does not work with {strategy.__name__}"):
        EMParameterCallback().setup(trainer, Toy(), "fit")


def test_refuses_a_second_callback_on_the_table(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `EMParameterCallback`"):
        make_trainer(tmp_path, EMParameterCallback(), callbacks=[EMParameterCallback()])  # Lightning's own check

    class Variant(EMParameterCallback):
        """Passes Lightning's check, and must not pass ours."""

    with pytest.raises(MisconfigurationException, match="2 EMParameterCallbacks would each move the same"):
        fit(Toy(), EMParameterCallback(), tmp_path, callbacks=[Variant()])


def test_refuses_a_checkpoint_with_other_classes(tmp_path: Path) -> None:
    make_trainer(tmp_path, EMParameterCallback(), epochs=1).fit(make_module(), SmoothImages(16))
    module = make_module()
    module.em_parameters = textbook_table(row_names=["cat"])
    with pytest.raises(ValueError, match=r"has 3 rows .* this one has 1 rows \(cat\)"):
        make_trainer(tmp_path, EMParameterCallback()).fit(
            module, SmoothImages(16), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True
        )


def test_bad_arguments_and_questions_before_time() -> None:
    with pytest.raises(ValueError, match="history_size must be at least 1 step, got 0"):
        EMParameterCallback(history_size=0)
    with pytest.raises(ValueError, match="max_skipped_steps must be at least 1, got 0"):
        EMParameterCallback(max_skipped_steps=0)
    with pytest.raises(RuntimeError, match="has not met a module"):
        EMParameterCallback().get_parameters()


def test_what_the_assignment_has_to_say_at_the_end_is_said(tmp_path: Path) -> None:
    """45 images are too few for three regimes to start."""
    callback = EMParameterCallback(make_rule("gradient"))
    trainer = make_trainer(tmp_path, callback, epochs=1)
    with pytest.warns(UserWarning, match="MixtureAssignment: the regimes never started: they wait for 48 images"):
        trainer.fit(make_module(network=False, assignment="mixture"), SmoothImages(batch_size=16))


class Slip(Rule):
    """A rule of a user's own with one mistake, from its third step on."""

    def __init__(self, mistake: str) -> None:
        self.mistake = mistake

    def initial_state(self, table: ParameterTable) -> Any:
        return [] if self.mistake == "state at the start" else {"steps": torch.zeros(1)}

    def m_step(self, table: ParameterTable, statistics: Any, state: Any) -> Any:
        shared, offsets, following = table.shared - 0.01, table.offsets, {"steps": state["steps"] + 1}
        values = TableValues(shared, offsets)
        if state["steps"] < 2:
            return values, following
        if self.mistake == "raises":
            raise KeyError("momentum")
        if self.mistake == "writes to the table":
            table.shared.mul_(2)
        if self.mistake == "writes to the statistics":
            statistics.sums.zero_()
        return {
            "no state": values,
            "None": None,
            "plain tuple": ((shared, offsets), following),
            "shape": (TableValues(shared[:, None], offsets), following),
            "offsets": (TableValues(shared, offsets.new_zeros(3, 1)), following),
            "precision": (TableValues(shared.float(), offsets), following),
            "whole": (TableValues(shared.long(), offsets), following),
            "other state": (values, {"step": state["steps"]}),
            "state of another shape": (values, {"steps": torch.zeros(2)}),
            "NaN": (TableValues(shared * torch.nan, offsets), following),
        }.get(self.mistake, (values, following))

    def sampled_values(self, table: ParameterTable, state: Any) -> Any:
        return table.shared if self.mistake == "sample" and state["steps"] > 2 else None

    def standard_deviation(self, table: ParameterTable, state: Any) -> Any:
        return torch.zeros(7) if self.mistake == "deviation" else None


SLIPS = {
    "raises": r"Slip\.m_step failed at step 3: KeyError: 'momentum'",
    "writes to the table": r"Slip\.m_step wrote to its argument `table` at step 3",
    "writes to the statistics": r"Slip\.m_step wrote to its argument `statistics` at step 3",
    "no state": r"Slip\.m_step must return a tuple of .* got TableValues\(.* at step 3",
    "None": r"Slip\.m_step must return .* got NoneType at step 3",
    "plain tuple": r"Slip\.m_step must return .* at step 3",
    "shape": r"Slip\.m_step must return .*\(P = 1, K = 0, on cpu\), got .*float64 \[1, 1\] .* at step 3",
    "offsets": r"Slip\.m_step must return .*float64 \[3, 1\] .* at step 3",
    "precision": r"Slip\.m_step must return .*float32 \[1\] .* at step 3",
    "whole": r"Slip\.m_step must return .*int64 \[1\] .* at step 3",
    "other state": r"Slip\.m_step must return .*\{step: .* at step 3",
    "state of another shape": r"Slip\.m_step must return .*\{steps: float32 \[2\] .* at step 3",
    "sample": r"Slip\.sampled_values must return .* at step 3",
    "deviation": r"Slip\.standard_deviation must return .* got float32 \[7\]",
    "state at the start": r"Slip\.initial_state must return a dictionary of tensors",
}


@pytest.mark.parametrize("mistake", SLIPS)
def test_a_slip_in_a_rule_is_one_line_that_names_it_and_the_step(mistake: str, tmp_path: Path) -> None:
    module = Toy()
    with pytest.raises((RuntimeError, TypeError), match=SLIPS[mistake]) as caught:
        fit(module, EMParameterCallback(Slip(mistake)), tmp_path, log_every_n_steps=3, batches=4)
    assert "\n" not in str(caught.value)
    if mistake != "writes to the table":
        steps = 0 if mistake == "state at the start" else 3 if mistake in ("sample", "deviation") else 2
        assert module.em_parameters.shared.item() == pytest.approx(-0.01 * steps)  # nothing is half changed


def test_a_rule_that_proposes_nan_is_named_with_the_step_and_changes_nothing(tmp_path: Path) -> None:
    module, callback = Toy(), EMParameterCallback(Slip("NaN"))
    with pytest.warns(UserWarning, match=r"Slip\.m_step proposed NaN or infinite values at step 3") as caught:
        fit(module, callback, tmp_path, batches=8)
    assert len([w for w in caught if "Slip" in str(w.message) or "M-step was skipped" in str(w.message)]) == 1
    assert module.em_parameters.shared.item() == pytest.approx(-0.02)
    assert callback.skipped_steps == 6


@pytest.mark.parametrize("size", [None, 3, 17])
def test_the_progress_bar_shows_the_first_learned_values_after_every_step(size: int | None, tmp_path: Path) -> None:
    """Those of the global set, which the status and the closing table have as well."""
    module = make_module(network=False)
    if size is not None:
        module = Toy(table=bank_table(size, per_row=["weight"], row_names=["cat", "dog"]))
        share = torch.zeros(4, 2)

        def training_step(batch: torch.Tensor, batch_idx: int) -> dict[str, Any]:
            theta = module.em_parameters(share)
            loss = theta["weight"].log().square().mean(1) + theta["gain"]
            return {"loss": loss.mean(), "em": EStep(share, None, loss.detach())}

        module.training_step = training_step  # type: ignore[method-assign]
    callback, seen = EMParameterCallback(make_rule("gradient")), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            status = callback.get_status()
            shown = {k: float(v) for k, v in trainer.progress_bar_metrics.items() if k.startswith("em/")}
            seen.append(shown)
            assert len(shown) == 3
            for name, value in shown.items():
                if size != 17:
                    assert value == pytest.approx(float(status[f"global_{name[3:]}"]), rel=1e-5)
            if size is None:
                assert [*shown] == ["em/sigma", "em/tau", "em/radius"]
                assert float(trainer.progress_bar_metrics["train/loss"]) == pytest.approx(callback.loss_history[-1])

    trainer = make_trainer(tmp_path, callback, epochs=1, callbacks=[Watch()])
    trainer.fit(module, SmoothImages(16) if size is None else loader(4))
    assert len({tuple(shown.values()) for shown in seen}) == len(seen)
    if size == 17:
        assert [*seen[-1]] == ["em/weight/min", "em/weight/median", "em/weight/max"] or "em/gain" in seen[-1]
