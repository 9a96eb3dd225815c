"""Tables that callbacks write: lines of all processes, and files that are whole or not there."""

import csv
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

Line = dict[str, Any]


def require_directory(owner: object, output_dir: str | None) -> None:
    """Raises a `ValueError` unless this is None or may become a directory."""
    if output_dir is not None and (not output_dir.strip() or Path(output_dir).is_file()):
        got = f"{output_dir!r}, which is a file" if output_dir.strip() else repr(output_dir)
        raise ValueError(f"{type(owner).__name__}: output_dir must name a directory, got {got}.")


def gather(lines: list[Line]) -> list[Line]:
    """Collects the lines of all processes by their `order`, on all. It is a collective: call it on every rank."""
    gathered: list[Any] = [lines]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gathered = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, lines)
    return sorted((line for part in gathered for line in part), key=lambda line: line["order"])


def write_table(lines: list[Line], path: Path, columns: list[str]) -> None:
    """Writes lines as a CSV, which replaces an earlier one when it is complete. None is written as nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    # a file's name may be bytes that are not UTF-8, which are written as they are
    with unfinished.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)
    os.replace(unfinished, path)


def keep_predictions(trainer: Trainer, keep: bool) -> None:
    """Prepares the Trainer for a writer of predictions that knows its samples and keeps them itself."""
    # Lightning asks the sampler for the indices; here they come with the batch, from which repeats can be recognised.
    warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")
    if not keep:
        trainer.predict_loop.return_predictions = False
