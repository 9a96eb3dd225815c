"""Where clustering begins: k-means++, k-means‖ and random samples, and a reservoir that no order or process changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.mixtures.collectives import Collectives
from lightning_modules.mixtures.lloyd import assign

Initialization = Literal["k-means++", "k-means||", "random"]
# Samples, mask of those that count, indices of the samples: the last two where they are known.
Samples = tuple[Tensor, Tensor | None, Tensor | None]
Stream = Callable[[], Iterable[Samples]]

# Samples that k-means‖ adds in one pass, for each component, and the passes it takes (Bahmani et al. 2012: l = 2k,
# about 5 rounds).
OVERSAMPLING = 2
ROUNDS = 4


def kmeans_plus_plus(
    z: Tensor, num_components: int, generator: torch.Generator, weights: Tensor | None = None
) -> Tensor:
    r"""Greedy k-means++ (Arthur and Vassilvitskii 2007): samples drawn with probability
    :math:`\propto w_n \min_k \|z_n - c_k\|^2`, the best of :math:`2 + \log K` draws each time.

    Args:
        z: Samples to choose from.
        num_components: How many to choose.
        generator: Source of the draws.
        weights: Multiplicity of the samples.

    Shape:
        - z: `[N, D]`
        - weights: `[N]`
        - output: `[K, D]`
    """
    weights = z.new_ones(z.shape[0]) if weights is None else weights.to(z)
    trials = 2 + int(math.log(num_components))
    norms = z.square().sum(dim=1)

    def squares_to(index: Tensor) -> Tensor:
        scores = torch.addmm(norms[index, None], z[index], z.T, alpha=-2.0)
        scores.add_(norms).clamp_(min=0.0)
        # the expanded square leaves rounding where there is a duplicate
        return torch.where(scores <= 1e-14 * (norms + norms[index, None]), 0.0, scores)

    index = _draw(weights, 1, generator)
    chosen = [int(index)]
    closest = squares_to(index)[0]
    for _ in range(1, num_components):
        candidates = _draw(weights * closest, trials, generator)
        distances = torch.minimum(squares_to(candidates), closest)
        best = int((distances @ weights).argmin())
        chosen.append(int(candidates[best]))
        closest = distances[best]
    return z[chosen].clone()


def _draw(mass: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices with probability proportional to `mass`; uniform where there is no mass left."""
    total = mass.double().cumsum(dim=0)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64).to(total.device)
    if not bool(total[-1] > 0):
        return (uniform * len(mass)).long().clamp_(max=len(mass) - 1)
    return torch.searchsorted(total, uniform * total[-1], right=True).clamp_(max=len(mass) - 1)


def random_samples(z: Tensor, num_components: int, generator: torch.Generator) -> Tensor:
    """Distinct samples, drawn uniformly.

    Shape:
        - z: `[N, D]`
        - output: `[K, D]`
    """
    return z[torch.randperm(z.shape[0], generator=generator)[:num_components].to(z.device)].clone()


def sample_keys(z: Tensor, seed: int, index: Tensor | None = None) -> Tensor:
    """A uniform number in (0, 1) for each sample, a function of its `index` (its values where unknown) and the seed.

    So the samples with the smallest keys are a random choice that is the same in every order and on any number of
    processes.

    Shape:
        - z: `[N, D]`
        - index: `[N]`
        - output: float64 `[N]`
    """
    if index is None:
        bits = z.double().contiguous().view(torch.int64)
        factors = torch.arange(1, 2 * z.shape[1], 2, device=z.device)
        mixed = _mix(bits ^ _mix(factors)).sum(dim=1)
    else:
        mixed = index.to(torch.int64)
    mixed = _mix(_mix(mixed) + _mix(torch.tensor(seed, dtype=torch.int64, device=z.device)))
    return (((mixed >> 11) & (2**53 - 1)).double() + 0.5) / 2**53


