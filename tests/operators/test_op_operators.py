"""Total variation and the bilateral filter against independent oracles, and what every operator promises."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from lightning_modules import GraphDiffusion
from lightning_modules.operators import BilateralFilter, ParameterSpec, RestorationOperator, TotalVariation
from lightning_modules.operators.operator import noise_level, per_image

OPERATORS = {
    "total variation": TotalVariation(),
    "bilateral": BilateralFilter(),
    "graph": GraphDiffusion(widths="noise"),
    "graph of patches": GraphDiffusion(4, 3, signal="patches", widths="noise"),
}
every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=list(OPERATORS))


def start(operator: RestorationOperator) -> dict[str, Any]:
    """The declared start values; a radius that 13 pixels can have."""
    values = {spec.name: spec.start for spec in operator.parameter_specs}
    if "radius" in values:
        values["radius"] = 4.0
    return {name: int(value) if name == "smooth_steps" else value for name, value in values.items()}


def noisy_image(seed: int = 0, size: tuple[int, ...] = (2, 3, 17, 13)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 1, size[-1]).expand(size)
    return (ramp > 0.4).float() * 0.5 + 0.1 * torch.randn(size, generator=generator)


def test_total_variation_is_the_minimizer_of_its_objective() -> None:
    y = noisy_image(size=(1, 2, 5, 6)).double()
    weight, level = 1.3, 0.1
    found = TotalVariation(3000)(y, noise=level, weight=weight)

    def objective(x: np.ndarray) -> float:
        image = x.reshape(2, 5, 6)
        rows = np.diff(image, axis=1, append=image[:, -1:])
        columns = np.diff(image, axis=2, append=image[:, :, -1:])
        variation = np.sqrt((rows**2 + columns**2).sum(0) + 1e-14).sum()
        return float(0.5 * ((image - y[0].numpy()) ** 2).sum() + weight * level * variation)

    best = optimize.minimize(
        objective, y.numpy().ravel(), method="L-BFGS-B", options={"maxiter": 20000, "maxfun": 10**6}
    )
    assert objective(found.numpy().ravel()) <= best.fun + 1e-5
    # The objective is strongly convex: where it is as low, the place is near. L-BFGS stops short on its kinks.
    np.testing.assert_allclose(found[0].numpy(), best.x.reshape(2, 5, 6), atol=1e-2)


def test_bilateral_filter_is_the_sum_over_its_window() -> None:
    y, level, space, spread, window = noisy_image(size=(1, 3, 6, 5)).double(), 0.1, 1.2, 1.7, 2
    restored = BilateralFilter(window)(y, noise=level, sigma_space=space, sigma_range=spread)
    image, width = y[0].numpy(), spread * 6**0.25 * level
    for row in range(6):
        for column in range(5):
            total, norm = np.zeros(3), 0.0
            for r in range(max(row - window, 0), min(row + window + 1, 6)):
                for c in range(max(column - window, 0), min(column + window + 1, 5)):
                    distance = ((image[:, row, column] - image[:, r, c]) ** 2).sum() - 6 * level**2
                    exponent = max(distance, 0) / (2 * width**2) if (r, c) != (row, column) else 0
                    weight = np.exp(-exponent - ((r - row) ** 2 + (c - column) ** 2) / (2 * space**2))
                    total, norm = total + weight * image[:, r, c], norm + weight
            np.testing.assert_allclose(restored[0, :, row, column].numpy(), total / norm, rtol=1e-9)


@every_operator
def test_a_level_of_0_is_the_identity_with_finite_gradients(operator: RestorationOperator) -> None:
    noisy = noisy_image().requires_grad_()
    level = torch.tensor([0.0, 0.1], requires_grad=True)
    theta = {
        name: torch.full((2,), value, requires_grad=True) if isinstance(value, float) else value
        for name, value in start(operator).items()
    }
    restored = operator(noisy, noise=level, **theta)
    assert torch.equal(restored[0], noisy[0])
    assert not torch.equal(restored[1], noisy[1])
    restored.square().sum().backward()
    for tensor in (noisy, level, *(value for value in theta.values() if torch.is_tensor(value))):
        assert tensor.grad is None or tensor.grad.isfinite().all()


@every_operator
def test_units_of_noise_scale_with_the_image(operator: RestorationOperator) -> None:
    noisy = noisy_image()
    small = operator(0.25 * noisy, noise=0.025, **start(operator))
    torch.testing.assert_close(small, 0.25 * operator(noisy, noise=0.1, **start(operator)), atol=2e-6, rtol=1e-4)


@every_operator
def test_numbers_of_every_shape_are_one_and_a_wrong_length_is_named(operator: RestorationOperator) -> None:
    noisy, theta = noisy_image(), start(operator)
    expected = operator(noisy, noise=0.1, **theta)
    for make in (torch.tensor, lambda v: torch.tensor([v]), lambda v: torch.tensor([v, v])):
        given_theta = {name: make(value) for name, value in theta.items()}
        torch.testing.assert_close(operator(noisy, noise=make(0.1), **given_theta), expected)
    for name, value in theta.items():
        with pytest.raises(ValueError, match=rf"{name} must be one number or one for each of 2 images, got \[3\]"):
            operator(noisy, noise=0.1, **{**theta, name: torch.tensor([value] * 3)})
    with pytest.raises(ValueError, match="noise level must be one number, one for each of 2 images"):
        operator(noisy, noise=torch.tensor([0.1] * 3), **theta)


@pytest.mark.parametrize("name", ["total variation", "bilateral", "graph"])
def test_a_constant_map_is_the_level_and_a_map_of_two_halves_is_local(name: str) -> None:
    operator = OPERATORS[name]
    noisy, theta = noisy_image(size=(2, 3, 12, 40)), start(operator)
    expected = operator(noisy, noise=0.1, **theta)
    level = torch.full((2, 1, 12, 40), 0.1)
    torch.testing.assert_close(operator(noisy, noise=level, **theta), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        operator(noisy, noise=level.expand(2, 3, 12, 40), **theta), expected, atol=1e-5, rtol=1e-4
    )
    level[..., 20:] = 0.0
    half = operator(noisy, noise=level, **theta)
    torch.testing.assert_close(half[..., 38:], noisy[..., 38:], atol=1e-6, rtol=0)
    assert (half[..., :2] - noisy[..., :2]).abs().max() > 0.01


@given(st.integers(0, 10**6), st.floats(0.01, 0.3))
def test_means_stay_between_the_smallest_and_largest_pixel(seed: int, level: float) -> None:
    noisy = noisy_image(seed, (1, 2, 9, 8))
    for operator in (TotalVariation(40), BilateralFilter(2)):
        restored = operator(noisy, noise=level, **start(operator))
        # 40 iterations leave the dual variable a little short of its end.
        slack = 0.02 if isinstance(operator, TotalVariation) else 1e-5
        assert restored.min() >= noisy.min() - slack
        assert restored.max() <= noisy.max() + slack


@pytest.mark.parametrize(
    ("operator", "theta"),
    [(TotalVariation(6), {"weight": 0.8}), (BilateralFilter(2), {"sigma_space": 1.4, "sigma_range": 1.8})],
)
def test_gradients(operator: RestorationOperator, theta: dict[str, float]) -> None:
    values = [torch.tensor([v, 1.2 * v], dtype=torch.float64, requires_grad=True) for v in theta.values()]
    noisy = torch.rand(2, 2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    level = torch.tensor([0.2, 0.3], dtype=torch.float64, requires_grad=True)

    def restore(noisy: torch.Tensor, level: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return operator(noisy, noise=level, **dict(zip(theta, values, strict=True)))

    assert torch.autograd.gradcheck(restore, (noisy, level, *values))


@every_operator
@pytest.mark.parametrize(
    ("images", "noise", "message"),
    [
        (torch.rand(3, 16, 16), 0.1, r"images must be \[B, C, H, W\], got \[3, 16, 16\]"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), 0.1, "must be floating-point, got torch.uint8: divide by 255"),
        (torch.rand(0, 3, 16, 16), 0.1, r"images are empty, got \[0, 3, 16, 16\]"),
        (
            torch.rand(1, 3, 16, 16),
            25,
            "noise level must lie between 0 and 1, where white is 1, got 25.0; 25 of 255 is 0.0980",
        ),
        (torch.rand(1, 3, 16, 16), -0.1, "noise level must lie between 0 and 1, where white is 1, got -0.1"),
    ],
)
def test_bad_images_and_levels_are_named(
    operator: RestorationOperator, images: torch.Tensor, noise: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        operator(images, noise=noise, **start(operator))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 2.0}, r"'gain' starts at 2.0, outside its bounds \[0.1, 1.0\]"),
        ({"bounds": (1.0, 0.1)}, "finite with lower ≤ upper"),
        ({"bounds": (0.0, 1.0)}, "must be positive"),
        ({"shape": (2, 2)}, r"must be \(\) or \(K,\)"),
        ({"start": [0.2, 0.3]}, "starts from one number or from 1, got 2"),
        ({"start": 0.5, "integer": True}, "must be whole numbers, got 0.5"),
        ({"relative_step": 1.0}, "relative_step"),
    ],
)
def test_an_impossible_parameter_is_refused_where_it_is_declared(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParameterSpec(**{"name": "gain", "start": 0.5, "bounds": (0.1, 1.0), **options})


def test_banks() -> None:
    images = torch.rand(2, 1, 4, 4)
    assert per_image("weight", [0.1, 0.2, 0.3], images, size=3).shape == (2, 3)
    assert per_image("weight", torch.rand(2, 3), images, size=3).shape == (2, 3)
    assert per_image("weight", 0.1, images, size=3).tolist()[0] == pytest.approx([0.1] * 3)
    with pytest.raises(
        ValueError, match=r"weight must be a bank \[3\] or one for each of 2 images, \[2, 3\], got \[2\]"
    ):
        per_image("weight", torch.rand(2), images, size=3)


def test_a_description_of_noise_takes_the_place_of_its_level() -> None:
    class Shot:
        def variance(self, images: torch.Tensor) -> torch.Tensor:
            return 0.01 * images.clamp_min(0)

        def distance_bias(self, offset: tuple[int, int]) -> torch.Tensor:
            return torch.tensor(0.01)

    images = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(noise_level(Shot(), images), 0.1 * images.sqrt())
