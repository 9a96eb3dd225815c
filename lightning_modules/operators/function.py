"""Any function that restores images, as an operator."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_modules.operators.operator import (
    Noise,
    ParameterSpec,
    RestorationOperator,
    check_images,
    image_level,
    is_readable,
    noise_level,
    per_image,
)

# Keyword under which a function that has it is told the noise level.
_NOISE = "noise_std"


class FunctionOperator(RestorationOperator):
    """Restores by a function of images and parameters, from whatever library.

    Args:
        function: Called as `function(noisy, weight=..., ...)`, by the names of `parameters` and `choices`; in a
            configuration its import path. `noisy` is `[B, C, H, W]`, each parameter `[B]`, a bank of K `[B, K]`. One
            with the argument `noise_std` is given the noise level of each image as well, `[B]`.
        parameters: By name, lower and upper bound of a positive number, which starts in the middle between their
            logarithms; or a `ParameterSpec`, for anything else. A whole number arrives as one, and images that differ
            in it are restored apart.
        choices: By name, values to choose from, in an order along which the result changes steadily. They are learned
            as whole numbers are, by their place, and arrive as they are here.
        arrays: The function takes a single image, as a NumPy array of floating point `[H, W, C]`, or `[H, W]` of one
            channel, and plain numbers, as those of scikit-image do. It has no gradient then: see `callbacks.SPSARule`.

    Raises:
        ValueError: If there is no parameter, a name is no argument of the function, or bounds or choices are
            impossible.

    Example:
        >>> def shrink(noisy, *, weight):
        ...     return noisy - weight.view(-1, 1, 1, 1) * (noisy - noisy.mean((2, 3), keepdim=True))
        >>> operator = FunctionOperator(shrink, {"weight": (0.01, 1.0)})
        >>> operator(torch.rand(2, 3, 16, 12), noise=0.1, weight=0.5).shape
        torch.Size([2, 3, 16, 12])
    """

    def __init__(
        self,
        function: Callable[..., Any],
        parameters: Mapping[str, tuple[float, float] | ParameterSpec] | None = None,
        choices: Mapping[str, list[Any]] | None = None,
        arrays: bool = False,
    ) -> None:
        super().__init__()
        self.function = function
        self.arrays = arrays
        self.choices = {name: list(values) for name, values in (choices or {}).items()}
        for name, values in self.choices.items():
            if len(values) < 2 or name in (parameters or {}):
                twice = "is among the parameters too" if len(values) >= 2 else f"has {len(values)}"
                raise ValueError(f"choices must be at least two values of what has no bounds; {name!r} {twice}")
        self._specs = (
            *(parameter_spec(name, given) for name, given in (parameters or {}).items()),
            *(
                ParameterSpec(name, (len(values) - 1) // 2, (0, len(values) - 1), integer=True)
                for name, values in self.choices.items()
            ),
        )
        if not self._specs:
            raise ValueError('give at least one parameter with its bounds, such as {"weight": (0.001, 1.0)}')
        self._name = getattr(function, "__name__", type(function).__name__)
        arguments = _arguments(function)
        unknown = [spec.name for spec in self._specs if arguments is not None and spec.name not in arguments]
        if arguments is not None and unknown and "**" not in arguments:
            raise ValueError(
                f"{self._name} has no argument {unknown[0]!r}: its arguments are {', '.join(arguments) or 'none'}"
            )
        self._wants_noise = arguments is not None and _NOISE in arguments

    @property
    def parameter_specs(self) -> tuple[ParameterSpec, ...]:
        """The parameters that were given, then the choices by their place."""
        return self._specs

    def forward(self, noisy: Tensor, *, noise: Noise, guide: Tensor | None = None, **parameters: Any) -> Tensor:
        """Restored images; see `RestorationOperator.forward`. What is not named has its start value.

        Shape:
            - noisy: `[B, C, H, W]`
            - noise: scalar, `[1]`, `[B]` or `[B, 1 or C, H, W]`
            - output: `[B, C, H, W]`
        """
        check_images(noisy)
        if guide is not None:
            raise ValueError(f"{self._name} takes no guide: leave it out")
        values = {
            spec.name: per_image(
                spec.name, parameters.get(spec.name, spec.start), noisy, spec.size if spec.shape else None
            )
            for spec in self._specs
        }
        if self._wants_noise:
            values[_NOISE] = image_level(noise_level(noise, noisy))
        restored = self._by_arrays(noisy, values) if self.arrays else self._by_batches(noisy, values)
        if is_readable(restored) and not restored.isfinite().all():
            bad = ~restored.detach().isfinite().flatten(1).all(1)
            named = {name: value[bad][:1].squeeze(0).tolist() for name, value in values.items()}
            raise ValueError(
                f"{self._name} returned NaN or infinite pixels under {self.describe(named)}: narrow the bounds to "
                "where it works"
            )
        return restored

    def describe(self, values: Mapping[str, Any]) -> str:
        """Values of parameters as they reach the function, for messages."""
        plain = {name: self._plain(name, value) for name, value in values.items()}
        return ", ".join(f"{n} = {v:.4g}" if isinstance(v, float) else f"{n} = {v!r:.40}" for n, v in plain.items())

    def plain(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values of a table as they reach the function: choices in place of their places."""
        return {name: self._plain(name, value) for name, value in values.items()}

    def _plain(self, name: str, value: Any) -> Any:
        return self.choices[name][int(value)] if name in self.choices else value

    def _by_batches(self, noisy: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """One call for all images that agree in whole numbers and choices."""
        whole = [spec.name for spec in self._specs if spec.integer]
        if not whole:
            return self._checked(self.function(noisy, **values), noisy)
        distinct, group = torch.stack([values[name] for name in whole], 1).unique(dim=0, return_inverse=True)
        restored = noisy.new_zeros(noisy.shape)
        for number, row in enumerate(distinct.tolist()):
            chosen = (group == number).nonzero()[:, 0]
            part = noisy[chosen]
            named = {name: value[chosen] for name, value in values.items() if name not in whole}
            found = self.function(part, **named, **{n: self._plain(n, v) for n, v in zip(whole, row, strict=True)})
            restored = restored.index_copy(0, chosen, self._checked(found, part))
        return restored

    def _by_arrays(self, noisy: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """One call for each image."""
        restored = []
        for index, image in enumerate(noisy.detach()):
            array = image.permute(1, 2, 0).cpu().double().numpy()
            array = np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array)
            own = {name: value[index] for name, value in values.items()}
            plain = {
                name: value.cpu().numpy() if value.ndim else self._plain(name, value.item())
                for name, value in own.items()
            }
            found = self.function(array, **plain)
            if not isinstance(found, np.ndarray) or found.shape != array.shape:
                raise ValueError(
                    f"{self._name} returned {_outline(found)} for an image {list(array.shape)}: it must return an "
                    "array of the shape of what it restores"
                )
            pixels = found[..., None] if found.ndim == 2 else found
            restored.append(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1))
        return torch.stack(restored).to(noisy)

    def _checked(self, restored: Any, noisy: Tensor) -> Tensor:
        if not isinstance(restored, Tensor) or restored.shape != noisy.shape or not restored.is_floating_point():
            raise ValueError(
                f"{self._name} returned {_outline(restored)} for images {list(noisy.shape)}: it must return a tensor "
                "of floating point and of the shape of what it restores; for a function of NumPy arrays say arrays=True"
            )
        return restored.to(noisy.dtype)


def parameter_spec(name: str, given: tuple[float, float] | Sequence[float] | ParameterSpec) -> ParameterSpec:
    """The declaration of a parameter of which two bounds are given: positive, from the middle of their logarithms."""
    if isinstance(given, ParameterSpec):
        if given.name != name:
            raise ValueError(f"the ParameterSpec of {name!r} is called {given.name!r}: give both one name")
        return given
    try:
        lower, upper = (float(bound) for bound in given)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name!r} must have two bounds (lower, upper), or a ParameterSpec, got {given!r:.60}"
        ) from None
    middle = math.sqrt(lower) * math.sqrt(upper) if 0 < lower <= upper < math.inf else lower
    return ParameterSpec(name, min(max(middle, lower), upper) if lower <= upper else middle, (lower, upper))


def _arguments(function: Callable[..., Any]) -> list[str] | None:
    """Names of a function's keyword arguments, `**` where it takes any; None where it does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return ["**", *(p.name for p in parameters)]
    return [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _outline(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
