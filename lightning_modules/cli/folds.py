"""Leave-one-source-out: for each source a fit to the others and a test on it, and a table of all."""

import csv
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich import get_console
from rich.table import Table

from lightning_modules.checkpoints.module import checkpoint_paths
from lightning_modules.cli.stopping import INTERRUPTED
from lightning_modules.imaging import write_whole

if TYPE_CHECKING:
    from lightning_modules.cli.training import EMCommand

TABLE_NAME = "leave_one_source_out.csv"
_REPORT = "detector_report.csv"
# What a fold's line has of its report, and what the table on the screen calls it.
_COLUMNS = {
    "n": "images",
    "auroc": "AUROC",
    "accuracy_verdict": "accuracy",
    "accuracy_sure": "of the sure",
    "unsure": "unsure",
    "file_auroc": "file",
    "thumbnail_auroc": "thumbnail",
    "color_auroc": "color",
    "semantic_auroc": "semantic",
    "file_wrong_accuracy": "where file errs",
    "thumbnail_wrong_accuracy": "where thumbnail errs",
    "color_wrong_accuracy": "where color errs",
    "semantic_wrong_accuracy": "where semantic errs",
}
_SHOWN = ("n", "auroc", "accuracy_verdict", "accuracy_sure", "unsure", *list(_COLUMNS)[5:9])
_FEWEST_TRAINED = 2

Line = dict[str, str]


def leave_one_source_out(words: Sequence[str], trainer: Trainer, data: Any, folds: Sequence[str] = ()) -> Path:
    """Runs the folds that are not done, each in a folder of its own, and writes and shows the table of all.

    The same words go on where a run has stopped: a fold with a report is done, one with a checkpoint goes on from it.

    Args:
        words: Words of the command line without the verb.
        trainer: What they make of it; it says where the runs are.
        data: Likewise; it knows the sources.
        folds: Sources to leave out, in turn; by default each.

    Returns:
        The table.
    """
    if trainer.world_size > 1:
        raise SystemExit(
            "lightning-em: leave one source out runs its folds one by one, on one device: --trainer.devices=1"
        )
    if not hasattr(data, "source_names"):
        raise SystemExit(f"lightning-em: {type(data).__name__} has no sources; GeneratedImagesDataModule has")
    names: list[str] = data.source_names
    if len(names) < _FEWEST_TRAINED:
        raise SystemExit(f"lightning-em: {data.root} has one source, {names[0]}: there is none to leave out")
    if unknown := [name for name in folds if name not in names]:
        raise SystemExit(f"lightning-em: there is no source {unknown[0]} to leave out; there is {', '.join(names)}")
    lines, home = [], Path(str(trainer.log_dir)).parent  # beside the runs
    for name in names:
        folder = home / f"without_{name}"
        if (not folds or name in folds) and not (folder / _REPORT).is_file():
            calibrating = calibrating_sources(names, name, data.val_sources)
            rank_zero_info(f"\nLeft out: {name}; calibrated on: {', '.join(calibrating) or 'held-out images'}")
            _fold(words, folder, name, calibrating)
        if (folder / _REPORT).is_file():
            lines.append({"left_out": name, **_whole(folder / _REPORT)})
    home.mkdir(parents=True, exist_ok=True)
    write_whole(home / TABLE_NAME, _csv(lines))
    console = get_console()
    console.print(_table(lines))
    console.print(f"table: {home / TABLE_NAME}", markup=False, highlight=False, soft_wrap=True)
    return home / TABLE_NAME


def calibrating_sources(names: list[str], left_out: str, given: list[str]) -> list[str]:
    """The sources that a fold is calibrated on: those given, or the next, where enough are left to train on."""
    if given:
        return [name for name in given if name != left_out]
    following = names[(names.index(left_out) + 1) % len(names)]
    return [following] if len(names) - 2 >= _FEWEST_TRAINED else []


def _fold(words: Sequence[str], folder: Path, left_out: str, calibrating: list[str]) -> None:
    last = folder / "checkpoints" / "last.ckpt"
    command = _build(
        [
            *words,
            f"--trainer.logger.init_args.version={folder.name}",
            f"--data.init_args.test_sources=[{left_out}]",
            f"--data.init_args.val_sources=[{', '.join(calibrating)}]",
        ]
    )
    trainer, newest_state = command.trainer, str(last) if last.is_file() else None
    try:
        trainer.fit(command.model, command.datamodule, ckpt_path=newest_state, weights_only=True)
    except SystemExit:
        if not trainer.interrupted:
            raise
        rank_zero_info("\nstopped: the same command goes on")
        raise SystemExit(INTERRUPTED) from None
    best, newest = checkpoint_paths(trainer)
    trainer.test(command.model, command.datamodule, ckpt_path=best or newest or None, weights_only=True, verbose=False)


def _build(words: Sequence[str]) -> "EMCommand":
    from lightning_modules.cli.training import build  # which imports this module

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
        return build(list(words))


def _whole(report: Path) -> Line:
    """The line of a fold's report on all its images under the first condition."""
    with report.open(newline="", encoding="utf-8") as file:
        line = next(csv.DictReader(file))
    return {column: line.get(column, "") for column in _COLUMNS}


def _csv(lines: list[Line]) -> bytes:
    rows = [["left_out", *_COLUMNS], *([line["left_out"], *(line[column] for column in _COLUMNS)] for line in lines)]
    return "".join(f"{','.join(row)}\n" for row in rows).encode()


def _table(lines: list[Line]) -> Table:
    table = Table(
        title="Each source left out",
        caption="accuracy counts unsure as wrong; the probes were fitted on the same training sources",
    )
    table.add_column("left out")
    for column in _SHOWN:
        table.add_column(_COLUMNS[column], justify="right")
    for line in lines:
        values = [line[column] for column in _SHOWN]
        table.add_row(line["left_out"], *(f"{float(v):.3f}" if "." in v else v for v in values))
    return table
