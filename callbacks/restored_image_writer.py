"""Writes what `predict` restores: one file for each image, and one CSV for all."""

import csv
import errno
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from callbacks._display import run_directory
from callbacks._tables import gather, keep_predictions, require_directory, write_table
from lightning_modules.imaging import (
    Picture,
    kind_of,
    output_names,
    png_name,
    read_picture,
    restored_name,
    write_picture,
)

TABLE_NAME = "restored.csv"


class RestoredImageWriter(BasePredictionWriter):
    """Writes each restored image under its name, at once, and `restored.csv` about all of them.

    It takes what `predict_step` returns: `{"restored", "noisy": [B, C, H, W], "name": list[str], "noise_std": [B],
    "parameters": {name: [B]}}`, and `"clean"` where it is known. Where the data set has `names` and `paths`, each
    result is a file of the kind that it came from, with its depth, transparency, color profile and metadata; otherwise
    a PNG, whose names keep a suffix that tells two of them apart (`a.jpg`, `a.png`: `a.jpg.png`, `a.png.png`). A file
    that no earlier run has written is never overwritten. What cannot be written is listed at the end, when all others
    are done.

    Every process writes its own images; the first writes the CSV, in the order of the input.

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
        self._journal = Path()
        self._outputs: dict[str, str] = {}
        self._sources: dict[str, Path] = {}
        self._earlier: set[str] = set()
        self._rows: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the directory, what an earlier run has left in it, and the names of the files to come."""
        default = Path(run_directory(trainer) or trainer.default_root_dir) / "restored"
        self._directory = default if self.output_dir is None else Path(self.output_dir).expanduser()
        self._journal = self._directory / f".{TABLE_NAME}.{trainer.global_rank}.part"
        self._rows = []
        self._earlier = self._earlier_outputs()
        loaders: Any = trainer.predict_dataloaders
        datasets = [loader.dataset for loader in (loaders if isinstance(loaders, list | tuple) else [loaders])]
        names = [name for dataset in datasets for name in getattr(dataset, "names", None) or () if name]
        paths = [path for dataset in datasets for path in getattr(dataset, "paths", None) or ()]
        _refuse_repeated(names)
        self._sources = dict(zip(names, paths, strict=True)) if paths else {}
        self._outputs = output_names(names, restored_name if paths else None)
        if results := [path for path in paths if path.resolve().is_relative_to(self._directory.resolve())]:
            raise ValueError(
                f"{results[0]} is a result of an earlier run and would be restored again: set output_dir to a "
                "directory that is not inside the folder of the images, or move the results away."
            )
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
        batch = batch if isinstance(batch, dict) else {}
        weight, index = batch.get("weight"), batch.get("index")
        columns = _columns(prediction)
        for i, name in enumerate(prediction["name"]):
            if weight is not None and weight[i] == 0:
                continue  # the padded repeat of an uneven distributed epoch
            image = prediction["restored"][i]
            order = (dataloader_idx, int(index[i]) if index is not None else len(self._rows))
            size = {"width": image.shape[-1], "height": image.shape[-2]}
            values = {column: value[i] for column, value in columns.items()}
            self._rows.append({"order": order, "name": name, **self._write(image, name), **size, **values})

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the CSV; raises where an image could not be written."""
        rows = gather(self._rows)
        _refuse_repeated([row["name"] for row in rows])
        failed = [f"{row['name']}: {row['failure']}" for row in rows if row["failure"]]
        rows = [row for row in rows if not row["failure"]]
        if trainer.is_global_zero:
            self._write_table(rows)
            for journal in self._journals():
                journal.unlink(missing_ok=True)
        rank_zero_info(f"restored {len(rows)} images into {self._directory}, described in {TABLE_NAME}")
        self._rows = []
        if failed:
            raise RuntimeError(f"{len(failed)} images could not be written, all others are: " + "; ".join(failed))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the CSV about what is finished; with several processes only the next run can know it all."""
        if trainer.world_size == 1:
            self._write_table([row for row in self._rows if not row["failure"]])

    def _journals(self) -> list[Path]:
        return list(self._directory.glob(f".{TABLE_NAME}.*.part"))

    def _earlier_outputs(self) -> set[str]:
        """Returns the files of earlier runs, by their table and the journals of those that were killed."""
        outputs = set()
        if (table := self._directory / TABLE_NAME).is_file():
            with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:  # as it was written
                outputs = {row.get("output") or "" for row in csv.DictReader(file)}
        for journal in self._journals():
            lines = journal.read_text().split("\n")[:-1]  # the last, if cut off, is of a file that was not begun
            outputs |= {json.loads(line) for line in lines}
        return outputs

    def _write_table(self, rows: list[dict[str, Any]]) -> None:
        columns = list(dict.fromkeys(column for row in rows for column in row if column not in ("order", "failure")))
        if rows:
            write_table(rows, self._directory / TABLE_NAME, columns)

    def _write(self, image: Tensor, name: str) -> dict[str, str]:
        # A data set that does not say which names are to come gets them with a suffix more, which keeps them apart.
        output = self._outputs.get(name) or png_name(name if name.endswith(".png") else f"{name}.png")
        target = self._directory / output
        if target.exists() and output not in self._earlier:
            _refuse_repeated([name, *(row["name"] for row in self._rows)])
            raise FileExistsError(
                f"{target} exists and is not an earlier result of RestoredImageWriter (it is not in "
                f"{self._directory / TABLE_NAME}): set output_dir to another directory, or move the file away."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._journal.open("a") as journal:  # what permits the next run to replace this file
            journal.write(json.dumps(output) + "\n")
        try:
            write_picture(_picture(image, self._sources.get(name), target), target)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            return {"output": output, "failure": str(error)}
        return {"output": output, "failure": ""}


def _picture(image: Tensor, path: Path | None, target: Path) -> Picture:
    """The restored picture in the kind of the file that it came from."""
    if path is None:
        return Picture(image)
    source = read_picture(path)
    image = image.detach().float().cpu()
    pixels = image.mean(0, keepdim=True) if len(source.pixels) == 1 else image
    kind = source.kind if target.suffix == path.suffix else kind_of(target) or "PNG"
    return replace(source, pixels=pixels, kind=kind)


def _refuse_repeated(names: list[str]) -> None:
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"RestoredImageWriter: two images are called {repeated[0]!r}; names must be unique.")


def _columns(prediction: dict[str, Any]) -> dict[str, list[float]]:
    """Returns the columns of the CSV for a batch, beside names and sizes."""
    columns = {"noise_std": prediction["noise_std"], **prediction["parameters"]}
    if "clean" in prediction:
        for column, image in (("psnr_noisy", prediction["noisy"]), ("psnr", prediction["restored"])):
            error = (image.float().clamp(0, 1) - prediction["clean"].float()).square().mean((1, 2, 3))
            columns[column] = -10 * torch.log10(error)
    return {column: value.tolist() for column, value in columns.items()}
