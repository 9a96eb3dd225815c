"""`learn_parameters`: the parameters of any restoration, learned from images by expectation-maximisation."""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

from callbacks import EMParameterCallback, NewtonRule, Rule, SPSARule
from datamodules import ImageSetDataModule
from lightning_modules.em import ParameterTable
from lightning_modules.imaging import as_batch
from lightning_modules.noise import estimate_noise_std
from lightning_modules.operators import FunctionOperator, ParameterSpec, RestorationOperator
from lightning_modules.operators.operator import Noise, noise_level
from lightning_modules.reconstruction import Reconstruction

Objective = Literal["supervised", "sure", "j_invariant"]

# Images of the first batch on which a function is tried out before anything is learned.
_TRIED = 2
# Relative difference of two results for the same images above which they are not the same.
_ROUNDING = 1e-4
# Share of the run, at its end, over which the loss is compared with that of the noisy images.
_LATE = 0.3
_SHOWN = 3
_STEPS = 10
# Points between the bounds that are tried out first, for each parameter, and at most.
_SWEEP, _MOST_POINTS = 8, 32


@dataclass(frozen=True)
class LearnedParameters:
    """What `learn_parameters` has found.

    Attributes:
        parameters: Value of each parameter, by name; of a bank a list.
        errors: How far each is known: its standard deviation, in its own unit, over the images that were seen; NaN
            where the rule does not know.
        history: For each step the loss before it and the values after it, oldest first.
        operator: The restoration under these parameters: `operator(noisy)`, or `restore(path, model=operator)`.
    """

    parameters: dict[str, Any]
    errors: dict[str, Any]
    history: list[dict[str, Any]] = field(repr=False)
    operator: "LearnedOperator" = field(repr=False)


