"""Denoisers and iterative algorithms of deepinv as operators (extra `deepinv`)."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_modules.operators.function import parameter_spec
from lightning_modules.operators.operator import (
    Noise,
    ParameterSpec,
    RestorationOperator,
    check_images,
    image_level,
    noise_level,
    per_image,
)

# Names that deepinv's algorithms take for those that they go by inside.
_ALIASES = {"lambda_reg": "lambda", "sigma_denoiser": "g_param"}


class DeepinvDenoiser(RestorationOperator):
    """A denoiser of `deepinv.models`, whose strength is learned: the threshold of `TVDenoiser`, the σ of `DRUNet`.

    Args:
        denoiser: The denoiser; its weights, where it has any, stay as they are.
        bounds: Lower and upper bound of its strength, the second argument of its `forward`; or a `ParameterSpec` of
            that name. With the unit `"noise"` it is multiplied by the noise level.

    Raises:
        TypeError: If the denoiser is no module.
        ValueError: If its `forward` has no second argument, or the bounds are impossible.

    Example:
        >>> import torch
        >>> class Shrink(nn.Module):  # what deepinv calls a Denoiser
        ...     def forward(self, x, sigma):
        ...         return x - sigma.view(-1, 1, 1, 1) * (x - x.mean((2, 3), keepdim=True))
        >>> operator = DeepinvDenoiser(Shrink(), (0.001, 1.0))
        >>> operator(torch.rand(2, 1, 8, 8), noise=0.1, sigma=0.5).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, denoiser: nn.Module, bounds: tuple[float, float] | ParameterSpec) -> None:
        super().__init__()
        if not isinstance(denoiser, nn.Module):
            raise TypeError(f"denoiser must be a module of deepinv.models, got {type(denoiser).__name__}")
        arguments = [*inspect.signature(denoiser.forward).parameters]
        if len(arguments) < 2:
            raise ValueError(f"{type(denoiser).__name__}.forward takes no strength beside the images: nothing to learn")
        self.denoiser = denoiser.requires_grad_(False)
        self._spec = parameter_spec(arguments[1], bounds)

    @property
    def parameter_specs(self) -> tuple[ParameterSpec, ...]:
        """The denoiser's strength, by its own name."""
        return (self._spec,)

    def forward(self, noisy: Tensor, *, noise: Noise, guide: Tensor | None = None, **parameters: Any) -> Tensor:
        """Restored images; see `RestorationOperator.forward`. What is not named has its start value.

        Shape:
            - noisy: `[B, C, H, W]`
            - noise: scalar, `[1]`, `[B]` or `[B, 1 or C, H, W]`
            - output: `[B, C, H, W]`
        """
        values = _values(self.parameter_specs, noisy, noise, guide, parameters)
        _forget(self)
        restored: Tensor = self.denoiser(noisy, values[self._spec.name])
        return restored


class DeepinvOptim(RestorationOperator):
    """An algorithm of `deepinv.optim`, such as plug-and-play, whose numbers are learned; images are the measurements.

    Autograd differentiates through its iterations, with `unfold` or without.

    Args:
        model: The algorithm: `PGD`, `HQS`, `DRS`, ... or what `optim_builder` returns, with `early_stop=False`. Its
            weights stay as they are.
        parameters: By name, as deepinv has them (`stepsize`, `lambda_reg`, `sigma_denoiser`, `beta`): lower and upper
            bound of a number that all iterations share, or a `ParameterSpec`; of shape `(N,)` for one in each of N
            iterations. With the unit `"noise"` they are multiplied by the noise level.
        physics: How measurements come about; by default images are measured as they are.

    Raises:
        ValueError: If the algorithm has no such parameter, or bounds are impossible.

    Example:
        >>> operator = DeepinvOptim(model, {"stepsize": (0.01, 10.0), "sigma_denoiser": (1e-3, 0.5)})  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, tuple[float, float] | ParameterSpec],
        physics: nn.Module | None = None,
    ) -> None:
        super().__init__()
        known = getattr(model, "init_params_algo", None)
        if known is None or not hasattr(model, "fixed_point"):
            raise ValueError(f"model must be an algorithm of deepinv.optim, got {type(model).__name__}")
        for name in parameters:
            if _ALIASES.get(name, name) not in known:
                raise ValueError(f"{type(model).__name__} has no parameter {name!r}, it has {', '.join(known)}")
        if not parameters:
            raise ValueError('give at least one parameter with its bounds, such as {"stepsize": (0.01, 10.0)}')
        self.model = model.requires_grad_(False)
        self._specs = tuple(parameter_spec(name, given) for name, given in parameters.items())
        for spec in self._specs:
            if spec.shape and spec.size < int(model.max_iter):  # type: ignore[arg-type]
                raise ValueError(f"{spec.name!r} has {spec.size} numbers for {model.max_iter} iterations")
        if physics is None:
            from deepinv.physics import Denoising

            physics = Denoising()
        self.physics = physics

    @property
    def parameter_specs(self) -> tuple[ParameterSpec, ...]:
        """The parameters that were named."""
        return self._specs

    def forward(self, noisy: Tensor, *, noise: Noise, guide: Tensor | None = None, **parameters: Any) -> Tensor:
        """Restored images; see `RestorationOperator.forward`. What is not named has its start value.

        Shape:
            - noisy: `[B, C, H, W]`
            - noise: scalar, `[1]`, `[B]` or `[B, 1 or C, H, W]`
            - output: `[B, C, H, W]`
        """
        values = _values(self._specs, noisy, noise, guide, parameters)
        model: Any = self.model
        usual = model.init_params_algo
        own = {
            _ALIASES.get(name, name): [number.view(-1, 1, 1, 1) for number in (value.T if value.ndim > 1 else [value])]
            for name, value in values.items()
        }
        _forget(self)
        try:
            model.init_params_algo = {**usual, **own}
            # What `model(y, physics)` does, but for the block without gradients that it puts around it.
            found, _ = model.fixed_point(noisy, self.physics, init=None, x_gt=None, compute_metrics=False)
        finally:
            model.init_params_algo = usual
        restored: Tensor = model.get_output(found)
        return restored


def _values(
    specs: tuple[ParameterSpec, ...],
    noisy: Tensor,
    noise: Noise,
    guide: Tensor | None,
    parameters: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Absolute values of each image, by name."""
    check_images(noisy)
    if guide is not None:
        raise ValueError("deepinv's denoisers take no guide: leave it out")
    values = {}
    for spec in specs:
        given = parameters.get(spec.name, list(spec.starts) if spec.shape else spec.starts[0])
        value = per_image(spec.name, given, noisy, spec.size if spec.shape else None)
        if spec.unit == "noise":
            level = image_level(noise_level(noise, noisy))
            value = value * (level[:, None] if spec.shape else level)
        values[spec.name] = value
    return values


def _forget(operator: nn.Module) -> None:
    """Lets denoisers that begin where the last call ended, such as `TVDenoiser`, begin anew."""
    # Without `unfold`, deepinv keeps the priors in a plain list, in which torch sees no modules.
    listed = list(getattr(getattr(operator, "model", None), "prior", None) or ())
    for module in (part for root in (operator, *listed) for part in root.modules()):
        if hasattr(module, "restart"):
            module.restart = True


__all__ = ["DeepinvDenoiser", "DeepinvOptim"]
