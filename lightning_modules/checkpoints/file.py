"""Checkpoint files: their checksums are looked at before they are read, and a damaged one is named."""

import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

_ZIP, _LEGACY = b"PK\x03\x04", b"\x80\x02"  # first bytes of what torch writes, and wrote before 1.6
_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, NotImplementedError, RuntimeError)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line that names the file."""


def find_damage(path: Path) -> str | None:
    """Returns what is wrong with a file as a whole, or None; torch itself does not compare checksums."""
    if path.is_dir():
        return "is a directory"
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return "is empty"
    if start[:2] == _LEGACY:
        return None
    if start != _ZIP:
        return "is not a checkpoint"
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except _BROKEN:
        return "is damaged: it ends too early, or its directory is broken"
    return None if bad is None else f"is damaged: the checksum of {bad} differs"


def check_file(path: str | Path) -> Path:
    """Returns the path of a checkpoint whose checksums are right.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged or something else; the message names the newest sound one beside it too.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"Checkpoint file not found: {path}{_beside(path)}")
    if damage := find_damage(path):
        raise CheckpointError(f"{path} {damage}{_beside(path)}")
    return path


def read_checkpoint(path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
    """Reads a checkpoint, checksums first.

    Args:
        path: The file, or an open one, which is left where it was.
        map_location: See `torch.load`.
        weights_only: See `torch.load`.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged or something else; see `check_file`.
    """
    source, path = path, file_name(path)
    if isinstance(source, str | Path):
        source = path = check_file(source)
    elif not hasattr(source, "seek"):
        raise CheckpointError(f"a checkpoint must be the path of a file or an open file, got {source!r:.80}")
    start = 0 if source is path else source.tell()
    try:
        content = torch.load(source, map_location=map_location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error):
            raise CheckpointError(f"{path} is damaged: it cannot be read{_beside(path)}") from error
        raise CheckpointError(
            f"{path} holds more than tensors and plain data, which loading would run as code: give "
            "weights_only=False if you trust whoever made it"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, OSError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise CheckpointError(f"{path} is damaged, or not a checkpoint of torch: {reason}{_beside(path)}") from error
    if source is not path:
        source.seek(start)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a checkpoint{_beside(path)}")
    return content


def file_name(source: Any) -> Any:
    """The path of a file, or the name of an open one, for messages."""
    return getattr(source, "name", "the open file") if hasattr(source, "read") else source


def _beside(path: Any) -> str:
    """The rest of a message: which file is to be given instead."""
    if not isinstance(path, Path):
        return ""
    try:
        others = sorted(path.parent.glob("*.ckpt"), key=lambda other: other.stat().st_mtime, reverse=True)
        sound = next((other for other in others if other != path and find_damage(other) is None), None)
    except OSError:
        sound = None
    return "; there is no sound checkpoint beside it" if sound is None else f"; {sound} beside it is sound: give that"
