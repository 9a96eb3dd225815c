"""Findings about a run while parameters are learned, each given once with its remedy."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from callbacks._display import em_table, require_positive, stopped_at, tensorboard_loggers

if TYPE_CHECKING:
    from lightning_modules.em import EStep, ParameterTable

# Correlation of proxies one period apart above which they oscillate. Of independent ones none of a window of 40 has it
# once in ten thousand times.
OSCILLATION = 0.7
# Cycles that a window must hold before it is said to repeat.
LEAST_CYCLES = 4
# Images that a row would have in an equal share before it is said to get none.
IMAGES_PER_ROW = 10
# Relative movement over the last fifth of the run above which a parameter has not converged.
STILL_MOVING = 0.1
# Times the reconstruction loss at which a perceptual loss leaves it without a say.
DROWNED = 100


# What is known of each image besides its row and the operator's own diagnostics.
_MEANS = ("similarity", "reconstruction", "perceptual")


class EMHealth(Callback):
    """Reads the run while it runs, and names what it sees, once, with what to do about it.

    It looks for parameters that are stopped by a bound, in the global set or a row; a loss proxy that oscillates; a row
    that gets no images; a perceptual loss beside which the reconstruction has no say; parameters that still move at the
    end; and whatever else the operator warns of (`RestorationOperator.warnings`), from the means of its own
    diagnostics. A finding goes to TensorBoard's text page under `em/health`, and once to the console: below the closing
    table where the run has an `EMReport`, or else as a warning when it is found. That a run will be too short is a
    warning at its start. It reads the device only on steps that log (`log_every_n_steps`) or end an epoch or the run. A
    run of few looks is judged at its end, by what all of them saw, and bounds by where the values rest then, as the
    closing table does.

    Args:
        patience: Looks on end that must see the same before it is a finding; in a run of fewer looks, all of them.
        window: Optimizer steps over which the proxy is watched for oscillation, of any period up to a quarter of it;
            each window is looked at once.

    Raises:
        ValueError: If an argument is below its least value.

    Example:
        >>> EMHealth(patience=5).findings
        {}
    """

    def __init__(self, patience: int = 3, window: int = 40) -> None:
        require_positive(self, patience=patience)
        if window < 40:
            raise ValueError(f"EMHealth: window must be at least 40 steps, or chance oscillates too, got {window}")
        self.patience = patience
        self.window = window
        self.findings: dict[str, str] = {}
        self._seen: dict[str, int] = {}
        # What was seen at the last looks, and how often there was a look for it.
        self._messages: dict[str, str] = {}
        self._looks: dict[str, int] = {}
        self._proxies: list[Tensor] = []
        self._sums: Tensor | None = None
        self._rows: list[float] = []
        self._path: list[tuple[int, list[list[float]]]] = []
        self._of_operator: set[str] = set()
        self._last_step = 0
        #: Whether someone else prints the findings; `EMReport` does.
        self.is_reported = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins a new record, and counts the steps to come."""
        self.findings, self._seen, self._path, self._proxies, self._rows = {}, {}, [], [], []
        self._messages, self._looks, self._sums, self._of_operator = {}, {}, None, set()
        self._last_step = trainer.global_step
        steps = trainer.estimated_stepping_batches
        if em_table(pl_module) is not None and steps < self.window and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"this run ends after {steps} steps, and learning takes some hundred; fewer than {self.window} do not "
                "show either whether it oscillates or still moves: raise max_epochs, make the batches smaller, or take "
                "more crops of each image"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the batch to the record; looks on steps that log."""
        table = em_table(pl_module)
        step = outputs.get("em") if isinstance(outputs, dict) else None
        if table is None or step is None:
            return
        batch_sums = _sums(step)
        self._sums = batch_sums if self._sums is None else self._sums + batch_sums
        if trainer.global_step == self._last_step:
            return  # a micro-batch of an accumulation
        self._last_step = trainer.global_step
        if len(self._proxies) < self.window:
            self._proxies.append(_mean_proxy(step))
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        ends = trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if ends or (every > 0 and trainer.global_step % every == 0):
            self._look(trainer, pl_module, table, batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Names what still moves, and what all of a few looks saw."""
        table = em_table(pl_module)
        if table is None:
            return
        self._look_at_bounds(trainer, table, table.values().tolist(), patience=1)  # what the closing table stars
        for key, message in self._messages.items():
            if 0 < self._seen[key] == self._looks[key] < self.patience:
                self._warn(trainer, key, message)
        moving = still_moving(table, self._path, trainer.global_step)
        for name in table.learned:
            changes = {row: change for (parameter, row), change in moving.items() if parameter == name}
            if changes:
                largest = max(changes.values(), key=abs)
                self._warn(
                    trainer,
                    f"moving/{name}",
                    f"{_named(table, name, list(changes))} moved by {largest:+.0%} over the last fifth of the run: "
                    "train longer, or raise the rule's step",
                )

    def _look(self, trainer: Trainer, pl_module: LightningModule, table: "ParameterTable", batch: Any) -> None:
        assert self._sums is not None
        diagnose = getattr(pl_module, "diagnose", None)
        diagnostics: dict[str, Tensor] = diagnose(batch) if diagnose is not None else {}
        local = torch.cat([self._sums, *map(_sum_and_count, diagnostics.values())])
        total = trainer.strategy.reduce(local, reduce_op="sum").tolist()
        self._sums = torch.zeros_like(self._sums)
        values = table.values().tolist()
        self._path.append((trainer.global_step, values))
        num_rows = len(table.row_names)
        images, *rows = total[: num_rows + 1]
        keys, sums, counts = [*_MEANS, *diagnostics], total[num_rows + 1 :: 2], total[num_rows + 2 :: 2]
        means = {key: value / n for key, value, n in zip(keys, sums, counts, strict=True) if n}
        self._look_at_bounds(trainer, table, values)
        self._look_at_proxies(trainer)
        self._look_at_losses(trainer, means.pop("reconstruction", 0.0), means.pop("perceptual", 0.0))
        self._look_at_operator(trainer, pl_module, means)
        self._look_at_rows(trainer, table, [images, *rows])

    def _look_at_bounds(
        self, trainer: Trainer, table: "ParameterTable", values: list[list[float]], patience: int | None = None
    ) -> None:
        for name in table.learned:
            for side, bound in zip(("lower", "upper"), table.bounds[name], strict=True):
                stopped = [
                    row
                    for row in _watched(table, name)
                    if any(stopped_at(table, name, value) == side for value in values[row][table.columns(name)])
                ]
                rests = "rests" if len(stopped) == 1 else "rest"
                self._note(
                    trainer,
                    f"bound/{name}/{side}",
                    bool(stopped),
                    f"{_named(table, name, stopped)} {rests} on its {side} bound {bound:g}: widen em_parameters.bounds "
                    "for it, unless it is meant to stop there",
                    patience,
                )

    def _look_at_proxies(self, trainer: Trainer) -> None:
        if len(self._proxies) < self.window:
            return
        period, correlation = oscillation(torch.stack(self._proxies).tolist(), trainer.num_training_batches)
        self._proxies.clear()
        self._note(
            trainer,
            "oscillation",
            correlation > OSCILLATION,
            f"the loss proxy oscillates, every {period} steps (correlation {correlation:.2f}): lower the rule's step "
            "(lr of GradientRule, rates of SignRule, trust_radius of the others) or the network's learning rate",
        )

    def _look_at_losses(self, trainer: Trainer, reconstruction: float, perceptual: float) -> None:
        ratio = perceptual / reconstruction if reconstruction > 0 else 0.0
        self._note(
            trainer,
            "perceptual",
            ratio > DROWNED,
            f"the perceptual loss is {ratio:.0e} times the reconstruction loss, which has no say beside it: divide "
            "model.perceptual_weight by about that, unless this is meant",
        )

    def _look_at_operator(self, trainer: Trainer, pl_module: LightningModule, means: dict[str, float]) -> None:
        operator = getattr(pl_module, "operator", None)
        found: dict[str, str] = operator.warnings(means) if operator is not None and means else {}
        self._of_operator |= found.keys()
        for key in sorted(self._of_operator):
            self._note(trainer, key, key in found, found.get(key, ""))

    def _look_at_rows(self, trainer: Trainer, table: "ParameterTable", counts: list[float]) -> None:
        """Judge the rows once each of them could have had enough images."""
        self._rows = [a + b for a, b in zip(self._rows or [0.0] * len(counts), counts, strict=True)]
        images, *rows = self._rows
        if not rows or images < IMAGES_PER_ROW * len(rows):
            return
        self._rows = []
        for row, count in zip(table.row_names, rows, strict=True):
            self._note(
                trainer,
                f"empty/{row}",
                count <= 1e-3 * images / len(rows),
                f"row {row!r} of the parameter table gets no images: take fewer rows, or check what assigns images to "
                "them (labels, regimes)",
            )

    def _note(self, trainer: Trainer, key: str, seen: bool, message: str, patience: int | None = None) -> None:
        self._seen[key] = self._seen.get(key, 0) + 1 if seen else 0
        self._looks[key], self._messages[key] = self._looks.get(key, 0) + 1, message
        if self._seen[key] >= (patience or self.patience):
            self._warn(trainer, key, message)

    def _warn(self, trainer: Trainer, key: str, message: str) -> None:
        if key in self.findings:
            return
        self.findings[key] = message
        if not self.is_reported:
            rank_zero_warn(f"EMHealth at step {trainer.global_step}: {message}.")
        if trainer.is_global_zero:
            for logger in tensorboard_loggers(trainer):
                text = "\n".join(f"- {finding}" for finding in self.findings.values())
                logger.experiment.add_text("em/health", text, trainer.global_step)


