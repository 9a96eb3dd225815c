"""Files that can be read, found before the first batch, and a warning about the others."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_modules.imaging import read_image

OnError = Literal["raise", "skip"]

_NAMED = 3  # files that a message names before it says "and so on"


def check_on_error(on_error: str) -> None:
    """Refuses anything but the two that are known."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be raise or skip, got {on_error!r}")


def find_readable(paths: Sequence[Path], names: Sequence[str], threads: int) -> Tensor:
    """Decodes every file once, and warns of those for which that fails.

    Every process comes to the same result by itself: no file can be missing on only one of them.

    Args:
        paths: The files.
        names: What the warning calls them.
        threads: How many to decode at a time.

    Shape:
        - output: `[N]`, bool
    """
    with ThreadPoolExecutor(max(threads, 1)) as pool:  # Pillow decodes without holding the interpreter's lock
        readable = list(pool.map(_is_readable, paths))
    if not all(readable):
        bad = [name for name, good in zip(names, readable, strict=True) if not good]
        rank_zero_warn(f"{len(bad)} of {len(paths)} files cannot be read and are left out: {some(bad)}")
    return torch.tensor(readable, dtype=torch.bool)


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _is_readable(path: Path) -> bool:
    try:
        read_image(path)
    except ValueError:
        return False
    return True
