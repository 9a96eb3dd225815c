"""Labels of image files, source by source: from folders called after the classes, or from a table."""

import csv
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from datamodules._readable import some
from lightning_modules.imaging import find_images, permutation

_Line = tuple[int, dict[str, str]]  # its number, and its columns

#: The parts of a source that are given, each with what finds its files.
Parts = dict[str, Callable[[], "LabelledFiles"]]

_PARTS = ("train", "val", "test")
_CHUNK = 2**20  # bytes


@dataclass(frozen=True)
class LabelledFiles:
    """Image files.

    Args:
        paths: Where they are.
        names: Their paths relative to the root of the data, with forward slashes.
        labels: Index of the class of each, or −1 where it is unknown.
        sources: Name of the source of each; empty where it is unknown.

    Shape:
        - labels: `[N]`, int64
    """

    paths: list[Path]
    names: list[str]
    labels: Tensor
    sources: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, chosen: Tensor) -> "LabelledFiles":
        """Returns the files at the given positions.

        Shape:
            - chosen: `[M]`, int64, or `[N]`, bool
        """
        positions = chosen.nonzero()[:, 0].tolist() if chosen.dtype == torch.bool else chosen.tolist()
        paths, names, sources = ([column[i] for i in positions] for column in (self.paths, self.names, self.sources))
        return LabelledFiles(paths, names, self.labels[positions], sources)

    def of_source(self, source: str) -> "LabelledFiles":
        """Returns those of one source."""
        return self.select(torch.tensor([name == source for name in self.sources], dtype=torch.bool))


def join(parts: Iterable[LabelledFiles]) -> LabelledFiles:
    """Returns the files of several lists as one."""
    parts = [*parts]
    return LabelledFiles(
        [path for part in parts for path in part.paths],
        [name for part in parts for name in part.names],
        torch.cat([part.labels for part in parts]),
        [source for part in parts for source in part.sources],
    )


def find_unlabelled(root: Path) -> LabelledFiles:
    """Returns the images to predict: those below a folder, those that a table lists, or a single file."""
    if _is_table(root):
        return _label_lines(root, "", _read_table(root, ("path",)), None)
    paths = [root] if root.is_file() else find_images(root)
    folder = root.parent if root.is_file() else root
    return _files(paths, folder, torch.full((len(paths),), -1), "")


def find_sources(root: Path, class_names: list[str]) -> dict[str, Parts]:
    """Returns the sources below a folder or in a table, by name.

    A folder of sources has one folder for each; a folder with parts or classes is one source, called after itself. A
    table has a column `source`, or is one source.
    """
    if _is_table(root):
        return _table_sources(root, class_names)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is neither a folder nor a table (.csv)")
    own = {*_PARTS, *class_names}
    folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name not in own and path.name[0] != ".")
    sources = {folder.name: _folder_parts(folder, root, class_names) for folder in folders}
    if parts := _folder_parts(root, root, class_names):
        if more := [name for name, found in sources.items() if found]:
            raise ValueError(
                f"{root} is a source, with {' and '.join(parts)}, and holds another, {more[0]}: give each a folder of "
                "its own, side by side"
            )
        return {root.resolve().name: parts}
    if not any(sources.values()):
        raise FileNotFoundError(
            f"{root} holds no labelled images: expected the folders {', '.join(_PARTS)} or one of them, and in each "
            f"the folders {' and '.join(class_names)}, be it here or in the folder of each source; or a table (.csv) "
            "with the columns path and label. Images without labels can be predicted only"
        )
    if empty := [name for name, parts in sources.items() if not parts]:
        raise FileNotFoundError(
            f"{root} is a folder of sources, and {empty[0]} in it holds none of {', '.join((*_PARTS, *class_names))}: "
            "complete it, or move it elsewhere"
        )
    return sources


