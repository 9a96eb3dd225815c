"""What can go wrong while parameters are learned, seen while it happens and said once, with the remedy."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from callbacks._display import at_bound, em_table, require_positive, tensorboard_loggers

if TYPE_CHECKING:
    from lightning_modules.em import EStep, ParameterTable

# Mean similarity over the edges under which the patches of a graph have next to nothing in common.
LEAST_SIMILARITY = 0.3
# Mean edge weights outside which a graph joins nothing, or everything alike.
DEAD_WEIGHT, COMPLETE_WEIGHT = 1e-3, 0.95
# Correlation of successive proxies below which they alternate. Independent ones of a window of 40 reach −0.5 once in a
# thousand times; two batches that share out an epoch have −0.5 by themselves.
ALTERNATION = -0.7
LEAST_BATCHES = 4
# Images that a row would have in an equal share before it is said to get none.
IMAGES_PER_ROW = 10
# Relative movement over the last fifth of the run above which a parameter has not come to rest.
STILL_MOVING = 0.1


class EMHealth(Callback):
    """Reads the run while it runs, and names what it sees, once, with what to do about it.

    It looks for parameters (the global ones, or those of the rows where a parameter has rows) that rest on a bound, a
    loss proxy that alternates, a graph whose patches have nothing in common or whose edges are all dead or all alike, a
    row that gets no images, and parameters that still move at the end. Findings go to the log, to TensorBoard's text
    page under `em/health`, and below the closing table of `EMReport`. It reads the device only on steps that log
    (`log_every_n_steps`).

    Args:
        patience: Looks in a row that must see the same before it is said.
        window: Optimiser steps over which the proxy is watched for alternation; each window is looked at once.

    Raises:
        ValueError: If an argument is below its least value.

    Example:
        >>> EMHealth(patience=5).findings
        {}
    """

    def __init__(self, patience: int = 3, window: int = 40) -> None:
        require_positive(self, patience=patience)
        if window < 40:
            raise ValueError(f"EMHealth: window must be at least 40 steps, or chance alternates too, got {window}")
        self.patience = patience
        self.window = window
        self.findings: dict[str, str] = {}
        self._seen: dict[str, int] = {}
        self._proxies: list[Tensor] = []
        self._sums: Tensor | None = None
        self._rows: list[float] = []
        self._path: list[tuple[int, list[list[float]]]] = []
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins a new record."""
        self.findings, self._seen, self._path, self._proxies, self._rows = {}, {}, [], [], []
        self._sums, self._last_step = None, trainer.global_step

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
        # A few batches that take turns alternate by their own contents.
        if len(self._proxies) < self.window and trainer.num_training_batches >= LEAST_BATCHES:
            self._proxies.append(_mean_proxy(step))
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and trainer.global_step % every == 0:
            self._look(trainer, pl_module, table, batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what has not come to rest."""
        table = em_table(pl_module)
        if table is None:
            return
        moving = still_moving(table, self._path, trainer.global_step)
        for name in table.learned:
            changes = {row: change for (parameter, row), change in moving.items() if parameter == name}
            if changes:
                largest = max(changes.values(), key=abs)
                self._say(
                    trainer,
                    f"moving/{name}",
                    f"{_named(table, name, list(changes))} moved by {largest:+.0%} over the last fifth of the run: "
                    "train longer, or raise the rule's step",
                )

    def _look(self, trainer: Trainer, pl_module: LightningModule, table: "ParameterTable", batch: Any) -> None:
        assert self._sums is not None
        weight = _edge_weight(pl_module, batch)
        local = self._sums if weight is None else torch.cat([self._sums, weight])
        total = trainer.strategy.reduce(local.clone(), reduce_op="sum").tolist()
        self._sums = torch.zeros_like(self._sums)
        values = table.values().tolist()
        self._path.append((trainer.global_step, values))
        images, similarity, with_similarity, *rows = total[: 3 + len(table.row_names)]
        self._look_at_bounds(trainer, table, values)
        if len(self._proxies) == self.window:
            correlation = alternation(torch.stack(self._proxies).tolist())
            self._proxies.clear()
            self._note(
                trainer,
                "alternation",
                correlation < ALTERNATION,
                f"the loss proxy alternates from step to step (correlation {correlation:.2f}): lower the rule's step "
                "(lr of GradientRule, rates of SignRule, radius of the others) or the network's learning rate",
            )
        if with_similarity:
            mean = similarity / with_similarity
            self._note(
                trainer,
                "similarity",
                mean < LEAST_SIMILARITY,
                f"the mean similarity of neighbouring patches is {mean:.2g}, under {LEAST_SIMILARITY}: raise sigma or "
                "its upper bound, and check that the noise level the diffusion is told is that of the images",
            )
        if weight is not None and total[-1]:
            self._look_at_weight(trainer, total[-2] / total[-1])
        self._look_at_rows(trainer, table, [images, *rows])

    def _look_at_bounds(self, trainer: Trainer, table: "ParameterTable", values: list[list[float]]) -> None:
        for name in table.learned:
            lower, upper = table.bounds[name]
            for side, bound in (("lower", lower), ("upper", upper)):
                column = table.names.index(name)
                resting = [row for row in _watched(table, name) if at_bound(values[row][column], bound)]
                rests = "rests" if len(resting) == 1 else "rest"
                self._note(
                    trainer,
                    f"bound/{name}/{side}",
                    lower < upper and bool(resting),
                    f"{_named(table, name, resting)} {rests} on its {side} bound {bound:g}: widen em_parameters.bounds "
                    "for it, unless it is meant to stop there",
                )

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

    def _look_at_weight(self, trainer: Trainer, weight: float) -> None:
        self._note(
            trainer,
            "graph/dead",
            weight < DEAD_WEIGHT,
            f"the graph is dead: its mean edge weight is {weight:.2g}. Raise sigma_f, or tell the diffusion the noise "
            "level of the images, whose part of the distances it then takes off",
        )
        self._note(
            trainer,
            "graph/complete",
            weight > COMPLETE_WEIGHT,
            f"the graph joins everything alike: its mean edge weight is {weight:.2f}. Lower sigma_f or the noise level "
            "the diffusion is told",
        )

    def _note(self, trainer: Trainer, key: str, seen: bool, message: str) -> None:
        self._seen[key] = self._seen.get(key, 0) + 1 if seen else 0
        if self._seen[key] >= self.patience:
            self._say(trainer, key, message)

    def _say(self, trainer: Trainer, key: str, message: str) -> None:
        if key in self.findings:
            return
        self.findings[key] = message
        rank_zero_warn(f"EMHealth at step {trainer.global_step}: {message}.")
        if trainer.is_global_zero:
            for logger in tensorboard_loggers(trainer):
                text = "\n".join(f"- {finding}" for finding in self.findings.values())
                logger.experiment.add_text("em/health", text, trainer.global_step)


def _watched(table: "ParameterTable", name: str) -> list[int]:
    """Rows of `table.values()` that restore images: 0 is the global set, which serves where a parameter has no rows."""
    return list(range(1, len(table.row_names) + 1)) if name in table.per_row and table.row_names else [0]


def _named(table: "ParameterTable", name: str, rows: list[int]) -> str:
    """A parameter with the rows in question, for a sentence."""
    labels = [table.row_names[row - 1] for row in rows if row > 0]
    return f"{name} of {', '.join(labels)}" if labels else name


def alternation(proxies: Sequence[float]) -> float:
    """Correlation of successive values about their linear trend: −1 where they alternate, 0 where unrelated."""
    values = torch.tensor(proxies, dtype=torch.float64)
    time = torch.arange(len(values), dtype=torch.float64)
    time = time - time.mean()
    values = values - values.mean()
    spread = values @ values
    values = values - time * (time @ values) / (time @ time)
    power = values @ values
    return float((values[1:] @ values[:-1]) / power) if power > 1e-12 * spread else 0.0


def still_moving(
    table: "ParameterTable", path: Sequence[tuple[int, list[list[float]]]], last: int
) -> dict[tuple[str, int], float]:
    """Relative change over the last fifth of a run, by parameter and row, where it is more than a tenth.

    The change is that of the means over the two halves of that fifth, doubled: a value that shakes about its place has
    come to rest.

    Args:
        table: The table whose values they are.
        path: Optimiser step of each look, and the values then, as `table.values()` has them.
        last: The run's last step.
    """
    late = [values for step, values in path if step > 0.8 * last]
    if len(late) < 4:
        return {}
    logs = torch.tensor(late, dtype=torch.float64).clamp_min(torch.finfo(torch.float64).tiny).log()
    half = len(late) // 2
    change = (2 * (logs[-half:].mean(0) - logs[:half].mean(0))).expm1().tolist()
    found = {(n, row): change[row][table.names.index(n)] for n in table.learned for row in _watched(table, n)}
    return {place: value for place, value in found.items() if abs(value) > STILL_MOVING}


def _mean_proxy(step: "EStep") -> Tensor:
    """Mean proxy of the images of this process that count."""
    if step.weight is None:
        return step.proxy.mean().detach()
    used = step.weight > 0
    return torch.where(used, step.proxy.detach(), 0.0).sum() / used.sum().clamp_min(1)


def _sums(step: "EStep") -> Tensor:
    """Images, similarity, images with a similarity, and images of each row; float64 `[3 + K]`."""
    rows = step.responsibilities.double()
    used = rows.new_ones(len(rows)) if step.weight is None else (step.weight > 0).double()
    similarity = step.smoothness if step.similarity is None else step.similarity
    known = torch.zeros_like(used) if similarity is None else used
    value = known if similarity is None else torch.where(known > 0, similarity.double(), 0.0)
    return torch.cat([torch.stack([used.sum(), value.sum(), known.sum()]), used @ rows])


def _edge_weight(pl_module: LightningModule, batch: Any) -> Tensor | None:
    """Sum and number of the mean edge weights of the batch's images, from modules that offer `mean_edge_weight`."""
    measure = getattr(pl_module, "mean_edge_weight", None)
    if measure is None:
        return None
    with torch.no_grad():
        weight = measure(batch)
    if weight is None:
        return None
    weight = weight.double()
    return torch.stack([weight.sum(), weight.new_tensor(float(len(weight)))])