def _watched(table: "ParameterTable", name: str) -> list[int]:
    """Rows of `table.values()` in which a parameter has a value of its own: 0 is the global set."""
    return list(range(len(table.row_names) + 1)) if name in table.per_row else [0]


def _named(table: "ParameterTable", name: str, rows: list[int]) -> str:
    """A parameter with the rows in question, for a sentence."""
    if name not in table.per_row:
        return name
    return f"{name} of {', '.join('the global set' if row == 0 else table.row_names[row - 1] for row in rows)}"


def oscillation(proxies: Sequence[float], num_batches: float = torch.inf) -> tuple[int, float]:
    """The period of at least 2 steps by which values repeat best, and their correlation that far apart.

    About their linear trend; 0 where no correlation comes back after it has been lower by a half. A period of which an
    epoch does not hold two is left out: there the same batches come again.

    Args:
        proxies: The values, of one step each.
        num_batches: Steps of an epoch.
    """
    values = torch.tensor(proxies, dtype=torch.float64)
    time = torch.arange(len(values), dtype=torch.float64)
    time, values = time - time.mean(), values - values.mean()
    spread = values @ values
    values = values - time * (time @ values) / (time @ time)
    power = values @ values
    best = (0, 0.0)
    if not power > 1e-12 * spread:
        return best
    lowest = torch.inf
    for lag in range(1, int(min(len(values) / LEAST_CYCLES, num_batches / 2)) + 1):
        correlation = float(values[lag:] @ values[:-lag] / power) * len(values) / (len(values) - lag)
        if correlation > max(best[1] + 0.1, lowest + 0.5):  # a multiple of the period is no better
            best = (lag, min(correlation, 1.0))
        lowest = min(lowest, correlation)
    return best