class LearnedOperator(RestorationOperator):
    """An operator under parameters that have been learned, which need not be named any more.

    Args:
        operator: The operator.
        values: Their values, as its table has them.
    """

    def __init__(self, operator: RestorationOperator, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.operator = operator
        self.values = dict(values)
        for name in ("channels", "halo"):  # by which `restore` takes an image apart
            if hasattr(operator, name):
                setattr(self, name, getattr(operator, name))

    @property
    def parameter_specs(self) -> tuple[ParameterSpec, ...]:
        """The operator's parameters, which start at what was learned."""
        return tuple(
            replaced(spec, start=value, bounds=_around(spec, value))
            for spec, value in ((spec, self.values[spec.name]) for spec in self.operator.parameter_specs)
        )

    def forward(
        self, noisy: Tensor, *, noise: Noise | None = None, guide: Tensor | None = None, **parameters: Any
    ) -> Tensor:
        """Restored images; see `RestorationOperator.forward`. Noise that is not told is estimated.

        Shape:
            - noisy: `[B, C, H, W]`
            - noise: scalar, `[1]`, `[B]` or `[B, 1 or C, H, W]`
            - guide: `[B, F, H, W]`
            - output: `[B, C, H, W]`
        """
        noise = estimate_noise_std(noisy) if noise is None else noise
        options = {} if guide is None else {"guide": guide}
        restored: Tensor = self.operator(noisy, noise=noise, **options, **{**self.values, **parameters})
        return restored


def learn_parameters(
    restore: Callable[..., Any] | RestorationOperator,
    parameters: Mapping[str, Any],
    images: Any,
    *,
    noise_std: float | tuple[float, float] | None = None,
    objective: Objective = "supervised",
    start: Mapping[str, Any] | None = None,
    arrays: bool = False,
    rule: Rule | None = None,
    steps: int | None = None,
    batch_size: int = 16,
    crop_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> LearnedParameters:
    """Learns the parameters of a restoration from a few batches of images.

    Args:
        restore: A function `restore(noisy, *, weight, ...)` of a tensor `[B, C, H, W]` and of one number for each image
            and parameter, `[B]`; or a `RestorationOperator`. One with the argument `noise_std` is told the level.
        parameters: By name: two bounds `(lower, upper)` of a positive number, which may be a thousandfold apart; a
            `range` of whole numbers; a list of values to choose from, in order; or a `ParameterSpec`, for a bank or for
            numbers that may be negative. Of an operator, those of its parameters that are to be learned, with bounds,
            or None for its own; an empty one learns them all.
        images: A tensor `[N, C, H, W]`, a list of images, a folder or a DataModule. Clean images, to which noise is
            added; pairs, as a tuple `(noisy, clean)` of any two of these; or noisy ones, with another `objective`.
        noise_std: Standard deviation of the noise, where white is 1: of that which is added, or was there. A range adds
            noise of any level in it. None estimates what was there.
        objective: `"supervised"`, by clean images; `"sure"`, by noisy ones, whose noise is white and Gaussian; or
            `"j_invariant"`, by noisy ones whose noise is of any kind, but independent from pixel to pixel.
        start: Values to start from, in place of the middle between the bounds, or of the operator's own.
        arrays: The function takes one image at a time, as a NumPy array `[H, W, C]` or `[H, W]`, and plain numbers.
        rule: The M-step; `NewtonRule` by default, or `SPSARule` where the function has no gradient.
        steps: Batches to learn from; 10 by default, or 20 for a rule that needs no gradient.
        batch_size: Images in a batch.
        crop_size: Side of the crops that are taken where images differ in size, or come from a folder.
        seed: Seed of order, crops and noise.
        progress: Show a bar.

    Returns:
        The parameters, how well they are known, the course of the run, and the restoration under them.

    Raises:
        ValueError: If the function, its parameters or the images cannot be used; the message says what to do.

    Example:
        >>> def shrink(noisy, *, weight):
        ...     return noisy - weight.view(-1, 1, 1, 1) * (noisy - noisy.mean((2, 3), keepdim=True))
        >>> images = 0.5 + 0.1 * torch.randn(32, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> learned = learn_parameters(shrink, {"weight": (0.001, 1.0)}, images, noise_std=0.1, progress=False)
        >>> round(learned.parameters["weight"], 1)  # half of the variance is noise
        0.5
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    operator, table = _prepare(restore, parameters, start or {}, arrays)
    data = _data(images, noise_std, objective, batch_size, crop_size, seed)
    with isolate_rng():
        batch = _first_batch(data, seed)
    level = _level(noise_std, batch)
    rule = _try_out(operator, table, batch["image"][:_TRIED], level[:_TRIED], rule)
    if steps is None:
        steps = _STEPS if rule.needs_gradient else 2 * _STEPS
    added = 25 / 255 if noise_std is None else noise_std
    module = Reconstruction(operator, table, add_noise=objective == "supervised", noise_std=added, objective=objective)
    frozen = [weight for weight in operator.parameters() if weight.requires_grad]
    scalars = [name for name in table.learned if not isinstance(table.get_parameters()[name], list)]
    learner = EMParameterCallback(rule, history_size=steps, sweep=min(_SWEEP * len(scalars), _MOST_POINTS))
    with _quiet(), isolate_rng(), _frozen(frozen):
        trainer = L.Trainer(
            accelerator="gpu" if torch.cuda.is_available() and not arrays else "cpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            callbacks=[learner, *([_Bar(steps)] if progress else [])],
            limit_val_batches=0,
            log_every_n_steps=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)
    module.cpu()
    losses = learner.loss_history
    _warn_of_bounds(table)
    _warn_of_loss(losses, _loss_of_the_noisy(batch, level, objective, noise_std))
    values = table.get_parameters()
    plain = operator.plain if isinstance(operator, FunctionOperator) else dict
    history = [{"loss": loss, **plain(past)} for loss, past in zip(losses, learner.parameter_history, strict=True)]
    return LearnedParameters(plain(values), _errors(table, learner), history, LearnedOperator(operator, values))


def _prepare(
    restore: Any, parameters: Mapping[str, Any], start: Mapping[str, Any], arrays: bool
) -> tuple[RestorationOperator, ParameterTable]:
    """The operator, and the table of its parameters."""
    if not isinstance(restore, RestorationOperator):
        if not callable(restore):
            raise ValueError(f"restore must be a function or a RestorationOperator, got {type(restore).__name__}")
        choices = {name: given for name, given in parameters.items() if isinstance(given, list)}
        bounded = {name: _bounded(name, given) for name, given in parameters.items() if name not in choices}
        operator = FunctionOperator(restore, bounded, choices, arrays)
        start = {n: choices[n].index(v) if n in choices and v in choices[n] else v for n, v in start.items()}
        table = ParameterTable(initial=dict(start)).declare(operator.parameter_specs)
        return operator, table
    if arrays:
        raise ValueError("arrays is for functions; a RestorationOperator takes tensors")
    bounds = {name: given for name, given in parameters.items() if given is not None}
    initial: dict[str, Any] = {}
    for spec in restore.parameter_specs:
        if spec.name in bounds:
            lower, upper = bounds[spec.name]
            inside = all(lower <= value <= upper for value in spec.starts)
            initial[spec.name] = spec.start if inside else _middle(spec, lower, upper)
    learned = list(parameters) or None
    table = ParameterTable(initial={**initial, **start}, bounds=bounds, learned=learned)
    return restore, table.declare(restore.parameter_specs)


def _bounded(name: str, given: Any) -> tuple[float, float] | ParameterSpec:
    if not isinstance(given, range):
        return given  # looked at by FunctionOperator
    if given.step != 1 or len(given) < 2:
        raise ValueError(f"{name!r} must be a range of at least two numbers in steps of 1, got {given}: give a list")
    return ParameterSpec(name, given[(len(given) - 1) // 2], (given[0], given[-1]), integer=True)


def _middle(spec: ParameterSpec, lower: float, upper: float) -> float:
    if spec.integer:
        return (lower + upper) // 2
    return (lower + upper) / 2 if spec.scale else math.sqrt(lower * upper)


def _around(spec: ParameterSpec, value: Any) -> tuple[float, float]:
    values = value if isinstance(value, list) else [value]
    return min(spec.bounds[0], *values), max(spec.bounds[1], *values)


def _data(
    images: Any,
    noise_std: float | tuple[float, float] | None,
    objective: Objective,
    batch_size: int,
    crop_size: int,
    seed: int,
) -> L.LightningDataModule:
    """The images as a DataModule, and whether what is known of them is enough."""
    if isinstance(images, L.LightningDataModule):
        return images
    pairs = isinstance(images, tuple)
    if pairs and len(images) != 2:
        raise ValueError(f"a tuple of images is a pair (noisy, clean), got {len(images)} parts: give a list of images")
    if pairs and objective != "supervised":
        raise ValueError(
            f"objective={objective!r} learns without clean images, and got pairs: give the noisy ones only"
        )
    if objective == "supervised" and not pairs and noise_std is None:
        raise ValueError(
            "noise_std is missing: noise of which level shall be added to the clean images? For images that are noisy "
            "already say objective='sure', or 'j_invariant' where the noise is not Gaussian"
        )
    known = noise_std if pairs or objective != "supervised" else None
    if isinstance(known, tuple):
        raise ValueError(f"noise_std must be one number for images that have their noise, got {known}: leave it out")
    noisy, clean = images if pairs else (images, None)
    return ImageSetDataModule(noisy, clean, known, crop_size, batch_size, seed=seed)


def _first_batch(data: L.LightningDataModule, seed: int) -> Any:
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    batch = data.on_after_batch_transfer(next(iter(loader)), 0)
    return as_batch(batch, seed=seed, epoch=0, rank=0, world_size=1, position=0, split_stream=0)


def _level(noise_std: float | tuple[float, float] | None, batch: Mapping[str, Any]) -> Tensor:
    """Noise level of the first images: known, the largest of those to be added, or estimated."""
    image = batch["image"]
    if "noise_std" in batch:
        return noise_level(batch["noise_std"], image)
    if noise_std is None:
        return estimate_noise_std(batch.get("noisy", image))
    return image.new_full((len(image),), max(noise_std) if isinstance(noise_std, Sequence) else noise_std)


def _try_out(
    operator: RestorationOperator, table: ParameterTable, images: Tensor, level: Tensor, rule: Rule | None
) -> Rule:
    """The rule, after the restoration has been called at its start and at the bounds of each parameter.

    Raises:
        ValueError: If it keeps state, has no finite result at a bound, or changes with none of the parameters.
    """
    theta = {name: _leaf(value, len(images)) for name, value in table.get_parameters().items()}
    with torch.enable_grad():
        restored = _call(operator, images, level, theta)
    with torch.no_grad():
        again = _call(operator, images, level, theta)
        if float((again - restored).abs().max()) > _ROUNDING * max(1.0, float(restored.abs().max())):
            raise ValueError(
                "restore gave two different results for the same images and parameters: it keeps state or draws random "
                "numbers, so that no two parameters can be compared. Let it depend on its arguments only"
            )
        idle = [name for name in table.learned if not _matters(operator, table, images, level, theta, name, restored)]
    if len(idle) == len(table.learned):
        raise ValueError(f"restore does not depend on {', '.join(idle)}, neither at its start nor at its bounds")
    for name in idle:
        warnings.warn(f"restore does not depend on {name} at its bounds: it may not be learned", stacklevel=4)
    leaves = {name: leaf for name, leaf in theta.items() if leaf.requires_grad and name in table.learned}
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if restored.requires_grad and leaves:
        found = torch.autograd.grad(restored.square().sum(), [*leaves.values()], allow_unused=True)
    with_gradient = [name for name, gradient in zip(leaves, found, strict=True) if gradient is not None]
    without = [name for name in table.learned if name not in with_gradient and name not in idle]
    if rule is None:
        return SPSARule() if without else NewtonRule()
    if rule.needs_gradient and without:
        raise ValueError(
            f"{type(rule).__name__} needs gradients, and {', '.join(without)} has none: choose rule=SPSARule()"
        )
    return rule


def _leaf(value: Any, count: int) -> Tensor:
    if isinstance(value, int):
        return torch.full((count,), value)
    number = torch.tensor(value, dtype=torch.float32)
    return number.expand(count, *number.shape).clone().requires_grad_()


def _call(operator: RestorationOperator, images: Tensor, level: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
    try:
        restored: Any = operator(images, noise=level, **theta)
    except RuntimeError as error:
        if not theta or "must match the size of tensor" not in str(error):
            raise
        sizes = ", ".join(f"{name} {list(value.shape)}" for name, value in theta.items())
        raise ValueError(
            f"restore failed on images {list(images.shape)} with {sizes}: {str(error).splitlines()[0]}. There is one "
            f"value for each image: {next(iter(theta))}.view(-1, 1, 1, 1) is multiplied with images"
        ) from error
    if not isinstance(restored, Tensor) or restored.shape != images.shape:
        got = list(restored.shape) if isinstance(restored, Tensor) else type(restored).__name__
        raise ValueError(f"restore returned {got} for images {list(images.shape)}: it must keep their shape")
    if not restored.isfinite().all():
        values = ", ".join(f"{name} = {value.flatten()[0]:.4g}" for name, value in theta.items())
        raise ValueError(f"restore returned NaN or infinite pixels under {values}: narrow the bounds")
    return restored


def _matters(
    operator: RestorationOperator,
    table: ParameterTable,
    images: Tensor,
    level: Tensor,
    theta: Mapping[str, Tensor],
    name: str,
    restored: Tensor,
) -> bool:
    """Whether the result at one of the bounds of a parameter differs from that at its start.

    Of a bank only the start is tried: all of its numbers at a bound are no filter that anybody uses.
    """
    if theta[name].ndim > 1:
        return True
    results = [
        _call(operator, images, level, {**theta, name: torch.full_like(theta[name], bound)})
        for bound in table.bounds[name]
    ]
    return any(not torch.equal(result, restored) for result in results)


def _warn_of_bounds(table: ParameterTable) -> None:
    for name, value in table.get_parameters().items():
        if name not in table.learned or isinstance(value, list) or name in table.integers:
            continue
        for side, bound in zip(("lower", "upper"), table.bounds[name], strict=True):
            if abs(value - bound) <= 1e-6 * abs(bound):
                warnings.warn(
                    f"{name} ended on its {side} bound {bound:g}: a better value may be beyond it, so widen the bounds "
                    "unless it is meant to stop there",
                    stacklevel=3,
                )


def _loss_of_the_noisy(
    batch: Mapping[str, Any], level: Tensor, objective: Objective, noise_std: float | tuple[float, float] | None
) -> float:
    """What the loss would be if nothing were restored; NaN where it is not known."""
    if "noisy" in batch:
        return float((batch["noisy"] - batch["image"]).square().mean())
    if objective == "j_invariant" or isinstance(noise_std, tuple):
        return math.nan
    return float(level.square().mean())


def _warn_of_loss(losses: list[float], before: float) -> None:
    late = [loss for loss in losses[-max(1, round(_LATE * len(losses))) :] if loss == loss]
    if late and sum(late) / len(late) >= before:
        warnings.warn(
            f"the restored images are no better than the noisy ones (loss {sum(late) / len(late):.3g}, of the noisy "
            f"images {before:.3g}): the bounds may hold no useful value, or the noise level may be another",
            stacklevel=3,
        )


def _errors(table: ParameterTable, learner: EMParameterCallback) -> dict[str, Any]:
    """Standard deviations in the parameters' own units, to first order."""
    deviation = learner.standard_deviation()
    if deviation is None:
        deviation = torch.full_like(table.values(), torch.nan)
    errors = (deviation * table.slope(table.values()))[0].tolist()
    named = {name: errors[table.columns(name)] for name in table.names}
    return {n: v if isinstance(table.get_parameters()[n], list) else v[0] for n, v in named.items()}


class _Bar(L.Callback):
    """One bar over all steps, with the first values."""

    def __init__(self, steps: int) -> None:
        columns = (TextColumn("learning"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[values]}"))
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("", total=steps, values="")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Begin."""
        self._progress.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Show the values after the step."""
        values = pl_module.em_parameters.get_parameters()
        shown = [f"{name} {value:.4g}" for name, value in values.items() if not isinstance(value, list)][:_SHOWN]
        self._progress.update(self._task, completed=trainer.global_step, values=", ".join(shown))

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Leave the bar as it is."""
        self._progress.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave the bar before the message."""
        self._progress.stop()


@contextmanager
def _frozen(weights: Sequence[Tensor]) -> Iterator[None]:
    """A block in which a network's weights stay: it is its parameters that are learned."""
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


@contextmanager
def _quiet() -> Iterator[None]:
    """A block in which Lightning does not report on its own doings, which nobody has asked for by its name."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers")
            warnings.filterwarnings("ignore", ".*GPU available but not used")
            warnings.filterwarnings(
                "ignore", r".*isinstance\(treespec, LeafSpec\)"
            )  # lightning, of newer versions of torch
            # The module looks at the labels before they leave the host; our DataModules have no hook there.
            warnings.filterwarnings("ignore", "You have overridden `on_before_batch_transfer` in `LightningModule`")
            yield
    finally:
        logger.setLevel(level)


__all__ = ["LearnedOperator", "LearnedParameters", "learn_parameters"]
