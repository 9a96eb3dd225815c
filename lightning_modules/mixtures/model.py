"""Streaming clustering: restarts side by side, ranks, convergence, resumption; a family adds its mathematics."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial, reduce
from itertools import chain
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_modules.mixtures.chunks import chunk_size
from lightning_modules.mixtures.collectives import EMPTY_COUNT, Collectives, SufficientStatistics
from lightning_modules.mixtures.initialization import (
    ROUNDS,
    Initialization,
    Reservoir,
    Samples,
    Stream,
    kmeans_plus_plus,
    random_samples,
    sample_keys,
    scalable_kmeans_plus_plus,
)
from lightning_modules.mixtures.lloyd import assign, lloyd
from lightning_modules.mixtures.standardizer import Scaling, Standardizer, StreamMoments, count_samples

Algorithm = Literal["exact", "stepwise"]
# The parameters of a family: a dataclass whose tensors are named like the buffers that hold them.
P = TypeVar("P")

# Numbers that the reservoir for the initialisation may hold, where `init_size` is not given: 32 MiB of float64.
RESERVOIR_NUMBERS = 2**22
# Relative difference below which the objectives of two restarts are the same.
TIE = 1e-9
# Samples that become float64 at a time.
BLOCK_SAMPLES = 2**15
# Lloyd iterations on the reservoir before a mixture starts.
LLOYD_ITERATIONS = 20


@dataclass
class EpochResult:
    """What one epoch came to; numbers are those of the best restart.

    Attributes:
        iteration: Epochs so far of the restart that has taken most.
        objective: The best one.
        change: How far it moved; NaN in the first epoch.
        finished: Whether no restart has an epoch left to take.
        converged: Whether the best restart has come to rest within `tol`.
        count: Weight of the samples.
        numbers: Further numbers to log.
        empty: Components without samples.
        objectives: Of all restarts, `[S]`.
    """

    iteration: int
    objective: float
    change: float
    finished: bool
    converged: bool
    count: float
    objectives: Tensor
    numbers: dict[str, float] = field(default_factory=dict)
    empty: list[int] = field(default_factory=list)


class ClusteringModel(nn.Module, ABC, Generic[P]):
    """Base of `MixtureModel` and `KMeansModel`: all of streaming EM but the mathematics.

    Everything learned is a float64 buffer, written in place and alike on every process; the sums of an epoch are plain
    tensors. The leading dimension S of the learned buffers is `n_init`: the restarts run side by side, one epoch is for
    all. The samples that a family sees are standardized.

    A family names its parameters (`make_parameters`, `parameter_shapes`), starts them at given centers (`start`),
    writes the E-step and the M-step (`e_step`, `m_step`), its objective (`objective_of`), the stepwise M-step
    (`stepwise_m_step`), and what its parameters are in units of the data (`inverse_transform`). `parameter_shapes` is
    called by this class's `__init__`: what it needs is set before.

    Args:
        num_components: Clusters or mixture components.
        num_features: Width of the data; found out from the first batch where not given.
        init: `k-means++` on a random choice of the data, refined there by K-means for a mixture; `k-means||`, on all
            of the data in six passes; or `random` samples.
        n_init: Restarts, side by side in the same epochs; the best is kept.
        init_size: Samples that the choice for the initialisation may hold; by default 32 MiB of them.
        tol: Change at which a restart has converged.
        max_iter: Iterations at most.
        algorithm: `exact` updates once an epoch, `stepwise` once an optimiser step.
        standardize: Scale each feature to variance 1 inside; reported parameters are in the units of the data.
        seed: Seed of the restarts.
    """

    scaling: Scaling = "feature"
    #: 1 where a larger objective is better, −1 where a smaller one is
    direction: float = 1.0
    #: whether the E-step cuts a block of samples into pieces that fit a cache by itself
    chunks_itself: bool = False
    make_parameters: Callable[..., P]
    #: data = offset + scale · standardized data, [D] each
    offset: Tensor
    scale: Tensor
    #: objective of each restart after its last epoch, [S]
    objective: Tensor
    #: restarts that have epochs left to take, [S]
    active: Tensor
    #: restarts that have come to rest within `tol`, [S]
    at_rest: Tensor
    #: epochs each restart has taken, [S]
    iterations: Tensor
    #: the restart that is reported
    best: Tensor
    #: whether the learned buffers hold a start
    initialized: Tensor
    #: passes over the data that the initialisation took
    initialization_passes: Tensor
    #: samples that have weight
    num_samples: Tensor

    def __init__(
        self,
        num_components: int,
        num_features: int | None = None,
        *,
        init: Initialization = "k-means++",
        n_init: int = 1,
        init_size: int | None = None,
        tol: float = 1e-3,
        max_iter: int = 100,
        algorithm: Algorithm = "exact",
        standardize: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        least = {"num_components": (num_components, 1), "n_init": (n_init, 1), "max_iter": (max_iter, 0)}
        for name, (value, minimum) in least.items():
            if isinstance(value, bool) or int(value) != value or value < minimum:
                raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
        if num_features is not None and num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features!r}")
        if init_size is not None and init_size < num_components:
            raise ValueError(f"init_size must be at least num_components={num_components}, got {init_size!r}")
        if not tol >= 0:
            raise ValueError(f"tol must be at least 0, got {tol!r}")
        for name, choice, known in (
            ("init", init, ("k-means++", "k-means||", "random")),
            ("algorithm", algorithm, ("exact", "stepwise")),
        ):
            if choice not in known:
                raise ValueError(f"{name} must be one of {known}, got {choice!r}")
        self.num_components, self.init, self.n_init, self.init_size = num_components, init, n_init, init_size
        self.tol, self.max_iter, self.algorithm = tol, max_iter, algorithm
        self.standardize, self.seed = standardize, seed
        for name, (_, first) in self._buffers_for(0).items():
            self.register_buffer(name, torch.empty(0, dtype=first.dtype))
        self._allocate(num_features or 0)
        # of the epoch under way: the state that it started from, and the batches in its sums
        self._epoch_start: dict[str, Tensor] = {}
        self._batches = 0

    # ------------------------------------------------------- a family's mathematics

    @abstractmethod
    def parameter_shapes(self, num_features: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of each learned parameter of one restart, for data of this width."""

    @abstractmethod
    def start(self, centers: Tensor) -> P:
        """Parameters at given centers.

        Shape:
            - centers: `[S, K, D]`
        """

    def prepare(self, theta: P) -> Any:
        """What the E-step computes from the parameters once for many batches; themselves by default."""
        return theta

    @abstractmethod
    def e_step(self, prepared: Any, z: Tensor, weight: Tensor | None = None) -> SufficientStatistics:
        """Sufficient statistics of some samples; zeros where there are none.

        Args:
            prepared: What `prepare` made of the parameters.
            z: Standardized samples; 0 where their weight is.
            weight: How often each of them counts; once where absent.

        Shape:
            - z: `[N, D]`
            - weight: `[N]`
        """

    @abstractmethod
    def m_step(self, statistics: Any, previous: P | None = None) -> P:
        """The parameters that maximize the bound.

        Args:
            statistics: Sums over all samples and all processes.
            previous: The parameters that they were taken under; None where they were not.
        """

    @abstractmethod
    def stepwise_m_step(self, statistics: Any) -> P:
        """The parameters after one more batch, whose `statistics` were taken under the present ones."""

    @abstractmethod
    def objective_of(self, statistics: Any) -> Tensor:
        """The objective of each restart, in units of the data.

        Shape:
            - output: `[S]`
        """

    @abstractmethod
    def inverse_transform(self, theta: P) -> P:
        """One restart's parameters, as they are in units of the data."""

    def change(self, objective: Tensor) -> Tensor:
        """What `tol` is compared with, for each restart of the epoch: by default how far its objective moved.

        Shape:
            - objective: `[S]`
            - output: `[S]`
        """
        return (objective - self.objective[self._selected]).abs().nan_to_num(nan=torch.inf)

    def tie(self, best: Tensor) -> Tensor:
        """How far the objectives of two restarts may be apart that reached the same optimum: rounding.

        Shape:
            - best: `[]`
            - output: `[]`
        """
        return TIE * best.abs()

    def numbers(self, statistics: Any, theta: P, restart: int) -> dict[str, float]:
        """Numbers to log for one restart, under the parameters after the M-step."""
        return {}

    def check_parameters(self, theta: P) -> None:
        """Raise where parameters are impossible, before they are learned."""

    def known_start(self) -> P | None:
        """Parameters to start from, where they are known so well that the data need not be looked at."""
        return None

    def initial_centers(self) -> Tensor | None:
        """Centers to start from, standardized, where they are known.

        Shape:
            - output: `[S, K, D]`
        """
        return None

    def with_initial(self, theta: P) -> P:
        """The start, with the parameters that are known in place of those that were found."""
        return theta

    # ------------------------------------------------------------------------ state

    @property
    def num_features(self) -> int:
        """Width of the data; 0 while it is unknown."""
        return self.offset.shape[0]

    @property
    def standardizer(self) -> Standardizer:
        """The map from data to standardized data."""
        return Standardizer(self.offset, self.scale)

    def standardized_variance(self, variance: float) -> Tensor:
        """A variance of each feature of the data (of the standardized data with `standardize`), standardized.

        Shape:
            - output: `[D]`
        """
        result = torch.full_like(self.scale, variance)
        return result if self.standardize else result / self.scale.square()

    def current_parameters(self, restarts: Tensor | int | slice = slice(None)) -> P:
        """Parameters of some restarts, or of one, for standardized data.

        Shape:
            - restarts: a mask `[S]`, where a tensor
        """
        return self.make_parameters(**{name: getattr(self, name)[restarts] for name in self.parameter_shapes(0)})

    def best_parameters(self) -> P:
        """Parameters of the best restart, in units of the data."""
        self.require_initialized()
        return self.inverse_transform(self.current_parameters(int(self.best)))

    def _write(self, theta: P, restarts: Tensor | slice = slice(None)) -> None:
        for name in self.parameter_shapes(0):
            getattr(self, name)[restarts] = getattr(theta, name)

    def _buffers_for(self, num_features: int) -> dict[str, tuple[tuple[int, ...], Tensor]]:
        """Shape and first value of each buffer."""
        restarts = self.n_init
        number = torch.tensor(0, dtype=torch.long)
        zero = torch.tensor(0.0, dtype=torch.float64)
        learned = self.parameter_shapes(num_features).items()
        return {
            "offset": ((num_features,), zero),
            "scale": ((num_features,), torch.tensor(1.0, dtype=torch.float64)),
            "objective": ((restarts,), torch.tensor(torch.nan, dtype=torch.float64)),
            "active": ((restarts,), torch.tensor(True)),
            "at_rest": ((restarts,), torch.tensor(False)),
            "iterations": ((restarts,), number),
            "best": ((), number),
            "initialized": ((), torch.tensor(False)),
            "initialization_passes": ((), number),
            "num_samples": ((), number),
        } | {name: ((restarts, *shape), zero) for name, shape in learned}

    @torch.no_grad()
    def _allocate(self, num_features: int) -> None:
        for name, (shape, value) in self._buffers_for(num_features).items():
            # in place: a DDP wrapper built before the width was known holds these very tensors
            buffer: Tensor = getattr(self, name)
            buffer.resize_(shape).fill_(value.item())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        offset, active = state_dict.get(prefix + "offset"), state_dict.get(prefix + "active")
        if offset is not None and not self.num_features:
            self._allocate(offset.shape[0])
        if active is not None:
            # of a version that did not tell rest from the last allowed iteration
            rest = ~active & (state_dict[prefix + "iterations"] < self.max_iter)
            state_dict.setdefault(prefix + "at_rest", rest)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def check_samples(self, x: Tensor) -> Tensor:
        """Samples of the fitted width, or a `ValueError` in scikit-learn's words.

        Shape:
            - x: `[N, …]`
            - output: `[N, D]`
        """
        if x.ndim > 2:
            x = x.flatten(1)
        if x.ndim != 2:
            raise ValueError(f"Expected 2D data [N, D], got {x.ndim}D data instead: shape {tuple(x.shape)}")
        if self.num_features and x.shape[1] != self.num_features:
            raise ValueError(
                f"X has {x.shape[1]} features, but {type(self).__name__.removesuffix('Model')} is expecting "
                f"{self.num_features} features as input."
            )
        return x

    def require_initialized(self) -> None:
        """Raise where nothing has been learned yet."""
        if not bool(self.initialized):
            name = type(self).__name__.removesuffix("Model")
            raise RuntimeError(f"This {name} is not fitted yet: fit it, or load a checkpoint, before using it.")

    # --------------------------------------------------------------- initialisation

    @torch.no_grad()
    def initialize(self, stream: Stream, collectives: Collectives | None = None) -> None:
        """Set standardizer and restarts from passes over the data; `initialization_passes` counts them."""
        collectives = collectives or Collectives()
        self.initialization_passes.zero_()  # a checkpoint may come from the middle of an initialisation
        theta = self.known_start()
        if theta is None:
            stream = partial(_with_indices, stream, collectives)
            moments, chosen, weights = self._first_pass(stream, collectives)
            self._set_standardizer(moments.standardizer("feature" if self.standardize else self.scaling))
            chosen = self.standardizer.transform(chosen)
            centers = self.initial_centers()
            if centers is None:
                centers = self._choose_centers(chosen, weights, stream, collectives)
            complete = chosen.shape[0] >= int(moments.rows)
            theta = self._start(centers, (chosen, weights) if complete else None, stream, collectives)
            self.num_samples.fill_(int(moments.rows))
        theta = self.with_initial(theta)
        self.check_parameters(theta)
        self._write(theta)
        self.active.fill_(self.max_iter > 0)
        self.initialized.fill_(True)

    def _first_pass(self, stream: Stream, collectives: Collectives) -> tuple[StreamMoments, Tensor, Tensor]:
        """Moments of all samples, and a random choice of them that no order or number of processes changes.

        Where it is not all of them it is a priority sample (Duffield, Lund and Thorup 2007): the smallest of u / w,
        with weights max(w, 1 / the next one's u / w) that make its weighted sums those of the data on average.
        """
        moments: StreamMoments | None = None
        reservoir: Reservoir | None = None
        for x, weight, index in stream():
            samples = self.check_samples(x)
            if moments is None:
                if not self.num_features:
                    self._allocate(samples.shape[1])
                moments = StreamMoments.zeros(samples.shape[1], samples.device)
                reservoir = Reservoir(self._reservoir_size() + 1)
            assert reservoir is not None
            assert index is not None
            moments = moments + StreamMoments.of(samples, weight)
            keys = sample_keys(index, self.seed)
            weight = torch.ones_like(keys) if weight is None else weight.double()
            carried = torch.cat([samples, weight[:, None].to(samples)], dim=1)
            reservoir.add(carried, torch.where(weight > 0, keys / weight, torch.inf))
        if moments is None or reservoir is None:
            raise ValueError(
                f"Found array with 0 sample(s) while a minimum of {self.num_components} is required: the data is empty."
            )
        parts = [StreamMoments.from_flat(part) for part in collectives.gather(moments.flat())]
        total = sum(parts[1:], parts[0])
        self.initialization_passes += 1
        self._check_count(int(total.rows), int(total.invalid), int(total.invalid_weights), self.num_components)
        carried, keys = (collectives.gather_samples(part) for part in reservoir.result())
        size, order = self._reservoir_size(), keys.argsort(stable=True)
        samples, weights = carried[order[:size], :-1], carried[order[:size], -1].double()
        if len(order) > size:
            weights = weights.clamp(min=1 / float(keys[order[size]]))
        return total, samples, weights

    def _reservoir_size(self) -> int:
        return self.init_size or max(RESERVOIR_NUMBERS // max(self.num_features, 1), 3 * self.num_components)

    def _check_count(self, count: int, invalid: int, invalid_weights: int, least: int) -> None:
        if invalid_weights:
            raise ValueError(
                f"{invalid_weights} weight(s) are negative, NaN or infinite. Weights say how often a sample counts: "
                "give numbers of at least 0."
            )
        if invalid:
            raise ValueError(
                f"Input X contains NaN or infinity in {invalid} sample(s). Remove them, impute the values, or look at "
                "the preprocessing that made them."
            )
        if not count:
            raise ValueError(
                "Found array with 0 sample(s) while a minimum of 1 is required: the data is empty, or no sample has a "
                "weight above 0."
            )
        if count < least:
            raise ValueError(
                f"Expected n_samples >= n_components but got n_components = {self.num_components}, "
                f"n_samples = {count}: n_samples={count} should be >= n_clusters={self.num_components}. "
                "Give more samples or ask for fewer components."
            )

    def _set_standardizer(self, standardizer: Standardizer) -> None:
        self.offset.copy_(standardizer.offset)
        self.scale.copy_(standardizer.scale)

    def _standardized(self, stream: Stream) -> Iterable[Samples]:
        for x, weight, index in stream():
            weight = None if weight is None else weight.double()
            yield self.standardizer.transform(self.check_samples(x), weight), weight, index

    def _choose_centers(self, chosen: Tensor, weights: Tensor, stream: Stream, collectives: Collectives) -> Tensor:
        """Centers `[S, K, D]`, standardized."""
        generators = [torch.Generator().manual_seed(self.seed * 1_000_003 + restart) for restart in range(self.n_init)]
        if self.init != "k-means||":
            choose = random_samples if self.init == "random" else kmeans_plus_plus
            return torch.stack([choose(chosen, self.num_components, generator, weights) for generator in generators])
        self.initialization_passes += ROUNDS + 1
        return scalable_kmeans_plus_plus(
            chosen,
            lambda: self._standardized(stream),
            self.num_components,
            generators,
            self.seed,
            collectives,
            weights,
        )

    def _start(
        self, centers: Tensor, samples: tuple[Tensor, Tensor] | None, stream: Stream, collectives: Collectives
    ) -> P:
        """Parameters to start from; `samples` are all of the data, standardized, and their weights, where they fit the
        reservoir.
        """
        return self.start(centers)

    # ----------------------------------------------------------------------- epochs

    @property
    def finished(self) -> bool:
        """Whether every restart has converged or used up its epochs."""
        return bool(self.initialized) and not bool(self.active.any())

    @property
    def converged(self) -> bool:
        """Whether the best restart has come to rest within `tol`."""
        return bool(self.initialized) and bool(self.at_rest[self.best])

    @torch.no_grad()
    def continue_fit(self) -> None:
        """Give the best restart epochs once more: on the same data, or on new ones, from where it is."""
        others = torch.arange(self.n_init, device=self.best.device) != self.best
        self.objective[others] = torch.nan
        self.iterations.fill_(0)
        self.at_rest.fill_(False)
        self.active.copy_(~others & (self.max_iter > 0))

    @torch.no_grad()
    def start_epoch(self) -> None:
        """Forget the sums, and prepare the parameters of the active restarts."""
        self._begin({name: buffer.clone() for name, buffer in self.named_buffers()})

    def _begin(self, start: dict[str, Tensor]) -> None:
        # all of them where running means tie them together
        everyone = self.algorithm == "stepwise" or not bool(self.active.any())
        self._selected = torch.ones_like(self.active) if everyone else self.active.clone()
        self._before = self.make_parameters(**{name: start[name][self._selected] for name in self.parameter_shapes(0)})
        self._epoch_statistics: SufficientStatistics | None = None
        self._rows = 0
        self._forget()
        self._epoch_start, self._batches = start, 0

    def _forget(self) -> None:
        self._prepared = self.prepare(self.current_parameters(self._selected))
        self._statistics: SufficientStatistics | None = None
        # samples, samples and weights that are impossible
        self._counts = self.offset.new_zeros(3)

    def epoch_state(self, collectives: Collectives | None = None) -> dict[str, Any] | None:
        """What an epoch that is interrupted here goes on from, or starts again from: `batches`, how many are in the
        sums (−1 while one is being added); `sums`, those of each process; `epoch_sums`, those of all before the last
        M-step, and `rows`, of how many samples; `start`, the learned buffers at the epoch's start. None outside an
        epoch.
        """
        if not self._epoch_start:
            return None
        sums = torch.cat([self._counts, _vector(self._own_statistics())])
        state: dict[str, Any] = {"batches": self._batches, "rows": self._rows, "start": self._epoch_start}
        state["sums"] = (collectives or Collectives()).gather(sums)
        if self._epoch_statistics is not None:
            state["epoch_sums"] = _vector(self._epoch_statistics)
        return state

    @torch.no_grad()
    def resume_epoch(self, state: dict[str, Any], rank: int = 0) -> None:
        """Go on with an interrupted epoch; the learned buffers are those of the interruption.

        Args:
            state: What `epoch_state` gave.
            rank: Which process's sums to go on from.
        """
        device = self.offset.device
        self._begin({name: buffer.to(device) for name, buffer in state["start"].items()})
        sums = state["sums"][rank].to(device)
        self._counts, self._statistics = sums[:3].clone(), _from_vector(self._own_statistics(), sums[3:])
        if "epoch_sums" in state:
            self._epoch_statistics = _from_vector(self._statistics, state["epoch_sums"].to(device))
        self._batches, self._rows = state["batches"], state["rows"]

    @torch.no_grad()
    def add_batch(self, x: Tensor, weight: Tensor | None = None) -> None:
        """E-step on a batch: add its sufficient statistics.

        Args:
            x: Samples; those of weight 0 may hold anything.
            weight: How often each sample counts, a number of at least 0; once where absent.

        Shape:
            - x: `[N, D]`
            - weight: `[N]`
        """
        x, step = self.check_samples(x), self._block_size()
        weight = None if weight is None else weight.double()
        statistics: SufficientStatistics | None = None
        counts = torch.zeros_like(self._counts)
        for first in range(0, x.shape[0], step):
            part = None if weight is None else weight[first : first + step]
            z = self.standardizer.transform(x[first : first + step], part)
            counts += torch.stack(count_samples(z, part))
            statistics = _plus(statistics, self.e_step(self._prepared, z, part))
        # the sums hold whole batches: a signal may have a checkpoint written at any moment
        batches, self._batches = self._batches, -1
        self._counts += counts
        if statistics is not None:
            self._statistics = _plus(self._statistics, statistics)
        self._batches = batches + 1

    def _block_size(self) -> int:
        if self.chunks_itself:
            return BLOCK_SAMPLES
        return min(BLOCK_SAMPLES, chunk_size(self.n_init * self.num_components * self.num_features, self.offset.device))

    def _own_statistics(self) -> SufficientStatistics:
        """The sums of this process; a process without a batch takes part with zeros."""
        if self._statistics is not None:
            return self._statistics
        return self.e_step(self._prepared, self.offset.new_zeros(0, self.num_features))

    def _reduced(self, collectives: Collectives | None) -> Any:
        """The statistics of all processes: the one reduction."""
        collectives = collectives or Collectives()
        own: Any = self._own_statistics()
        flat = collectives.reduce(torch.cat([self._counts, own.pack(collectives)]))
        rows, invalid, invalid_weights = (int(number) for number in flat[:3].tolist())
        self._check_count(rows, invalid, invalid_weights, self.num_components if self.algorithm == "exact" else 1)
        self._rows += rows
        return own.unpack(flat[3:], collectives)

    @torch.no_grad()
    def end_batch(self, collectives: Collectives | None = None) -> None:
        """The stepwise algorithm's M-step, after a batch of every process."""
        statistics = self._reduced(collectives)
        batches, self._batches = self._batches, -1
        self._epoch_statistics = _plus(self._epoch_statistics, statistics)
        theta = self.stepwise_m_step(statistics)
        self.check_parameters(theta)
        self._write(theta, self._selected)
        self._forget()
        self._batches = batches

    @torch.no_grad()
    def end_epoch(self, collectives: Collectives | None = None) -> EpochResult:
        """The exact algorithm's M-step, and what the epoch came to."""
        statistics: Any = self._epoch_statistics
        if self.algorithm == "exact":
            statistics = self._reduced(collectives)
            theta = self.m_step(statistics, self._before)
            self.check_parameters(theta)
            self._write(theta, self._selected)
        self.num_samples.fill_(self._rows)
        objective = self.objective_of(statistics)
        moved = self._settle(objective, self.change(objective))
        best, count = float(self.objective[self.best]), float(statistics.count)
        result = EpochResult(
            int(self.iterations.max()), best, moved, self.finished, self.converged, count, self.objective.clone()
        )
        # the best restart may have converged in an earlier epoch; then there is nothing new to report of it
        if bool(self._selected[self.best]):
            place = int(self._selected[: int(self.best)].sum())
            result.numbers = self.numbers(statistics, self.current_parameters(self._selected), place)
            result.empty = (statistics.weight[place] <= EMPTY_COUNT * count).nonzero()[:, 0].tolist()
        # what was prepared for the epoch is no part of the model: copies and pickles stay small
        self._prepared = self._statistics = self._epoch_statistics = None
        self._epoch_start = {}
        return result

    def _settle(self, objective: Tensor, change: Tensor) -> float:
        """Write what the epoch came to, and stop restarts that converged; how far the best one's objective moved."""
        previous, selected = self.objective.clone(), self._selected
        self.objective[selected] = objective
        self.iterations[selected] += 1
        self.at_rest[selected] = change <= self.tol
        self.active[selected] = ~self.at_rest[selected] & (self.iterations[selected] < self.max_iter)
        score = self.direction * self.objective.nan_to_num(nan=-self.direction * torch.inf)
        # restarts that reached the same optimum differ by rounding: the first of them, on any number of processes
        near = score >= score.max() - self.tie(score.max())
        self.best.copy_(near.int().argmax())
        return (self.objective[self.best] - previous[self.best]).item()


def _with_indices(stream: Stream, collectives: Collectives) -> Iterator[Samples]:
    """The samples of a stream, those without an index by their position: what random keys are made of."""
    position = 0
    for x, weight, index in stream():
        if index is None:
            index = torch.arange(position, position + x.shape[0], device=x.device) * collectives.world
            index = index + collectives.rank
        position += x.shape[0]
        yield x, weight, index


def _plus(total: SufficientStatistics | None, part: SufficientStatistics) -> SufficientStatistics:
    if total is None:
        return part
    total.add(part)
    return total


def _tensors(statistics: Any) -> dict[str, Tensor]:
    """Every tensor of sufficient statistics, by name."""
    values = ((item.name, getattr(statistics, item.name)) for item in fields(statistics))
    return {name: value for name, value in values if isinstance(value, Tensor)}


def _vector(statistics: SufficientStatistics) -> Tensor:
    return torch.cat([value.reshape(-1) for value in _tensors(statistics).values()])


def _from_vector(like: Any, vector: Tensor) -> Any:
    """Statistics of the form of `like` from what `_vector` made of them."""
    tensors = _tensors(like)
    parts = vector.split([value.numel() for value in tensors.values()])
    pairs = zip(tensors.items(), parts, strict=True)
    return replace(like, **{name: part.view_as(value).to(value.dtype, copy=True) for (name, value), part in pairs})


class MixtureModel(ClusteringModel[P]):
    """Base of the mixtures: a family adds the joint density of its components to what `ClusteringModel` asks for.

    Its statistics hold `log_likelihood` `[S]`. It starts from the M-step of a hard assignment, for which the E-step is
    given labels in place of a posterior.

    Args:
        num_components: Components of the mixture.
        num_features: Width of the data; found out from the first batch where not given.
        step_exponent: How fast stepwise EM forgets: step t has weight `(t + 2)^-step_exponent`; above 0.5, at most 1.
        **options: Further arguments of `ClusteringModel`.
    """

    #: mini-batch updates so far
    steps: Tensor
    #: running mean of the statistics, flat (stepwise)
    average: Tensor

    def __init__(
        self, num_components: int, num_features: int | None = None, *, step_exponent: float = 0.7, **options: Any
    ) -> None:
        if not 0.5 < step_exponent <= 1:
            raise ValueError(f"step_exponent must be in (0.5, 1] for stepwise EM to converge, got {step_exponent!r}")
        super().__init__(num_components, num_features, **options)
        self.step_exponent = step_exponent
        self.register_buffer("steps", torch.tensor(0, dtype=torch.long))
        self.register_buffer("average", torch.zeros(0, dtype=torch.float64))

    @abstractmethod
    def e_step(
        self, prepared: Any, z: Tensor, weight: Tensor | None = None, labels: Tensor | None = None
    ) -> SufficientStatistics:
        """Sufficient statistics of some samples; zeros where there are none.

        Args:
            prepared: What `prepare` made of the parameters.
            z: Standardized samples; 0 where their weight is.
            weight: How often each of them counts; once where absent.
            labels: Components that take the place of the posterior.

        Shape:
            - z: `[N, D]`
            - weight: `[N]`
            - labels: `[S, N]`
        """

    @abstractmethod
    def log_densities(self, prepared: Any, z: Tensor) -> Tensor:
        r""":math:`\log \pi_k p(z_n \mid k)`.

        Shape:
            - z: `[N, D]`, standardized
            - output: `[S, K, N]`
        """

    @abstractmethod
    def num_free_parameters(self) -> int:
        """Free parameters, as BIC and AIC count them."""

    def expected_statistics(self, theta: P) -> SufficientStatistics | None:
        """Statistics of one sample of the mixtures, where the running mean begins; None: with the first batch."""
        return None

    def objective_of(self, statistics: Any) -> Tensor:
        """Mean log-likelihood of a sample.

        Shape:
            - output: `[S]`
        """
        return statistics.log_likelihood / statistics.count - self.standardizer.log_volume

    def tie(self, best: Tensor) -> Tensor:
        """A log-likelihood has no unit: what is absolute here is relative in the likelihood.

        Shape:
            - best: `[]`
            - output: `[]`
        """
        return TIE * best.abs().clamp(min=1.0)

    def remember(self, batch_size: int) -> None:
        """Turn from exact to stepwise EM: the samples of the fit count as so many batches of this size."""
        self.algorithm = "stepwise"
        seen = (int(self.num_samples) + batch_size) / batch_size
        self.steps.fill_(math.ceil(seen ** (1 / self.step_exponent)))

    def stepwise_m_step(self, statistics: Any) -> P:
        r"""Stepwise M-step (Cappé and Moulines 2009): :math:`s \leftarrow (1-\gamma_t) s + \gamma_t \hat s_t`,
        :math:`\gamma_t = (t+2)^{-\alpha}`.
        """
        batch = statistics.about_origin()
        mean = batch.flat() / batch.count
        if not len(self.average):
            expected = self.expected_statistics(self.current_parameters())
            self.average.resize_(mean.shape).copy_(mean if expected is None else expected.flat())
        rate = float(self.steps + 2) ** -self.step_exponent
        self.average.mul_(1 - rate).add_(mean, alpha=rate)
        self.steps += 1
        return self.m_step(batch.with_flat(self.average))

    @torch.no_grad()
    def log_joint(self, x: Tensor) -> Tensor:
        r""":math:`\log \pi_k p(x_n \mid k)` under the best restart.

        Shape:
            - x: `[N, D]`
            - output: float64 `[N, K]`
        """
        self.require_initialized()
        x, step = self.check_samples(x), self._block_size()
        best = torch.arange(self.n_init, device=self.best.device) == self.best
        prepared = self.prepare(self.current_parameters(best))
        result = x.new_empty(x.shape[0], self.num_components, dtype=torch.float64)
        for first in range(0, x.shape[0], step):
            z = self.standardizer.transform(x[first : first + step])
            result[first : first + step] = self.log_densities(prepared, z)[0].T
        return result - self.standardizer.log_volume

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        average = state_dict.get(prefix + "average")
        if average is not None:
            self.average.resize_(average.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _choose_centers(self, chosen: Tensor, weights: Tensor, stream: Stream, collectives: Collectives) -> Tensor:
        centers = super()._choose_centers(chosen, weights, stream, collectives)
        if self.init != "k-means++":
            return centers
        return torch.stack([lloyd(chosen, start, LLOYD_ITERATIONS, weights=weights).centers for start in centers])

    def _start(
        self, centers: Tensor, samples: tuple[Tensor, Tensor] | None, stream: Stream, collectives: Collectives
    ) -> P:
        """The M-step of the hard assignment to `centers`; one more pass where `samples` are not all of the data."""
        prepared = self.prepare(self.start(centers))
        whole = self._standardized(stream) if samples is None else [(*samples, None)]
        nothing: Samples = (centers.new_zeros(0, self.num_features), None, None)
        parts = (self.e_step(prepared, z, weight, assign(centers, z)[0]) for z, weight, _ in chain([nothing], whole))
        statistics = reduce(_plus, parts)
        if samples is None:
            statistics = statistics.unpack(collectives.reduce(statistics.pack(collectives)), collectives)
            self.initialization_passes += 1
        return self.m_step(statistics)


def fit_in_memory(
    model: ClusteringModel[Any],
    x: Tensor,
    batch_size: int | None = None,
    weight: Tensor | None = None,
    report: Callable[[EpochResult], None] | None = None,
) -> list[EpochResult]:
    """Fit to samples that are in memory; a model that has come to rest goes on from where it is.

    Args:
        model: What is fitted.
        x: Samples; on the CPU they may be wherever the model computes: a batch at a time goes there.
        batch_size: Samples that are looked at together, all by default.
        weight: How often each sample counts; once where absent.
        report: Is given what each epoch came to.

    Shape:
        - x: `[N, D]`
        - weight: `[N]`
    """
    size, device = batch_size or max(len(x), 1), model.offset.device
    weights = itertools.repeat(None) if weight is None else weight.split(size)

    def stream() -> Iterator[Samples]:
        for part, w in zip(x.split(size), weights, strict=False):
            yield part.to(device), None if w is None else w.to(device), None

    return fit_stream(model, stream, report)


def fit_stream(
    model: ClusteringModel[Any], stream: Stream, report: Callable[[EpochResult], None] | None = None
) -> list[EpochResult]:
    """Fit to a stream that can be gone through again and again: the loop that a Trainer runs elsewhere.

    Args:
        model: What is fitted.
        stream: Gives the samples, once more at each call.
        report: Is given what each epoch came to.
    """
    if not bool(model.initialized):
        model.initialize(stream)
    elif model.finished:
        model.continue_fit()
    results = []
    while not model.finished:
        model.start_epoch()
        for x, weight, _ in stream():
            model.add_batch(x, weight)
            if model.algorithm == "stepwise":
                model.end_batch()
        results.append(model.end_epoch())
        if report:
            report(results[-1])
    return results