def _mix(value: Tensor) -> Tensor:
    """splitmix64 (Steele, Lea and Flood 2014) in wrapping signed arithmetic."""
    value = value + -7046029254386353131
    value = (value ^ ((value >> 30) & (2**34 - 1))) * -4658895280553007687
    value = (value ^ ((value >> 27) & (2**37 - 1))) * -7723592293110705685
    return value ^ ((value >> 31) & (2**33 - 1))


class Reservoir:
    """The `size` samples of a stream with the smallest keys."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._samples: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._held = 0
        self._threshold = math.inf

    def add(self, samples: Tensor, keys: Tensor) -> None:
        """Offer samples; those whose keys are not finite never enter.

        Shape:
            - samples: `[N, D]`
            - keys: `[N]`
        """
        keep = keys < self._threshold
        self._samples.append(samples[keep])
        self._keys.append(keys[keep])
        self._held += int(keep.sum())
        if self._held > 2 * self.size:
            self._compact()

    def _compact(self) -> None:
        samples, keys = torch.cat(self._samples), torch.cat(self._keys)
        order = keys.argsort(stable=True)[: self.size]
        self._samples, self._keys, self._held = [samples[order]], [keys[order]], len(order)
        if len(order) == self.size:
            self._threshold = float(keys[order[-1]])

    def result(self) -> tuple[Tensor, Tensor]:
        """Samples and keys, smallest key first.

        Shape:
            - output: `[M, D]` and `[M]`
        """
        self._compact()
        return self._samples[0], self._keys[0]


def scalable_candidates(
    sample: Tensor,
    stream: Stream,
    num_components: int,
    generators: list[torch.Generator],
    seed: int,
    collectives: Collectives,
) -> tuple[Tensor, Tensor]:
    r"""K-means‖ (Bahmani et al. 2012): in each pass every restart draws :math:`2K` samples with weight their squared
    distance; after `ROUNDS` passes one more counts what the candidates stand for.

    Weighted draws without replacement are the samples with the smallest :math:`-\log u_n / d_n^2` (Efraimidis and
    Spirakis), so a pass needs no total cost, and the draws do not depend on order or processes.

    Args:
        sample: Samples to draw the first candidate of each restart from.
        stream: Gives the samples, standardized like those, once more at each call.
        num_components: How many centers the candidates are for.
        generators: Source of the first draw of each of the S restarts.
        seed: Seed of the draws from the stream.
        collectives: How the processes talk.

    Shape:
        - sample: `[N, D]`
        - output: `[S, C, D]`, and how many samples each candidate stands for, `[S, C]`
    """
    candidates = torch.stack([random_samples(sample, 1, generator) for generator in generators])
    size = min(OVERSAMPLING * num_components, sample.shape[0])  # no more candidates than samples
    for turn in range(ROUNDS):
        drawn = [Reservoir(size) for _ in generators]
        for z, mask, index in stream():
            _, squares = assign(candidates, z)
            for restart, target in enumerate(drawn):
                uniform = sample_keys(z, seed + 7919 * (turn + 1) + 104_729 * restart, index)
                keys = torch.where(squares[restart] > 0, -uniform.log() / squares[restart], torch.inf)
                target.add(z, keys if mask is None else torch.where(mask, keys, torch.inf))
        parts = []
        for restart, target in enumerate(drawn):
            drawn_samples, keys = (collectives.gather_samples(part) for part in target.result())
            chosen = drawn_samples[keys.argsort(stable=True)[:size]]
            # fewer than asked for: the rest repeats the first candidate, and weighs nothing below
            fill = candidates[restart, :1].expand(size - chosen.shape[0], -1)
            parts.append(torch.cat([candidates[restart], chosen, fill]))
        candidates = torch.stack(parts)
    weights = candidates.new_zeros(candidates.shape[:2])
    for z, mask, _ in stream():
        labels, _ = assign(candidates, z)
        for restart in range(len(generators)):
            chosen = labels[restart] if mask is None else labels[restart][mask]
            weights[restart] += torch.bincount(chosen, minlength=weights.shape[1])
    return candidates, collectives.reduce(weights.flatten()).view_as(weights)
