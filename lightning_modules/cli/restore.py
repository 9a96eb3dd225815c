"""`lightning-em restore`: photographs and folders of them, restored file by file."""

import argparse
import csv
import errno
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from io import StringIO
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from lightning_modules.cli.walk import error_console, real_path, reason_of, show_progress
from lightning_modules.cli.words import Parser
from lightning_modules.imaging import check_noise_std, find_images, restored_name, write_whole
from lightning_modules.restoration import NOISES, NOISES_IN_WORDS, load_operator, restore_file

TABLE_NAME = "restored.csv"
_COLUMNS = (
    *("name", "output", "noise", "noise_std", "slope", "intercept", "correlation"),
    *("seconds", "size", "note", "source"),
)
# Without these, a table is not one of this command; others have come since.
_FIRST_COLUMNS = {"name", "output", "noise_std", "seconds", "size", "note", "source"}
_CHARACTERS: dict[str, Any] = {
    "encoding": "utf-8",
    "errors": "surrogateescape",
}  # a name may be bytes that are no UTF-8

Row = dict[str, str]


class Job(NamedTuple):
    """One file to restore.

    Attributes:
        name: What the table calls it.
        source: Where it is.
        target: Where the restored one goes.
        is_named: Whether the user has named the target, whose suffix is then the format.
    """

    name: str
    source: Path
    target: Path
    is_named: bool = False


