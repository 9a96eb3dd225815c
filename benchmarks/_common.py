"""What the benchmarks share: where the data are, and how results are written."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch

PROJECT = Path(__file__).resolve().parents[1]


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    default = os.environ.get("LIGHTNING_EM_DATA", str(PROJECT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(default), help="folder with cifar-10-batches-py")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    return parser


def quiet_trainer(max_steps: int, *callbacks: L.Callback) -> L.Trainer:
    """A Trainer on the CPU that trains for so many steps and neither shows nor keeps anything."""
    return L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        callbacks=list(callbacks),
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def write_json(path: Path | None, records: list[dict[str, Any]]) -> None:
    """Write the records, if a file was asked for; a run that is cut short leaves those it has."""
    if path is not None:
        path.write_text(json.dumps(records, indent=1) + "\n")
