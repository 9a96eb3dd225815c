"""TensorBoard's logger of a command: one run a training, and what is evaluated as a table."""

import shutil
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

# What a run that has not begun leaves in its folder, beside its events.
_BEGINNINGS = ("config.yaml", "hparams.yaml")


class RunLogger(TensorBoardLogger):
    """Lightning's logger, but for two things: it opens its file when there is something to write, and a number that has
    no course, such as one of `test`, is a line of the table *Text*, `results`, in place of a card of its own.

    Args:
        save_dir: As of `TensorBoardLogger`, like all others.
        options: Its further arguments.
    """

    def __init__(self, save_dir: str, **options: Any) -> None:
        super().__init__(save_dir, **options)
        #: What the names of the numbers without a course begin with.
        self.tabled = "test/"
        self._results: dict[str, float] = {}

    @property
    def experiment(self) -> Any:
        """The writer; made anew when it is first used."""
        return (
            self._experiment if self._experiment is not None else _Unopened(lambda: super(RunLogger, self).experiment)
        )

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the numbers, those without a course as a table."""
        results = {
            name: float(value) for name, value in metrics.items() if name.startswith(self.tabled) and name != "epoch"
        }
        if results:
            self._results |= results
            lines = [f"| {name} | {value:.4g} |" for name, value in self._results.items()]
            self.experiment.add_text("results", "\n".join(["| | |", "|---|---|", *lines]), step)
        courses = {name: value for name, value in metrics.items() if name not in results}
        if courses.keys() - {"epoch"}:
            super().log_metrics(courses, step)


class _Unopened:
    """A writer that is opened when something is asked of it."""

    def __init__(self, opened: Callable[[], Any]) -> None:
        self._opened = opened

    def flush(self) -> None:
        """Nothing has been written."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened(), name)


def evaluation_place(arguments: Any, verb: str, checkpoint: str | None) -> None:
    """Lets a logger's arguments name a folder `verb` within that of the run whose checkpoint is evaluated.

    Without a run of its own it is beside them, `<name>/<verb>`. What a former evaluation has left stays: the next one
    is `<verb>_1`.
    """
    if arguments.get("version") is not None:
        return
    folder = Path(checkpoint).parent if checkpoint else Path()
    if folder.name == "checkpoints" and folder.parent.name:
        arguments["save_dir"], arguments["name"] = str(folder.parents[1]), folder.parent.name
    home = Path(arguments["save_dir"], arguments.get("name") or "")
    names = (verb if number == 0 else f"{verb}_{number}" for number in count())
    arguments["version"] = next(name for name in names if not (home / name).exists())


def remove_unbegun(folder: Path) -> None:
    """Removes the folder of a run, where it holds nothing but what every run begins with."""
    files = [path for path in folder.rglob("*") if not path.is_dir()] if folder.is_dir() else []
    if all(path.name in _BEGINNINGS or path.name.startswith("events.out.tfevents.") for path in files):
        shutil.rmtree(folder, ignore_errors=True)
