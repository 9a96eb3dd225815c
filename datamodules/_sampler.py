"""Batches whose order, weights and random keys do not depend on how many processes share the work."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from lightning_modules.imaging import ImageBatch, draw, key_stream, permutation, stream

# The streams of an epoch's order, and of an order by groups; the others are those of its keys.
_ORDER, _GROUPS = 0, 2


class SampleBatch(NamedTuple):
    """The samples of a batch: what a sampler asks a `BatchDataset` for.

    Args:
        index: Their positions in the data set.
        weight: Their weights; see `EpochBatches`.
        key: What all that is random about them is drawn from.

    Shape:
        - index: `[B]`, int64
        - weight: `[B]`, float32
        - key: `[B]`, int64
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    weight: Tensor
    key: Tensor

    def batch(self, image: Tensor, label: Tensor | None = None) -> ImageBatch:
        """Returns the batch of these images, with labels of −1 by default.

        Shape:
            - image: `[B, ...]`
            - label: `[B]`, int64
        """
        label = torch.full_like(self.index, -1) if label is None else label
        return {"image": image, "label": label, "index": self.index, "weight": self.weight, "key": self.key}


class EpochBatches(DistributedSampler[Any]):
    """Yields one rank's batches of an epoch as `SampleBatch`, for `DataLoader(batch_size=None)`.

    A subclass of `DistributedSampler`, so that Lightning leaves it in place and gives it the epoch. Rank r of W takes
    the samples r, r + W, … of one common order: together the ranks see at each step what a single process with W times
    the batch size would see. An uneven epoch is padded with repeats of weight 0.

    The weight of a valid sample in a batch of b is b·W·A / v, where A is the number of batches that Lightning
    accumulates and v the number of valid samples in that optimizer step over all ranks. Lightning divides by A, the
    mean over the batch by b, the mean over the ranks by W: what remains is the exact mean over the valid samples.

    Args:
        length: Number of samples in the data set.
        batch_size: Samples per batch of one rank.
        num_replicas: Number of ranks.
        rank: The rank whose batches are wanted.
        shuffle: Draw the order anew in each epoch; otherwise it is sequential.
        seed: Seed of order and keys.
        accumulation: Returns the number of batches per optimizer step and the number of batches after which the epoch
            is cut; asked when the epoch starts, because Lightning settles both late.
        done: Returns the number of this epoch's batches that are done; asked when an interrupted epoch goes on.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = False,
        seed: int = 0,
        accumulation: Callable[[], tuple[int, float]] | None = None,
        done: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(range(length), num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.length = length  # of an epoch
        self.samples = length
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.done = done
        self.first_batch = 0

    def __len__(self) -> int:
        return math.ceil(self.num_samples / self.batch_size)

    def __iter__(self) -> Iterator[SampleBatch]:
        # a generator: nothing is fixed before the first batch is asked for
        order = self._order()
        keys = key_stream(self.seed, self.epoch)
        accumulate, cut = self.accumulation() if self.accumulation else (1, math.inf)
        last_batch = int(min(len(self), cut))
        for batch in range(self.first_batch, len(self)):
            begin, end = self._span(batch, batch + 1)
            position = torch.arange(begin, end) * self.num_replicas + self.rank
            place = order[position % self.length]
            group = batch // accumulate * accumulate
            group_begin, group_end = self._span(group, max(min(group + accumulate, last_batch), batch + 1))
            valid = min(self.length, group_end * self.num_replicas) - group_begin * self.num_replicas
            weight = (position < self.length) * ((end - begin) * self.num_replicas * accumulate / valid)
            yield SampleBatch(place % self.samples, weight.float(), draw(keys, self._drawn(place)))

    def _order(self) -> Tensor:
        """Places of an epoch's samples, in order: a sample's position, and beyond the last one that of a repeat."""
        if not self.shuffle:
            return torch.arange(self.length)
        return permutation(self.length, self.seed, self.epoch, _ORDER)

    def _drawn(self, place: Tensor) -> Tensor:
        """The places that keys are drawn by."""
        return place

    def _span(self, first: int, last: int) -> tuple[int, int]:
        """Returns which of a rank's samples the batches from `first` up to `last` cover."""
        return first * self.batch_size, min(last * self.batch_size, self.num_samples)


