"""The image operator under `torch.compile`, `torch.export`, `torch.func`, and the checks of `torch.library`."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules import GraphDenoiser, GraphDiffusionReconstruction
from lightning_modules._cached import cached_tensors
from lightning_modules.graph import GraphDiffusion

VALUES: dict[str, Any] = {"sigma": 0.5, "tau": 0.2, "radius": 2.5, "sigma_s": 2.0, "sigma_f": 0.5, "noise": 0.05}
FULL = {**VALUES, "smooth_steps": 3}


def images(*size: int) -> Tensor:
    return torch.rand(size or (2, 3, 13, 11), generator=torch.Generator().manual_seed(0))


def leaves() -> dict[str, Tensor]:
    return {name: torch.full((2,), value, requires_grad=True) for name, value in VALUES.items()}


@pytest.mark.usefixtures("graph_backend")
@pytest.mark.parametrize("steps", [3, torch.tensor([2, 3])])
def test_compiles_without_a_break(steps: Any) -> None:
    torch.compiler.reset()
    diffusion, values = GraphDiffusion(3), leaves()
    compiled = torch.compile(diffusion, fullgraph=True, backend="aot_eager")
    results = []
    for function in (diffusion, compiled):
        restored = function(images(), **values, smooth_steps=steps)
        results.append([restored, *torch.autograd.grad(restored.square().sum(), tuple(values.values()))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_compiles_as_a_part_of_a_network() -> None:
    torch.compiler.reset()
    denoiser = small_denoiser()
    compiled = torch.compile(denoiser, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images(), noise=0.1), denoiser(images(), noise=0.1))


def small_denoiser() -> GraphDenoiser:
    denoiser = GraphDenoiser(widths=(4,), depths=(1,), up_depths=()).eval().requires_grad_(False)
    for weight in denoiser.network.parameters():
        nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return denoiser


def stored(program: Any) -> nn.Module:
    """An exported program, written and read."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    module: nn.Module = torch.export.load(file).module()
    return module


def test_exports_images_of_any_size() -> None:
    diffusion, dynamic = GraphDiffusion(3), torch.export.Dim.DYNAMIC
    shapes = {"noisy": {0: dynamic, 2: dynamic, 3: dynamic}, **dict.fromkeys(FULL)}
    program = torch.export.export(diffusion, (images(),), FULL, dynamic_shapes=shapes)
    for size in ((2, 3, 13, 11), (3, 3, 30, 41)):
        torch.testing.assert_close(stored(program)(images(*size), **FULL), diffusion(images(*size), **FULL))


def test_exports_the_denoiser() -> None:
    denoiser, level = small_denoiser(), torch.tensor([0.1, 0.05])
    module = stored(torch.export.export(denoiser, (images(),), {"noise": level}))
    restored = denoiser(images(), noise=level)
    torch.testing.assert_close(module(images(), noise=level), restored)
    assert (restored - images()).abs().max() > 1e-2


def test_exports_a_whole_module() -> None:
    module = GraphDiffusionReconstruction(GraphDiffusion(3, widths="noise"))  # in training, as it is made
    arguments = (images(), torch.tensor([0.1, 0.2]))
    program = stored(torch.export.export(module, arguments))
    expected = module(*arguments)
    torch.testing.assert_close(program(*arguments), expected)
    assert (expected - images()).abs().max() > 1e-2
    expected.sum().backward()
    assert module.em_parameters.pop_gradient() is not None


def test_no_tensor_of_an_export_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    @cached_tensors(maxsize=2)
    def ones(size: int) -> Tensor:
        made.append(size)
        return torch.ones(size)

    with monkeypatch.context() as exporting:
        exporting.setattr(torch.compiler, "is_compiling", lambda: True)
        ones(3)
    with torch.inference_mode():
        ones(3)
    assert not ones(3).is_inference()
    assert made == [3, 3]


@pytest.mark.usefixtures("graph_backend")
def test_maps_over_images_and_parameters() -> None:
    diffusion, batch = GraphDiffusion(3), images()
    expected = diffusion(batch, **FULL)
    torch.testing.assert_close(torch.vmap(lambda image: diffusion(image[None], **FULL)[0])(batch), expected)
    sigmas = torch.tensor([0.3, 0.5])
    mapped = torch.vmap(lambda sigma: diffusion(batch, **{**FULL, "sigma": sigma}))(sigmas)
    torch.testing.assert_close(mapped[1], expected)
    assert not torch.equal(mapped[0], mapped[1])


@pytest.mark.usefixtures("graph_backend")
def test_gradients_of_functions() -> None:
    diffusion, batch = GraphDiffusion(3), images().double()

    def energy(image: Tensor) -> Tensor:
        return diffusion(image[None], **FULL).square().sum()

    leaf = batch.clone().requires_grad_()
    (expected,) = torch.autograd.grad(diffusion(leaf, **FULL).square().sum(), leaf)
    torch.testing.assert_close(torch.vmap(torch.func.grad(energy))(batch), expected)

    def energies(sigma: Tensor) -> Tensor:
        return diffusion(batch, **{**FULL, "sigma": sigma}).square().mean((1, 2, 3))

    sigma = torch.tensor([0.3, 0.5]).double()
    found = torch.func.jacrev(energies)(sigma)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(energies, sigma))
    with pytest.raises(RuntimeError, match="derivatives backward only"):
        torch.func.jvp(energies, (sigma,), (torch.ones_like(sigma),))
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.func.jacrev(torch.func.jacrev(energies))(sigma)


@pytest.mark.parametrize(
    "diffusion", [GraphDiffusion(3, 2, "patches"), GraphDiffusion(3, implementation="message_passing")]
)
def test_other_graphs_are_refused_by_name(diffusion: GraphDiffusion) -> None:
    with pytest.raises(RuntimeError, match="take GraphDiffusion with signal='image' and implementation='auto' only"):
        torch.vmap(lambda image: diffusion(image[None], **FULL)[0])(images())
    with pytest.raises(RuntimeError, match="take GraphDiffusion with signal='image' and implementation='auto' only"):
        torch.export.export(diffusion, (images(),), FULL)
    torch.compiler.reset()
    compiled = torch.compile(diffusion, backend="eager")  # with a break
    torch.testing.assert_close(compiled(images(), **FULL), diffusion(images(), **FULL))


@pytest.mark.usefixtures("graph_backend")
def test_the_checks_of_torch_library() -> None:
    operators, batch = torch.ops.lightning_em, images()
    sigma, tau, radius, sigma_s, sigma_f, noise = leaves().values()
    tensors = (noise, sigma, tau, radius, sigma_s, sigma_f)
    for arguments in ((None, 3, 3, 3.0, None, None, True), (torch.tensor([2, 3]), 0, 3, 3.0, 4.0, 4, False)):
        torch.library.opcheck(operators.diffuse_image.default, (batch.requires_grad_(), batch, *tensors, *arguments))
    fixed = [tensor.detach() for tensor in (batch, batch, batch, batch, *tensors)]
    torch.library.opcheck(
        operators.diffuse_image_backward.default, (*fixed, None, 3, 3, 3.0, None, None, [True, False, True])
    )
    torch.library.opcheck(
        operators.similarity_sum.default, (batch, -sigma.detach().requires_grad_(), noise.detach(), 3, 3.0)
    )
    torch.library.opcheck(
        operators.similarity_sum_backward.default,
        (sigma.detach(), batch.detach(), -sigma.detach(), noise.detach(), 3, 3.0, True),
    )
