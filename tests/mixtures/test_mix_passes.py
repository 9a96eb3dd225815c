"""The compiled passes of K-means against brute force in float64, and Lloyd's algorithm with them and without."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from torch import Tensor

from lightning_modules.mixtures import lloyd as in_memory
from lightning_modules.mixtures import passes
from lightning_modules.mixtures.lloyd import LloydResult, lloyd
from lightning_modules.mixtures.passes import Passes
from lightning_modules.mixtures.rows import FramedRows, SparseRows, dense
from lightning_modules.mixtures.standardizer import Standardizer, StreamMoments

DTYPES = [torch.float32, torch.float64]
SIZES = [(1, 1, 1), (2, 1, 7), (2, 3, 64), (17, 48, 65), (33, 100, 131), (200, 3, 6), (200, 48, 301), (8, 129, 50)]


@pytest.fixture(autouse=True)
def compiled() -> None:
    if None in [passes.library(dtype) for dtype in DTYPES]:
        pytest.skip("no compiled passes: no C compiler, or LIGHTNING_EM_COMPILE=0")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Compiled:
    """The passes over samples, with what they write to."""

    def __init__(
        self, x: Tensor, offset: float = 0.0, unit: float = 1.0, weights: Tensor | None = None, sparse: bool = False
    ) -> None:
        library = passes.library(x.dtype)
        assert library is not None
        frame = torch.tensor([offset, 1 / unit], dtype=torch.float64)[:, None].expand(2, x.shape[1])
        samples = csr_array(x.numpy()) if sparse else x
        self.passes = Passes(library, samples, None if (offset, unit) == (0, 1) else tuple(frame), weights)
        self.x, self.weights = x, weights

    def nearest(self, index: Tensor | None, centers: Tensor) -> tuple[Tensor, Tensor, float]:
        """Labels (-1 where it was not asked for), bounds (NaN there), and the largest squared norm."""
        labels, gap = torch.full((len(self.x),), -1), torch.full((len(self.x),), torch.nan, dtype=self.x.dtype)
        members = torch.zeros(len(centers), self.x.shape[1] + 2, dtype=torch.float64)
        changed, largest = self.passes.nearest(index, centers, labels, gap, members)
        asked = torch.arange(len(self.x)) if index is None else index.sort().values
        assert torch.equal((labels >= 0).nonzero()[:, 0], asked)
        assert torch.equal((~gap.isnan()).nonzero()[:, 0], asked)
        assert changed == len(asked)
        if self.x.isfinite().all():
            added = torch.zeros_like(members)
            self.passes.add(asked, labels[asked], torch.full_like(asked, -1), added)
            torch.testing.assert_close(members, added, rtol=1e-12, atol=1e-12)
        before, again = labels.clone(), members.clone()
        assert self.passes.nearest(index, centers, labels, gap, again)[0] == 0
        assert torch.equal(labels, before)
        assert torch.equal(again.nan_to_num(), members.nan_to_num())
        return labels, gap, largest


def passes_over(
    x: Tensor, offset: float = 0.0, unit: float = 1.0, weights: Tensor | None = None, sparse: bool = False
) -> Compiled:
    return Compiled(x, offset, unit, weights, sparse)


def distances(z: Tensor, centers: Tensor) -> np.ndarray:
    """`[N, K]`, by differences, in the longest numbers that numpy has."""
    longest = [tensor.numpy().astype(np.longdouble) for tensor in (z.double(), centers)]
    return np.sqrt(((longest[0][:, None] - longest[1]) ** 2).sum(axis=2))


def check_nearest(labels: Tensor, gap: Tensor, z: Tensor, centers: Tensor) -> None:
    assert ((labels >= 0) & (labels < len(centers))).all()
    far = distances(z, centers)
    order = np.sort(far, axis=1)
    rounding = 1e-14 * (1 + far.max(axis=1))
    assert (far[np.arange(len(far)), labels.numpy()] <= order[:, 0] + rounding).all()
    difference = order[:, 1] - order[:, 0] if len(centers) > 1 else np.full(len(z), np.inf)
    bound = gap.double().numpy()
    assert (bound <= difference + 8 * torch.finfo(z.dtype).eps * order[:, 0]).all(), "a lower bound"
    tied = np.isneginf(bound)
    assert (difference <= 1e-6 * (1 + order[:, 0]))[tied].all()
    if len(centers) > 1:
        assert (bound >= difference - 0.01 * (1 + order[:, 0]))[~tied].all(), "that is of use"


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize(("components", "width", "count"), SIZES)
def test_nearest_is_that_of_brute_force(components: int, width: int, count: int, dtype: torch.dtype) -> None:
    x = (3 * normal(count, width) + 5).to(dtype)
    z, centers = ((x.double() - 5) / 2).to(dtype), normal(components, width, seed=1)
    found = passes_over(x, 5.0, 2.0)
    labels, gap, largest = found.nearest(None, centers)
    check_nearest(labels, gap, z, centers)
    assert gap.isneginf().sum() <= 0.05 * count
    assert largest == pytest.approx(float(z.double().square().sum(dim=1).amax()), rel=8 * torch.finfo(dtype).eps)
    index = torch.randperm(count, generator=torch.Generator().manual_seed(2))[: count // 2 + 1]
    again, some, _ = found.nearest(index, centers)
    assert torch.equal(again[index], labels[index])
    assert torch.equal(some[index].nan_to_num(), gap[index].nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize(("components", "width", "count"), SIZES)
@pytest.mark.parametrize("stored", [0.0, 0.1, 1.0])
def test_nearest_of_sparse_samples(components: int, width: int, count: int, stored: float, dtype: torch.dtype) -> None:
    mask = torch.rand(count, width, generator=torch.Generator().manual_seed(3)) < stored
    x = (normal(count, width) * mask).to(dtype)
    centers = 0.2 * normal(components, width, seed=1)
    found = passes_over(x, sparse=True)
    labels, gap, largest = found.nearest(None, centers)
    check_nearest(labels, gap, x, centers)
    assert gap.isneginf().sum() <= 0.05 * count
    assert largest == pytest.approx(float(x.double().square().sum(dim=1).amax()), rel=1e-12)
    expected = passes_over(x).passes.inertia(labels, centers)
    assert found.passes.inertia(labels, centers) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_samples_that_change_their_label_move_to_its_members(dtype: torch.dtype, sparse: bool) -> None:
    x, weights = normal(300, 7).to(dtype), torch.arange(300).remainder(3).double()
    found = passes_over(x, weights=weights, sparse=sparse).passes
    labels, gap = torch.full((300,), -1), torch.empty(300, dtype=dtype)
    members = torch.zeros(5, 9, dtype=torch.float64)
    for seed in range(4):
        centers, before = normal(5, 7, seed=seed + 1), labels.clone()
        changed, _ = found.nearest(None, centers, labels, gap, members)
        assert changed == int((labels != before).sum()) > 100
        rows = torch.cat([weights[:, None] * x, weights[:, None], torch.ones(300, 1)], dim=1)
        expected = torch.zeros(5, 9, dtype=torch.float64).index_add_(0, labels, rows * (weights > 0)[:, None])
        torch.testing.assert_close(members, expected, rtol=1e-12, atol=1e-12)
    untouched = members.clone()
    found.nearest(None, normal(5, 7, seed=9), labels, gap)
    assert torch.equal(members, untouched)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_bounds_are_loosened_by_label(dtype: torch.dtype) -> None:
    gap, labels, moved = normal(500).to(dtype), torch.arange(500) % 7, normal(7, seed=1).abs()
    gap[3] = -torch.inf
    expected = gap - moved.to(dtype)[labels]
    index = passes_over(normal(500, 1).to(dtype)).passes.loosen(labels, moved, 0.25, gap)
    assert torch.equal(gap, expected)
    assert torch.equal(index, (expected <= 0.25).nonzero()[:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_ties_have_no_bound(dtype: torch.dtype) -> None:
    x = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0)).to(dtype)
    centers = torch.tensor([[1.0, 1], [3, 1], [1, 1], [3, 3]], dtype=torch.float64)
    labels, gap, _ = passes_over(x).nearest(None, centers)
    order = np.sort(distances(x, centers), axis=1)
    assert torch.equal(gap.isneginf(), torch.from_numpy(order[:, 0] == order[:, 1]))
    check_nearest(labels, gap, x, centers)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e15, 1e20, 1e30])
def test_what_is_out_of_reach_of_float32_is_looked_at_closer(value: float, dtype: torch.dtype) -> None:
    x, centers = normal(20, 5).to(dtype), normal(3, 5, seed=1)
    x[4, 2], x[17] = value, value
    labels, gap, _ = passes_over(x).nearest(None, centers)
    others = [n for n in range(20) if n not in (4, 17)]
    check_nearest(labels[others], gap[others], x[others], centers)
    if np.isfinite(value):
        assert gap[[4, 17]].isneginf().all() or value < 1e20
        far = distances(x, centers)
        assert (far[np.arange(20), labels.numpy()] <= far.min(axis=1) * (1 + 1e-14)).all()
    centers[1, 0] = value
    labels, gap, _ = passes_over(x).nearest(None, centers)
    if np.isfinite(value):
        assert (labels[others] != 1).all()
        far = distances(x, centers)
        assert (far[np.arange(20), labels.numpy()] <= far.min(axis=1) * (1 + 1e-7))[others].all()


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
    found = passes_over(x, 0.5, 0.25, weights).passes
    index = torch.arange(69, -1, -3)
    for former in (torch.full((70,), -1), old):
        expected = torch.zeros(4, 13, dtype=torch.float64)
        for n in (n for n in index.tolist() if share[n] > 0):
            row = torch.cat([share[n] * z[n], share[n, None], torch.ones(1)])
            expected[labels[n]] += row
            if former[n] >= 0:
                expected[former[n]] -= row
        added = torch.zeros(4, 13, dtype=torch.float64)
        found.add(index, labels[index], former[index], added)
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
        added = torch.zeros(5, 11, dtype=torch.float64)
        found.passes.add(torch.arange(101), labels, labels.roll(1), added)
        loose = gap.clone()
        candidates = found.passes.loosen(labels, normal(5, seed=2).abs(), 0.1, loose)
        inertia = torch.tensor([largest, found.passes.inertia(labels, centers)])
        results.append((labels, gap, inertia, moments, added, candidates, loose))
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
        patch.setattr(in_memory, "library", lambda dtype: None)
        return lloyd(*arguments, **options)


@pytest.mark.parametrize(
    "kind", ["blobs", "ties", "equal rows", "units", "weights", "frame", "scales", "sparse", "sparse ties"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("iterations", [1, 3, 100])
def test_lloyd_is_the_same_in_torch(
    kind: str, dtype: torch.dtype, iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weights = normal(900, 6) + 3 * normal(9, 6, seed=1)[torch.arange(900) % 9], None
    if kind.startswith("sparse"):
        x *= torch.rand(900, 6, generator=torch.Generator().manual_seed(2)) < 0.4
    if kind.endswith("ties"):
        x = x.round()
    elif kind == "equal rows":
        x = x[torch.arange(900) % 40]
    elif kind == "units":
        x = 1e30 * x
    elif kind == "weights":
        weights = torch.arange(900).remainder(4).double()
    x = x.to(dtype)
    z: Tensor | FramedRows | SparseRows = SparseRows(csr_array(x.numpy())) if kind.startswith("sparse") else x
    if kind in ("frame", "scales"):
        x += 1000
        scale = 0.5 if kind == "frame" else 0.3
        z = FramedRows(x, Standardizer(torch.full((6,), 999.0).double(), torch.full((6,), scale).double()), dtype)
    start = dense(z[:12])
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


def test_all_samples_given_to_lost_centers_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([[0.0], [0.0], [10.0]], dtype=torch.float64)
    start = torch.tensor([[4.0], [100.0], [200.0]], dtype=torch.float64)
    for result in (lloyd(x, start, 1), in_torch(monkeypatch, x, start, 1)):
        assert result.inertia == 0
        assert set(result.centers.flatten().tolist()) >= {0.0, 10.0}
