"""The fast image operator beyond its equality with the reference: chunks of the batch, gradients of the smoothness."""

import pytest
import torch

from lightning_modules.graph import GraphDiffusion, image_operator, stencil_diffusion

NAMES = ("sigma", "tau", "radius", "sigma_s", "sigma_f")


def test_chunks_of_unequal_size_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_operator, "is_supported", lambda *_, **__: False)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, 3, 9, 7, dtype=torch.float64, generator=generator).requires_grad_()
    features = torch.rand(5, 2, 9, 7, dtype=torch.float64, generator=generator).requires_grad_()
    leaves = [
        (base * (0.8 + 0.4 * torch.rand(5, dtype=torch.float64, generator=generator))).requires_grad_()
        for base in (0.7, 0.15, 3.0, 2.0, 0.8)
    ]
    results = []
    for limit in (2**30, 1, 2 * 14 * (9 + 4) * 10 * 8 + 64):  # all at once, one by one, two and two and one
        monkeypatch.setitem(stencil_diffusion.CHUNK_BYTES, "cpu", limit)
        restored = GraphDiffusion(3)(
            images,
            **dict(zip(NAMES, leaves, strict=True)),
            smooth_steps=torch.tensor([1, 3, 2, 0, 3]),
            guide=features,
        )
        results.append((restored, *torch.autograd.grad((restored * images).sum(), (images, features, *leaves))))
    for other in results[1:]:
        for one, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("graph_backend")
@pytest.mark.parametrize("patch_size", [1, 3, 5])
def test_gradients_of_the_smoothness(patch_size: int) -> None:
    images = torch.rand(2, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    sigma = torch.tensor([0.7, 1.1], dtype=torch.float64, requires_grad=True)
    diffusion = GraphDiffusion(patch_size, reach=2.3)
    assert torch.autograd.gradcheck(lambda y, s: diffusion.smoothness(y, sigma=s).similarity, (images, sigma))


@pytest.mark.usefixtures("graph_backend")
def test_gradient_of_the_noise_level() -> None:
    images = torch.rand(1, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    noise = torch.tensor([0.05], dtype=torch.float64, requires_grad=True)
    p = {"sigma": 0.7, "tau": 0.15, "radius": 2.5, "sigma_s": 2.0, "sigma_f": 0.8, "smooth_steps": 2}
    assert torch.autograd.gradcheck(lambda level: GraphDiffusion(3)(images, **p, noise=level), (noise,))


@pytest.mark.usefixtures("graph_backend")
def test_weights_that_underflow_give_finite_gradients() -> None:
    """Far-apart windows and a radius that ends on a neighbour: weights of exactly 0."""
    images = (torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 100).requires_grad_()
    leaves = [torch.tensor([value], requires_grad=True) for value in (0.05, 0.2, 2.0, 0.3, 0.05)]
    restored = GraphDiffusion(3)(images, **dict(zip(NAMES, leaves, strict=True)), smooth_steps=3)
    for gradient in torch.autograd.grad(restored.sum(), (images, *leaves)):
        assert gradient.isfinite().all()


@pytest.mark.usefixtures("graph_backend")
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 1, 5)])
def test_no_neighbour(size: tuple[int, int, int]) -> None:
    batch, height, width = size
    images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(4)).requires_grad_()
    sigma = torch.full((batch,), 0.5, requires_grad=True)
    p = {"tau": 0.2, "radius": 2.0, "sigma_s": 1.0, "sigma_f": 0.5, "smooth_steps": 2}
    restored = GraphDiffusion(1)(images, sigma=sigma, **p)
    expected = GraphDiffusion(1, implementation="message_passing")(images, sigma=sigma, **p)
    torch.testing.assert_close(restored, expected)
    gradients = torch.autograd.grad(restored.sum(), (images, sigma), allow_unused=True, materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in gradients)
