"""`lightning-em detect`: a verdict on each image of a folder."""

import csv
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from lightning_modules.cli.walk import error_console, real_path, reason_of, show_progress
from lightning_modules.cli.words import Parser
from lightning_modules.generated_image_detector import GeneratedImageDetector, Verdict
from lightning_modules.imaging import find_images, write_whole

TABLE_NAME = "predictions.csv"
_COLUMNS = ("path", "label", "probability", "ood_score", "reason")
# Images from which on all with one label is worth a remark.
_MANY = 10


class Finding(NamedTuple):
    """What became of one file: a verdict, or the reason why there is none."""

    name: str
    verdict: Verdict | None
    failure: str = ""


def run(words: list[str]) -> int:
    """Run the command.

    Args:
        words: Words after `detect`.

    Returns:
        The exit code: 0 where every file has a verdict, 1 where one has none, 130 where the user has stopped it.
    """
    options = _parser().parse_args(words)
    console = error_console()
    output = Path(options.output).expanduser()
    try:
        if options.model is None:
            raise ValueError(
                "no weights come with this package (docs/site/detector.md has the reason): name a checkpoint of yours "
                "with --model, such as logs/detector/version_0/checkpoints/last.ckpt"
            )
        with warnings.catch_warnings(record=True, action="always") as left_out:
            files = _files([Path(path).expanduser() for path in options.paths], output)
        for warning in left_out:
            console.print(str(warning.message))
        with warnings.catch_warnings(action="ignore"):
            detector = GeneratedImageDetector.load_from_checkpoint(Path(options.model).expanduser(), map_location="cpu")
        output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError) as error:
        console.print(f"lightning-em detect: {reason_of(error)}")
        return 1
    if detector.warning:
        console.print(detector.warning)
    findings: list[Finding] = []
    stopped = False
    try:
        with show_progress(console, len(files)) as show, warnings.catch_warnings(action="ignore"):
            for finding in _findings(detector.eval(), files):
                findings.append(finding)
                show(len(findings), finding.name)
    except KeyboardInterrupt:
        stopped = True
    _write(findings, output / TABLE_NAME)
    _report(console, findings, len(files), output / TABLE_NAME)
    return 130 if stopped else int(any(finding.verdict is None for finding in findings))


def _parser() -> Parser:
    parser = Parser("lightning-em detect", description="Say which images were generated, or unsure.")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="an image, or a folder of them")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help=f"the folder to write {TABLE_NAME} into")
    parser.add_argument(
        "--model", metavar="CHECKPOINT", help="checkpoint that fitting GeneratedImageDetector has written"
    )
    return parser


def _files(paths: list[Path], output: Path) -> list[tuple[str, Path]]:
    """Names and paths of the images, each once, in the order of the words and sorted within a folder."""
    if missing := [path for path in paths if not path.exists()]:
        raise FileNotFoundError(f"{missing[0]}: no such file")
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file: name a folder for {TABLE_NAME} with -o")
    files: dict[Path, str] = {}
    for path in paths:
        for found in find_images(path) if path.is_dir() else [path]:
            name = found.relative_to(path).as_posix() if path.is_dir() and len(paths) == 1 else str(found)
            files.setdefault(real_path(found), name)
    return [(name, path) for path, name in files.items()]


def _findings(detector: GeneratedImageDetector, files: Iterable[tuple[str, Path]]) -> Iterator[Finding]:
    """Findings in the order of the files, each image by itself, as many at a time as there are threads."""

    def find(file: tuple[str, Path]) -> Finding:
        name, path = file
        try:
            return Finding(name, detector.verdict(path))
        except Exception as error:  # one bad file ends no folder, whatever its decoder raises
            return Finding(name, None, reason_of(error))

    threads = torch.get_num_threads()
    # an image is small for all threads at once, and its decoding has but one
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(find, files)
    finally:
        torch.set_num_threads(threads)


def _write(findings: list[Finding], path: Path) -> None:
    buffer = StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(_COLUMNS)
    writer.writerows([finding.name, *finding.verdict] for finding in findings if finding.verdict is not None)
    # a file's name may be bytes that are not UTF-8, which are written as they are
    write_whole(path, buffer.getvalue().encode("utf-8", "surrogateescape"))


def _report(console: Console, findings: list[Finding], count: int, path: Path) -> None:
    """Prints the counts, what they may mean, and what failed."""
    labels = Counter(finding.verdict.label for finding in findings if finding.verdict is not None)
    parts = [f"{number} {label}" for label, number in sorted(labels.items())]
    stopped = f", stopped after {len(findings)} of {count}" if len(findings) < count else ""
    console.print(f"{path}: {', '.join(parts) or 'no image'}{stopped}")
    if len(labels) == 1 and labels.total() >= _MANY:
        (label,) = labels
        console.print(
            f"all {labels.total()} images are labelled {label}: where they are known to be mixed, the detector does "
            "not reach them, and its verdicts mean nothing here"
        )
    failures = [finding for finding in findings if finding.verdict is None]
    if failures:
        console.print(f"{len(failures)} have no verdict:")
    for name, _, failure in failures:
        console.print(f"  {failure}" if os.path.basename(name) in failure else f"  {name}: {failure}")
