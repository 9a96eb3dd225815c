"""Predictions of a detector as the callbacks take them."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from callbacks._tables import Line


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
    """Returns the probability above which the module predicts the second class; by default one half."""
    return float(getattr(pl_module, "threshold", 0.5))


def prediction_lines(owner: object, step: str, output: Any, dataloader_idx: int) -> list[Line]:
    """Returns a line for each image of a batch but the padded repeats; `order` sorts those of all processes."""
    wanted = ("probability", "name", "index", "weight")
    if not isinstance(output, dict) or any(name not in output for name in wanted):
        got = sorted(output) if isinstance(output, dict) else type(output).__name__
        raise TypeError(f"{type(owner).__name__} needs a dict with {', '.join(wanted)} from {step}; got {got}.")
    columns = {
        column: output[column].detach().cpu().tolist()
        for column in ("probability", "index", "weight", "label", "ood_score", "verdict")
        if column in output
    }
    if "reason" in output:
        columns["reason"] = list(output["reason"])
    return [
        {"order": (dataloader_idx, columns["index"][i]), "path": name}
        | {column: values[i] for column, values in columns.items()}
        for i, name in enumerate(output["name"])
        if columns["weight"][i] != 0
    ]
