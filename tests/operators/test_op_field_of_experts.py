"""A field of experts against autograd down its energy, filter by filter."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules import FieldOfExperts

LEVEL = 0.1


def parameters(operator: FieldOfExperts, images: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Values of each image's own, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return {
        spec.name: torch.tensor(spec.starts, dtype=torch.float64)
        * (0.5 + torch.rand(images, spec.size, generator=generator, dtype=torch.float64))
        for spec in operator.parameter_specs
    }


def energy(padded: Tensor, noisy: Tensor, theta: dict[str, Tensor], level: Tensor, side: int) -> Tensor:
    """E of one image whose border is given `[C, H + s − 1, W + s − 1]`, with one convolution for each filter."""
    margin = side // 2
    image = padded[:, margin:-margin, margin:-margin]
    total = 0.5 * (image - noisy).square().sum()
    for number, kernel in enumerate(theta["filters"].view(-1, 1, 1, side, side)):
        kernel = kernel - kernel.mean()
        response = F.conv2d(padded[:, None], kernel)[:, 0]
        width = (theta["widths"][number] * level).square()
        total = total + (theta["weights"][number] * 0.5 * width * (1 + response.square() / width).log()).sum()
    return total


def by_autograd(operator: FieldOfExperts, noisy: Tensor, theta: dict[str, Tensor], level: Tensor) -> Tensor:
    """Steps down the energy's gradient; the border is a mirror of the image that does not pull on it."""
    side, margin = operator.filter_size, operator.filter_size // 2
    restored = []
    for index, one in enumerate(noisy):
        own = {name: value[index] for name, value in theta.items()}
        image = one
        for length in own["lengths"]:
            padded = F.pad(image[None], (margin,) * 4, mode="replicate")[0].requires_grad_()
            (slope,) = torch.autograd.grad(energy(padded, one, own, level[index], side), padded)
            image = image - length * slope[:, margin:-margin, margin:-margin]
        restored.append(image)
    return torch.stack(restored)


@pytest.mark.parametrize("a_map", [False, True])
def test_each_step_goes_down_the_gradient_of_the_energy(a_map: bool) -> None:
    operator = FieldOfExperts(num_filters=5, filter_size=3, iterations=3)
    noisy = torch.rand(2, 3, 11, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theta = parameters(operator)
    level = torch.tensor([LEVEL, 0.3], dtype=torch.float64)
    if a_map:
        level = level.view(2, 1, 1, 1) * torch.linspace(0.5, 2, 88, dtype=torch.float64).view(1, 1, 11, 8)
    found = operator(noisy, noise=level, **theta)
    expected = by_autograd(operator, noisy, theta, level[:, 0] if a_map else level)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert (found - noisy).abs().max() > 0.05  # it has done something


def test_the_gradients_of_all_numbers_are_those_of_differences() -> None:
    operator = FieldOfExperts(num_filters=2, filter_size=3, iterations=2)
    noisy = torch.rand(1, 1, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theta = parameters(operator, images=1)
    leaves = [value.requires_grad_() for value in theta.values()]
    assert torch.autograd.gradcheck(
        lambda *values: operator(noisy, noise=LEVEL, **dict(zip(theta, values, strict=True))), leaves
    )


def test_the_start_denoises_and_a_pixel_looks_no_further_than_the_halo() -> None:
    operator = FieldOfExperts(num_filters=8, filter_size=3, iterations=2)
    theta = {spec.name: list(spec.starts) for spec in operator.parameter_specs}
    clean = (torch.arange(40) > 18).float().expand(1, 1, 30, 40) * 0.6 + 0.2
    noisy = clean + LEVEL * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    restored = operator(noisy, noise=LEVEL, **theta)
    assert (restored - clean).square().mean() < 0.8 * (noisy - clean).square().mean()
    other = noisy.clone()
    other[..., 20] += 1
    moved = (operator(other, noise=LEVEL, **theta) - restored).abs().amax((0, 1, 2)) > 0
    assert moved.nonzero().flatten().tolist() == list(range(20 - operator.halo, 21 + operator.halo))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filter_size": 4}, "filter_size must be odd and at least 3, got 4"),
        ({"filter_size": 3, "num_filters": 9}, "num_filters must be between 1 and 8, got 9"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_built_is_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FieldOfExperts(**arguments)


def test_a_guide_is_refused() -> None:
    operator = FieldOfExperts(2, 3, 1)
    theta = {spec.name: list(spec.starts) for spec in operator.parameter_specs}
    with pytest.raises(ValueError, match="takes no guide"):
        operator(torch.rand(1, 1, 8, 8), noise=0.1, guide=torch.rand(1, 1, 8, 8), **theta)
