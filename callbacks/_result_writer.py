"""Files of what `predict` restores, one for each sample, and a table about all of them."""

import csv
import errno
import json
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from callbacks._display import run_directory
from callbacks._tables import Line, gather, keep_predictions, require_directory, write_table

TABLE_NAME = "restored.csv"
_NEEDED = ("restored", "noisy", "name", "noise_std", "parameters")


class ResultWriter(BasePredictionWriter, ABC):
    """Writes each result at once, under a name that is free or that an earlier run has written, and `restored.csv`.

    Names of written files go into a journal before the files, so that the next run knows those of one that was killed.
    What cannot be written is listed at the end, when all others are done.

    Args:
        output_dir: Where to write; by default `restored` in the directory of the run.
        keep_predictions: Let `Trainer.predict` return the results too.
    """

    # What the samples are, in messages; and how their files end unless they keep the format of their source.
    samples: ClassVar[str]
    suffix: ClassVar[str]

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
        self._lines: list[Line] = []

    @abstractmethod
    def output_names(self, names: list[str], from_files: bool) -> dict[str, str]:
        """File of each sample, below the directory."""

    @abstractmethod
    def columns(self, prediction: dict[str, Any]) -> dict[str, list[Any]]:
        """What the table has of the samples of a batch, beside their names."""

    @abstractmethod
    def write(self, prediction: dict[str, Any], i: int, source: Path | None, target: Path) -> None:
        """Writes a sample of a batch; the file that it came from is known where the data set has paths."""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the directory, what an earlier run has left in it, and the names of the files to come."""
        default = Path(run_directory(trainer) or trainer.default_root_dir) / "restored"
        self._directory = default if self.output_dir is None else Path(self.output_dir).expanduser()
        self._journal = self._directory / f".{TABLE_NAME}.{trainer.global_rank}.part"
        self._lines = []
        self._earlier = self._earlier_outputs()
        loaders: Any = trainer.predict_dataloaders
        datasets = [loader.dataset for loader in (loaders if isinstance(loaders, list | tuple) else [loaders])]
        names = [name for dataset in datasets for name in getattr(dataset, "names", None) or () if name]
        paths = [path for dataset in datasets for path in getattr(dataset, "paths", None) or ()]
        self._refuse_repeated(names)
        self._sources = dict(zip(names, paths, strict=True)) if paths else {}
        self._outputs = self.output_names(names, bool(paths))
        if results := [path for path in paths if path.resolve().is_relative_to(self._directory.resolve())]:
            raise ValueError(
                f"{results[0]} is a result of an earlier run and would be restored again: set output_dir to a "
                f"directory that is not inside the folder of the {self.samples}, or move the results away."
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
        if missing := [name for name in _NEEDED if name not in prediction]:
            raise TypeError(
                f"{type(self).__name__} needs {', '.join(_NEEDED)} from {type(pl_module).__name__}.predict_step; "
                f"{', '.join(missing)} is missing."
            )
        batch = batch if isinstance(batch, dict) else {}
        weight, index = batch.get("weight"), batch.get("index")
        columns = self.columns(prediction)
        for i, name in enumerate(prediction["name"]):
            if weight is not None and weight[i] == 0:
                continue  # the padded repeat of an uneven distributed epoch
            order = (dataloader_idx, int(index[i]) if index is not None else len(self._lines))
            # A data set that does not say which names are to come gets them with a suffix more, which keeps them apart.
            whole = name if name.endswith(self.suffix) else name + self.suffix
            output = self._outputs.get(name) or self.output_names([whole], False)[whole]
            target = self._claim(output, name)
            failure = ""
            try:
                self.write(prediction, i, self._sources.get(name), target)
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                failure = str(error)
            values = {column: value[i] for column, value in columns.items()}
            self._lines.append({"order": order, "name": name, "output": output, "failure": failure, **values})

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the CSV; raises where a result could not be written."""
        lines = gather(self._lines)
        self._refuse_repeated([line["name"] for line in lines])
        failed = [f"{line['name']}: {line['failure']}" for line in lines if line["failure"]]
        lines = [line for line in lines if not line["failure"]]
        if trainer.is_global_zero:
            self._write_table(lines)
            for journal in self._journals():
                journal.unlink(missing_ok=True)
        rank_zero_info(f"restored {len(lines)} {self.samples} into {self._directory}, described in {TABLE_NAME}")
        self._lines = []
        if failed:
            raise RuntimeError(
                f"{len(failed)} {self.samples} could not be written, all others are: " + "; ".join(failed)
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the CSV about what is finished; with several processes only the next run can know it all."""
        if trainer.world_size == 1:
            self._write_table([line for line in self._lines if not line["failure"]])

    def _claim(self, output: str, name: str) -> Path:
        """Path to write to, which is another's file in no case."""
        target = self._directory / output
        if target.exists() and output not in self._earlier:
            self._refuse_repeated([name, *(line["name"] for line in self._lines)])
            raise FileExistsError(
                f"{target} exists and is not an earlier result of {type(self).__name__} (it is not in "
                f"{self._directory / TABLE_NAME}): set output_dir to another directory, or move the file away."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._journal.open("a") as journal:  # what permits the next run to replace this file
            journal.write(json.dumps(output) + "\n")
        return target

    def _journals(self) -> list[Path]:
        return list(self._directory.glob(f".{TABLE_NAME}.*.part"))

    def _earlier_outputs(self) -> set[str]:
        """Returns the files of earlier runs, by their table and the journals of those that were killed."""
        outputs = set()
        if (table := self._directory / TABLE_NAME).is_file():
            with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:  # as it was written
                outputs = {line.get("output") or "" for line in csv.DictReader(file)}
        for journal in self._journals():
            lines = journal.read_text().split("\n")[:-1]  # the last, if cut off, is of a file that was not begun
            outputs |= {json.loads(line) for line in lines}
        return outputs

    def _write_table(self, lines: list[Line]) -> None:
        columns = list(dict.fromkeys(column for line in lines for column in line if column not in ("order", "failure")))
        if lines:
            write_table(lines, self._directory / TABLE_NAME, columns)

    def _refuse_repeated(self, names: list[str]) -> None:
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(
                f"{type(self).__name__}: two {self.samples} are called {repeated[0]!r}; names must be unique."
            )
