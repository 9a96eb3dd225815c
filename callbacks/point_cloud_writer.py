"""Writes what `predict` denoises: one PLY file for each cloud, and one CSV for all."""

from pathlib import Path
from typing import Any

from callbacks._result_writer import ResultWriter
from lightning_modules.imaging import output_names
from lightning_modules.point_clouds.files import CloudFile, read_cloud, write_ply


class PointCloudWriter(ResultWriter):
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

    samples, suffix = "clouds", ".ply"

    def output_names(self, names: list[str], from_files: bool) -> dict[str, str]:
        """File of each cloud: its name with the suffix `.ply`, which is appended where two would collide."""
        return output_names(names, suffix=self.suffix)

    def columns(self, prediction: dict[str, Any]) -> dict[str, list[Any]]:
        """Number of points, noise level, shift and parameters of each cloud."""
        shifts = [after - before for after, before in zip(prediction["restored"], prediction["noisy"], strict=True)]
        values = {column: value.tolist() for column, value in prediction["parameters"].items()}
        return {
            "points": [len(shift) for shift in shifts],
            "noise_std": prediction["noise_std"].tolist(),
            "mean_shift": [float(shift.square().sum(1).mean().sqrt()) for shift in shifts],
            **values,
        }

    def write(self, prediction: dict[str, Any], i: int, source: Path | None, target: Path) -> None:
        """Writes a cloud with everything that its source has."""
        restored, noisy = (prediction[key][i].double().cpu().numpy() for key in ("restored", "noisy"))
        if source is None:
            write_ply(CloudFile.of(restored), target)
        else:
            file = read_cloud(source)
            points = file.points
            points[file.finite] += restored - noisy  # the difference has digits that far coordinates have not
            write_ply(file.moved(points), target)