def take_part(
    parts: Parts, source: str, part: str, class_names: list[str], fractions: dict[str, float], seed: int
) -> LabelledFiles:
    """Returns one part of a source, `train`, `val` or `test`.

    A part that is not given is a stratified part of `train`, drawn by seed, which `train` then does not contain.

    Args:
        parts: Those that are given.
        source: Name of the source.
        part: The one that is wanted.
        class_names: Names of the classes.
        fractions: How much of `train` becomes `val` and `test` where they are not given.
        seed: Seed of the draw.
    """
    if part != "train" and part in parts:
        return parts[part]()
    if "train" not in parts:
        purpose = {"train": "train on", "val": "validate on", "test": "test on"}[part]
        raise FileNotFoundError(
            f"the source {source} has no images to {purpose}: expected the part {part}, or train to take it from; "
            f"there is {' and '.join(parts)}"
        )
    files = parts["train"]()
    missing = {name: fraction for name, fraction in fractions.items() if name not in parts}
    if not missing:
        return files
    require_classes(files, class_names)
    drawn = torch.empty(len(files), dtype=torch.int64)
    for label, name in enumerate(class_names):
        members = files.labels == label
        drawn[members] = draw_parts(int(members.sum()), f"the class {name} of {source}", missing, seed, label)
    return files.select(drawn == ([*missing].index(part) if part in missing else -1))


def require_classes(files: LabelledFiles, class_names: list[str]) -> None:
    """Refuses sources of which a class has no image."""
    for source in dict.fromkeys(files.sources):
        labels = files.of_source(source).labels
        for label, name in enumerate(class_names):
            if not (labels == label).any():
                raise ValueError(
                    f"{source} has no image of the class {name}; both, {' and '.join(class_names)}, are needed of each "
                    "source"
                )


def require_files(files: LabelledFiles) -> None:
    """Refuses files that are not there, all at once and before the first epoch."""
    if missing := [str(path) for path in files.paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} files do not exist: {some(missing)}. Relative paths in a table start "
            "at its folder; on_error: skip leaves such files out"
        )


def require_disjoint(sources: dict[str, Parts]) -> None:
    """Refuses sources that share a file, by its content: a detector tested on the one would have seen it in the other.

    Only files of equal length are read.
    """
    if len(sources) < 2:
        return
    by_size: dict[int, list[tuple[str, Path]]] = {}
    for source, parts in sources.items():
        for find in parts.values():
            for path in find().paths:
                if path.is_file() and (length := path.stat().st_size):
                    by_size.setdefault(length, []).append((source, path))
    shared: list[str] = []
    for alike in by_size.values():
        if len({source for source, _ in alike}) < 2:
            continue
        first: dict[bytes, tuple[str, Path]] = {}
        for source, path in alike:
            other = first.setdefault(_digest(path), (source, path))
            if other[0] != source:
                shared.append(f"{path} is {other[1]}")
    if shared:
        raise ValueError(
            f"the sources share {len(shared)} files, by their content: {some(shared)}. What is left out must not have "
            "been seen in another source: keep each in one of them"
        )


def _digest(path: Path) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.digest()


def _folder_parts(folder: Path, root: Path, class_names: list[str]) -> Parts:
    folders = {part: folder / part for part in _PARTS if (folder / part).is_dir()}
    if not folders and any((folder / name).is_dir() for name in class_names):
        folders = {"train": folder}
    source = folder.resolve().name if folder == root else folder.name
    return {part: partial(_classes, path, root, source, class_names) for part, path in folders.items()}


def _classes(folder: Path, root: Path, source: str, class_names: list[str]) -> LabelledFiles:
    if missing := [name for name in class_names if not (folder / name).is_dir()]:
        raise FileNotFoundError(
            f"{folder} has no folder {missing[0]}; images of both classes are needed, in {' and '.join(class_names)}. "
            "Set class_names where the folders are called otherwise; images of one kind can be predicted"
        )
    found = [find_images(folder / name) for name in class_names]
    return join(_files(paths, root, torch.full((len(paths),), label), source) for label, paths in enumerate(found))


