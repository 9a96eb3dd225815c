"""Where clustering begins: k-means++, k-means‖ and random samples, and a reservoir that no order or process changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.mixtures.collectives import Collectives
from lightning_modules.mixtures.lloyd import assign
from lightning_modules.mixtures.rows import Rows, dense, distinct, products, squared_norms

Initialization = Literal["k-means++", "k-means||", "random"]
# Samples, their weights, and their indices in the data: the last two where they are known.
Samples = tuple[Any, Tensor | None, Tensor | None]
Stream = Callable[[], Iterable[Samples]]

# Samples that k-means‖ adds in one pass, for each component, and the passes it takes (Bahmani et al. 2012: l = 2k,
# about 5 rounds).
OVERSAMPLING = 2
ROUNDS = 4


def kmeans_plus_plus(z: Rows, num_components: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
    r"""Greedy k-means++ (Arthur and Vassilvitskii 2007): samples drawn with probability
    :math:`\propto w_n \min_k \|z_n - c_k\|^2`, the best of :math:`2 + \log K` draws each time.

    The draws do not depend on the order of the samples, and samples of whole weights are drawn as the same samples
    repeated.

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
    weights = torch.ones(z.shape[0], dtype=z.dtype, device=z.device) if weights is None else weights.to(z.dtype)
    trials = 2 + int(math.log(num_components))
    norms, order = squared_norms(z), canonical_order(z)
    rounding = 32 * torch.finfo(z.dtype).eps

    def squares_to(index: Tensor) -> Tensor:
        scores = products(dense(z, index), z).mul_(-2.0).add_(norms[index, None]).add_(norms).clamp_(min=0.0)
        # the expanded square leaves rounding where there is a duplicate
        return torch.where(scores <= rounding * (norms + norms[index, None]), 0.0, scores)

    index = _draw(weights, order, 1, generator)
    chosen = [int(index)]
    closest = squares_to(index)[0]
    for _ in range(1, num_components):
        candidates = _draw(weights * closest, order, trials, generator)
        distances = torch.minimum(squares_to(candidates), closest)
        best = int((distances @ weights).argmin())
        chosen.append(int(candidates[best]))
        closest = distances[best]
    return dense(z, torch.tensor(chosen, device=norms.device))


