"""Lightning's record of an epoch that was interrupted, brought into a form that resumes without loss."""

from __future__ import annotations

from typing import Any


class FitRecord:
    """The progress of `fit` in a checkpoint, for a module whose M-step is the end of the epoch.

    By itself Lightning counts an epoch as over when the checkpoint is from its last batch, and never runs its end; and
    it lets a loader that cannot go on in the middle of an epoch begin anew, as if that were the rest of it.

    Args:
        loops: What the checkpoint holds as `loops`; changed in place.
    """

    def __init__(self, loops: dict[str, Any]) -> None:
        self._fit = loops["fit_loop"]
        self._epoch = self._fit["epoch_progress"]
        self._batch = self._fit["epoch_loop.batch_progress"]

    @property
    def in_epoch(self) -> bool:
        """Whether an epoch has begun and not ended."""
        return self._epoch["current"]["started"] > self._epoch["current"]["processed"]

    @property
    def loader_goes_on(self) -> bool:
        """Whether the loaders have kept where they were."""
        return bool(self._fit["state_dict"].get("combined_loader"))

    @property
    def batches(self) -> int:
        """Batches of the epoch that Lightning takes as done when it resumes."""
        current = self._batch["current"]
        # in the hooks that end a batch it is processed, and not completed yet
        return current["processed"] if current["processed"] == current["started"] else current["completed"]

    def finish_batch(self) -> None:
        """Where the epoch's last batch is done, leave its end, and the validation before it, to be run."""
        current, total = self._batch["current"], self._batch["total"]
        if self._batch["is_last_batch"] and current["completed"] == current["processed"] - 1:
            current["completed"], total["completed"] = current["processed"], total["processed"]
            self._fit["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
            validation = self._fit["epoch_loop.val_loop.batch_progress"]
            for counts in (validation["total"], validation["current"]):  # as if interrupted in its first batch
                counts.update(ready=1, started=1, processed=0, completed=0)

    def rewind(self) -> None:
        """Go back to the start of the epoch that was interrupted."""
        for counts in (self._epoch["total"], self._epoch["current"]):
            counts.update(dict.fromkeys(counts, counts["completed"]))
        self._leave_epoch(undo=True)
        step = self._fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
        self._fit["epoch_loop.state_dict"]["_batches_that_stepped"] = step["total"]["completed"]

    def finish_epoch(self) -> None:
        """Where the epoch has ended, begin the next one; with `max_steps` Lightning would end it twice."""
        for counts in (self._epoch["total"], self._epoch["current"]):
            counts.update(dict.fromkeys(counts, counts["processed"]))
        self._leave_epoch(undo=False)

    def _leave_epoch(self, undo: bool) -> None:
        """Set the counts of this epoch to zero, and take them from the totals where it is undone."""
        optimizer = self._fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        progress = (self._batch, self._fit["epoch_loop.scheduler_progress"], optimizer["step"], optimizer["zero_grad"])
        for counts in progress:
            for name, count in counts["current"].items():
                if undo:
                    counts["total"][name] -= count
                counts["current"][name] = 0
        self._batch["is_last_batch"] = False
        self._fit["state_dict"].pop("combined_loader", None)
