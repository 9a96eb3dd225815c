"""`restore`: any photograph, in memory or in a file, by the denoiser that comes with the package or by any operator."""

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_modules.imaging import (
    Picture,
    check_noise_std,
    check_quality,
    find_white,
    fixed_crops,
    kind_of,
    read_picture,
    restored_name,
    to_picture,
    write_picture,
)
from lightning_modules.noise import NoiseModel, estimate_noise_model
from lightning_modules.noise.model import LIGHT_REACH
from lightning_modules.operators import RestorationOperator

Progress = Callable[[float], Any]
NoiseLike = float | str | NoiseModel
Model = str | Path | RestorationOperator
OperatorFor = Callable[..., RestorationOperator]  # by the number of channels, and whether the noise is a camera's
NOISES = ("auto", "white", "camera")
NOISES_IN_WORDS = "'auto', 'white' or 'camera'"

_TILE_SIZE = 512
_HALO = 32  # of an operator that does not say how far a restored pixel looks
_ALIGNMENT = 16  # tiles begin where a network of several scales would begin its coarsest pixels
# Of more pixels than the first number, the noise level is read off crops from all over the picture.
_SAMPLE_ABOVE, _SAMPLE_SIZE, _SAMPLE_SIDE = 2**21, 256, 4
# Estimated levels of white noise under the first are left, from the second on restored, between them in part.
_UNTRUSTED, _TRUSTED = 0.6 / 255, 2 / 255
_TAG = ".restored"


class Restored(NamedTuple):
    """A restored picture.

    Attributes:
        picture: The picture.
        noise: Its noise, told or estimated.
    """

    picture: Picture
    noise: NoiseModel


