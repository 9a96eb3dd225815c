"""Order, weights and keys: the same samples with the same influence on any number of processes."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DistributedSampler, SequentialSampler

from datamodules._sampler import EpochBatches, EpochLoader, FixedBatches

sizes = {
    "length": st.integers(1, 60),
    "batch_size": st.integers(1, 9),
    "world": st.integers(1, 5),
    "accumulate": st.integers(1, 4),
    "epoch": st.integers(0, 3),
}


def epoch_of_ranks(
    length: int,
    batch_size: int,
    world: int = 1,
    epoch: int = 0,
    seed: int = 0,
    accumulation: Callable[[], tuple[int, float]] | None = None,
) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    samplers = [
        EpochBatches(length, batch_size, num_replicas=world, rank=r, shuffle=True, seed=seed, accumulation=accumulation)
        for r in range(world)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    ranks = [list(sampler) for sampler in samplers]
    assert all(len(batches) == len(sampler) for batches, sampler in zip(ranks, samplers, strict=True))
    return ranks


@given(**sizes)
def test_every_optimiser_step_gives_the_exact_mean(length, batch_size, world, accumulate, epoch):
    values = torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    ranks = epoch_of_ranks(length, batch_size, world, epoch, accumulation=lambda: (accumulate, float("inf")))
    seen: list[int] = []
    for start in range(0, len(ranks[0]), accumulate):
        total, valid = 0.0, []
        for batches in ranks:
            for index, weight, _ in batches[start : start + accumulate]:
                total += float((weight.double() * values[index]).mean()) / accumulate / world
                valid += index[weight > 0].tolist()
        assert total == pytest.approx(float(values[valid].mean()), rel=1e-6, abs=1e-6)
        seen += valid
    assert sorted(seen) == list(range(length))


@given(**sizes)
def test_ranks_and_accumulation_split_the_batches_of_one_process(length, batch_size, world, accumulate, epoch):
    one = epoch_of_ranks(length, batch_size * world * accumulate, epoch=epoch)[0]
    many = epoch_of_ranks(length, batch_size, world, epoch, accumulation=lambda: (accumulate, float("inf")))
    assert -(-len(many[0]) // accumulate) == len(one)
    for step, (index, _, key) in enumerate(one):
        samples = {}
        for batches in many:
            for other_index, other_weight, other_key in batches[step * accumulate : (step + 1) * accumulate]:
                valid = other_weight > 0
                samples.update(zip(other_index[valid].tolist(), other_key[valid].tolist(), strict=True))
        assert samples == dict(zip(index.tolist(), key.tolist(), strict=True))


@given(**sizes, cut=st.integers(1, 20))
def test_weights_know_that_the_epoch_is_cut(length, batch_size, world, accumulate, epoch, cut):
    ranks = epoch_of_ranks(length, batch_size, world, epoch, accumulation=lambda: (accumulate, cut))
    used = [batches[:cut] for batches in ranks]
    for start in range(0, len(used[0]), accumulate):
        total = sum(float(w.double().mean()) for batches in used for _, w, _ in batches[start : start + accumulate])
        assert total / accumulate / world == pytest.approx(1, rel=1e-6)


def test_a_full_batch_weighs_exactly_one():
    for _, weight, _ in epoch_of_ranks(64, 8, world=2)[0]:
        assert torch.equal(weight, torch.ones(8))


@pytest.mark.parametrize(("length", "world"), [(1, 1), (1, 4), (3, 4)])
def test_fewer_samples_than_ranks(length, world):
    ranks = epoch_of_ranks(length, 2, world)
    weights = torch.cat([batches[0][1] for batches in ranks])
    assert weights.tolist() == pytest.approx([world / length] * length + [0] * (world - length))


def test_order_and_keys_depend_on_seed_and_epoch_alone():
    def flat(**options: int) -> tuple[list[int], dict[int, int]]:
        batches = epoch_of_ranks(50, 8, **options)[0]
        index, _, key = (torch.cat(part).tolist() for part in zip(*batches, strict=True))
        return index, dict(zip(index, key, strict=True))

    assert flat(seed=3, epoch=2) == flat(seed=3, epoch=2)
    # a sum of seed and epoch would make each of these pairs collide
    for other in ({"seed": 2, "epoch": 3}, {"seed": 3, "epoch": 3}, {"seed": 4, "epoch": 1}, {"seed": 3 + 2**32}):
        assert flat(seed=3, epoch=2)[0] != flat(**other)[0]
        assert not set(flat(seed=3, epoch=2)[1].values()) & set(flat(**other)[1].values())


def test_keys_are_uniform_62_bit_numbers():
    keys = epoch_of_ranks(20_000, 20_000)[0][0][2]
    assert 0 <= int(keys.min()) <= int(keys.max()) < 2**62
    assert keys.unique().numel() == 20_000
    bits = torch.stack([(keys >> bit & 1).double().mean() for bit in range(62)])
    assert (bits - 0.5).abs().max() < 4 * 0.5 / 20_000**0.5


def test_evaluation_is_sequential_and_stays_at_epoch_zero():
    sampler = FixedBatches(10, 4, seed=1)
    first = list(sampler)
    sampler.set_epoch(7)
    assert torch.cat([index for index, _, _ in first]).tolist() == list(range(10))
    for batch, other in zip(first, sampler, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


def test_lightning_recognises_the_samplers():
    assert isinstance(EpochBatches(3, 1), DistributedSampler)  # left in place, told the epoch
    assert not isinstance(EpochBatches(3, 1), SequentialSampler)
    assert isinstance(FixedBatches(3, 1), DistributedSampler)
    assert isinstance(FixedBatches(3, 1), SequentialSampler)  # left in place by overfit_batches


class Identity(torch.utils.data.Dataset):
    def __getitem__(self, item):
        return item[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_takes_the_epoch_that_is_set_after_its_iterator(workers):
    expected = [index.tolist() for index, _, _ in epoch_of_ranks(20, 4, epoch=5)[0]]
    sampler = EpochBatches(20, 4, shuffle=True)
    loader = EpochLoader(Identity(), batch_size=None, sampler=sampler, num_workers=workers)
    iterator = iter(loader)
    sampler.set_epoch(5)
    assert [index.tolist() for index in iterator] == expected


def test_the_loader_resumes_in_the_middle_of_an_epoch():
    def loader() -> EpochLoader:
        return EpochLoader(Identity(), batch_size=None, sampler=EpochBatches(20, 4, shuffle=True))

    interrupted = loader()
    interrupted.sampler.set_epoch(2)
    expected = [index.tolist() for index in interrupted]
    iterator = iter(interrupted)
    next(iterator), next(iterator)
    state = interrupted.state_dict()
    assert state == {"epoch": 2, "batches": 2}

    resumed = loader()
    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(2)
    assert [index.tolist() for index in resumed] == expected[2:]
    assert [index.tolist() for index in resumed] == expected  # only once

    later = loader()
    later.load_state_dict(state)
    later.sampler.set_epoch(3)
    assert len(list(later)) == 5
