"""Diffusion: the literal formula, the reference, the fast paths and their gradients."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import Batch, Data

from lightning_modules.graph import GraphDiffusion, PatchGrid, radius_graph
from lightning_modules.graph import laplacian as laplacian_module
from lightning_modules.graph.patch_operator import debiased_distance
from lightning_modules.graph.weights import flush_small, gaussian

NAMES = ("sigma", "tau", "radius", "sigma_s", "sigma_f")
LAPLACIANS = ("symmetric", "random_walk", "unnormalized")


def parameters(dtype: torch.dtype = torch.float64, size: int = 2, steps: Any = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    base = {"sigma": 0.7, "tau": 0.15, "radius": 3.0, "sigma_s": 2.0, "sigma_f": 0.8}
    each = {
        name: value * (0.8 + 0.4 * torch.rand(size, generator=generator, dtype=dtype)) for name, value in base.items()
    }
    return {**each, "smooth_steps": steps, "noise": torch.linspace(0.0, 0.1, size, dtype=dtype)}


def noisy_images(dtype: torch.dtype = torch.float64, size: int = 2, height: int = 9, width: int = 7) -> Tensor:
    return torch.rand(size, 3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(0))


def dense_oracle(x: Tensor, positions: Tensor, p: dict[str, Any], laplacian: str, reach: float, steps: int) -> Tensor:
    """S' x / S' 1 with S' = (I − τL)^k S formed literally, one graph."""
    distance = ((x[:, None] - x[None]) ** 2).sum(2) - 2 * p["noise"] ** 2 * x.shape[1]
    distance = distance.clamp_min(0).fill_diagonal_(0)
    length = (positions[:, None] - positions[None]).norm(dim=2)
    joined = length > 0  # within the radius: the cut-off is 0 beyond
    similar = joined & (length <= reach)
    similarity = torch.exp(-distance / (2 * p["sigma"] ** 2)) * similar + torch.eye(len(x))
    cutoff = torch.where(length < p["radius"], 0.5 * (1 + torch.cos(torch.pi * length / p["radius"])), 0.0)
    weight = torch.exp(-(length**2) / (2 * p["sigma_s"] ** 2) - distance / (2 * p["sigma_f"] ** 2)) * cutoff * joined
    degree = torch.diag(weight.sum(1))
    if laplacian == "unnormalized":
        step = min(float(p["tau"]), 1 / float(degree.max())) * (degree - weight)
    elif laplacian == "random_walk":
        step = p["tau"] * (torch.eye(len(x)) - torch.linalg.inv(degree) @ weight)
    else:
        root = torch.diag(degree.diagonal().rsqrt())
        step = p["tau"] * (torch.eye(len(x)) - root @ weight @ root)
    smoothed = torch.matrix_power(torch.eye(len(x), dtype=x.dtype) - step, steps) @ similarity
    return (smoothed @ x) / smoothed.sum(1, keepdim=True)


