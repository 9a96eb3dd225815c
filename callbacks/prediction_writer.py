"""Table of what `predict` returns for each image."""

from collections import Counter
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from callbacks._display import run_directory
from callbacks._predictions import decision_threshold, prediction_lines, two_classes
from callbacks._tables import Line, gather, keep_predictions, require_directory, write_table

TABLE_NAME = "predictions.csv"

_UNSURE = "unsure"
# Images from which on all with one label is worth a remark.
_MANY = 10


class PredictionWriter(BasePredictionWriter):
    """Writes `predictions.csv`: path, label and probability of each image, in the order of the files.

    It takes what `predict_step` returns, `{"probability": [B], "name": list[str], "index": [B], "weight": [B]}`, and
    adds columns where there is an `"ood_score": [B]` or, with a `"verdict": [B]`, a `"reason": list[str]`. The label is
    `unsure` where the verdict is −1, else the second of the DataModule's `class_names` where the probability is above
    the threshold, and the first elsewhere. Probabilities have all their digits, by which
    images keep their order however certain the module is. The table is there when it is complete: an interrupted run
    leaves none, and an earlier one as it was.

    Args:
        output_dir: Where to write; by default the directory of the run.
        threshold: Probability above which an image is given the second class; by default the module's `threshold`,
            which it may have found on validation images, or one half where it has none.
        keep_predictions: Let `Trainer.predict` return what the module returned too. Without, it returns None.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PredictionWriter("results")], logger=False)
    """

    def __init__(
        self, output_dir: str | None = None, threshold: float | None = None, keep_predictions: bool = False
    ) -> None:
        super().__init__(write_interval="batch")
        require_directory(self, output_dir)
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"PredictionWriter: threshold must be between 0 and 1, got {threshold}.")
        self.output_dir = output_dir
        self.threshold = threshold
        self.keep_predictions = keep_predictions
        self._path = Path()
        self._class_names: list[str] = []
        self._lines: list[Line] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the directory and the names of the classes."""
        default = run_directory(trainer) or trainer.default_root_dir
        self._path = Path(default if self.output_dir is None else self.output_dir) / TABLE_NAME
        self._class_names = two_classes(self, trainer)
        self._lines = []
        keep_predictions(trainer, self.keep_predictions)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keeps one batch: a few numbers an image."""
        self._lines += prediction_lines(self, f"{type(pl_module).__name__}.predict_step", prediction, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the table."""
        lines = gather(self._lines)
        self._lines = []
        threshold = decision_threshold(pl_module) if self.threshold is None else self.threshold
        for line in lines:
            is_unsure = line.get("verdict", 0) < 0
            line["label"] = _UNSURE if is_unsure else self._class_names[line["probability"] > threshold]
        known = [column for column in ("ood_score", "reason") if any(column in line for line in lines)]
        if trainer.is_global_zero:
            write_table(lines, self._path, ["path", "label", "probability", *known])
        counts = Counter(line["label"] for line in lines)
        found = ", ".join(f"{number} {label}" for label, number in sorted(counts.items()))
        rank_zero_info(
            f"{found or 'no image'} (probability above {threshold:.3g}: {self._class_names[1]}): {self._path}"
        )
        if len(counts) == 1 and len(lines) >= _MANY:
            rank_zero_info(
                f"all {len(lines)} images are labelled {next(iter(counts))}: where they are known to be mixed, the "
                "detector does not reach them"
            )
