"""Stein's risk: against the squared error it estimates, the trace it probes, and inside the module."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules import ConvAutoencoder, GraphDiffusion, GraphDiffusionReconstruction, ParameterTable
from lightning_modules.em.objectives import probe_step, squared_error, stein_risk


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft(images: Tensor) -> Tensor:
    """A restoration that is not linear: each pixel is drawn towards its neighbours' mean, the less the farther."""
    mean = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    return images + (mean - images) * torch.exp(-((mean - images) ** 2) / 0.1)


def test_the_mean_risk_is_the_mean_squared_error() -> None:
    clean = F.avg_pool2d(draw(1, 3, 10, 10), 3, 1).expand(6000, -1, -1, -1)
    level = torch.full((6000,), 0.2, dtype=torch.float64)
    noisy = clean + 0.2 * draw(*clean.shape, seed=1)
    probe = draw(*clean.shape, seed=2)
    restored = soft(noisy)
    perturbed = soft(noisy + probe_step(level).view(-1, 1, 1, 1) * probe)
    risk, error = stein_risk(noisy, restored, perturbed, probe, level), squared_error(restored, clean)
    difference = risk - error
    standard_error = difference.std() / 6000**0.5
    assert abs(float(difference.mean())) < 4 * float(standard_error)
    assert float(standard_error) < 0.02 * float(error.mean())  # a test that could have failed


def test_the_probe_measures_the_trace() -> None:
    """Averaged over the 2^n sign vectors, whose mean of b bᵀ is the identity, the quotient is the trace exactly."""
    matrix = draw(6, 6)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 6).view(64, 1, 2, 3)
    level = torch.full((64,), 0.3, dtype=torch.float64)
    noisy = draw(1, 1, 2, 3, seed=3).expand(64, -1, -1, -1)

    def restore(images: Tensor) -> Tensor:
        return (images.flatten(1) @ matrix.T).view_as(images)

    perturbed = restore(noisy + probe_step(level).view(-1, 1, 1, 1) * signs)
    risk = stein_risk(noisy, restore(noisy), perturbed, signs, level).mean()
    expected = squared_error(restore(noisy), noisy)[0] - 0.09 + 2 * 0.09 * matrix.trace() / 6
    torch.testing.assert_close(risk, expected, rtol=1e-9, atol=0)


def test_the_probe_to_learn_by_meets_the_kinks() -> None:
    """A soft threshold is smooth in pieces only: the gradient of its risk is the error's, and not much noisier."""
    clean = 0.3 * draw(400, 1, 12, 12)
    level = torch.full((400,), 0.2, dtype=torch.float64)
    noisy, probe = clean + 0.2 * draw(*clean.shape, seed=1), draw(*clean.shape, seed=2)

    def gradients(learning: bool | None) -> Tensor:
        threshold = torch.full((400, 1, 1, 1), 0.12, dtype=torch.float64, requires_grad=True)

        def shrink(images: Tensor) -> Tensor:
            return images.sign() * F.relu(images.abs() - threshold)

        restored = shrink(noisy)
        if learning is None:
            loss = squared_error(restored, clean)
        else:
            perturbed = shrink(noisy + probe_step(level, learning).view(-1, 1, 1, 1) * probe)
            loss = stein_risk(noisy, restored, perturbed, probe, level, learning)
        return torch.autograd.grad(loss.sum(), threshold)[0].flatten()

    error, short, long = gradients(None), gradients(False), gradients(True)
    assert float(short.std()) > 8 * float(error.std())  # why there are two lengths
    assert float(long.std()) < 4 * float(error.std())
    assert abs(float((long - error).mean())) < 4 * float((long - error).std()) / 400**0.5


def make(**arguments: Any) -> GraphDiffusionReconstruction:
    table = ParameterTable(
        initial={"radius": 2.0, "sigma_s": 2.0, "smooth_steps": 2}, bounds={"radius": (1.5, 3.0), "sigma_s": (0.5, 20)}
    )
    return GraphDiffusionReconstruction(GraphDiffusion(patch_size=3), table, objective="sure", **arguments)


def batch(images: Tensor) -> dict[str, Tensor]:
    count = len(images)
    return {
        "image": images,
        "label": torch.full((count,), -1),
        "index": torch.arange(count),
        "weight": torch.ones(count),
        "key": torch.arange(count) + 7,
    }


