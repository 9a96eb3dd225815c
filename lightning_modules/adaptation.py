"""A denoiser adapted to noisy images: it learns from them alone, no clean one is seen."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.graph_denoiser import GraphDenoiser, has_weights
from lightning_modules.imaging import draw, seeded_normal, stream
from lightning_modules.noise import NoiseModel, estimate_noise_models

_CROP, _BATCH, _HELD_OUT = 64, 8, 48
_LEARNING_RATE, _BANK_RATE = 2e-4, 2e-3
_WARM_UP = 0.1  # of the steps
# Length of a step along the noise in the risk, in units of the noise: long beside rounding, short beside textures.
_STEP = 0.03
_TRAINING, _VALIDATION = 0, 1  # streams of draws


class Adapted(NamedTuple):
    """What adaptation comes to.

    Attributes:
        denoiser: The denoiser, with the values of its bank.
        noises: The noise of each image, as EM has found it.
        before: Estimated risk on held-out crops under the weights that it started from, in units of the noise variance.
        after: The same under the adapted ones.
        is_better: Whether the adapted ones are kept; without, the denoiser is the one that it started from.
        risks: Estimated risk of each training step, in the same unit.
    """

    denoiser: GraphDenoiser
    noises: list[NoiseModel]
    before: float
    after: float
    is_better: bool
    risks: list[float]


class _Signal(NamedTuple):
    """An image as the denoiser sees it, and its noise there.

    Attributes:
        image: `[3, H, W]`.
        level: Told level, `[1, H, W]`.
        noise: From the corner and size of a crop and a key, a draw of its noise, `[3, S, S]`.
    """

    image: Tensor
    level: Tensor
    noise: Callable[[int, int, int, Tensor], Tensor]


def adapt(
    images: Sequence[Tensor],
    cameras: Sequence[str] | None = None,
    start: GraphDenoiser | None = None,
    steps: int = 100,
    seed: int = 0,
    progress: Callable[[float], Any] | None = None,
) -> Adapted:
    r"""Adapts a denoiser to noisy images by Stein's unbiased risk estimate under the noise that EM finds in them.

    For noise of covariance :math:`\Sigma`, correlated and dependent on the brightness as a camera's,

    .. math:: \frac1n \lVert f(y) - y \rVert^2 - \frac1n \operatorname{tr} \Sigma
        + \frac{2}{n\varepsilon}\, b^\top \bigl(f(y + \varepsilon b) - f(y)\bigr), \qquad b \sim \mathcal N(0, \Sigma)

    has the mean squared error as its expectation (`em.objectives.stein_risk` is the white case). Network and bank
    descend on it in crops; crops with draws of their own are held out, and where the risk is no lower there in the end,
    the weights stay what they were.

    Args:
        images: Noisy images, in color or gray, of at least 64×64 pixels.
        cameras: Camera of each, as in `estimate_noise_models`; unknown by default.
        start: Denoiser of color images to start from; by default the one that comes with the package for this noise.
        steps: Training steps.
        seed: Seed of crops and draws.
        progress: Called with the part of the work that is done.

    Shape:
        - images: `[C, H, W]` each
        - output: see `Adapted`

    Raises:
        ValueError: If no image is large enough and has noise.
    """
    noises = estimate_noise_models(images, [""] * len(images) if cameras is None else cameras)
    usable = [
        (image, noise)
        for image, noise in zip(images, noises, strict=True)
        if float(noise.level) > 0 and min(image.shape[1:]) >= _CROP and image.shape[0] in (1, 3)
    ]
    if not usable:
        raise ValueError(
            f"none of {len(images)} images has noise and {_CROP}×{_CROP} pixels, of which there is anything to learn"
        )
    denoiser = _start(usable) if start is None else start
    first = {name: value.clone() for name, value in denoiser.state_dict().items()}
    signals = [_signal(image, noise, denoiser.knows_correlation) for image, noise in usable]
    held_out = [_batch(signals, stream(seed, _VALIDATION, part)) for part in range(_HELD_OUT // _BATCH)]
    bank = nn.ParameterDict({n: nn.Parameter(torch.tensor(v).log()) for n, v in denoiser.bank.items()})
    before = _mean_risk(denoiser, bank, held_out)
    risks = []
    denoiser.train().requires_grad_(True)
    groups: list[dict[str, Any]] = [
        {"params": denoiser.network.parameters()},
        {"params": bank.parameters(), "lr": _BANK_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, lr=_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / (_WARM_UP * steps + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    for step in range(steps):
        risk = _risk(denoiser, bank, *_batch(signals, stream(seed, _TRAINING, step))).mean()
        optimizer.zero_grad()
        risk.backward()
        nn.utils.clip_grad_norm_(denoiser.network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        _keep_in_bounds(denoiser, bank)
        risks.append(float(risk.detach()))
        if progress is not None:
            progress((step + 1) / steps)
    denoiser.eval().requires_grad_(False)
    after = _mean_risk(denoiser, bank, held_out)
    is_better = after < before
    if is_better:
        denoiser.bank = {name: tuple(value.detach().exp().tolist()) for name, value in bank.items()}
    else:
        denoiser.load_state_dict(first)
    return Adapted(denoiser, noises, before, after, is_better, risks)


def _start(usable: Sequence[tuple[Tensor, NoiseModel]]) -> GraphDenoiser:
    """The shipped denoiser for what most of the images have."""
    num_correlated = sum(not bool(noise.is_uncorrelated) for _, noise in usable)
    is_camera = 2 * num_correlated > len(usable) and has_weights("camera")
    return GraphDenoiser.from_pretrained("camera" if is_camera else "color")


def _signal(image: Tensor, noise: NoiseModel, knows_correlation: bool) -> _Signal:
    """What `restore` shows the denoiser: the image with a map of the level, or what a transform has made of it."""
    if bool(noise.is_uncorrelated):
        if not bool(noise.is_white):
            offset, scale = noise.stable_range(image)
            image, level = (noise.stabilize(image[None])[0] - offset) * scale, float(scale)
        else:
            level = float(noise.level)
        shown = image.new_full((1, *image.shape[1:]), level)

        def independent(top: int, left: int, size: int, key: Tensor) -> Tensor:
            return level * seeded_normal(key[None], (image.shape[0], size, size))[0].expand(3, -1, -1)

        return _Signal(image.expand(3, -1, -1), shown, independent)
    gain = 1.0 if knows_correlation else float(noise.low_frequency_gain)
    shown = (gain * noise.level_map(image[None]))[0].clamp_max(1)

    def correlated(top: int, left: int, size: int, key: Tensor) -> Tensor:
        part = image[None, :, top : top + size, left : left + size]
        return (noise.sample(part, key[None]) - part)[0].expand(3, -1, -1)

    return _Signal(image.expand(3, -1, -1), shown, correlated)


def _batch(signals: Sequence[_Signal], start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Crops, the levels told and draws of their noise, `[B, 3, S, S]` but for the levels' one channel."""
    numbers = draw(start, torch.arange(4 * _BATCH)).view(_BATCH, 4)
    crops = []
    for which, down, right, key in numbers:
        signal = signals[int(which) % len(signals)]
        top, left = (
            int(number) % (length - _CROP + 1)
            for number, length in zip((down, right), signal.image.shape[1:], strict=True)
        )
        window = (slice(None), slice(top, top + _CROP), slice(left, left + _CROP))
        crops.append((signal.image[window], signal.level[window], signal.noise(top, left, _CROP, key)))
    noisy, level, noise = (torch.stack(part) for part in zip(*crops, strict=True))
    return noisy, level, noise


def _risk(denoiser: GraphDenoiser, bank: nn.ParameterDict, noisy: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """Stein's estimate for each crop, in units of the noise's variance there."""
    parameters = {name: value.exp() for name, value in bank.items()}
    both = denoiser(torch.cat([noisy, noisy + _STEP * noise]), noise=level.repeat(2, 1, 1, 1), **parameters)
    restored, perturbed = both.chunk(2)
    variance = noise.square().mean((1, 2, 3)).detach()
    divergence = (noise * (perturbed - restored)).mean((1, 2, 3)) / _STEP
    return ((restored - noisy).square().mean((1, 2, 3)) + 2 * divergence) / variance - 1


@torch.no_grad()
def _mean_risk(
    denoiser: GraphDenoiser, bank: nn.ParameterDict, batches: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> float:
    return float(torch.stack([_risk(denoiser, bank, *batch).mean() for batch in batches]).mean())


@torch.no_grad()
def _keep_in_bounds(denoiser: GraphDenoiser, bank: nn.ParameterDict) -> None:
    for spec in denoiser.parameter_specs:
        low, high = spec.bounds
        bank[spec.name].clamp_(math.log(low), math.log(high))