@pytest.mark.usefixtures("graph_backend")
@pytest.mark.filterwarnings("ignore:.*exceeds the stable step")
@pytest.mark.parametrize("laplacian", LAPLACIANS)
@pytest.mark.parametrize("implementation", ["message_passing", "auto"])
@pytest.mark.parametrize("reach", [3.0, 7.0])
def test_patches_equal_the_literal_formula(laplacian: Any, implementation: Any, reach: float) -> None:
    images, p = noisy_images(), parameters()
    diffusion = GraphDiffusion(4, 3, "patches", laplacian, implementation=implementation, reach=reach)
    restored = diffusion(images, **p)
    grid = PatchGrid(9, 7, 4, 3)
    for index, image in enumerate(images):
        own = {name: p[name][index] for name in (*NAMES, "noise")}
        patches = dense_oracle(grid.extract(image[None])[0], grid.centers, own, laplacian, reach, 3)
        torch.testing.assert_close(restored[index], grid.average(patches[None])[0], rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*exceeds the stable step")
@pytest.mark.parametrize("laplacian", LAPLACIANS)
def test_point_sets_diffuse_with_and_without_an_edge_index(laplacian: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    sets = [
        Data(
            x=torch.rand(n, 2, dtype=torch.float64, generator=generator),
            pos=torch.rand(n, 3, dtype=torch.float64, generator=generator) * 3,
        )
        for n in (12, 15)
    ]
    p = parameters()
    diffusion = GraphDiffusion(1, 1, "patches", laplacian, reach=1.5)
    restored = diffusion(Batch.from_data_list(sets), **p)
    expected = []
    for index, data in enumerate(sets):
        own = {name: p[name][index] for name in (*NAMES, "noise")}
        expected.append(dense_oracle(data.x, data.pos, own, laplacian, 1.5, 3))
        data.edge_index = radius_graph(data.pos, 3.6)
    torch.testing.assert_close(restored, torch.cat(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(diffusion(Batch.from_data_list(sets), **p), restored)


@pytest.mark.usefixtures("graph_backend")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("patch_size", [1, 3, 5])
@pytest.mark.parametrize("steps", [0, 4, torch.tensor([2, 5])])
def test_image_operator_equals_the_reference(dtype: torch.dtype, tolerance: float, patch_size: int, steps: Any) -> None:
    images, p = noisy_images(dtype), parameters(dtype, steps=steps)
    for name in NAMES:
        p[name].requires_grad_()
    outputs = []
    for implementation in ("auto", "message_passing"):
        restored = GraphDiffusion(patch_size, implementation=implementation)(images, **p)
        used = [p[name] for name in NAMES]
        unused = isinstance(steps, int) and not steps
        gradients = torch.autograd.grad((restored * images).sum(), used, allow_unused=unused, materialize_grads=unused)
        outputs.append((restored, *gradients))
    for fast, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(fast, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("graph_backend")
@pytest.mark.filterwarnings("ignore:.*exceeds the stable step")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("laplacian", LAPLACIANS)
@pytest.mark.parametrize("steps", [0, 4, torch.tensor([2, 5])])
def test_dense_patches_equal_the_reference(dtype: torch.dtype, tolerance: float, laplacian: Any, steps: Any) -> None:
    images, p = noisy_images(dtype).requires_grad_(), parameters(dtype, steps=steps)
    used = [p[name].requires_grad_() for name in NAMES] + [images]
    outputs = []
    for implementation in ("auto", "message_passing"):
        restored = GraphDiffusion(4, 3, "patches", laplacian, implementation=implementation)(images, **p)
        gradients = torch.autograd.grad(restored.square().sum(), used, materialize_grads=True)
        outputs.append((restored, *gradients))
    for fast, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(fast, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("graph_backend")
@pytest.mark.parametrize("laplacian", ["symmetric", "random_walk"])
def test_steps_longer_than_one(laplacian: Any) -> None:
    """1 − τ is negative then, and so may be entries of S'."""
    images, p = noisy_images(), {**parameters(), "tau": 1.6}
    fast, slow = (
        GraphDiffusion(4, 3, "patches", laplacian, implementation=implementation)(images, **p)
        for implementation in ("auto", "message_passing")
    )
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)


def test_unlike_patches_leave_no_subnormal_numbers() -> None:
    """Weights from 1 down to less than any number; products with subnormal ones are a hundred times slower."""
    features = torch.linspace(0, 30, 40)[None, :, None] ** torch.tensor([1.0, 0.5])
    distance = debiased_distance(features - features.mean(1, keepdim=True), torch.zeros(1))
    assert torch.exp(-distance).min() < torch.finfo(torch.float32).tiny
    similarity = gaussian(distance, torch.tensor(0.7))
    step = flush_small(0.9 * torch.eye(40) + 0.1 * similarity / 40)
    for _ in range(5):
        similarity = flush_small(similarity)
        smallest = similarity[similarity > 0].min() * step[step > 0].min()
        assert smallest >= torch.finfo(torch.float32).tiny  # of all the numbers that the product adds up
        similarity = step @ similarity


@pytest.mark.usefixtures("graph_backend")
def test_image_operator_equals_a_pixel_by_pixel_loop() -> None:
    """An oracle that shares no code with the product: loops over pixels, windows and neighbours."""
    y = noisy_images(size=1, height=5, width=4)[0]
    channels, height, width = y.shape
    sigma, tau, radius, sigma_s, sigma_f, noise, reach = 0.6, 0.2, 2.3, 1.7, 0.8, 0.05, 2.0
    inside = lambda a, b: 0 <= a < height and 0 <= b < width  # noqa: E731
    pixels = [(a, b) for a in range(height) for b in range(width)]
    window = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    near = [(a, b) for a in range(-2, 3) for b in range(-2, 3) if 0 < a * a + b * b <= radius**2]

    def distance(q: tuple[int, int], d: tuple[int, int]) -> float:
        terms = [
            float((y[:, q[0] + a, q[1] + b] - y[:, q[0] + a + d[0], q[1] + b + d[1]]).square().sum())
            for a, b in window
            if inside(q[0] + a, q[1] + b) and inside(q[0] + a + d[0], q[1] + b + d[1])
        ]
        return max(9 / len(terms) * sum(terms) - 2 * noise**2 * 9 * channels, 0.0)

    def averaged(weight_of: Callable[..., float], own: float, x: Tensor) -> Tensor:
        total, share = torch.zeros_like(x), torch.zeros(height, width, dtype=x.dtype)
        for q in pixels:
            weights = {d: weight_of(q, d) for d in near if inside(q[0] + d[0], q[1] + d[1])}
            norm = own + sum(weights.values())
            for (a, b), weight in {(0, 0): own, **weights}.items():
                for u in window:
                    target, source = (q[0] + u[0], q[1] + u[1]), (q[0] + u[0] + a, q[1] + u[1] + b)
                    if inside(*target) and inside(*source):
                        total[:, target[0], target[1]] += weight / norm * x[:, source[0], source[1]]
                        share[target] += weight / norm
        return total / share

    def edge(q: tuple[int, int], d: tuple[int, int]) -> float:
        square = d[0] ** 2 + d[1] ** 2
        cutoff = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * square**0.5 / radius))) if square < radius**2 else 0
        exponent = -square / (2 * sigma_s**2) - distance(q, d) / (2 * sigma_f**2)
        return float(torch.exp(torch.tensor(exponent, dtype=torch.float64)) * cutoff)

    def similar(q: tuple[int, int], d: tuple[int, int]) -> float:
        if d[0] ** 2 + d[1] ** 2 > reach**2:
            return 0.0
        return float(torch.exp(torch.tensor(-distance(q, d) / (2 * sigma**2), dtype=torch.float64)))

    x = averaged(similar, 1.0, y)
    for _ in range(2):
        x = (1 - tau) * x + tau * averaged(edge, 1e-3, x)
    p = {"sigma": sigma, "tau": tau, "radius": radius, "sigma_s": sigma_s, "sigma_f": sigma_f}
    restored = GraphDiffusion(3, reach=reach)(y[None], **p, smooth_steps=2, noise=noise)
    torch.testing.assert_close(restored[0], x, rtol=0, atol=1e-7)  # the loop's cosine is float32


@pytest.mark.usefixtures("graph_backend")
@pytest.mark.filterwarnings("ignore:.*exceeds the stable step")
@pytest.mark.parametrize(
    "diffusion",
    [GraphDiffusion(3), *(GraphDiffusion(3, 2, "patches", laplacian) for laplacian in ("symmetric", "random_walk"))],
)
def test_gradients_in_every_continuous_parameter_the_image_and_the_features(diffusion: GraphDiffusion) -> None:
    images = noisy_images(size=1, height=5, width=4).requires_grad_()
    features = torch.rand(1, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    p = {**parameters(size=1), "noise": 0.0, "smooth_steps": 2}
    leaves = [p[name].clone().requires_grad_() for name in NAMES]

    def restore(images: Tensor, guide: Tensor, *values: Tensor) -> Tensor:
        return diffusion(images, **{**p, **dict(zip(NAMES, values, strict=True))}, guide=guide)

    assert torch.autograd.gradcheck(restore, (images, features, *leaves), atol=1e-6)
    own = lambda images, *values: diffusion(images, **{**p, **dict(zip(NAMES, values, strict=True))})  # noqa: E731
    assert torch.autograd.gradcheck(own, (images, *leaves), atol=1e-6)


@pytest.mark.usefixtures("graph_backend")
@pytest.mark.parametrize("patch_size", [3, 5])
def test_fast_and_reference_agree_on_features(patch_size: int) -> None:
    features = torch.rand(2, 4, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for geometry in ((patch_size, 1, "image"), (patch_size, 3, "patches")):
        fast, slow = (
            GraphDiffusion(*geometry, implementation=implementation)(noisy_images(), guide=features, **parameters())
            for implementation in ("auto", "message_passing")
        )
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)


def test_features_cannot_absorb_sigma() -> None:
    features = torch.rand(2, 4, 9, 7, dtype=torch.float64)
    diffusion, images, p = GraphDiffusion(3), noisy_images(), parameters()
    expected = diffusion(images, guide=features, **p)
    torch.testing.assert_close(diffusion(images, guide=17 * features + 5, **p), expected)
    flat = diffusion(images, guide=torch.ones_like(features), **p)
    assert flat.isfinite().all()


@settings(max_examples=30)
@given(st.integers(3, 12), st.integers(3, 12), st.floats(1, 20), st.integers(1, 5), st.booleans())
def test_constants_stay_and_values_keep_their_range(
    height: int, width: int, reach: float, steps: int, flat: bool
) -> None:
    p = parameters(steps=steps)
    images = (
        torch.full((2, 3, height, width), 0.4, dtype=torch.float64)
        if flat
        else noisy_images(torch.float64, 2, height, width)
    )
    for diffusion in (GraphDiffusion(3, reach=reach), GraphDiffusion(3, 2, "patches", reach=reach)):
        restored = diffusion(images, **p)
        if flat:
            torch.testing.assert_close(restored, images)
        assert restored.min() >= images.min() - 1e-12
        assert restored.max() <= images.max() + 1e-12


@pytest.mark.usefixtures("graph_backend")
def test_each_image_stops_after_its_own_steps() -> None:
    images, p = noisy_images(), parameters(steps=torch.tensor([1, 4]))
    for diffusion in (
        GraphDiffusion(3),
        GraphDiffusion(4, 3, "patches"),
        GraphDiffusion(4, 3, "patches", implementation="message_passing"),
    ):
        together = diffusion(images, **p)
        for index, steps in enumerate((1, 4)):
            alone = {name: value[index : index + 1] if torch.is_tensor(value) else value for name, value in p.items()}
            single = diffusion(images[index : index + 1], **{**alone, "smooth_steps": steps})
            torch.testing.assert_close(together[index : index + 1], single)


def test_unnormalized_step_is_scaled_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laplacian_module, "_warned", False)
    images, p = noisy_images(), {**parameters(), "tau": 5.0, "sigma_f": 5.0}
    diffusion = GraphDiffusion(4, 1, "patches", "unnormalized")
    with pytest.warns(UserWarning, match=r"tau=5 exceeds the stable step .* was scaled"):
        restored = diffusion(images, **p)
    assert restored.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffusion(images, **p)


def test_isolated_nodes_keep_their_value_and_give_finite_gradients() -> None:
    x = torch.rand(4, 2, dtype=torch.float64)
    positions = torch.tensor([[0.0, 0.0], [1.0, 0.0], [50.0, 0.0], [90.0, 0.0]], dtype=torch.float64)
    sigma_f = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    p = {**parameters(size=1), "sigma_f": sigma_f, "noise": 0.0}
    for laplacian in LAPLACIANS[:2]:
        restored = GraphDiffusion(1, 1, "patches", laplacian)(Data(x=x, pos=positions), **p)
        torch.testing.assert_close(restored[2:], x[2:])
        restored.sum().backward()
        assert sigma_f.grad is not None
        assert sigma_f.grad.isfinite().all()


def test_debiased_distance_revives_the_graph_under_noise() -> None:
    clean = torch.full((1, 3, 16, 16), 0.5)
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    p = {"sigma": 0.3, "tau": 0.1, "radius": 3.0, "sigma_s": 3.0, "sigma_f": 0.3, "smooth_steps": 2}
    debiased, biased = (GraphDiffusion(3)(noisy, **p, noise=level) for level in (0.1, 0.0))
    assert (debiased - clean).square().mean() < 0.5 * (biased - clean).square().mean()


@pytest.mark.usefixtures("graph_backend")
@pytest.mark.parametrize("diffusion", [GraphDiffusion(3), GraphDiffusion(4, 3, "patches", reach=3.6)])
def test_smoothness_is_the_mean_similarity_over_the_edges(diffusion: GraphDiffusion) -> None:
    images, sigma = noisy_images(), torch.tensor([0.7, 2.0], dtype=torch.float64)
    smoothness = diffusion.smoothness(images, sigma=sigma)
    if diffusion.signal == "patches":
        grid = PatchGrid(9, 7, 4, 3)
        patches = grid.extract(images)
        source, target = radius_graph(grid.centers, 3.6)
        distance = (patches[:, source] - patches[:, target]).square().sum(2)
        expected = torch.exp(-distance / (2 * sigma[:, None] ** 2)).mean(1)
        torch.testing.assert_close(smoothness.similarity, expected)
        density = min(1.0, len(source) / (5 * grid.num_patches))
    else:
        density = 1.0
    torch.testing.assert_close(smoothness.score, 0.7 * smoothness.similarity + 0.3 * density)
    flat = diffusion.smoothness(torch.ones_like(images), sigma=sigma)
    torch.testing.assert_close(flat.similarity, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 4}, "patch_size must be odd, got 4"),
        ({"stride": 2}, "stride must be 1, got 2"),
        ({"patch_size": 0}, "patch_size must be a positive"),
        ({"laplacian": "symmetric"}, "leave laplacian out"),
        ({"signal": "pixels"}, "must be 'image' or 'patches'"),
    ],
)
def test_refuses_impossible_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GraphDiffusion(**arguments)