@pytest.mark.parametrize("network", [False, True])
def test_training_by_the_risk_follows_the_error_it_does_not_see(network: bool) -> None:
    """Gradients of risk and error agree over many images, for the table and for the network."""
    images = F.avg_pool2d(torch.rand(300, 3, 14, 14, generator=torch.Generator().manual_seed(0)), 3, 1)
    # Of so narrow a network some draws begin with half their units dead, where the gradient is less than the probe's
    # noise: this one (0.999 and above) has a gradient to agree on.
    torch.manual_seed(1)
    backbone = ConvAutoencoder(width=4) if network else None
    gradients = []
    for objective in ("sure", "supervised"):
        torch.manual_seed(0)
        module = make(backbone=backbone).train()
        module.objective = objective
        module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
        module.zero_grad()
        module.training_step(batch(images), 0)["loss"].backward()
        table = module.em_parameters.pop_gradient()
        assert table is not None
        parts = [table.sum(0)[[0, 1, 3, 4]]]
        parts += [p.grad.flatten().double() for p in module.parameters() if p.grad is not None and p.ndim > 1]
        gradients.append([part / part.norm() for part in parts if part.norm() > 0])
    for one, other in zip(*gradients, strict=True):
        assert float(one @ other) > 0.98


def test_a_second_step_gives_the_same_risk() -> None:
    images = torch.rand(4, 3, 12, 12)
    values = []
    for _ in range(2):
        module = make().train()
        module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
        values.append(module.training_step(batch(images), 0)["em"].reconstruction)
    assert torch.equal(*values)


def test_what_the_risk_cannot_do_without() -> None:
    with pytest.raises(ValueError, match="needs noise: set noise_std above 0, or add_noise=False"):
        make(noise_std=0.0)
    assert make(add_noise=False).objective == "sure"
    with pytest.raises(ValueError, match=r"no clean images.*leave perceptual out"):
        make(perceptual=nn.Identity())
    with pytest.raises(ValueError, match="objective must be 'supervised', 'sure' or 'j_invariant', got 'stein'"):
        GraphDiffusionReconstruction(GraphDiffusion(), ParameterTable(), objective="stein")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"may be negative: leave loss at 'mse'"):
        make(loss="log_mse")
    with pytest.raises(ValueError, match="loss must be 'mse' or 'log_mse', got 'l1'"):
        GraphDiffusionReconstruction(GraphDiffusion(), ParameterTable(), loss="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"noise_levels must be numbers ≥ 0, at least one, got \[\]"):
        make(noise_levels=[])


def test_levels_are_drawn_from_those_given() -> None:
    module = make(noise_levels=[0.1, 0.4])
    images = torch.full((400, 3, 12, 12), 0.5)
    noisy, level = module._observe(batch(images))
    assert torch.equal(level.unique(), torch.tensor([0.1, 0.4]))
    assert 150 < int((level > 0.2).sum()) < 250
    torch.testing.assert_close((noisy - 0.5).std((1, 2, 3)), level, rtol=0.2, atol=0)


class Report:
    """Takes the place of the Trainer's logging."""

    def __init__(self, module: GraphDiffusionReconstruction) -> None:
        self.values: dict[str, float] = {}
        module.log_dict = lambda metrics, **_: self.values.update(metrics.compute())  # type: ignore[method-assign]


def test_validation_by_the_risk_needs_no_clean_image() -> None:
    """Photographs with noise of their own: no PSNR against themselves, and the risk of the restoration."""
    clean = F.avg_pool2d(torch.rand(60, 3, 14, 14, generator=torch.Generator().manual_seed(0)), 3, 1)
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    module = make(add_noise=False).eval()
    report = Report(module)
    with torch.no_grad():
        restored = module.validation_step(batch(noisy), 0)["restored"]
    assert list(report.values) == ["val/loss"]
    truth = float(squared_error(restored, clean).mean())
    assert abs(float(report.values["val/loss"]) - truth) < 0.35 * truth

    module = make(noise_std=0.1).eval()
    report = Report(module)
    module.validation_step(batch(clean), 0)
    assert {"val/loss", "val/psnr", "val/psnr_gain"} <= set(report.values)