def canonical_order(z: Rows) -> Tensor:
    """An order of the samples in which equal ones are neighbors, whatever order they come in.

    Shape:
        - z: `[N, D]`
        - output: `[N]`
    """
    direction = torch.randn(z.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return products(direction.to(z.device, z.dtype)[None], z)[0].argsort(stable=True)


def _draw(mass: Tensor, order: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices with probability proportional to `mass`; uniform where there is no mass left."""
    total = mass.double()[order].cumsum(dim=0)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64).to(total.device)
    if not bool(total[-1] > 0):
        return order[(uniform * len(mass)).long().clamp_(max=len(mass) - 1)]
    place = torch.searchsorted(total, uniform * total[-1], right=True)
    # rounding at the end must not draw what has no mass
    return order[torch.minimum(place, torch.searchsorted(total, total[-1:]))]


def random_samples(z: Rows, num_components: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
    """Distinct points, drawn one after the other with probability proportional to the weight that is left; points are
    drawn twice only where there are fewer than `num_components`.

    Shape:
        - z: `[N, D]`
        - weights: `[N]`
        - output: `[K, D]`
    """
    mass = torch.ones(z.shape[0], dtype=torch.float64, device=z.device) if weights is None else weights.double()
    order, chosen = canonical_order(z), dense(z, torch.zeros(0, dtype=torch.long, device=z.device))
    while bool(mass.any()):
        # of draws with replacement, the first of each point are draws without
        drawn = dense(z, _draw(mass, order, 4 * num_components, generator))
        chosen = torch.cat([chosen, drawn])
        chosen = chosen[distinct(chosen)]
        if len(chosen) >= num_components:
            return chosen[:num_components]
        _, squares = assign(chosen[None], z)
        mass = torch.where(squares[0] > 0, mass, 0.0)
    again = dense(z, _draw(mass, order, num_components - len(chosen), generator))
    return torch.cat([chosen, again])


def sample_keys(index: Tensor, seed: int) -> Tensor:
    """A uniform number in (0, 1) for each sample, a function of its index and the seed.

    So the samples with the smallest keys are a random choice that is the same in every order and on any number of
    processes.

    Shape:
        - index: `[N]`
        - output: float64 `[N]`
    """
    mixed = _mix(index.to(torch.int64))
    mixed = _mix(mixed + _mix(torch.tensor(seed, dtype=torch.int64, device=index.device)))
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

    def add(self, samples: Rows, keys: Tensor) -> None:
        """Offer samples; those whose keys are not finite never enter.

        Shape:
            - samples: `[N, D]`
            - keys: `[N]`
        """
        keep = (keys < self._threshold).nonzero()[:, 0]
        if len(keep) > self.size:
            keep = keep[keys[keep].argsort(stable=True)[: self.size]]
        self._samples.append(dense(samples, keep))
        self._keys.append(keys[keep])
        self._held += len(keep)
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
    sample: Rows,
    stream: Stream,
    num_components: int,
    generators: list[torch.Generator],
    seed: int,
    collectives: Collectives,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""K-means‖ (Bahmani et al. 2012): in each pass every restart draws :math:`2K` samples with weight their squared
    distance; after `ROUNDS` passes one more counts what the candidates stand for.

    Weighted draws without replacement are the samples with the smallest :math:`-\log u_n / w_n d_n^2` (Efraimidis and
    Spirakis), so a pass needs no total cost, and the draws depend on the samples' indices, not on order or processes.

    Args:
        sample: Samples to draw the first candidate of each restart from.
        stream: Gives the samples, standardized like those, once more at each call.
        num_components: How many centers the candidates are for.
        generators: Source of the first draw of each of the S restarts.
        seed: Seed of the draws from the stream.
        collectives: How the processes talk.
        weights: Weights of `sample`.

    Shape:
        - sample: `[N, D]`
        - weights: `[N]`
        - output: `[S, C, D]`, and the weight of the samples that each candidate stands for, `[S, C]`
    """
    candidates = torch.stack([random_samples(sample, 1, generator, weights) for generator in generators])
    size = min(OVERSAMPLING * num_components, sample.shape[0])  # no more candidates than samples
    for turn in range(ROUNDS):
        drawn = [Reservoir(size) for _ in generators]
        for z, weight, index in stream():
            assert index is not None
            _, squares = assign(candidates, z)
            mass = squares if weight is None else squares * weight
            for restart, target in enumerate(drawn):
                uniform = sample_keys(index, seed + 7919 * (turn + 1) + 104_729 * restart)
                target.add(z, torch.where(mass[restart] > 0, -uniform.log() / mass[restart], torch.inf))
        parts = []
        for restart, target in enumerate(drawn):
            drawn_samples, keys = (collectives.gather_samples(part) for part in target.result())
            chosen = drawn_samples[keys.argsort(stable=True)[:size]]
            # fewer than asked for: the rest repeats the first candidate, and weighs nothing below
            fill = candidates[restart, :1].expand(size - chosen.shape[0], -1)
            parts.append(torch.cat([candidates[restart], chosen.to(candidates), fill]))
        candidates = torch.stack(parts)
    represented = candidates.new_zeros(candidates.shape[:2])
    for z, weight, _ in stream():
        labels, _ = assign(candidates, z)
        for restart in range(len(generators)):
            represented[restart] += torch.bincount(labels[restart], weight, minlength=represented.shape[1])
    return candidates, collectives.reduce(represented.flatten()).view_as(represented)


def scalable_kmeans_plus_plus(
    sample: Rows,
    stream: Stream,
    num_components: int,
    generators: list[torch.Generator],
    seed: int,
    collectives: Collectives,
    weights: Tensor | None = None,
) -> Tensor:
    """The candidates of k-means‖, and k-means++ among them; arguments as `scalable_candidates` has them.

    Shape:
        - sample: `[N, D]`
        - weights: `[N]`
        - output: `[S, K, D]`
    """
    found = scalable_candidates(sample, stream, num_components, generators, seed, collectives, weights)
    again = (generator.manual_seed(generator.initial_seed()) for generator in generators)
    parts = zip(*found, again, strict=True)
    return torch.stack([kmeans_plus_plus(z, num_components, g, represented) for z, represented, g in parts])
