"""Labels of image files: from folders called after the classes, or from a table."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from datamodules._readable import some
from lightning_modules.imaging import find_images, permutation

_Line = tuple[int, dict[str, str]]  # its number, and its columns

_PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class LabelledFiles:
    """Image files.

    Args:
        paths: Where they are.
        names: Their paths relative to the root of the data, with forward slashes.
        labels: Index of the class of each, or −1 where it is unknown.

    Shape:
        - labels: `[N]`, int64
    """

    paths: list[Path]
    names: list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, chosen: Tensor) -> "LabelledFiles":
        """Returns the files at the given positions.

        Shape:
            - chosen: `[M]`, int64, or `[N]`, bool
        """
        positions = chosen.nonzero()[:, 0].tolist() if chosen.dtype == torch.bool else chosen.tolist()
        return LabelledFiles(
            [self.paths[i] for i in positions], [self.names[i] for i in positions], self.labels[positions]
        )


def find_unlabelled(root: Path) -> LabelledFiles:
    """Returns the images to predict: those below a folder, those that a table lists, or a single file."""
    if _is_table(root):
        return _label_lines(root, _read_table(root, ("path",)), None)
    paths = [root] if root.is_file() else find_images(root)
    folder = root.parent if root.is_file() else root
    return LabelledFiles(paths, [_name(path, folder) for path in paths], torch.full((len(paths),), -1))


def find_labelled(root: Path, part: str, class_names: list[str], val_fraction: float, seed: int) -> LabelledFiles:
    """Returns the images of one part, `train`, `val` or `test`.

    Where there is no `test` part, it is that of `val`; where there is no `val` either, both are a stratified part of
    `train`, drawn by seed, which `train` then does not contain.
    """
    parts = _table_parts(root, class_names) if _is_table(root) else _folder_parts(root, class_names)
    wanted = "val" if part == "test" and "test" not in parts else part
    if wanted in parts and not (wanted == "train" and "val" not in parts):
        return parts[wanted]()
    if "train" not in parts:
        raise FileNotFoundError(
            f"{root} has no images to {'train on' if part == 'train' else 'evaluate'}: expected the part {part}, or "
            f"train to take it from; there is {' and '.join(parts)}"
        )
    files = parts["train"]()
    held_out = _held_out(files, root, class_names, val_fraction, seed)
    return files.select(~held_out if part == "train" else held_out)


def require_classes(files: LabelledFiles, source: Path, class_names: list[str]) -> None:
    """Refuses images of which a class has none."""
    for label, name in enumerate(class_names):
        if not (files.labels == label).any():
            raise ValueError(
                f"{source} has no image of the class {name}; both, {' and '.join(class_names)}, are needed"
            )


def require_files(files: LabelledFiles) -> None:
    """Refuses files that are not there, all at once and before the first epoch."""
    if missing := [str(path) for path in files.paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} files do not exist: {some(missing)}. Relative paths in a table start "
            "at its folder; on_error: skip leaves such files out"
        )


def _folder_parts(root: Path, class_names: list[str]) -> dict[str, Callable[[], LabelledFiles]]:
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is neither a folder nor a table (.csv)")
    folders = {part: root / part for part in _PARTS if (root / part).is_dir()}
    if not folders and any((root / name).is_dir() for name in class_names):
        folders = {"train": root}
    if not folders:
        raise FileNotFoundError(
            f"{root} holds no labelled images: expected the folders {', '.join(_PARTS)} or one of them, and in each "
            f"the folders {' and '.join(class_names)}; or a table (.csv) with the columns path and label. Images "
            "without labels can be predicted only"
        )
    return {part: partial(_classes, folder, root, class_names) for part, folder in folders.items()}


def _classes(folder: Path, root: Path, class_names: list[str]) -> LabelledFiles:
    if missing := [name for name in class_names if not (folder / name).is_dir()]:
        raise FileNotFoundError(
            f"{folder} has no folder {missing[0]}; images of both classes are needed, in {' and '.join(class_names)}. "
            "Set class_names where the folders are called otherwise; images of one kind can be predicted"
        )
    paths = [find_images(folder / name) for name in class_names]
    labels = [torch.full((len(found),), label) for label, found in enumerate(paths)]
    return LabelledFiles(
        [path for found in paths for path in found],
        [_name(path, root) for found in paths for path in found],
        torch.cat(labels),
    )


def _table_parts(path: Path, class_names: list[str]) -> dict[str, Callable[[], LabelledFiles]]:
    """Sorts the lines of a table by its column `split`; all are `train` where there is none."""
    lines: dict[str, list[_Line]] = {}
    for line in _read_table(path, ("path", "label")):
        number, entries = line
        part = entries.get("split", "train").strip()
        if part not in _PARTS:
            raise ValueError(f"{path}, line {number}: the split {part!r} is not one of {', '.join(_PARTS)}")
        lines.setdefault(part, []).append(line)
    return {part: partial(_label_lines, path, found, class_names) for part, found in lines.items()}


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
        if (first := numbers.setdefault((path.parent / name).resolve(), number)) != number:
            raise ValueError(f"{path} lists {name} in line {first} and again in line {number}; keep one of them")
    return lines


def _label_lines(table: Path, lines: list[_Line], class_names: list[str] | None) -> LabelledFiles:
    paths = [table.parent / entries["path"] for _, entries in lines]
    labels = [
        -1 if class_names is None else _label(entries["label"], class_names, table, number) for number, entries in lines
    ]
    return LabelledFiles(paths, [_name(path, table.parent) for path in paths], torch.tensor(labels))


def _label(text: str, class_names: list[str], path: Path, line: int) -> int:
    text = text.strip()
    accepted = [*class_names, *(str(label) for label in range(len(class_names)))]
    if text not in accepted:
        raise ValueError(f"{path}, line {line}: the label {text!r} is not one of {', '.join(accepted)}")
    return accepted.index(text) % len(class_names)


def _held_out(files: LabelledFiles, root: Path, class_names: list[str], fraction: float, seed: int) -> Tensor:
    held_out = torch.zeros(len(files), dtype=torch.bool)
    require_classes(files, root, class_names)
    for label, name in enumerate(class_names):
        members = (files.labels == label).nonzero()[:, 0]
        if len(members) < 2:
            raise ValueError(f"{root} has only one image of the class {name}: none could be held out. Add images")
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out[members[permutation(len(members), seed, label)[:count]]] = True
    return held_out


def _is_table(root: Path) -> bool:
    return root.suffix.lower() == ".csv" and root.is_file()


def _name(path: Path, root: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