def still_moving(
    table: "ParameterTable", path: Sequence[tuple[int, list[list[float]]]], last: int
) -> dict[tuple[str, int], float]:
    """Relative change over the last fifth of a run, by parameter and row, where it is more than a tenth.

    The change is that of the means over the two halves of that fifth, doubled: a value that shakes about its
    place has converged. That of a number that may be negative is relative to its scale.

    Args:
        table: The table whose values they are.
        path: Optimiser step of each look, and the values then, as `table.values()` has them.
        last: The run's last step.
    """
    late = [values for step, values in path if step > 0.8 * last]
    if len(late) < 4:
        return {}
    values = torch.tensor(late, dtype=torch.float64)
    scale = table.vector(table.scales).cpu()
    logs = values.clamp_min(torch.finfo(torch.float64).tiny).log()
    logs = torch.where(scale > 0, values / scale.clamp_min(torch.finfo(torch.float64).tiny), logs)
    half = len(late) // 2
    change = (2 * (logs[-half:].mean(0) - logs[:half].mean(0))).expm1().tolist()
    places = [(name, row) for name in table.learned for row in _watched(table, name)]
    found = {(name, row): max(change[row][table.columns(name)], key=abs) for name, row in places}
    return {key: value for key, value in found.items() if abs(value) > STILL_MOVING}


def _mean_proxy(step: "EStep") -> Tensor:
    """Mean proxy of the images of this process that count."""
    if step.weight is None:
        return step.proxy.mean().detach()
    used = step.weight > 0
    return torch.where(used, step.proxy.detach(), 0.0).sum() / used.sum().clamp_min(1)


def _sums(step: "EStep") -> Tensor:
    """Images, images of each row, and sum and number of each of `_MEANS`; float64 `[K + 1 + 2 * 3]`."""
    rows = step.responsibilities.double()
    used = rows.new_ones(len(rows)) if step.weight is None else (step.weight > 0).double()
    similarity = step.smoothness if step.similarity is None else step.similarity
    unknown = rows.new_full((len(rows),), torch.nan)
    means = [
        _sum_and_count(torch.where(used > 0, unknown if values is None else values.double(), torch.nan))
        for values in (similarity, step.reconstruction, step.perceptual)
    ]
    return torch.cat([used.sum()[None], used @ rows, *means])


def _sum_and_count(values: Tensor) -> Tensor:
    """Sum and number of those that are not NaN, float64 `[2]`."""
    known = ~values.isnan()
    return torch.stack([torch.where(known, values.double(), 0.0).sum(), known.sum().double()])