def test_refuses_wrong_inputs() -> None:
    p = parameters(size=1)
    with pytest.raises(ValueError, match=r"must be \[B, C, H, W\]"):
        GraphDiffusion(3)(torch.rand(3, 8, 8), **p)
    with pytest.raises(ValueError, match="smaller than a patch"):
        GraphDiffusion(5)(torch.rand(1, 3, 4, 8), **p)
    with pytest.raises(ValueError, match=r"images must be floating-point, got torch.uint8"):
        GraphDiffusion(3)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), **p)
    with pytest.raises(ValueError, match="the graph has no pos"):
        GraphDiffusion(3)(Data(x=torch.rand(3, 2)), **p)


@pytest.mark.usefixtures("graph_backend")
@pytest.mark.parametrize("shape", [(1, 2, 12, 12), (2, 2, 6, 6), (2, 2, 20, 20), (2, 12, 12)])
def test_features_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    """Compiled code would read beyond them."""
    images, p = torch.rand(2, 3, 12, 12), parameters(torch.float32)
    with pytest.raises(ValueError, match=r"guide must be \[B, F, H, W\] of the images' B, H and W"):
        GraphDiffusion(3)(images, **p, guide=torch.rand(shape))


def test_a_number_of_steps_for_each_image() -> None:
    images, p = torch.rand(1, 3, 8, 8), {**parameters(torch.float32, 1), "smooth_steps": torch.tensor([1, 2, 3])}
    with pytest.raises(ValueError, match=r"one for each of 1 images, got \[3\]"):
        GraphDiffusion(3)(images, **p)


