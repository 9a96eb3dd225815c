"""The protocol of a restoration operator: which parameters it has, and how it restores images under them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_modules.imaging import check_noise_std


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter that an operator declares: where it starts, between which bounds, and in which unit.

    Args:
        name: Keyword under which `RestorationOperator.forward` takes it.
        start: Start value; for a bank one number for all of its entries, or one for each.
        bounds: Lower and upper bound, positive (an integer's lower bound may be 0, and with a `scale` any may).
        shape: `()` for a scalar, `(K,)` for a bank of K values that every image receives whole.
        unit: What the number counts, for reports. `"noise"`: multiples of the noise level; the operator multiplies.
        integer: Whether it takes whole numbers, which have no gradient and stay out of log space.
        relative_step: Relative step of `SignRule`.
        scale: Of a number that may be negative, such as a filter's tap: how much of it counts as a factor e does in
            others. It is learned in units of this, where others are learned as logarithms.
        picture: Height and width of the pictures that a bank holds one after the other, such as filters; for reports.

    Raises:
        ValueError: If the bounds are reversed or not positive, the start is outside them, or the shape or the scale is
            impossible.

    Example:
        >>> ParameterSpec("weight", start=0.1, bounds=(0.001, 1.0)).size
        1
    """

    name: str
    start: float | Sequence[float]
    bounds: tuple[float, float]
    shape: tuple[int, ...] = ()
    unit: str = ""
    integer: bool = False
    relative_step: float = 0.05
    scale: float | None = None
    picture: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name in ("noisy", "noise", "guide"):
            raise ValueError(
                f"{self.name!r} cannot be a parameter's name: it is the keyword of `forward` for its value"
            )
        if len(self.shape) > 1 or any(size < 1 for size in self.shape):
            raise ValueError(f"the shape of {self.name!r} must be () or (K,) with K ≥ 1, got {self.shape}")
        if not 0 <= self.relative_step < 1:
            raise ValueError(f"relative_step of {self.name!r} must be in [0, 1), got {self.relative_step}")
        if self.scale is not None and (not 0 < self.scale < math.inf or self.integer):
            what = "is for numbers that are not whole" if self.integer else f"must be positive, got {self.scale}"
            raise ValueError(f"the scale of {self.name!r} {what}")
        if self.picture is not None and (min(self.picture) < 1 or self.size % math.prod(self.picture)):
            raise ValueError(
                f"{self.name!r} has {self.size} numbers, which are no whole number of pictures of {self.picture}"
            )
        lower, upper = self.bounds
        if not (math.isfinite(lower) and math.isfinite(upper) and lower <= upper):
            raise ValueError(f"bounds of {self.name!r} must be finite with lower ≤ upper, got ({lower}, {upper})")
        if self.scale is None and (lower < 0 or (lower == 0 and not self.integer)):
            raise ValueError(
                f"bounds of {self.name!r} must be positive, got ({lower}, {upper}): it is learned as a logarithm; a "
                "number that may be negative has a scale"
            )
        if not isinstance(self.start, float | int) and len(self.start) != self.size:
            raise ValueError(
                f"{self.name!r} has shape {self.shape}, so it starts from one number or from {self.size}, got "
                f"{len(self.start)}"
            )
        for value in self.starts:
            if not lower <= value <= upper:
                raise ValueError(
                    f"{self.name!r} starts at {value}, outside its bounds [{lower}, {upper}]: move the start value or "
                    "widen the bounds"
                )
        for value in (*self.starts, lower, upper):
            if self.integer and value != int(value):
                raise ValueError(f"{self.name!r} and its bounds must be whole numbers, got {value:g}")

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def starts(self) -> tuple[float, ...]:
        """One start value for each of its numbers."""
        if isinstance(self.start, float | int):
            return (float(self.start),) * self.size
        return tuple(float(value) for value in self.start)


class Smoothness(NamedTuple):
    """How smooth restored images are, in the operator's own measure.

    Attributes:
        score: The score, larger for smoother, `[B]`: what the loss proxy may reward and `SignRule` compares.
        similarity: Mean similarity of neighbours, in [0, 1], `[B]`.
    """

    score: Tensor
    similarity: Tensor


@runtime_checkable
class NoiseDescription(Protocol):
    """Noise that is more than a level: an object that an operator takes in place of one."""

    def variance(self, images: Tensor) -> Tensor:
        """Noise variance of each pixel.

        Shape:
            - images: `[B, C, H, W]`
            - output: `[B, 1 or C, H, W]`
        """

    def distance_bias(self, offset: tuple[int, int]) -> Tensor:
        """What noise adds to the squared difference of two pixels `offset` = (row, column) apart, mean over channels:
        twice the variance for white noise.

        Shape:
            - output: `[]` or `[B]`
        """