class Table:
    """`restored.csv`: a line for each file that is done, appended at once, and put in order at the end.

    Its sources are paths from where it is, so that it can move together with the photographs.

    Args:
        folder: Where it is; None for no table.

    Raises:
        ValueError: If there is a file of that name that is something else.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / TABLE_NAME
        self.rows: dict[str, Row] = {}  # by their outputs
        self._is_cut, self._time = False, 0.0
        if self.path is None or not self.path.is_file():
            return
        self._time = self.path.stat().st_mtime
        with self.path.open(newline="", **_CHARACTERS) as file:
            reader = csv.DictReader(file)
            if not _FIRST_COLUMNS <= set(reader.fieldnames or ()) <= set(_COLUMNS):
                raise ValueError(f"{self.path} is not a table of this command: name another folder with -o")
            for row in reader:
                # The last line of a run that was killed may be half there; what it names is looked at again.
                is_whole = row["source"] is not None
                self._is_cut |= not is_whole
                if is_whole and (self.path.parent / row["output"]).is_file():
                    self.rows[row["output"]] = {column: row.get(column, "") for column in _COLUMNS}
        self.write()

    def source(self, source: Path) -> str:
        """What it calls a source."""
        if self.path is None:
            return str(source)
        return Path(os.path.relpath(real_path(source), real_path(self.path.parent))).as_posix()

    def holds(self, job: Job) -> bool:
        """Whether a job is done, of which the target is there.

        Raises:
            FileExistsError: If the target is something else.
        """
        if job.target.is_dir():
            raise FileExistsError(f"{job.target} is a folder: name another file or folder with -o")
        if self.path is None:
            if not job.is_named:
                return True  # beside its source, and named after it
            raise FileExistsError(f"{job.target} exists: name another file with -o, or restore with --overwrite")
        if row := self.rows.get(self.output(job)):
            if row["source"] == self.source(job.source):
                return True
            made_of = os.path.normpath(self.path.parent / row["source"])
            raise FileExistsError(
                f"{job.target} is made of {made_of}: name another folder with -o, or restore with --overwrite"
            )
        # The last result of a run that was killed; anything else is somebody's own file.
        if self._time and (self._is_cut or job.target.stat().st_mtime >= self._time):
            return False
        raise FileExistsError(
            f"{job.target} exists and is not in {self.path}: name another folder with -o, or restore with --overwrite"
        )

    def output(self, job: Job) -> str:
        """What it calls a target."""
        return str(job.target) if self.path is None else job.target.relative_to(self.path.parent).as_posix()

    def append(self, row: Row) -> None:
        """Adds a line, in the file too."""
        self.rows[row["output"]] = row
        if self.path is not None and self.path.exists():
            with self.path.open("a", newline="", **_CHARACTERS) as file:
                csv.DictWriter(file, _COLUMNS).writerow(row)
        else:
            self.write()

    def write(self) -> None:
        """Writes the whole table, by name."""
        if self.path is None or not (self.rows or self.path.exists()):
            return
        buffer = StringIO(newline="")
        writer = csv.DictWriter(buffer, _COLUMNS)
        writer.writeheader()
        writer.writerows(sorted(self.rows.values(), key=itemgetter("name", "output")))
        write_whole(self.path, buffer.getvalue().encode(**_CHARACTERS))


def run(words: list[str]) -> int:
    """Run the command.

    Args:
        words: Words after `restore`.

    Returns:
        The exit code: 0 where everything is done, 1 where something is not, 130 where the user has stopped it.
    """
    options = _parser().parse_args(words)
    console = error_console()
    output = None if options.output is None else Path(options.output).expanduser()
    outcome = Outcome()
    try:
        with warnings.catch_warnings(record=True, action="always") as left_out:
            jobs, folder = _jobs(options.paths, output, outcome)
        for warning in left_out:
            console.print(str(warning.message))
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        table = Table(folder)
        operator = cache(partial(load_operator, options.model))
        restore_one = partial(restore_file, operator=operator, noise=options.noise, quality=options.quality)
        if jobs:
            operator(3)  # a model that cannot be read is one error, not one for each file
    except (OSError, ValueError) as error:
        console.print(f"lightning-em restore: {reason_of(error)}")
        return 1
    try:
        # Libraries warn of damaged metadata without a name; what we have to say is in the table.
        with show_progress(console, len(jobs)) as show, warnings.catch_warnings(action="ignore"):
            for place, job in enumerate(jobs):
                show(place, job.name)
                progress = partial(_inside, show, place, job.name)
                _restore(job, table, outcome, options.overwrite, partial(restore_one, progress=progress))
                if outcome.is_disk_full:
                    break
    except KeyboardInterrupt:
        outcome.is_stopped = True
    try:
        table.write()
    except OSError as error:
        outcome.fail(str(table.path), error)
    if len(jobs) == 1 and outcome.done:
        row = table.rows[table.output(jobs[0])]
        level = f"{row['noise'].replace('told', '')} noise {255 * float(row['noise_std']):.1f}/255".strip()
        console.print(", ".join(filter(None, (f"{jobs[0].target}: {level}", f"{row['seconds']} s", row["note"]))))
    outcome.report(console, len(jobs))
    return 130 if outcome.is_stopped else int(bool(outcome.failures))


@dataclass
class Outcome:
    """What became of the files: how many are done or were there, and which failed, with their reasons."""

    done: int = 0
    there: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    is_disk_full: bool = False
    is_stopped: bool = False

    def fail(self, name: str, error: Exception) -> None:
        """Counts a failure."""
        self.failures.append((name, reason_of(error)))
        self.is_disk_full |= isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)

    def report(self, console: Console, count: int) -> None:
        """Prints the counts, then what failed."""
        parts = [f"restored {self.done} of {count}"]
        parts += [f"{self.there} there already (--overwrite restores them again)"] * (self.there > 0)
        parts += ["stopped: the same command goes on"] * self.is_stopped
        if count > 1 or len(parts) > 1:
            console.print(", ".join(parts))
        if self.failures:
            console.print(f"{len(self.failures)} failed:")
        for name, reason in self.failures:
            console.print(f"  {reason}" if name in reason else f"  {name}: {reason}")


def _restore(job: Job, table: Table, outcome: Outcome, overwrite: bool, restore_one: Callable[..., Row]) -> None:
    is_there = job.target.exists() and (job.target.is_dir() or not overwrite)
    try:
        if is_there and table.holds(job):
            outcome.there += 1
            return
        row = restore_one(job.source, job.target, write=not is_there, is_named=job.is_named)
        if is_there:
            row["note"] = "; ".join(filter(None, (row["note"], "was there before")))
        table.append({"name": job.name, "output": table.output(job), **row, "source": table.source(job.source)})
    except Exception as error:  # one bad file ends no folder, whatever its decoder raises
        outcome.fail(str(job.source), error)
        return
    outcome.done += not is_there
    outcome.there += is_there


def _parser() -> Parser:
    parser = Parser("lightning-em restore", description="Restore photographs, and folders of them.")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a photograph, or a folder of them")
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="the file to write, or a folder, which gets the tree of the input and restored.csv; by default "
        "photo.restored.jpg beside photo.jpg",
    )
    parser.add_argument(
        "--noise",
        type=_noise,
        default="auto",
        metavar="LEVEL",
        help="standard deviation of the noise where white is 1, such as 25/255 or 0.1; or what it is estimated as: "
        "white, camera (grows with the light, correlated), or auto (default), whichever it is",
    )
    parser.add_argument("--model", default="auto", metavar="FILE", help="weights that save_pretrained has written")
    parser.add_argument("--overwrite", action="store_true", help="restore again what is there already")
    parser.add_argument(
        "--quality",
        type=int,
        choices=range(1, 101),
        metavar="Q",
        help="quality from 1 to 100 of JPEG, WebP and AVIF files; by default a JPEG file has its source's tables",
    )
    return parser


def _noise(text: str) -> float | str:
    if text in NOISES:
        return text
    numerator, _, denominator = text.partition("/")
    try:
        level = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number, such as 25/255 or 0.1, nor {NOISES_IN_WORDS}"
        ) from None
    try:
        check_noise_std(level)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return level


def _jobs(paths: list[str], output: Path | None, outcome: Outcome) -> tuple[list[Job], Path | None]:
    """What to restore, and the folder that the results go to where there is one."""
    inputs = [Path(path).expanduser() for path in paths]
    outcome.failures += [(str(path), "no such file") for path in inputs if not path.exists()]
    inputs = [path for path in inputs if path.exists()]
    is_file = len(paths) == 1 and not any(path.is_dir() for path in inputs)
    if is_file and output is not None and output.suffix and not output.is_dir():
        if any(real_path(output) == real_path(path) for path in inputs):
            raise ValueError(f"the result would replace the photograph {output}: name another file with -o")
        return [Job(path.name, path, output, is_named=True) for path in inputs], None
    jobs: list[Job] = []
    taken: set[str] = set()
    for path in inputs:
        if path.is_dir():
            if output is None:
                raise ValueError(f"{path} is a folder: name one for the results with -o")
            if real_path(output) == real_path(path):
                raise ValueError(f"the results would replace the photographs in {path}: name another folder with -o")
            is_below = real_path(path).is_relative_to(real_path(output))
            for source in find_images(path):
                # Left out are the results of the run before.
                if is_below or not real_path(source).is_relative_to(real_path(output)):
                    name = source.relative_to(path).as_posix()
                    target = output / _untaken(restored_name(name), taken)
                    jobs.append(Job(name if len(inputs) == 1 else str(source), source, target))
        elif output is None:
            jobs.append(Job(str(path), path, path.with_name(restored_name(path.name, ".restored"))))
        else:
            jobs.append(Job(str(path), path, output / _untaken(restored_name(path.name), taken)))
    sources = {real_path(job.source) for job in jobs}
    targets = {real_path(job.target) for job in jobs}
    if output is None:  # `*.jpg` names results, the second time
        return [job for job in jobs if real_path(job.source) not in targets], None
    if replaced := sorted(sources & targets):
        raise ValueError(f"the results would replace the photograph {replaced[0]}: name another folder with -o")
    return jobs, output


def _inside(show: Callable[[float, str], None], place: int, name: str, part: float) -> None:
    show(place + part, name)


def _untaken(name: str, taken: set[str]) -> str:
    """A name that no other result has, on file systems that cannot tell `a.JPG` from `a.jpg` either."""
    path, number = Path(name), 1
    while name.casefold() in taken:
        number += 1
        name = path.with_name(f"{path.stem}~{number}{path.suffix}").as_posix()
    taken.add(name.casefold())
    return name