@pytest.mark.usefixtures("graph_backend")
def test_half_precision_and_autocast_compute_in_float32() -> None:
    images, p = noisy_images(torch.float32), parameters(torch.float32)
    for diffusion in (GraphDiffusion(3), GraphDiffusion(4, 3, "patches")):
        expected = diffusion(images, **p)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(diffusion(images, **p), expected)
        half = diffusion(images.bfloat16(), **p)
        assert half.dtype == torch.bfloat16
        assert (half - expected).abs().max() < 0.02


@pytest.mark.usefixtures("graph_backend")
def test_cached_geometry_of_a_validation_serves_training() -> None:
    images, p = torch.rand(1, 3, 13, 19), parameters(torch.float32, 1)
    for diffusion in (GraphDiffusion(3), GraphDiffusion(5, 4, "patches")):
        with torch.inference_mode():
            diffusion(images, **p)
        sigma = torch.tensor([0.5], requires_grad=True)
        diffusion(images, **{**p, "sigma": sigma}).sum().backward()
        assert sigma.grad is not None


@pytest.mark.usefixtures("graph_backend")
@pytest.mark.parametrize(("signal", "patch_size", "stride"), [("image", 3, 1), ("patches", 4, 3)])
def test_mean_edge_weight_is_that_of_the_reference(signal: str, patch_size: int, stride: int) -> None:
    """Against a loop over all pairs."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 2, 9, 11, generator=generator, dtype=torch.float64)
    sigma, noise = torch.tensor([0.5, 0.9]).double(), torch.tensor([0.05, 0.2]).double()
    diffusion = GraphDiffusion(patch_size, stride, signal=signal)  # type: ignore[arg-type]
    found = diffusion.diagnostics(images, sigma_f=sigma, noise=noise, radius=4.0)["edge_weight"]
    weights: list[torch.Tensor] = []
    half = patch_size // 2
    grid = PatchGrid(9, 11, patch_size, stride)
    if signal == "patches":
        centers, vectors = grid.centers, grid.extract(images)
        for i in range(len(centers)):
            for j in range(len(centers)):
                if 0 < (centers[i] - centers[j]).norm() <= 4:
                    distance = (vectors[:, i] - vectors[:, j]).square().sum(1)
                    distance = (distance - 2 * noise**2 * vectors.shape[2]).clamp_min(0)
                    weights.append(torch.exp(-distance / (2 * sigma**2)))
    else:
        dimension = 2 * patch_size**2
        for a, b in itertools.product(range(9), range(11)):
            for c, d in itertools.product(range(9), range(11)):
                if not 0 < (a - c) ** 2 + (b - d) ** 2 <= 16:
                    continue
                terms = [
                    (images[:, :, a + u, b + v] - images[:, :, c + u, d + v]).square().sum(1)
                    for u, v in itertools.product(range(-half, half + 1), repeat=2)
                    if min(a + u, b + v, c + u, d + v) >= 0 and max(a, c) + u < 9 and max(b, d) + v < 11
                ]
                distance = patch_size**2 / len(terms) * torch.stack(terms).sum(0) - 2 * noise**2 * dimension
                weights.append(torch.exp(-distance.clamp_min(0) / (2 * sigma**2)))
    torch.testing.assert_close(found, torch.stack(weights).mean(0), rtol=1e-9, atol=0)


@pytest.mark.usefixtures("graph_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("laplacian", ["symmetric", "random_walk"])
@pytest.mark.parametrize(("tau", "steps"), [(0.5, 3), (0.99, 10), (0.9, 1000), (1.0, 2)])
def test_isolated_patches_keep_their_value(tau: float, steps: int, laplacian: Any, dtype: torch.dtype) -> None:
    """However little is left of them: no edge is as short as the radius, so the steps move nothing."""
    diffusion = GraphDiffusion(5, 4, "patches", laplacian, reach=4.5)
    restored = []
    for count in (0, steps):
        images, sigma = noisy_images(dtype, height=13, width=13).requires_grad_(), torch.tensor(1.0, dtype=dtype)
        arguments = {"sigma": sigma.requires_grad_(), "tau": tau, "radius": 3.0, "sigma_s": 2.0, "sigma_f": 1.0}
        result = diffusion(images, **arguments, smooth_steps=count, noise=0.1)
        restored.append([result, *torch.autograd.grad((result * result.detach().cos()).sum(), (images, sigma))])
    for untouched, smoothed in zip(*restored, strict=True):
        torch.testing.assert_close(smoothed, untouched, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("graph_backend")
@pytest.mark.parametrize("laplacian", ["symmetric", "random_walk"])
def test_gradient_of_a_step_of_exactly_one(laplacian: Any) -> None:
    """Nothing of a node's own is left then; what would be has a gradient."""
    gradients = []
    for implementation in ("message_passing", "auto"):
        tau = torch.ones(2, dtype=torch.float64, requires_grad=True)
        arguments = {**parameters(), "tau": tau, "sigma_f": 2.0, "radius": 4.4}
        restored = GraphDiffusion(4, 3, "patches", laplacian, implementation)(noisy_images(), **arguments)
        gradients.append(torch.autograd.grad((restored * restored.detach().cos()).sum(), tau)[0])
    assert gradients[0].abs().min() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)