Noise = Tensor | float | NoiseDescription


class RestorationOperator(nn.Module, ABC):
    """Restores images under parameters that somebody else holds: a table that learns them, or a caller.

    A new operator is a subclass in a file of its own, named by `class_path` in a configuration; `Reconstruction` trains
    any. It declares its parameters and restores; the rest of this class is optional.
    """

    @property
    @abstractmethod
    def parameter_specs(self) -> tuple[ParameterSpec, ...]:
        """The parameters, in order."""

    @abstractmethod
    def forward(self, noisy: Tensor, *, noise: Noise, guide: Tensor | None = None, **parameters: Any) -> Tensor:
        """Restored images.

        Args:
            noisy: Images to restore, in [0, 1] but for the noise.
            noise: Their noise: a standard deviation where white is 1 (one for all, one for each image, or a map), or an
                object that describes it; see `noise_level`.
            guide: Images, or features, on which pixels are compared in place of the noisy ones (joint filtering).
            parameters: By the names declared: one number for all images or one for each; banks likewise.

        Shape:
            - noisy: `[B, C, H, W]`
            - noise: scalar, `[1]`, `[B]` or `[B, 1 or C, H, W]`
            - guide: `[B, F, H, W]`
            - parameters: scalar, `[1]` or `[B]`; a bank of K `[K]` or `[B, K]`
            - output: `[B, C, H, W]`
        """

    def smoothness(self, restored: Tensor, *, noise: Noise, **parameters: Any) -> Smoothness | None:
        """Smoothness of restored images; None where the operator has no measure of it.

        Args:
            restored: Images as `forward` returned them.
            noise: Noise of the images that were restored, for parameters in units of it.
            parameters: As in `forward`.

        Shape:
            - restored: `[B, C, H, W]`
            - noise: scalar or `[B]`
        """
        return None

    def set_bounds(self, bounds: Mapping[str, tuple[float, float]]) -> None:
        """Take the bounds of a run, or raise `ValueError` where the operator cannot work between them.

        Results must not depend on them; what is worked out once for all parameters of a run may.

        Args:
            bounds: Smallest and largest value that each parameter can have in the run.
        """

    def unit_factor(self, name: str, channels: int) -> float:
        """Absolute value of a parameter in units of noise, over its number and the noise level; for reports."""
        return 1.0

    def diagnostics(self, noisy: Tensor, *, noise: Noise, **parameters: Any) -> dict[str, Tensor]:
        """Numbers of each image that show whether the operator is at work; read on steps that log.

        Shape:
            - noisy: `[B, C, H, W]`
            - output: `[B]` each
        """
        return {}

    def warnings(self, diagnostics: Mapping[str, float]) -> dict[str, str]:
        """What the user should know of the means of `diagnostics` and of the smoothness (`similarity`), with the
        remedy, by a key of its own each.
        """
        return {}


def check_images(noisy: Tensor, guide: Tensor | None = None) -> None:
    """Raise `ValueError` unless these are images that an operator can work on.

    Shape:
        - noisy: `[B, C, H, W]`, floating point
        - guide: `[B, F, H, W]`
    """
    if noisy.ndim != 4:
        raise ValueError(f"images must be [B, C, H, W], got {list(noisy.shape)}: add the batch dimension with [None]")
    if not noisy.is_floating_point():
        raise ValueError(f"images must be floating-point, got {noisy.dtype}: divide by 255 what has whole numbers")
    if noisy.numel() == 0:
        raise ValueError(f"images are empty, got {list(noisy.shape)}: give at least one image of at least one pixel")
    size = (noisy.shape[0], *noisy.shape[-2:])
    if guide is not None and (guide.ndim != 4 or (guide.shape[0], *guide.shape[-2:]) != size or not guide.shape[1]):
        raise ValueError(
            f"guide must be [B, F, H, W] of the images' B, H and W, got {list(guide.shape)} beside {list(noisy.shape)}"
        )


