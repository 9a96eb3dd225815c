"""What the callbacks take from a detector and its DataModule."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks._tables import Row


class Files(Protocol):
    """Image files of a split, in the order of the batches' `index`."""

    paths: list[Path]
    names: list[str]
    labels: Tensor  # [N], int64


class DetectorData(Protocol):
    """A DataModule with images of two classes, tested under one or more conditions."""

    class_names: list[str]
    conditions: list[str]  # one test loader each, all over the same images

    def files(self, split: str) -> Files:
        """Returns the files of `train` or `test`."""

    def read(self, path: Path, condition: str = "clean") -> Tensor:
        """Returns a whole image `[3, H, W]`, uint8, as it is under a condition."""

    def mirrors(self, height: int, width: int, condition: str = "clean") -> bool:
        """Tells whether an image of a size is smaller than a crop under a condition, and continued by its mirror."""


@dataclass(frozen=True)
class Judgements:
    """What the detector said about images under one condition.

    Shape:
        - index: [N], int64, positions in the list of test files
        - probability: [N], float64
        - label: [N], int64
    """

    index: Tensor
    probability: Tensor
    label: Tensor


def two_classes(owner: object, trainer: Trainer) -> list[str]:
    """Returns the names of the DataModule's two classes, that of probability 0 first."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    names = list(getattr(data, "class_names", []))
    if len(names) != 2:
        raise TypeError(
            f"{type(owner).__name__} needs a DataModule whose class_names are two, such as GeneratedImagesDataModule; "
            f"got {names or type(data).__name__}."
        )
    return names


def decision_threshold(pl_module: LightningModule) -> float:
    """Returns the probability above which the module calls an image one of the second class; by default one half."""
    return float(getattr(pl_module, "threshold", 0.5))


def image_rows(owner: object, step: str, output: Any, dataloader_idx: int) -> list[Row]:
    """Returns a row for each image of a batch that is no padded repeat; `order` sorts those of all processes."""
    wanted = ("probability", "name", "index", "weight")
    if not isinstance(output, dict) or any(name not in output for name in wanted):
        got = sorted(output) if isinstance(output, dict) else type(output).__name__
        raise TypeError(f"{type(owner).__name__} needs a dict with {', '.join(wanted)} from {step}; got {got}.")
    columns = {
        column: output[column].detach().cpu().tolist()
        for column in ("probability", "index", "weight", "label", "novelty")
        if column in output
    }
    return [
        {
            "order": (dataloader_idx, columns["index"][i]),
            "path": name,
            **{column: values[i] for column, values in columns.items()},
        }
        for i, name in enumerate(output["name"])
        if columns["weight"][i] != 0
    ]


def judgements(rows: list[Row], conditions: list[str]) -> dict[str, Judgements]:
    """Sorts rows by condition, that is by loader; `limit_test_batches` may leave some conditions without any."""
    result = {}
    for place, condition in enumerate(conditions):
        found = [row for row in rows if row["order"][0] == place]
        if found:
            result[condition] = Judgements(
                torch.tensor([row["order"][1] for row in found]),
                torch.tensor([row["probability"] for row in found], dtype=torch.float64),
                torch.tensor([row["label"] for row in found]),
            )
    return result


def worst_mistakes(judged: Judgements, threshold: float, most: int) -> list[int]:
    """Returns positions of the images on the wrong side of the threshold, the farthest from their label first."""
    wrong = (judged.probability > threshold) != (judged.label == 1)
    distance = (judged.probability - judged.label).abs().where(wrong, torch.tensor(-1.0, dtype=torch.float64))
    return distance.argsort(descending=True, stable=True)[: min(most, int(wrong.sum()))].tolist()
