"""Writes what `predict` denoises: one PLY file for each cloud, and one CSV for all."""

import csv
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from callbacks._display import run_directory
from callbacks._tables import gather, keep_predictions, require_directory, write_table
from lightning_modules.point_clouds.files import CloudFile, read_cloud, write_ply

TABLE_NAME = "restored.csv"


class PointCloudWriter(BasePredictionWriter):
    """Writes each denoised cloud as a PLY file, at once, and `restored.csv` about all of them.

    It takes what `predict_step` returns: `{"restored", "noisy": list of [N, 3], "name": list[str], "noise_std": [B],
    "parameters": {name: [B]}}`. Where the data set has `names` and `paths`, a result has everything that its source
    holds, in its order and precision, faces and points that are not finite included: only coordinates are new. A file
    that no earlier run has written is never overwritten. Every process writes its own clouds; the first writes the CSV.

    Args:
        output_dir: Where to write; by default `restored` in the directory of the run.
        keep_predictions: Let `Trainer.predict` return the clouds too.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PointCloudWriter("restored")], logger=False)
    """

    def __init__(self, output_dir: str | None = None, keep_predictions: bool = False) -> None:
        super().__init__(write_interval="batch")
        require_directory(self, output_dir)
        self.output_dir = output_dir
        self.keep_predictions = keep_predictions
        self._directory = Path()
        self._sources: dict[str, Path] = {}
        self._outputs: dict[str, str] = {}
        self._earlier: set[str] = set()
        self._lines: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the directory, what an earlier run has left in it, and the names of the files to come."""
        default = Path(run_directory(trainer) or trainer.default_root_dir) / "restored"
        self._directory = default if self.output_dir is None else Path(self.output_dir).expanduser()
        self._lines = []
        self._earlier = set()
        if (table := self._directory / TABLE_NAME).is_file():
            with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                self._earlier = {line.get("output") or "" for line in csv.DictReader(file)}
        loaders: Any = trainer.predict_dataloaders
        dataset = (loaders[0] if isinstance(loaders, list | tuple) else loaders).dataset
        names, paths = getattr(dataset, "names", None) or [], getattr(dataset, "paths", None) or []
        self._sources = dict(zip(names, paths, strict=True))
        if results := [path for path in paths if path.resolve().is_relative_to(self._directory.resolve())]:
            raise ValueError(
                f"{results[0]} is a result of an earlier run and would be denoised again: set output_dir to a "
                "directory that is not inside the folder of the clouds, or move the results away."
            )
        plain = {name: str(PurePosixPath(name).with_suffix(".ply")) for name in names}
        count = Counter(output.casefold() for output in plain.values())
        self._outputs = {n: output if count[output.casefold()] == 1 else f"{n}.ply" for n, output in plain.items()}
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
        weight, index = batch["weight"].tolist(), batch["index"].tolist()
        for i, name in enumerate(prediction["name"]):
            if weight[i] == 0:
                continue  # the padded repeat of an uneven distributed epoch
            restored, noisy = (prediction[key][i].double().cpu().numpy() for key in ("restored", "noisy"))
            output = self._outputs.get(name, f"{name}.ply")
            target = self._directory / output
            if target.exists() and output not in self._earlier:
                raise FileExistsError(
                    f"{target} exists and is not an earlier result of PointCloudWriter (it is not in "
                    f"{self._directory / TABLE_NAME}): set output_dir to another directory, or move the file away."
                )
            if name in self._sources:
                source = read_cloud(self._sources[name])
                points = source.points.copy()
                points[source.finite] += restored - noisy  # the difference has digits that far coordinates have not
                write_ply(source.moved(points), target)
            else:
                write_ply(CloudFile.of(restored), target)
            values = {key: float(value[i]) for key, value in prediction["parameters"].items()}
            shift = float(np.sqrt(np.square(restored - noisy).sum(1).mean()))
            line = {"name": name, "output": output, "points": len(restored)}
            level = float(prediction["noise_std"][i])
            self._lines.append({"order": index[i], **line, "noise_std": level, "mean_shift": shift, **values})

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the CSV."""
        lines = gather(self._lines)
        self._lines = []
        if trainer.is_global_zero and lines:
            write_table(lines, self._directory / TABLE_NAME, [column for column in lines[0] if column != "order"])
        rank_zero_info(f"denoised {len(lines)} clouds into {self._directory}, described in {TABLE_NAME}")