def restore(
    source: Any,
    *,
    noise: NoiseLike = "auto",
    model: Model = "auto",
    output: str | Path | None = None,
    overwrite: bool = False,
    quality: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """Restores a photograph.

    Args:
        source: Path of an image; `PIL.Image`; array `[H, W]`, `[H, W, C]` or `[C, H, W]`, or tensor `[H, W]`,
            `[C, H, W]` or `[B, C, H, W]`, of whole numbers, or of floating point in [0, 1] or [0, 255].
        noise: Standard deviation of the noise where white is 1, such as `25 / 255`, or a `NoiseModel`; or what to
            estimate it as: `"white"`, a camera's (`"camera"`), or, by default, whichever it is.
        model: The operator, or the file of a `GraphDenoiser`; by default the one that comes with the package, for color
            or gray. An operator restores under the start values of its parameters.
        output: File to write where the source is a file; by default `photo.restored.jpg` beside `photo.jpg`.
        overwrite: Replace the output where it exists.
        quality: Quality from 1 to 100 of a JPEG, WebP or AVIF file, in place of the source's.
        progress: Called with the part of the work that is done, while it is.

    Returns:
        The path that was written, or an image of the source's kind: mode, or type, layout and range.

    Shape:
        - output: as the source

    Raises:
        FileNotFoundError: If there is no such file.
        FileExistsError: If the output exists.
        ValueError: If the source is none of these, or holds no image, or the noise level is out of range.

    Example:
        >>> from lightning_modules.operators import TotalVariation
        >>> image = np.full((20, 30, 3), 128, np.uint8)
        >>> restore(image, noise=5 / 255, model=TotalVariation()).shape
        (20, 30, 3)
    """
    check_quality(quality)
    _check_noise(noise)
    operator = cache(partial(load_operator, model))  # read once for all images of a batch
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        target = path.with_name(restored_name(path.name, _TAG)) if output is None else Path(output).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{source} is not a file: give the path of an image")
        if target.is_dir():
            raise FileExistsError(f"{target} is a folder: give the path of a file as output")
        if os.path.realpath(target) == os.path.realpath(path):
            raise FileExistsError(f"the result would replace the photograph {target}: give another output")
        if target.exists() and not overwrite:
            raise FileExistsError(f"{target} exists: give another output, or overwrite=True")
        write_picture(_restore(_reading(path, target, output is not None), noise, operator, progress), target, quality)
        return target
    if output is not None:
        raise ValueError("output is for files; an image in memory is returned")
    if isinstance(source, Image.Image):
        source.load()
        restored = _restore(to_picture(source), noise, operator, progress)
        result = Image.fromarray(_without_channel(restored.array()))
        changed = {name: getattr(restored, name) for name in ("exif", "xmp", "icc_profile")}
        info = {name: changed.get(str(name), value) for name, value in source.info.items() if name != "transparency"}
        result.info = {name: value for name, value in info.items() if value or name not in changed}
        return result.convert("1") if source.mode == "1" else result
    if isinstance(source, Tensor):
        return _restore_tensor(source, noise, operator, progress)
    if isinstance(source, np.ndarray):
        planes = source.ndim == 3 and source.shape[0] in (1, 3) and source.shape[2] not in (1, 2, 3, 4)
        array = source.transpose(1, 2, 0) if planes else source
        numbers = _restore_array(array, noise, operator, progress)
        return numbers.transpose(2, 0, 1) if planes else numbers
    raise ValueError(f"expected the path of an image, a PIL image, an array or a tensor, got {type(source).__name__}")


def restore_file(
    source: Path,
    target: Path,
    operator: OperatorFor,
    noise: NoiseLike = "auto",
    quality: int | None = None,
    progress: Progress | None = None,
    write: bool = True,
    is_named: bool = False,
) -> dict[str, Any]:
    """Restores one file into another, and returns what there is to say of it.

    Args:
        source: The file to restore.
        target: The file to write.
        operator: The operator for a number of channels.
        noise: As in `restore`.
        quality: As in `restore`.
        progress: As in `restore`.
        write: Restore and write; without, only look at the source.
        is_named: Whether the suffix of the target is a wish for its format, whatever the source holds.
    """
    start = time.perf_counter()
    picture = _reading(source, target, is_named)
    height, width = picture.pixels.shape[-2:]
    if write:
        picture, found = restore_picture(picture, operator, noise, progress)
        write_picture(picture, target, quality)
    else:
        picture, found = _estimate(picture, noise)
    seconds = f"{time.perf_counter() - start:.2f}"
    described = {"noise": _kind(noise, found), **_numbers(found), "seconds": seconds, "size": f"{width}x{height}"}
    return described | {"note": "; ".join(picture.notes)}


def restore_picture(
    picture: Picture,
    operator: OperatorFor,
    noise: NoiseLike = "auto",
    progress: Progress | None = None,
) -> Restored:
    """Restores a picture; its notes say where it was left as it is.

    Args:
        picture: The picture.
        operator: The operator for a number of channels.
        noise: As in `restore`.
        progress: As in `restore`.
    """
    picture, found = _estimate(picture, noise)
    pixels = picture.pixels
    if not found.level > 0:
        return Restored(picture, found)
    if found.is_white:
        level = float(found.level)
        restored = _in_tiles(pixels, operator(len(pixels)), partial(_denoise, level=level), progress)
        if isinstance(noise, str):  # of little noise, an estimate that is a little off costs more than it gains
            trust = min(max((level - _UNTRUSTED) / (_TRUSTED - _UNTRUSTED), 0.0), 1.0)
            if trust < 1:
                with torch.inference_mode():  # in place: a copy of a large picture is large
                    restored.lerp_(pixels, 1 - trust)
    elif found.is_uncorrelated:
        restored = _in_tiles(pixels, operator(len(pixels)), partial(_denoise_stabilized, noise=found), progress)
    else:
        chosen = operator(len(pixels), camera=True)
        gain = 1.0 if getattr(chosen, "knows_correlation", False) else float(found.low_frequency_gain)
        by_map = partial(_denoise_by_map, noise=found, gain=gain)
        restored = _in_tiles(pixels, chosen, by_map, progress, beyond=LIGHT_REACH)
    return Restored(replace(picture, pixels=restored), found)


def load_operator(model: Model, channels: int, camera: bool = False) -> RestorationOperator:
    """The operator that a user has named, for images of so many channels.

    Args:
        model: As `restore` takes it.
        channels: 1 for gray, 3 for color.
        camera: Whether their noise is correlated, as a camera's.
    """
    if isinstance(model, RestorationOperator):
        return model
    if not isinstance(model, str | Path):
        raise ValueError(f"model must be 'auto', the path of a GraphDenoiser or an operator, got {model!r}")
    home = import_module("lightning_modules.graph_denoiser")  # when it is needed: it loads the graph, and weights
    if model == "auto":  # without weights for gray, those for color restore the three equal channels
        model = "gray" if channels == 1 and home.has_weights("gray") else "color"
        model = "camera" if camera and channels == 3 and home.has_weights("camera") else model
    denoiser: RestorationOperator = home.GraphDenoiser.from_pretrained(model)
    return denoiser


def _reading(source: Path, target: Path, is_named: bool) -> Picture:
    """The picture in a file, of the kind that the target's name asks for where it is a wish, or another suffix."""
    kind = kind_of(target)
    if kind is None:
        raise ValueError(f"{target}: files of this kind are not written; choose .png, .jpg or .tif")
    picture = read_picture(source)
    return picture if not is_named and kind_of(source) == kind else replace(picture, kind=kind)


def _restore(picture: Picture, noise: NoiseLike, operator: OperatorFor, progress: Progress | None) -> Picture:
    restored, _ = restore_picture(picture, operator, noise, progress)
    for note in restored.notes:
        warnings.warn(note, stacklevel=3)
    return restored


def _restore_array(
    array: np.ndarray, noise: NoiseLike, operator: OperatorFor, progress: Progress | None, white: float | None = None
) -> np.ndarray:
    """Restores [H, W] or [H, W, C]."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"an image must hold whole numbers or floating point, got {array.dtype}")
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] > 4):
        raise ValueError(f"an image must be [H, W], or [H, W, C] of one to four channels, got {list(array.shape)}")
    picture = to_picture(array if array.ndim == 3 else array[..., None], white)
    restored = _restore(picture, noise, operator, progress).array()
    return restored if array.ndim == 3 else restored[..., 0]


def _restore_tensor(images: Tensor, noise: NoiseLike, operator: OperatorFor, progress: Progress | None) -> Tensor:
    if images.ndim not in (2, 3, 4) or 0 in images.shape:
        raise ValueError(f"a tensor must be [H, W], [C, H, W] or [B, C, H, W], with pixels, got {list(images.shape)}")
    if images.is_complex():
        raise ValueError(f"an image must hold whole numbers or floating point, got {images.dtype}")
    numbers = images.detach().cpu()
    numbers = numbers.float() if numbers.dtype == torch.bfloat16 else numbers  # which NumPy does not know
    arrays = (numbers if numbers.ndim == 2 else numbers.movedim(-3, -1)).numpy()
    if images.ndim < 4:
        restored = _restore_array(arrays, noise, operator, progress)
    else:  # one scale for the whole batch
        white, _ = find_white(arrays)
        restored = np.stack([_restore_array(array, noise, operator, progress, white) for array in arrays])
    result = torch.from_numpy(restored)
    return (result if images.ndim == 2 else result.movedim(-1, -3)).to(images).contiguous()


def _without_channel(array: np.ndarray) -> np.ndarray:
    return array[..., 0] if array.shape[-1] == 1 else array


def _check_noise(noise: Any) -> None:
    if isinstance(noise, NoiseModel) or (isinstance(noise, str) and noise in NOISES):
        return
    try:
        if isinstance(noise, str | bool | np.bool_):
            raise TypeError
        level = float(noise)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"the noise level must be a number or {NOISES_IN_WORDS}, got {noise!r}") from None
    check_noise_std(level)


def _estimate(picture: Picture, noise: NoiseLike) -> Restored:
    """The noise that was told or is estimated; none, with a note, where there is nothing to estimate it from."""
    _check_noise(noise)
    channels = len(picture.pixels)
    if isinstance(noise, NoiseModel):
        return Restored(picture, noise)
    if not isinstance(noise, str):
        return Restored(picture, NoiseModel.white(torch.tensor([float(noise)]), channels))
    pixels = picture.pixels[None]
    if pixels[0, 0].numel() > _SAMPLE_ABOVE and min(pixels.shape[-2:]) >= _SAMPLE_SIZE:
        crops = fixed_crops(picture.pixels, _SAMPLE_SIZE, _SAMPLE_SIDE**2)
        pixels = torch.cat([torch.cat(list(row), dim=-1) for row in crops.split(_SAMPLE_SIDE)], dim=-2)[None]
    try:
        return Restored(picture, estimate_noise_model(pixels, noise))
    except ValueError as error:
        left = replace(picture, notes=(*picture.notes, f"left as it is: {error}"))
        return Restored(left, NoiseModel.white(torch.zeros(1), channels))


def _kind(noise: NoiseLike, found: NoiseModel) -> str:
    """What the noise is called in a table."""
    return "told" if not isinstance(noise, str) else "white" if found.is_white else "camera"


def _numbers(noise: NoiseModel) -> dict[str, str]:
    """The noise in numbers, means over the channels: level, slope and intercept of its variance, correlation."""
    numbers = {
        "noise_std": noise.level,
        "slope": noise.slope.mean(),
        "intercept": noise.intercept.mean(),
        "correlation": noise.neighbor_correlation,
    }
    return {name: f"{float(number):.6f}" for name, number in numbers.items()}


def _denoise(operator: RestorationOperator, image: Tensor, level: float | Tensor) -> Tensor:
    """Restores an image; a denoiser of color restores gray as color, and one of gray restores each channel.

    Shape:
        - image: `[1, C, H, W]`
        - level: a number, or `[1, 1, H, W]`
        - output: `[1, C, H, W]`
    """
    parameters = {spec.name: list(spec.starts) if spec.shape else spec.starts[0] for spec in operator.parameter_specs}
    channels = getattr(operator, "channels", None)
    if channels == 3 and image.shape[1] == 1:
        return operator(image.expand(-1, 3, -1, -1), noise=level, **parameters).mean(1, keepdim=True)
    if channels == 1:
        return operator(image.transpose(0, 1), noise=level, **parameters).transpose(0, 1)
    return operator(image, noise=level, **parameters)


def _denoise_stabilized(operator: RestorationOperator, image: Tensor, noise: NoiseModel) -> Tensor:
    """Restores an image whose noise is white but not as strong everywhere, between a transform that makes it so and
    the way back.

    Shape:
        - image: `[1, C, H, W]`
        - output: `[1, C, H, W]`
    """
    offset, scale = noise.stable_range(image[0])
    restored = _denoise(operator, (noise.stabilize(image) - offset) * scale, float(scale))
    return noise.unstabilize(restored / scale + offset)


def _denoise_by_map(operator: RestorationOperator, image: Tensor, noise: NoiseModel, gain: float) -> Tensor:
    """Restores an image by the level of each pixel's noise.

    Shape:
        - image: `[1, C, H, W]`
        - output: `[1, C, H, W]`
    """
    return _denoise(operator, image, (gain * noise.level_map(image)).clamp_max(1))


@torch.inference_mode()
def _in_tiles(
    pixels: Tensor,
    operator: RestorationOperator,
    denoise: Callable[[RestorationOperator, Tensor], Tensor],
    progress: Progress | None,
    beyond: int = 0,
) -> Tensor:
    """Restores an image of any size in bounded memory: in tiles, each with a halo that is computed and thrown away.

    Args:
        pixels: The image.
        operator: The operator.
        denoise: Restores a tile by it.
        progress: Is told the share that is done.
        beyond: How much farther than the operator the restoration of a pixel looks.

    Shape:
        - pixels: `[C, H, W]`
        - output: `[C, H, W]` in [0, 1]
    """
    device = next((tensor.device for tensor in operator.state_dict().values()), pixels.device)
    halo = getattr(operator, "halo", _HALO) + beyond
    halo += -halo % _ALIGNMENT
    output = torch.empty_like(pixels)
    height, width = pixels.shape[1:]
    corners = list(product(range(0, height, _TILE_SIZE), range(0, width, _TILE_SIZE)))
    for done, (top, left) in enumerate(corners, start=1):
        rows = slice(max(top - halo, 0), min(top + _TILE_SIZE + halo, height))
        columns = slice(max(left - halo, 0), min(left + _TILE_SIZE + halo, width))
        restored = denoise(operator, pixels[None, :, rows, columns].to(device))[0]
        inside = restored[:, top - rows.start :, left - columns.start :][:, :_TILE_SIZE, :_TILE_SIZE]
        output[:, top : top + _TILE_SIZE, left : left + _TILE_SIZE] = inside.clamp(0, 1)
        if progress is not None:
            progress(done / len(corners))
    return output
