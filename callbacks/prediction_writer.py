"""Writes what `predict` says about each image into one table."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from callbacks._display import run_directory
from callbacks._tables import Row, gather, keep_predictions, require_directory, write_table
from callbacks.detector_report.evaluation import decision_threshold, image_rows, two_classes

TABLE_NAME = "predictions.csv"


class PredictionWriter(BasePredictionWriter):
    """Writes `predictions.csv`: path, label and probability of each image, in the order of the files.

    It takes what `predict_step` returns, `{"probability": [B], "name": list[str], "index": [B], "weight": [B]}`, and
    adds a column where there is a `"novelty": [B]`. The label is the second of the DataModule's `class_names` where the
    probability is above the threshold, and the first elsewhere. Probabilities have all their digits, by which images
    keep their order however certain the module is. The table is there when it is complete: an interrupted
    run leaves none, and an earlier one as it was.

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
            raise ValueError(f"PredictionWriter: threshold must lie between 0 and 1, got {threshold}.")
        self.output_dir = output_dir
        self.threshold = threshold
        self.keep_predictions = keep_predictions
        self._path = Path()
        self._class_names: list[str] = []
        self._rows: list[Row] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the directory and the names of the classes."""
        default = run_directory(trainer) or trainer.default_root_dir
        self._path = Path(default if self.output_dir is None else self.output_dir) / TABLE_NAME
        self._class_names = two_classes(self, trainer)
        self._rows = []
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
        self._rows += image_rows(self, f"{type(pl_module).__name__}.predict_step", prediction, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the table."""
        rows = gather(self._rows)
        self._rows = []
        threshold = decision_threshold(pl_module) if self.threshold is None else self.threshold
        for row in rows:
            row["label"] = self._class_names[row["probability"] > threshold]
        columns = ["path", "label", "probability"] + ["novelty"] * any("novelty" in row for row in rows)
        if trainer.is_global_zero:
            write_table(rows, self._path, columns)
        called = sum(row["label"] == self._class_names[1] for row in rows)
        rank_zero_info(
            f"{called} of {len(rows)} images are called {self._class_names[1]} (probability above {threshold:.3g}): "
            f"{self._path}"
        )