def noise_level(noise: Noise, images: Tensor) -> Tensor:
    """Noise standard deviation of each image, or of each of its pixels.

    Args:
        noise: As `RestorationOperator.forward` takes it.
        images: The images.

    Shape:
        - noise: scalar, `[1]`, `[B]`, `[B, 1, 1, 1]` or `[B, 1 or C, H, W]`
        - images: `[B, C, H, W]`
        - output: `[B]` or `[B, 1 or C, H, W]`, in the precision and on the device of the images

    Raises:
        ValueError: If a level is negative or above 1, or the shape is none of these.
    """
    if not isinstance(noise, (Tensor, float, int)):
        return noise.variance(images).sqrt()
    # A number is filled in, not copied: a copy to an accelerator would make the host wait.
    level = noise.to(images) if isinstance(noise, Tensor) else images.new_full((), noise)
    size = images.shape[0]
    if level.ndim == 4 and level.shape == (size, 1, 1, 1):
        level = level.flatten()
    is_map = level.ndim == 4 and level.shape[0] in (1, size) and level.shape[2:] == images.shape[2:]
    if is_map and level.shape[1] in (1, images.shape[1]):
        level = level.expand(size, -1, -1, -1)
    elif level.ndim <= 1 and level.numel() in (1, size):
        level = level.expand(size)
    else:
        raise ValueError(
            f"the noise level must be one number, one for each of {size} images, or a map [B, 1 or C, H, W] of the "
            f"images' size, got {list(level.shape)} beside images {list(images.shape)}"
        )
    if is_readable(level):  # data and arguments of other devices were checked on the host
        for extreme in level.detach().aminmax():
            check_noise_std(float(extreme), "the noise level")
    return level


def is_readable(tensor: Tensor) -> bool:
    """Whether a look at the values costs nothing and is possible: they are in this process's own memory.

    Not so on an accelerator, where a look would stall every step, nor where a function is being compiled, exported,
    traced or transformed (`torch.func`), and tensors are so in name only.

    Shape:
        - tensor: any
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if tensor.device.type != "cpu" or type(tensor) not in (Tensor, nn.Parameter):
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def pixel_level(level: Tensor) -> Tensor:
    """Noise level of each pixel: the root mean square over the channels.

    Shape:
        - level: as `noise_level` returns it
        - output: `[B, 1, 1, 1]`, or of a map `[B, 1, H, W]`
    """
    return level.view(-1, 1, 1, 1) if level.ndim == 1 else _root_mean_square(level, (1,))


def image_level(level: Tensor) -> Tensor:
    """Noise level of each image: the root mean square over its pixels.

    Shape:
        - level: as `noise_level` returns it
        - output: `[B]`
    """
    return level if level.ndim == 1 else _root_mean_square(level, (1, 2, 3)).flatten()


def _root_mean_square(level: Tensor, dim: tuple[int, ...]) -> Tensor:
    square = level.square().mean(dim, keepdim=True)
    # A level of 0 keeps a finite derivative.
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)


def per_image(name: str, value: Tensor | float | Sequence[float], images: Tensor, size: int | None = None) -> Tensor:
    """A parameter as one number, or one bank, for each image.

    Args:
        name: Its name, for the message.
        value: One for all images, or one for each.
        images: The images; one number for each where they are graphs.
        size: Length K of a bank; None for a scalar parameter.

    Shape:
        - value: scalar, `[1]`, `[B]` or `[B, 1, 1, 1]`; a bank `[K]` or `[B, K]`
        - images: `[B, ...]`; of graphs `[B]`
        - output: `[B]`; a bank `[B, K]`

    Raises:
        ValueError: If the value has another shape.
    """
    if isinstance(value, Tensor):
        number = value.to(images.device)
    elif isinstance(value, (float, int)):  # filled in, not copied: a copy would make the host wait for an accelerator
        number = images.new_full((), value, dtype=torch.long if isinstance(value, int) else images.dtype)
    else:
        number = torch.tensor(value, dtype=images.dtype, device=images.device)
    number = number.to(images.dtype) if number.is_floating_point() or size is not None else number
    count = images.shape[0]  # of a dynamic export, `len` would make a constant
    kind = "images" if images.ndim > 1 else "graphs"
    if size is None:
        if number.ndim == 4 and number.shape[1:] == (1, 1, 1):
            number = number.flatten()
        if number.ndim <= 1 and number.numel() in (1, count):
            return number.expand(count)
        expected = f"one number or one for each of {count} {kind}"
    else:
        if number.ndim == 0 or number.shape in ((size,), (1, size), (count, size)):
            return number.expand(count, size)
        expected = f"a bank [{size}] or one for each of {count} images, [{count}, {size}]"
    raise ValueError(f"{name} must be {expected}, got {list(number.shape)}")
