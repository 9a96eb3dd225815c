"""Writes what `predict` restores: one file for each image, and one CSV for all."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from callbacks._result_writer import ResultWriter
from lightning_modules.imaging import (
    Picture,
    kind_of,
    output_names,
    read_picture,
    restored_name,
    write_picture,
)


class RestoredImageWriter(ResultWriter):
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

    samples, suffix = "images", ".png"

    def output_names(self, names: list[str], from_files: bool) -> dict[str, str]:
        """File of each image: of the kind that it came from, or a PNG."""
        return output_names(names, restored_name if from_files else None)

    def columns(self, prediction: dict[str, Any]) -> dict[str, list[Any]]:
        """Size, noise level and parameters of each image, and its PSNR where the clean one is known."""
        columns = {"noise_std": prediction["noise_std"], **prediction["parameters"]}
        if "clean" in prediction:
            for column, image in (("psnr_noisy", prediction["noisy"]), ("psnr", prediction["restored"])):
                error = (image.float().clamp(0, 1) - prediction["clean"].float()).square().mean((1, 2, 3))
                columns[column] = -10 * torch.log10(error)
        sizes = [image.shape for image in prediction["restored"]]
        size = {"width": [size[-1] for size in sizes], "height": [size[-2] for size in sizes]}
        return size | {column: value.tolist() for column, value in columns.items()}

    def write(self, prediction: dict[str, Any], i: int, source: Path | None, target: Path) -> None:
        """Writes an image in the kind of its source."""
        write_picture(_picture(prediction["restored"][i], source, target), target)


def _picture(image: Tensor, path: Path | None, target: Path) -> Picture:
    """The restored picture in the kind of the file that it came from."""
    if path is None:
        return Picture(image)
    source = read_picture(path)
    image = image.detach().float().cpu()
    pixels = image.mean(0, keepdim=True) if len(source.pixels) == 1 else image
    kind = source.kind if target.suffix == path.suffix else kind_of(target) or "PNG"
    return replace(source, pixels=pixels, kind=kind)
