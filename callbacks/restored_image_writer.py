"""Writer of what `predict` restores: one PNG for each image, and one CSV for all."""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from callbacks._display import run_directory
from callbacks._tables import gather, keep_predictions, require_directory, write_table
from lightning_modules.imaging import output_names, png_name, write_png

TABLE_NAME = "restored.csv"


class RestoredImageWriter(BasePredictionWriter):
    """Writes each restored image as a PNG of the same name and size, and `restored.csv` about all of them.

    It takes what `predict_step` returns: `{"restored", "noisy": [B, C, H, W], "name": list[str], "noise_std": [B],
    "parameters": {name: [B]}}`, and `"clean"` where it is known. Images that differ only in their suffix (`a.jpg`,
    `a.png`) keep it: `a.jpg.png`, `a.png.png`. A file that no earlier run has written is never overwritten.

    While it runs, files are called `NAME.part.png`: which names collide is known at the end. Every process writes its
    own images; the first writes the CSV, in the order of the input.

    Args:
        output_dir: Where to write; by default `restored` in the directory of the run.
        keep_predictions: Let `Trainer.predict` return the images too. Without, it returns None: it would otherwise
            collect all of them in memory.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RestoredImageWriter("restored")], logger=False)
    """

    def __init__(self, output_dir: str | None = None, keep_predictions: bool = False) -> None:
        super().__init__(write_interval="batch")
        require_directory(self, output_dir)
        self.output_dir = output_dir
        self.keep_predictions = keep_predictions
        self._directory = Path()
        self._earlier: set[str] = set()
        self._lines: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the directory, and what an earlier run has left in it."""
        default = Path(run_directory(trainer) or trainer.default_root_dir) / "restored"
        self._directory = default if self.output_dir is None else Path(self.output_dir).expanduser()
        self._lines = []
        self._earlier = _outputs_of(self._directory / TABLE_NAME)
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
        """Writes one batch."""
        wanted = ("restored", "noisy", "name", "noise_std", "parameters")
        missing = [name for name in wanted if name not in prediction]
        if missing:
            raise TypeError(
                f"RestoredImageWriter needs {', '.join(wanted)} from {type(pl_module).__name__}.predict_step; "
                f"{', '.join(missing)} is missing."
            )
        weight = batch.get("weight") if isinstance(batch, dict) else None
        index = batch.get("index") if isinstance(batch, dict) else None
        columns = _columns(prediction)
        for i, name in enumerate(prediction["name"]):
            if weight is not None and weight[i] == 0:
                continue  # the padded repeat of an uneven distributed epoch
            self._refuse_foreign(self._directory / png_name(name))
            image = prediction["restored"][i]
            write_png(image, self._directory / _provisional(name))
            order = (dataloader_idx, int(index[i]) if index is not None else len(self._lines))
            size = {"width": image.shape[-1], "height": image.shape[-2]}
            values = {column: value[i] for column, value in columns.items()}
            self._lines.append({"order": order, "name": name, "output": "", **size, **values})

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives every file its name, and writes the CSV."""
        lines = gather(self._lines)
        count = Counter(line["name"] for line in lines)
        if repeated := [name for name in count if count[name] > 1]:
            raise ValueError(f"RestoredImageWriter: two images are called {repeated[0]!r}; names must be unique.")
        names = output_names(list(count))
        for line in lines:
            line["output"] = names[line["name"]]
        # The table comes first: it is what permits the next run to replace these files.
        if trainer.is_global_zero and lines:
            columns = list(dict.fromkeys(column for line in lines for column in line if column != "order"))
            write_table(lines, self._directory / TABLE_NAME, columns)
        for line in self._lines:
            target = self._directory / names[line["name"]]
            self._refuse_foreign(target)
            (self._directory / _provisional(line["name"])).replace(target)
        rank_zero_info(f"restored {len(lines)} images into {self._directory}, described in {TABLE_NAME}")
        self._lines = []

    def _refuse_foreign(self, path: Path) -> None:
        if path.exists() and path.relative_to(self._directory).as_posix() not in self._earlier:
            raise FileExistsError(
                f"{path} exists and is not an earlier result of RestoredImageWriter (it is not in "
                f"{self._directory / TABLE_NAME}): set output_dir to another directory, or move the file away."
            )


def _columns(prediction: dict[str, Any]) -> dict[str, list[float]]:
    """Returns the columns of the CSV for a batch, beside names and sizes."""
    columns = {"noise_std": prediction["noise_std"], **prediction["parameters"]}
    if "clean" in prediction:
        for column, image in (("psnr_noisy", prediction["noisy"]), ("psnr", prediction["restored"])):
            error = (image.float().clamp(0, 1) - prediction["clean"].float()).square().mean((1, 2, 3))
            columns[column] = -10 * torch.log10(error)
    return {column: value.tolist() for column, value in columns.items()}


def _provisional(name: str) -> str:
    return f"{name}.part.png"


def _outputs_of(path: Path) -> set[str]:
    """Returns the files that an earlier run has written, by its table."""
    if not path.is_file():
        return set()
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:  # as it was written
        return {line.get("output") or "" for line in csv.DictReader(file)}
