"""The compiled passes of K-means against brute force in float64, and Lloyd's algorithm with them and without."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_modules.mixtures import lloyd as in_memory
from lightning_modules.mixtures import passes
from lightning_modules.mixtures.lloyd import LloydResult, lloyd
from lightning_modules.mixtures.passes import Passes
from lightning_modules.mixtures.rows import FramedRows
from lightning_modules.mixtures.standardizer import Standardizer, StreamMoments

DTYPES = [torch.float32, torch.float64]
SIZES = [(1, 1, 1), (2, 1, 7), (2, 3, 64), (17, 48, 65), (33, 100, 131), (200, 3, 6), (200, 48, 301), (8, 129, 50)]


@pytest.fixture(autouse=True)
def compiled() -> None:
    if None in [passes.library(dtype) for dtype in DTYPES]:
        pytest.skip("no compiled passes: no C compiler, or LIGHTNING_EM_COMPILE=0")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def passes_over(x: Tensor, offset: float = 0.0, unit: float = 1.0, weights: Tensor | None = None) -> Passes:
    library = passes.library(x.dtype)
    assert library is not None
    width = x.shape[1]
    return Passes(library, x, torch.full((width,), offset).double(), torch.full((width,), 1 / unit).double(), weights)


def distances(z: Tensor, centers: Tensor) -> np.ndarray:
    """`[N, K]`, by differences, in the longest numbers that numpy has."""
    longest = [tensor.numpy().astype(np.longdouble) for tensor in (z.double(), centers)]
    return np.sqrt(((longest[0][:, None] - longest[1]) ** 2).sum(axis=2))


def check_nearest(labels: Tensor, gap: Tensor, z: Tensor, centers: Tensor) -> None:
    far = distances(z, centers)
    certain = ~gap.isnan().numpy()
    assert ((labels >= 0) & (labels < len(centers))).all()
    assert (labels.numpy() == far.argmin(axis=1))[certain].all()
    order = np.sort(far, axis=1)
    difference = order[:, 1] - order[:, 0] if len(centers) > 1 else np.full(len(z), np.inf)
    rounding = 8 * torch.finfo(z.dtype).eps * order[:, 0]
    assert (gap.double().numpy() <= difference + rounding)[certain].all(), "a lower bound"
    if len(centers) > 1:
        assert (gap.double().numpy() >= difference - 0.01 * (1 + order[:, 0]))[certain].all(), "that is of use"


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize(("components", "width", "count"), SIZES)
def test_nearest_is_that_of_brute_force(components: int, width: int, count: int, dtype: torch.dtype) -> None:
    x = (3 * normal(count, width) + 5).to(dtype)
    z, centers = ((x.double() - 5) / 2).to(dtype), normal(components, width, seed=1)
    labels, gap, largest = passes_over(x, 5.0, 2.0).nearest(None, centers)
    check_nearest(labels, gap, z, centers)
    assert gap.isnan().sum() <= 0.05 * count
    assert largest == pytest.approx(float(z.double().square().sum(dim=1).amax()), rel=1e-12)
    index = torch.randperm(count, generator=torch.Generator().manual_seed(2))[: count // 2 + 1]
    again, some, _ = passes_over(x, 5.0, 2.0).nearest(index, centers)
    assert torch.equal(again, labels[index])
    assert torch.equal(some.nan_to_num(), gap[index].nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_ties_are_left_to_a_closer_look(dtype: torch.dtype) -> None:
    x = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0)).to(dtype)
    centers = torch.tensor([[1.0, 1], [3, 1], [1, 1], [3, 3]], dtype=torch.float64)
    labels, gap, _ = passes_over(x).nearest(None, centers)
    order = np.sort(distances(x, centers), axis=1)
    assert torch.equal(gap.isnan(), torch.from_numpy(order[:, 0] == order[:, 1]))
    check_nearest(labels, gap, x, centers)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e20, 1e30])
def test_what_is_out_of_reach_of_float32_is_left_to_a_closer_look(value: float, dtype: torch.dtype) -> None:
    x, centers = normal(20, 5).to(dtype), normal(3, 5, seed=1)
    x[4, 2], x[17] = value, value
    labels, gap, _ = passes_over(x).nearest(None, centers)
    assert gap.isnan()[[4, 17]].all()
    others = [n for n in range(20) if n not in (4, 17)]
    check_nearest(labels[others], gap[others], x[others], centers)
    assert ((labels >= 0) & (labels < 3)).all()
    centers[1, 0] = value
    labels, gap, _ = passes_over(x).nearest(None, centers)
    assert gap.isnan().all()
    assert ((labels >= 0) & (labels < 3)).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_sums_and_inertia_are_those_of_loops(dtype: torch.dtype, weighted: bool) -> None:
    x, centers = normal(70, 11).to(dtype), normal(4, 11, seed=1)
    labels, old = torch.arange(70) % 4, torch.arange(70) * 7 % 3
    weights = torch.arange(70).remainder(6).double() / 2 if weighted else None
    share = torch.ones(70).double() if weights is None else weights
    if weighted:
        x[::6] = torch.nan  # of weight 0
    z = ((x.double() - 0.5) * 4).to(dtype).double()
    found = passes_over(x, 0.5, 0.25, weights)
    index = torch.arange(69, -1, -3)
    for rows, former in ((None, None), (index, old[index])):
        expected = torch.zeros(4, 13, dtype=torch.float64)
        for n in (n for n in (range(70) if rows is None else rows.tolist()) if share[n] > 0):
            row = torch.cat([share[n] * z[n], share[n, None], torch.ones(1)])
            expected[labels[n]] += row
            if former is not None:
                expected[old[n]] -= row
        added = found.add(rows, labels if rows is None else labels[rows], former, 4)
        torch.testing.assert_close(added, expected, rtol=1e-12, atol=1e-12)
    expected = sum(share[n] * (z[n] - centers[labels[n]]).square().sum() for n in range(70) if share[n] > 0)
    assert found.inertia(labels, centers) == pytest.approx(float(expected), rel=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize(("count", "width"), [(1, 1), (63, 3), (64, 48), (1000, 5)])
def test_moments_are_those_of_long_numbers(count: int, width: int, dtype: torch.dtype) -> None:
    x = (1e3 * normal(count, width).abs() + 1e5).to(dtype)
    x[:, 0] = 0.1
    found = StreamMoments.of(x)
    longest = x.double().numpy().astype(np.longdouble)
    np.testing.assert_allclose(found.mean, longest.mean(axis=0).astype(float), rtol=1e-15)
    np.testing.assert_allclose(found.squares, (longest.var(axis=0) * count).astype(float), rtol=1e-12)
    assert found.squares[0] == 0
    assert found.count == found.rows == count
    assert found.invalid == found.invalid_weights == 0
    x[-1, -1] = torch.nan
    assert passes.moments(x) is None
    assert StreamMoments.of(x).invalid == 1
    assert passes.moments(x[:0]) is None


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_share_the_samples(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_MINIMUM_SHARE", 1)
    x, centers = normal(101, 9), normal(5, 9, seed=1)
    results = []
    for number in (1, threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        found = passes_over(x)
        labels, gap, largest = found.nearest(None, centers)
        moments = StreamMoments.of(x).flat()
        added = found.add(None, labels, labels.roll(1), 5)
        results.append((labels, gap, torch.tensor([largest, found.inertia(labels, centers)]), moments, added))
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["columns", "every other row", "part of the columns"])
def test_any_layout_in_memory(layout: str) -> None:
    x = normal(60, 8)
    given = {
        "columns": lambda: x.T.contiguous().T,
        "every other row": lambda: x.repeat_interleave(2, dim=0)[::2],
        "part of the columns": lambda: torch.cat([x, x], dim=1)[:, :8],
    }[layout]()
    centers = normal(4, 8, seed=1)
    for one, other in zip(
        passes_over(x).nearest(None, centers), passes_over(given).nearest(None, centers), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(StreamMoments.of(given).flat(), StreamMoments.of(x).flat(), rtol=0, atol=0)


def in_torch(monkeypatch: pytest.MonkeyPatch, *arguments: object, **options: object) -> LloydResult:
    with monkeypatch.context() as patch:
        patch.setattr(in_memory, "library_for", lambda x: None)
        return lloyd(*arguments, **options)


@pytest.mark.parametrize("kind", ["blobs", "ties", "equal rows", "units", "weights", "frame", "scales"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("iterations", [1, 3, 100])
def test_lloyd_is_the_same_in_torch(
    kind: str, dtype: torch.dtype, iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weights = normal(900, 6) + 3 * normal(9, 6, seed=1)[torch.arange(900) % 9], None
    if kind == "ties":
        x = x.round()
    elif kind == "equal rows":
        x = x[torch.arange(900) % 40]
    elif kind == "units":
        x = 1e30 * x
    elif kind == "weights":
        weights = torch.arange(900).remainder(4).double()
    x = x.to(dtype)
    z: Tensor | FramedRows = x
    if kind in ("frame", "scales"):
        x += 1000
        scale = 0.5 if kind == "frame" else 0.3
        z = FramedRows(x, Standardizer(torch.full((6,), 999.0).double(), torch.full((6,), scale).double()), dtype)
    start = z[:12]
    compiled = lloyd(z, start, iterations, weights=weights)
    plain = in_torch(monkeypatch, z, start, iterations, weights=weights)
    assert torch.equal(compiled.labels, plain.labels)
    assert (compiled.n_iter, compiled.converged) == (plain.n_iter, plain.converged)
    size = float(plain.centers.abs().amax())
    torch.testing.assert_close(compiled.centers, plain.centers, rtol=1e-10, atol=1e-12 * size)
    assert compiled.inertia == pytest.approx(plain.inertia, rel=1e-10)


def test_the_comparison_with_torch_uses_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Passes, "nearest", None)
    x = normal(30, 2)
    assert in_torch(monkeypatch, x, x[:3]).converged
    with pytest.raises(TypeError):
        lloyd(x, x[:3])
