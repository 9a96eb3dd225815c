"""Discovery of image files in folders."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")
_JPEG_2000 = (".jp2", ".j2k", ".jpx")
_NETPBM = (".ppm", ".pgm", ".pbm", ".pnm")
_OTHERS = (".png", ".apng", ".webp", ".avif", ".gif", ".tif", ".tiff", ".bmp", ".dib", ".tga", ".qoi")
SUFFIXES = (*_JPEG, *_OTHERS, *_JPEG_2000, *_NETPBM)

# Images by their names, which are not read: other encodings, drawings and documents of programs, raw photographs.
NOT_READ = frozenset(
    (
        *(".heic", ".heif", ".hif", ".jxl", ".jxr", ".avifs", ".exr", ".hdr", ".pfm", ".dds", ".pcx"),
        *(".svg", ".svgz", ".eps", ".ico", ".icns", ".psd", ".xcf"),
        *(".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw"),
    )
)


def find_images(root: str | Path) -> list[Path]:
    """Returns the image files below a folder, sorted by relative path.

    Links are followed; hidden files and folders are left out. Other files that look like images are counted by suffix
    in a warning.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder. root must be a folder with images ({', '.join(SUFFIXES)})")
    paths, left_out = [], Counter[str]()
    for path in _files(root, ()):
        suffix = path.suffix.lower()
        if suffix in SUFFIXES:
            paths.append(path)
        elif suffix in NOT_READ:
            left_out[suffix] += 1
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(left_out.items()))
    if not paths:
        unread = f" ({counts} cannot be read)" if counts else ""
        raise FileNotFoundError(f"{root} holds no images{unread}: no file below it ends in {', '.join(SUFFIXES)}")
    if counts:
        warnings.warn(
            f"{root}: {counts} left out, which cannot be read; convert them, for instance to PNG", stacklevel=2
        )
    return sorted(paths, key=lambda path: path.relative_to(root).parts)


def _files(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Files below a folder that are not hidden; a link back to a folder that it is in is not followed."""
    above = (*above, folder.resolve())
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        reason = "no permission to read it" if isinstance(error, PermissionError) else error.strerror
        warnings.warn(f"{folder} is left out: {reason}", stacklevel=3)
        return
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if path.is_file():  # not a link to nowhere, nor to itself
            yield path
        elif path.is_dir() and path.resolve() not in above:
            yield from _files(path, above)
