"""deepinv's denoisers and algorithms as operators, where it is installed."""

import pytest
import torch

from lightning_modules import learn_parameters
from lightning_modules.operators import ParameterSpec

dinv = pytest.importorskip("deepinv", reason="deepinv is not installed: pip install lightning-em[deepinv]")
from lightning_modules.operators.deepinv import DeepinvDenoiser, DeepinvOptim  # noqa: E402


def pictures(count: int = 8) -> torch.Tensor:
    place = torch.linspace(0, 1, 24)
    phase = torch.linspace(0.1, 0.9, count)
    return ((place > phase[:, None]).float() * 0.6 + 0.2)[:, None, None].expand(-1, 1, 20, 24).contiguous()


def algorithm(**parameters: object) -> torch.nn.Module:
    from deepinv.optim import PGD
    from deepinv.optim.data_fidelity import L2
    from deepinv.optim.prior import PnP

    denoiser = dinv.models.TVDenoiser(n_it_max=15)
    return PGD(data_fidelity=L2(), prior=PnP(denoiser), max_iter=3, **parameters)


def test_a_denoiser_is_what_deepinv_computes_and_keeps_no_state() -> None:
    noisy = pictures() + 0.1 * torch.randn(8, 1, 20, 24, generator=torch.Generator().manual_seed(0))
    strength = torch.linspace(0.05, 0.4, 8)
    operator = DeepinvDenoiser(dinv.models.TVDenoiser(n_it_max=40), (0.001, 1.0))
    for _ in range(2):
        expected = dinv.models.TVDenoiser(n_it_max=40)(noisy, strength)
        torch.testing.assert_close(operator(noisy, noise=0.1, ths=strength), expected)
    alone = DeepinvDenoiser(dinv.models.TVDenoiser(n_it_max=40, crit=0.0), (0.001, 1.0))
    together = alone(noisy, noise=0.1, ths=strength)
    torch.testing.assert_close(together[3:4], alone(noisy[3:4], noise=0.1, ths=0.2), atol=1e-5, rtol=0)


def test_an_algorithm_is_what_deepinv_computes_with_gradients() -> None:
    noisy = pictures() + 0.1 * torch.randn(8, 1, 20, 24, generator=torch.Generator().manual_seed(0))
    steps, sigmas = [0.3, 0.5, 0.9], [0.2, 0.1, 0.05]
    expected = algorithm(stepsize=steps, sigma_denoiser=sigmas)(noisy, dinv.physics.Denoising())
    operator = DeepinvOptim(
        algorithm(stepsize=1.0, sigma_denoiser=0.1),
        {
            "stepsize": ParameterSpec("stepsize", 0.5, (0.01, 1.0), (3,)),
            "sigma_denoiser": ParameterSpec("sigma_denoiser", 0.1, (0.001, 1.0), (3,)),
        },
    )
    leaf = torch.tensor(steps).repeat(8, 1).requires_grad_()
    found = operator(noisy, noise=0.1, stepsize=leaf, sigma_denoiser=torch.tensor(sigmas))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    (gradient,) = torch.autograd.grad(found.square().sum(), leaf)
    assert torch.equal(gradient[:, 0], torch.zeros(8))  # the first step begins at the data
    assert gradient[:, 1:].abs().min() > 0


def test_both_learn() -> None:
    clean = pictures(16)
    tv = DeepinvDenoiser(dinv.models.TVDenoiser(n_it_max=15), (0.001, 1.0))
    learned = learn_parameters(tv, {"ths": (0.001, 1.0)}, clean, noise_std=0.1, progress=False)
    assert 0.03 < learned.parameters["ths"] < 0.5
    both = DeepinvOptim(
        algorithm(stepsize=1.0, sigma_denoiser=0.1), {"stepsize": (0.01, 1.0), "sigma_denoiser": (0.001, 1.0)}
    )
    learned = learn_parameters(both, {}, clean, noise_std=0.1, steps=4, progress=False)
    losses = [step["loss"] for step in learned.history]
    assert losses[-1] < 0.3 * 0.1**2


def test_what_an_algorithm_does_not_have_is_named() -> None:
    with pytest.raises(ValueError, match="PGD has no parameter 'weight', it has"):
        DeepinvOptim(algorithm(stepsize=1.0, sigma_denoiser=0.1), {"weight": (0.1, 1.0)})
    with pytest.raises(ValueError, match=r"model must be an algorithm of deepinv\.optim, got Identity"):
        DeepinvOptim(torch.nn.Identity(), {"stepsize": (0.1, 1.0)})