class BalancedBatches(EpochBatches):
    """Shuffled batches in which every group of samples has its equal part, however few it has.

    An epoch has about as many samples as there are. Each round of it takes one sample of each group, the groups in an
    order drawn anew, so that every rank sees all of them; a group begins again, in another order and with other keys,
    when its samples are spent.

    A sample and its original, of another group, come in the same round and with the same key: what tells them apart is
    then all that differs, and is learned many times as soon.

    Args:
        groups: Number of each sample's group, from 0 without a gap.
        batch_size: See `EpochBatches`.
        originals: Place of the sample that each was made of; its own for one that was made of none. None where all are.
        options: Keywords of `EpochBatches`.

    Shape:
        - groups: `[N]`, int64
        - originals: `[N]`, int64
    """

    def __init__(self, groups: Tensor, batch_size: int, originals: Tensor | None = None, **options: Any) -> None:
        self.originals = torch.arange(len(groups)) if originals is None else originals
        members = [(groups == group).nonzero()[:, 0] for group in range(int(groups.max()) + 1)]
        members = [own[self.originals[own].argsort(stable=True)] for own in members]
        rounds = math.ceil(len(groups) / len(members))
        super().__init__(rounds * len(members), batch_size, **options)
        self.samples, self.members, self.rounds = len(groups), members, rounds
        # by which its order is drawn: for samples that were made of others, the group of those
        self.names = [int(groups[self.originals[own[0]]]) for own in members]

    def _drawn(self, place: Tensor) -> Tensor:
        index = place % self.samples
        return place - index + self.originals[index]

    def _order(self) -> Tensor:
        columns = []
        for name, members in zip(self.names, self.members, strict=True):
            passes = [
                members[permutation(len(members), self.seed, self.epoch, _GROUPS, name, number)] + number * self.samples
                for number in range(math.ceil(self.rounds / len(members)))
            ]
            columns.append(torch.cat(passes)[: self.rounds])
        within = draw(stream(self.seed, self.epoch, _GROUPS), torch.arange(self.length)).view(self.rounds, -1)
        return torch.stack(columns, dim=1).gather(1, within.argsort(dim=1, stable=True)).flatten()


class FixedBatches(EpochBatches, SequentialSampler):  # type: ignore[misc]
    """The same batches with the same keys in every epoch: evaluation, and training with `overfit_batches`.

    Also a `SequentialSampler`, by which Lightning knows that `overfit_batches` has nothing to replace here.
    """

    def set_epoch(self, epoch: int) -> None:
        """Stays at epoch 0."""


class EpochLoader(DataLoader[Any]):
    """A `DataLoader` over `EpochBatches` that starts late and resumes in the middle of an epoch.

    On resuming, Lightning makes the iterator before it gives the sampler the epoch, and worker processes fetch at
    once: they would fetch epoch 0. This loader begins with the first batch that is asked for. Its state is what lets
    Lightning continue an interrupted epoch with the batch that comes next, not with the first.
    """

    _batches_yielded = 0
    _resume_from: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.sampler
        assert isinstance(sampler, EpochBatches)
        resume, self._resume_from = self._resume_from, None
        sampler.first_batch = 0
        if resume and resume["epoch"] == sampler.epoch:
            # a checkpoint written in the middle of a batch counts that batch here, and Lightning does it again
            sampler.first_batch = sampler.done() if sampler.done else resume["batches"]
        self._batches_yielded = sampler.first_batch
        for batch in super().__iter__():
            self._batches_yielded += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Returns how far the epoch has come, for Lightning's checkpoint."""
        assert isinstance(self.sampler, EpochBatches)
        return {"epoch": self.sampler.epoch, "batches": self._batches_yielded}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continues after the batches already seen, provided that the next epoch asked for is the one interrupted."""
        self._resume_from = state_dict
