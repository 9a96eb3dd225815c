"""M-step of a parameter table, once for each optimizer step of the network."""

from collections import deque
from collections.abc import Container
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from callbacks._em_metrics import em_metrics, values_by_name
from callbacks._em_requirements import check_module, check_trainer
from callbacks._rule_protocol import answer, next_values
from lightning_modules.checkpoints.module import keep_newest
from lightning_modules.em import Assignment, EStep, ParameterTable, SufficientStatistics, TableValues
from lightning_modules.em.rules import GradientRule, Rule, RuleState

# Steps whose mean loss `get_status` gives.
_RECENT = 5
# M-steps after which a learned parameter that has had no gradient is said to have none.
_PATIENCE = 10
# Values of the global set that the progress bar shows.
_SHOWN = 3
# Occasions on which a run logs, after which it does so half as often with each doubling.
_DENSE_LOGS = 1024
# Metric of the validation that is kept from before the first step.
_SCORE = "val/psnr"
# Most that responsibilities may sum to above 1 by rounding, bfloat16's included.
_ROUNDING = 0.02


class EMParameterCallback(Callback):
    """Learns a module's `em_parameters` while the module's network trains.

    The module's `training_step` is the E-step: it asks its `ParameterTable` for the parameters of each image and
    returns `{"loss": ..., "em": EStep(...)}`, where the loss is the mean over the batch of each image's (weighted)
    loss. This callback is the M-step: it adds the statistics of the micro-batches of an optimizer step, sums them over
    the processes in one reduction, applies the rule, clamps, writes and logs. Every process computes the same numbers,
    so nothing is sent back. It does not wait for an accelerator on steps that do not log, one process given.

    What it logs as `em/…` has the step of the module's own `train/…`, and can be monitored by name, as by
    `EarlyStopping(monitor="em/loss_proxy")`: the value is that of the last step that logged or ended an epoch. The
    progress bar shows the first three learned values of the global set after every step. A run that logs more than
    1024 times does so half as often from then on, and again with each doubling, so that its events stay small.

    The `last.ckpt` of a `ModelCheckpoint` with a monitor is the newest state, not a copy of the best.

    Lightning's `WeightAveraging` averages the network and nothing that the M-step writes: module, checkpoint and
    validation have the table, and the assignment's own state, of the last M-step.

    Args:
        rule: The M-step proper; `GradientRule()` by default.
        update_rows: Whether the rows of the table (its classes, say) learn too, or the global set alone.
        sweep: Number of points, spread evenly between the bounds, that are tried out on the first batch of a run, to
            begin with the one of the least proxy; 0 begins at the start values. Where bounds are orders of magnitude
            apart, the start may be on a plateau from which no gradient leads away. Parameters of the global set that
            are scalars take part. The training step is called once for each point, without gradients.
        history_size: Number of past steps whose proxy and parameters are kept.
        max_skipped_steps: Number of consecutive steps with a non-finite proxy or gradient that stops the run.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> callback = EMParameterCallback(rule=GradientRule(lr=0.05))
        >>> callback.skipped_steps
        0
    """

    def __init__(
        self,
        rule: Rule | None = None,
        update_rows: bool = True,
        history_size: int = 1000,
        max_skipped_steps: int = 20,
        sweep: int = 0,
    ) -> None:
        if sweep < 0:
            raise ValueError(f"sweep must be a number of points, or 0 for none, got {sweep}")
        if history_size < 1:
            raise ValueError(f"history_size must be at least 1 step, got {history_size}")
        if max_skipped_steps < 1:
            raise ValueError(f"max_skipped_steps must be at least 1, got {max_skipped_steps}")
        self.rule = GradientRule() if rule is None else rule
        self.update_rows = update_rows
        self.sweep = sweep
        self.history_size = history_size
        self.max_skipped_steps = max_skipped_steps
        self._table: ParameterTable | None = None
        self._begin()

    def _begin(self) -> None:
        """State before the first step of a run."""
        self._rule_state: RuleState = {}
        self._proxies: deque[Tensor] = deque(maxlen=self.history_size)
        self._states: deque[TableValues] = deque(maxlen=self.history_size)
        # Skipped steps: in all, the present streak, and the longest; counted on the device.
        self._skipped = torch.zeros(3, dtype=torch.long)
        # The first step whose proposal was not finite though its statistics were; 0 for none.
        self._rule_fault = torch.zeros((), dtype=torch.long)
        # Columns that have had a gradient, and the most that responsibilities were off; likewise.
        self._has_gradient = self._excess = torch.zeros(0)
        self._num_steps = 0
        self._statistics = SufficientStatistics(0, 0)
        self._last_step = 0
        self._scale: Tensor | None = None
        #: Validation PSNR before the first step, where all of the validation data were looked at then
        #: (`num_sanity_val_steps: -1`).
        self.start_score: float | None = None
        self._warned: set[str] = set()

    # For whoever prefers numbers to TensorBoard ------------------------------------------------------------------

    def get_parameters(self, class_idx: int | None = None) -> dict[str, Any]:
        """Current parameters by name, a list for a bank, of the global set or of a class.

        Args:
            class_idx: Row of the table; None for the global set.

        Raises:
            RuntimeError: Before the callback has met a module.
            ValueError: If there is no such row.
        """
        return self._require_table().get_parameters(class_idx)

    def get_status(self) -> dict[str, str]:
        """Current state as strings: `global_<parameter>` of each, and `avg_loss`, mean proxy of the last 5 steps."""
        table = self._require_table()
        values = table.values()[0].tolist()
        status = {f"global_{name}": f"{value:.6g}" for name, value in zip(table.column_names, values, strict=True)}
        recent = [loss for loss in self.loss_history if loss == loss][-_RECENT:]  # NaN marks a skipped step
        status["avg_loss"] = f"{sum(recent) / len(recent):.6g}" if recent else "nan"
        return status

    def standard_deviation(self) -> Tensor | None:
        """How well each parameter is known, in log units, where the rule says so; see `Rule.standard_deviation`.

        Shape:
            - output: `[K + 1, P]`, row 0 for the global set
        """
        table = self._require_table()
        # Before training the state of a checkpoint is on the host, and afterwards the table may be.
        state = {name: tensor.to(table.shared.device) for name, tensor in self._rule_state.items()}
        return answer(self.rule, "standard_deviation", table, state or answer(self.rule, "initial_state", table))

    @property
    def loss_history(self) -> list[float]:
        """Loss proxy of the last steps, oldest first; NaN where the M-step was skipped."""
        return self.class_loss_history(None)

    @property
    def parameter_history(self) -> list[dict[str, Any]]:
        """Global parameters after each of the last steps, oldest first."""
        return self.class_parameter_history(None)

    def class_loss_history(self, class_idx: int | None) -> list[float]:
        """`loss_history` of a row; NaN as well where a step had no image of it.

        Args:
            class_idx: Row of the table; None for all images.

        Raises:
            ValueError: If there is no such row.
        """
        self.get_parameters(class_idx)  # knows the rows
        return [float(proxies[0 if class_idx is None else class_idx + 1]) for proxies in self._proxies]

    def class_parameter_history(self, class_idx: int | None) -> list[dict[str, Any]]:
        """`parameter_history` of a row; see `class_loss_history`."""
        table = self._require_table()
        return [table.describe(state, class_idx) for state in self._states]

    @property
    def skipped_steps(self) -> int:
        """Number of optimizer steps whose M-step was left out for a non-finite proxy or gradient."""
        return int(self._skipped[0])

    # Lightning's side --------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check, before anything is trained, that the M-step will be right in this setup.

        What an earlier run has learned of its own objective is no knowledge of another's: every `fit` starts the rule
        afresh, unless a checkpoint, which is read after this, continues it.
        """
        table = getattr(pl_module, "em_parameters", None)
        self._table = table if isinstance(table, ParameterTable) else None
        if stage != "fit":
            return
        self._begin()
        check_module(pl_module)
        check_trainer(trainer, EMParameterCallback)
        keep_newest(trainer)  # for a module of one's own; ours have asked before

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the state to the module's device, and continue after the step at which a checkpoint was taken."""
        table = self._require_table()
        device = table.shared.device
        initial = answer(self.rule, "initial_state", table)
        shapes = {name: tensor.shape for name, tensor in initial.items()}
        if {name: tensor.shape for name, tensor in self._rule_state.items()} == shapes:
            self._rule_state = {name: tensor.to(device) for name, tensor in self._rule_state.items()}
        else:
            if self._rule_state:
                rank_zero_warn(
                    f"the checkpoint's {type(self.rule).__name__} had other settings (its state has other shapes): the "
                    "parameters go on from where they were, the rule starts afresh"
                )
            self._rule_state = initial
        self._skipped, self._rule_fault = self._skipped.to(device), self._rule_fault.to(device)
        self._has_gradient = torch.zeros_like(table.shared, dtype=torch.bool)
        self._excess, self._num_steps = torch.zeros((), device=device), 0
        self._statistics = SufficientStatistics(len(table.row_names), len(table.shared), device)
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise MisconfigurationException(
                    "EMParameterCallback does not work with LBFGS, which evaluates the loss several times for one "
                    "step, so that an image would be counted more than once: choose another optimizer, such as Adam"
                )
        self._last_step = trainer.global_step
        table.rows_learn = self.update_rows
        table.pop_gradient()  # of whoever ran before, such as a learning-rate finder
        self._prepare_step(table, trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the first step of a run that begins, try out points between the bounds."""
        if self.sweep and trainer.global_step == 0 and batch_idx == 0 and not self._states:
            self._try_points(trainer, pl_module, batch)

    @torch.no_grad()
    def _try_points(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        table = self._require_table()
        offsets = table.offsets.clone()
        points = _spread_points(table, self.sweep)
        table.pair_distance = None
        sums = []
        for point in points:
            table.write(TableValues(point, offsets))
            step = _e_step(pl_module.training_step(batch, 0))
            statistics = SufficientStatistics(len(table.row_names), len(table.shared), point.device)
            statistics.add(step, None)
            sums.append(torch.stack([statistics.sum("proxy")[0], statistics.count[0]]))
        total = trainer.strategy.reduce(torch.stack(sums), reduce_op="sum")
        loss = total[:, 0] / total[:, 1].clamp_min(torch.finfo(torch.float64).tiny)
        best = torch.where(loss.isfinite(), loss, torch.inf).argmin()
        table.write(TableValues(points[best], offsets))
        self._prepare_step(table, trainer.global_step)

    def _prepare_step(self, table: ParameterTable, step: int) -> None:
        """Lets the table hand out, in the next training step, what the rule asks for."""
        table.perturb(answer(self.rule, "sampled_values", table, self._rule_state, step=step))
        table.pair_distance = answer(self.rule, "pair_distance", table, self._rule_state, step=step)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the scale of this backward pass: the optimizer step that follows may change it."""
        self._scale = _loss_scale(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch's statistics; after an optimizer step, take the M-step."""
        self._add(trainer, _e_step(outputs))
        if trainer.global_step == self._last_step:
            return  # a micro-batch of an accumulation
        self._last_step = trainer.global_step
        table = self._require_table()
        # One sum over the processes, on every process, at every optimizer step.
        statistics = self._statistics.reduced(lambda flat: trainer.strategy.reduce(flat, reduce_op="sum"))
        self._statistics = SufficientStatistics(len(table.row_names), len(table.shared), table.shared.device)
        scale = _loss_scale(trainer, pl_module)
        rejected = scale < self._scale if scale is not None and self._scale is not None else None
        assignment = getattr(pl_module, "assignment", None)
        self._m_step(
            table, statistics, rejected, assignment if isinstance(assignment, Assignment) else None, self._last_step
        )
        _keep_from_averages(trainer, pl_module)
        shown = dict([*values_by_name(table, "em", table.values()[:1], table.learned).items()][:_SHOWN])
        pl_module.log_dict(shown, prog_bar=True, logger=False, on_step=True, on_epoch=False)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        logs = every > 0 and trainer.global_step % every == 0 and _is_logged(trainer.global_step // every)
        if logs or table.shared.device.type == "cpu":
            self._check_run(table)
        if logs or trainer.is_last_batch:
            self._log(trainer, pl_module, statistics, shown, logs)
        if logs and isinstance(assignment, Assignment):
            self._log_assignment(trainer, assignment)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what is learned out of the averages that validation is about to use, wherever in the list we are."""
        _keep_from_averages(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the score of the start values, and log what has been gained over it on a scale of its own."""
        score = trainer.callback_metrics.get(_SCORE)
        if score is None or trainer.state.fn != "fit":
            return
        if trainer.sanity_checking:
            if trainer.global_step == 0:  # a run that is resumed keeps the score of its own start
                whole = trainer.num_sanity_val_steps == float("inf")  # -1 in the configuration
                self.start_score = float(score) if whole else None
        elif self.start_score is not None:
            _log_to_loggers(trainer, {"val/psnr_over_start": float(score) - self.start_score})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As `on_validation_start`: an average may have begun with this epoch."""
        _keep_from_averages(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """As `on_validation_start`: the averages go into the checkpoint, in which they are no copies."""
        _keep_from_averages(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of what has come up after the last step that logged: skipped steps, and what the assignment has seen."""
        _keep_from_averages(trainer, pl_module)
        self._require_table().perturb(None)
        self._require_table().pair_distance = None
        self._check_run(self._require_table())
        assignment = getattr(pl_module, "assignment", None)
        if isinstance(assignment, Assignment):
            self._warn_of(assignment, ended=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the table with what was learned: an interrupted run has no end at which perturbation stops."""
        if self._table is not None:
            self._table.perturb(None)
            self._table.pair_distance = None

    def state_dict(self) -> dict[str, Any]:
        """Rule state, counts and history as plain numbers and tensors on the CPU."""
        return {
            "rule": type(self.rule).__name__,
            "rule_state": {name: tensor.cpu() for name, tensor in self._rule_state.items()},
            "skipped": self._skipped.cpu(),
            "start_score": self.start_score,
            "proxies": torch.stack([*self._proxies]).cpu() if self._proxies else [],
            "states": [(state.shared.cpu(), state.offsets.cpu()) for state in self._states],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; another rule starts afresh from the parameters reached."""
        if state_dict.get("rule") == type(self.rule).__name__:
            self._rule_state = dict(state_dict.get("rule_state", {}))
        else:
            rank_zero_warn(
                f"the checkpoint was written under {state_dict.get('rule')}, this run uses {type(self.rule).__name__}: "
                "the parameters go on from where they were, the rule starts afresh"
            )
        self.start_score = state_dict.get("start_score")
        # The total goes on; a streak of skipped steps that stopped a run must not stop the one that resumes it.
        total = state_dict.get("skipped", self._skipped)[:1].cpu()
        self._skipped = torch.cat([total, torch.zeros(2, dtype=torch.long)])
        self._proxies.clear()
        self._states.clear()
        self._proxies.extend(torch.as_tensor(state_dict.get("proxies", []), dtype=torch.float64))
        self._states.extend(TableValues(*state) for state in state_dict.get("states", []))

    # Inside ------------------------------------------------------------------------------------------------------

    def _require_table(self) -> ParameterTable:
        if self._table is None:
            raise RuntimeError("the callback has not met a module with em_parameters yet: run trainer.fit first")
        return self._table

    @torch.no_grad()
    def _add(self, trainer: Trainer, step: EStep) -> None:
        table = self._require_table()
        step.check(len(table.row_names))
        rows = step.responsibilities.double()
        if rows.numel():
            # What is not a number in an image that is none itself is a matter of skipped steps.
            counted = step.proxy.isfinite() if step.weight is None else step.proxy.isfinite() & (step.weight > 0)
            off = torch.maximum(rows.sum(1) - 1, -rows.amin(1))
            self._excess = torch.maximum(self._excess.double(), torch.where(counted, off, 0.0).amax())
        gradient = table.pop_gradient()
        if step.gradient is not None:
            if step.gradient.shape != (len(rows), len(table.shared)):
                raise ValueError(
                    f"EStep.gradient must be [{len(rows)}, {len(table.shared)}], one number for each image and column "
                    f"of the table, got {list(step.gradient.shape)}"
                )
            self._statistics.add(step, step.gradient)
            return
        if table.pair_distance is not None:
            raise MisconfigurationException(
                f"{type(self.rule).__name__} learns from pairs, and training_step handed in no EStep.gradient: ask the "
                "table for a `pair` of parameters, and for its `gradient` where `pair_distance` is set"
            )
        if gradient is not None:
            if len(gradient) != len(rows):
                raise ValueError(
                    f"the table gave parameters to {len(gradient)} images, and EStep has statistics of {len(rows)}: "
                    "return those of the images that the loss is the mean of"
                )
            # The loss is the mean over the batch of weighted losses, divided by the number of accumulated batches and,
            # under mixed precision, scaled: undo all of it, and what remains is the gradient of each image's own loss.
            factor = torch.full_like(gradient[:, :1], len(gradient) * trainer.accumulate_grad_batches)
            if step.weight is not None:
                factor = factor / step.weight.double()[:, None]
            if self._scale is not None:
                factor = factor / self._scale
            gradient = gradient * factor
        self._statistics.add(step, gradient)

    @torch.no_grad()
    def _m_step(
        self,
        table: ParameterTable,
        statistics: SufficientStatistics,
        rejected: Tensor | None,
        assignment: Assignment | None,
        step: int,
    ) -> None:
        proposed, rule_state = next_values(self.rule, table, statistics, self._rule_state, step)
        is_number = proposed.shared.isfinite().all() & proposed.offsets.isfinite().all()
        fault = statistics.finite & ~is_number & (self._rule_fault == 0)
        self._rule_fault = torch.where(fault, step, self._rule_fault)
        proposed = table.project(proposed)
        finite = statistics.finite & is_number
        if rejected is None:
            accepted, counted = finite, ~finite
        else:  # the gradient scaler has thrown the network's step away: neither an M-step nor a fault
            accepted, counted = finite & ~rejected, ~finite & ~rejected
        # Selection instead of a branch: the host need not know whether the step was taken.
        table.write(
            TableValues(*(torch.where(accepted, new, old) for new, old in zip(proposed, table.state, strict=True)))
        )
        self._rule_state = {
            name: torch.where(accepted, rule_state[name], old) for name, old in self._rule_state.items()
        }
        self._prepare_step(table, step)
        if assignment is not None and len(statistics.latent):
            assignment.m_step(statistics.latent, accepted)
        total, streak, longest = self._skipped.unbind()
        streak = torch.where(counted, streak + 1, torch.where(accepted, 0, streak))
        self._skipped = torch.stack([total + counted, streak, torch.maximum(longest, streak)])
        self._has_gradient = self._has_gradient | (statistics.mean_square_gradient[0] != 0)
        self._num_steps += 1
        self._proxies.append(torch.where(accepted & (statistics.count > 0), statistics.mean("proxy"), torch.nan))
        self._states.append(TableValues(table.shared.clone(), table.offsets.clone()))

    def _check_run(self, table: ParameterTable) -> None:
        if not (excess := float(self._excess)) <= _ROUNDING:
            raise ValueError(
                "responsibilities must be in [0, 1] and sum to 1 at most over the rows for each image, and "
                + ("were NaN" if excess != excess else f"were off by {excess:.3g}")
                + ": normalize what `assignment` returns"
            )
        total, _, longest, fault = torch.cat([self._skipped, self._rule_fault[None]]).tolist()
        if fault:
            self._warn(
                f"{type(self.rule).__name__}.m_step proposed NaN or infinite values at step {fault}, from "
                "statistics that were finite: mend the rule; the parameters keep their values at such steps"
            )
        if longest >= self.max_skipped_steps:
            raise RuntimeError(
                f"{longest} M-steps on end had a non-finite loss proxy or gradient, so the run was stopped; the "
                "parameters are those of the last good step. Look at the loss (does it diverge: lower the learning "
                "rate), at the data (NaN or infinite pixels), at the precision (try 32-true), and at bounds near zero"
            )
        if total and not fault:
            self._warn(
                "an M-step was skipped because its loss proxy or gradient was not finite; the parameters keep their "
                "values. em/skipped_steps counts such steps from here on"
            )
        if self.rule.needs_gradient and self._num_steps - total >= _PATIENCE:
            got = self._has_gradient.tolist()
            for name in table.learned:
                if name not in table.integers and not any(got[table.columns(name)]):
                    self._warn(
                        f"{name} has had no gradient in {_PATIENCE} steps, so it is not learned: let the loss depend "
                        "on what the table hands out, without detach or no_grad, or leave it out of its `learned`"
                    )

    def _log(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        statistics: SufficientStatistics,
        shown: Container[str],
        logs: bool,
    ) -> None:
        table = self._require_table()
        deviation = answer(self.rule, "standard_deviation", table, self._rule_state, step=self._last_step)
        metrics = em_metrics(table, statistics, self._skipped[0], deviation)
        # For those who monitor: by Lightning, which the loggers would otherwise get stale values of a row from.
        monitored = {name: value for name, value in metrics.items() if name not in shown}
        pl_module.log_dict(monitored, logger=False, on_step=True, on_epoch=False)
        if logs:
            numbers = torch.stack([*metrics.values()]).tolist()  # one transfer for everything
            _log_to_loggers(
                trainer, {k: number for k, number in zip(metrics, numbers, strict=True) if number == number}
            )

    def _log_assignment(self, trainer: Trainer, assignment: Assignment) -> None:
        _log_to_loggers(trainer, {f"em/assignment/{name}": value for name, value in assignment.diagnostics().items()})
        self._warn_of(assignment)

    def _warn_of(self, assignment: Assignment, ended: bool = False) -> None:
        for warning in assignment.warnings(ended):
            self._warn(f"{type(assignment).__name__}: {warning}")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(message)


def _spread_points(table: ParameterTable, count: int) -> Tensor:
    """Coordinates between the bounds, the present ones first, `[count + 1, P]`.

    Of the R sequence (Roberts, 2018), any number of whose first points covers a cube evenly.
    """
    moving = table.mask([name for name in table.learned if table.columns(name).stop - table.columns(name).start == 1])
    dimension = int(moving.sum())
    root = 2.0
    for _ in range(40):  # of x^(d + 1) = x + 1
        root = (1 + root) ** (1 / (dimension + 1))
    step = root ** -torch.arange(1, dimension + 1, dtype=torch.float64, device=moving.device)
    place = (0.5 + torch.arange(count, device=moving.device)[:, None] * step) % 1
    points = table.shared.repeat(count + 1, 1)
    lower, upper = table.lower[moving], table.upper[moving]
    points[1:, moving] = lower + place * (upper - lower)
    return points


def _keep_from_averages(trainer: Trainer, pl_module: LightningModule) -> None:
    """Writes what the M-step has learned over its average, in whatever Lightning averages of the module.

    Under a late `update_starting_at_step` the average is the start, and a regime's mean is not the mean of its means.
    Averaged is a copy of the module, which has no other name.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for averaging in callbacks:
        average = averaging._average_model if isinstance(averaging, WeightAveraging) else None
        for name in ("em_parameters", "assignment") if average is not None else ():
            source, copy = (getattr(module, name, None) for module in (pl_module, average.module))  # type: ignore[union-attr]
            if isinstance(source, torch.nn.Module) and isinstance(copy, torch.nn.Module):
                for learned, averaged in zip(source.buffers(recurse=False), copy.buffers(recurse=False), strict=True):
                    averaged.copy_(learned)


def _is_logged(number: int) -> bool:
    """Whether the n-th occasion to log is taken."""
    return number % 2 ** max(0, number.bit_length() - (_DENSE_LOGS - 1).bit_length()) == 0


def _log_to_loggers(trainer: Trainer, numbers: dict[str, float]) -> None:
    for logger in trainer.loggers:
        # Lightning's own count: what a step logs has the number of steps before it.
        logger.log_metrics(numbers, step=trainer.global_step - 1)


def _loss_scale(trainer: Trainer, pl_module: LightningModule) -> Tensor | None:
    """Current factor of the gradient scaler, on the device; None without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    # `scale` gives the factor without waiting for the device, which `get_scale` would.
    return None if scaler is None else scaler.scale(torch.ones((), device=pl_module.device)).clone()


def _e_step(outputs: Any) -> EStep:
    step = outputs.get("em") if isinstance(outputs, dict) else None
    if not isinstance(step, EStep):
        got = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
        raise MisconfigurationException(
            'EMParameterCallback needs `training_step` to return {"loss": loss, "em": EStep(...)}, but it returned '
            f"{got}: add the statistics of the batch (lightning_modules.EStep)"
        )
    return step