def _files(paths: list[Path], root: Path, labels: Tensor, source: str) -> LabelledFiles:
    return LabelledFiles(paths, [_name(path, root) for path in paths], labels, [source] * len(paths))


def _table_sources(path: Path, class_names: list[str]) -> dict[str, Parts]:
    """Sorts the lines of a table by its columns `source` and `split`; all are `train` where there is none."""
    lines: dict[str, dict[str, list[_Line]]] = {}
    for line in _read_table(path, ("path", "label")):
        number, entries = line
        part, source = entries.get("split", "train").strip(), entries.get("source", path.stem).strip()
        if part not in _PARTS:
            raise ValueError(f"{path}, line {number}: the split {part!r} is not one of {', '.join(_PARTS)}")
        if not source:
            raise ValueError(f"{path}, line {number}: the source is empty; name it, or leave the column out")
        lines.setdefault(source, {}).setdefault(part, []).append(line)
    return {
        source: {part: partial(_label_lines, path, source, found, class_names) for part, found in parts.items()}
        for source, parts in lines.items()
    }


def _read_table(path: Path, columns: tuple[str, ...]) -> list[_Line]:
    """Reads the lines of a table with their numbers."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True, restval="")
            found, lines = reader.fieldnames or [], [(reader.line_num, entries) for entries in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}. Save it as CSV in UTF-8") from error
    if missing := [name for name in columns if name not in found]:
        raise ValueError(f"{path} has no column {missing[0]}; its columns are {', '.join(found) or 'none'}")
    if not lines:
        raise ValueError(f"{path} lists no images")
    numbers: dict[Path, int] = {}
    for number, entries in lines:
        name = entries["path"]
        if "\0" in name:
            raise ValueError(f"{path}, line {number}: the path {name!r} holds a NUL byte")
        if (first := numbers.setdefault((path.parent / name).resolve(), number)) != number:
            raise ValueError(f"{path} lists {name} in line {first} and again in line {number}; keep one of them")
    return lines


def _label_lines(table: Path, source: str, lines: list[_Line], class_names: list[str] | None) -> LabelledFiles:
    paths = [table.parent / entries["path"] for _, entries in lines]
    labels = [
        -1 if class_names is None else _label(entries["label"], class_names, table, number) for number, entries in lines
    ]
    return _files(paths, table.parent, torch.tensor(labels), source)


def _label(text: str, class_names: list[str], path: Path, line: int) -> int:
    text = text.strip()
    accepted = [*class_names, *(str(label) for label in range(len(class_names)))]
    if text not in accepted:
        raise ValueError(f"{path}, line {line}: the label {text!r} is not one of {', '.join(accepted)}")
    return accepted.index(text) % len(class_names)


def draw_parts(count: int, source: str, fractions: dict[str, float], *seed: int) -> Tensor:
    """Draws by seed which of several parts each of so many images becomes: its number, or −1 where it stays.

    Args:
        count: Number of images.
        source: What to call them where they are too few.
        fractions: How much of them becomes each part; one image at least.
        seed: Integers that the draw depends on.

    Shape:
        - output: `[count]`, int64
    """
    if count <= len(fractions):
        few = "only one image" if count == 1 else f"only {count} images"
        raise ValueError(f"{source} has {few}: none could be held out for {' and '.join(fractions)}. Add images")
    drawn, order, begin = torch.full((count,), -1), permutation(count, *seed), 0
    for number, fraction in enumerate(fractions.values()):
        left = count - begin - (len(fractions) - number)  # one stays, and one for each part to come
        end = begin + min(max(round(fraction * count), 1), left)
        drawn[order[begin:end]] = number
        begin = end
    return drawn


def _is_table(root: Path) -> bool:
    return root.suffix.lower() == ".csv" and root.is_file()


def _name(path: Path, root: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
