"""Finding image files."""

from collections import Counter
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")
_JPEG_2000 = (".jp2", ".j2k", ".jpx")
_NETPBM = (".ppm", ".pgm", ".pbm", ".pnm")
_OTHERS = (".png", ".apng", ".webp", ".avif", ".gif", ".tif", ".tiff", ".bmp", ".dib", ".tga", ".qoi")
SUFFIXES = (*_JPEG, *_OTHERS, *_JPEG_2000, *_NETPBM)

# Images by their names, which are not read: other encodings, drawings and documents of programs, raw photographs.
_NOT_READ = frozenset(
    (
        *(".heic", ".heif", ".hif", ".jxl", ".jxr", ".avifs", ".exr", ".hdr", ".pfm", ".dds", ".pcx"),
        *(".svg", ".svgz", ".eps", ".ico", ".icns", ".psd", ".xcf"),
        *(".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw"),
    )
)


def find_images(root: Path) -> list[Path]:
    """Returns the image files below a folder, sorted by relative path; hidden files and folders are left out.

    Other files that look like images are counted by suffix in a warning.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder. root must be a folder with images ({', '.join(SUFFIXES)})")
    paths, left_out = [], Counter[str]()
    for path in root.rglob("*"):
        suffix = path.suffix.lower()
        known = suffix in SUFFIXES
        if not known and suffix not in _NOT_READ:
            continue
        if any(part.startswith(".") for part in path.relative_to(root).parts) or not path.is_file():
            continue
        if known:
            paths.append(path)
        else:
            left_out[suffix] += 1
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(left_out.items()))
    if not paths:
        unread = f" ({counts} cannot be read)" if counts else ""
        raise FileNotFoundError(f"{root} holds no images{unread}: no file below it ends in {', '.join(SUFFIXES)}")
    if counts:
        rank_zero_warn(f"{root}: {counts} left out, which cannot be read; convert them, for instance to PNG")
    return sorted(paths, key=lambda path: path.relative_to(root).parts)
