"""Random numbers by counter: independent, of the right law, and the same for the same key in every version."""

import numpy as np
import pytest
import scipy.stats
import torch

from lightning_modules import graph
from lightning_modules.imaging import draw, mix, permutation, seeded_normal, seeded_uniform, stream


def test_numbers_are_those_of_earlier_versions() -> None:
    """Runs are resumed and compared across versions: a key keeps its order, its noise and its crops."""
    assert mix(torch.tensor([1, -5])).tolist() == [6238072747940578789, 5185122842947594062]
    assert draw(stream(3, -1), torch.arange(2)).tolist() == [1538329473644005760, 4036660599934440499]
    assert permutation(8, 1, 2).tolist() == [2, 7, 3, 1, 5, 6, 0, 4]
    assert seeded_uniform(torch.tensor([7]), 2).tolist() == [[0.5243459416779314, 0.30213903321684277]]
    assert seeded_normal(torch.tensor([7]), (1, 2)).flatten().tolist() == pytest.approx(
        [-0.39226082, 1.15423584], rel=1e-6
    )
    assert graph.seeded_normal is seeded_normal


def test_draws_depend_on_the_key_alone() -> None:
    key = torch.randint(2**62, (7,), generator=torch.Generator().manual_seed(0))
    together = seeded_normal(key, (3, 5, 7))
    for index in (3, 0, 6):
        assert torch.equal(seeded_normal(key[index : index + 1], (3, 5, 7))[0], together[index])
    assert together.dtype == torch.float32


@pytest.mark.parametrize(
    "keys", [torch.arange(40), torch.randint(2**62, (40,), generator=torch.Generator().manual_seed(0))]
)
def test_draws_are_normal_uniform_and_independent(keys: torch.Tensor) -> None:
    normal = seeded_normal(keys, (2501,)).double().numpy()
    assert scipy.stats.kstest(normal.ravel(), "norm").pvalue > 1e-3
    uniform = seeded_uniform(keys, 2500).numpy()
    assert scipy.stats.kstest(uniform.ravel(), "uniform").pvalue > 1e-3
    # Neighbouring keys and neighbouring counters must not know of each other.
    across = np.corrcoef(normal) - np.eye(40)
    along = np.corrcoef(normal[:, :-1].ravel(), normal[:, 1:].ravel())[0, 1]
    assert np.abs(across).max() < 0.1
    assert abs(along) < 0.02


def test_streams_do_not_collide():
    starts = {int(stream(seed, epoch)) for seed in range(50) for epoch in range(40)}
    assert len(starts) == 2_000
    assert stream(1) != stream(1, 0)
    assert stream(-1) == stream(2**64 - 1)


def test_permutation_is_one():
    assert sorted(permutation(100, 5).tolist()) == list(range(100))
    first = torch.stack([permutation(10, seed)[0] for seed in range(2000)])
    assert (torch.bincount(first, minlength=10) - 200).abs().max() < 70  # 5 standard deviations
