"""Walk over files: the bar that shows it, and the reason where one fails."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def error_console() -> Console:
    """The console that the commands speak to their user by, as it comes: names may hold what rich takes for markup."""
    return Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)


def real_path(path: Path) -> Path:
    """The path without links; `Path.resolve` raises at a link to itself."""
    return Path(os.path.realpath(path))


@contextmanager
def show_progress(console: Console, total: int) -> Iterator[Callable[[float, str], None]]:
    """A bar on a terminal, moved by how many files are done and the name of the next."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)

        def show(done: float, name: str) -> None:
            progress.update(task, completed=done, description=name)

        yield show


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {os.fspath(error.filename)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
