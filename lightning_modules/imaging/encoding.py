"""Encoding of images as PNG files, and the names of those files."""

from collections import Counter
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from torch import Tensor


def output_names(names: list[str]) -> dict[str, str]:
    """Returns the file for each image: its name with the suffix `.png`, which is appended where two would collide.

    Names count as equal where they differ in case only: some file systems cannot keep them apart.

    Example:
        >>> output_names(["a.jpg", "a.png", "b/c.tif"])
        {'a.jpg': 'a.jpg.png', 'a.png': 'a.png.png', 'b/c.tif': 'b/c.png'}
    """
    outputs = {name: png_name(name) for name in names}
    while True:
        count = Counter(output.casefold() for output in outputs.values())
        colliding = [n for n, output in outputs.items() if count[output.casefold()] > 1 and output != f"{n}.png"]
        if not colliding:
            return outputs
        outputs.update({name: f"{name}.png" for name in colliding})


def png_name(name: str) -> str:
    """Returns a name with the suffix `.png`; a name that leads out of the folder it is written to is refused."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ValueError(f"the name of an image must be a path below the input's root, got {name!r}")
    return str(path.with_suffix(".png"))


def write_png(image: Tensor, path: Path) -> None:
    """Writes an image as an 8-bit PNG.

    Shape:
        - image: `[C, H, W]` in [0, 1], C 1 (gray) or 3 (color)
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"{path}: an image of shape [1 or 3, H, W] can be written as PNG, got {list(image.shape)}.")
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    array = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.contiguous().numpy()).save(path)
