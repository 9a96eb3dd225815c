"""What K-means and Gaussian mixtures share: starts side by side, initialisation from a stream, passes, convergence."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_modules.mixtures.collectives import Collectives
from lightning_modules.mixtures.initialization import (
    ROUNDS,
    Initialization,
    Rows,
    Stream,
    StreamSample,
    kmeans_plus_plus,
    random_rows,
    row_keys,
    scalable_candidates,
)
from lightning_modules.mixtures.standardizer import ReferenceFrame, Scaling, StreamMoments

Algorithm = Literal["exact", "stepwise"]

# Numbers that the sample for the initialisation may hold, where `init_size` is not given: 32 MiB of float64.
SAMPLE_NUMBERS = 2**22
# Relative difference below which the objectives of two starts are the same.
TIE = 1e-9
# Rows that become float64 at a time.
BLOCK_ROWS = 2**15


@dataclass
class PassReport:
    """What one pass over the data came to; numbers are those of the best start."""

    iteration: int
    objective: float
    change: float
    converged: bool
    count: int
    numbers: dict[str, float] = field(default_factory=dict)
    empty: list[int] = field(default_factory=list)


class ClusteringModel(nn.Module):
    """Base of :class:`GaussianMixtureModel` and :class:`KMeansModel`.

    Everything learned is a float64 buffer, written in place and alike on every process; the sums of a pass are plain
    tensors. The leading dimension S of the learned buffers is ``n_init``: the starts run side by side, one pass serves
    all.

    Args:
        num_components: clusters or mixture components.
        num_features: width of the data; known after the first batch where not given.
        init: how the centres are chosen.
        n_init: starts, of which the best is reported.
        init_size: rows sampled from the stream for the initialisation; chosen by memory where not given.
        tol: change at which the run has converged.
        max_iter: passes at most.
        algorithm: ``exact`` updates once a pass, ``stepwise`` once an optimiser step.
        standardize: scale each feature to variance 1 inside; undone in what is reported.
        seed: seed of the draws.
    """

    scaling: Scaling = "feature"
    #: 1 where a larger objective is better, −1 where a smaller one is
    direction: float = 1.0
    #: data = offset + scale · frame, [D] each
    offset: Tensor
    scale: Tensor
    #: objective of each start after its last pass, [S]
    objective: Tensor
    #: starts that still move, [S]
    running: Tensor
    #: passes each start has taken, [S]
    iterations: Tensor
    #: the start that is reported
    best: Tensor
    #: whether the learned buffers hold a start
    initialized: Tensor
    #: passes over the data that the initialisation took
    initialization_passes: Tensor
    #: rows that one pass counts
    num_rows: Tensor

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
        for name, value in (("num_components", num_components), ("n_init", n_init), ("max_iter", max_iter)):
            if isinstance(value, bool) or int(value) != value or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
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
        self._invalid: Tensor | None = None
        for name in self._shapes(0):
            self.register_buffer(name, torch.empty(0, dtype=self._shapes(0)[name][1].dtype))
        self._allocate(num_features or 0)

    # ------------------------------------------------------------------ state

    @property
    def num_features(self) -> int:
        """Width of the data; 0 while it is unknown."""
        return self.offset.shape[0]

    @property
    def frame(self) -> ReferenceFrame:
        """The frame that the learned buffers live in."""
        return ReferenceFrame(self.offset, self.scale)

    def _shapes(self, num_features: int) -> dict[str, tuple[tuple[int, ...], Tensor]]:
        """Shape and first value of each buffer."""
        starts = self.n_init
        number = torch.tensor(0, dtype=torch.long)
        return {
            "offset": ((num_features,), torch.tensor(0.0, dtype=torch.float64)),
            "scale": ((num_features,), torch.tensor(1.0, dtype=torch.float64)),
            "objective": ((starts,), torch.tensor(torch.nan, dtype=torch.float64)),
            "running": ((starts,), torch.tensor(True)),
            "iterations": ((starts,), number),
            "best": ((), number),
            "initialized": ((), torch.tensor(False)),
            "initialization_passes": ((), number),
            "num_rows": ((), number),
        }

    @torch.no_grad()
    def _allocate(self, num_features: int) -> None:
        for name, (shape, value) in self._shapes(num_features).items():
            # in place: a DDP wrapper built before the width was known holds these very tensors
            buffer: Tensor = getattr(self, name)
            buffer.resize_(shape).fill_(value.item())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        offset = state_dict.get(prefix + "offset")
        if offset is not None and not self.num_features:
            self._allocate(offset.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def check_rows(self, x: Tensor) -> Tensor:
        """``x`` as ``[N, D]`` of the fitted width, or a ``ValueError`` in scikit-learn's words."""
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

    # --------------------------------------------------------- initialisation

    @torch.no_grad()
    def initialize(self, stream: Stream, collectives: Collectives | None = None) -> None:
        """Set frame and starts from passes over ``stream``; how many passes, ``initialization_passes`` says."""
        collectives = collectives or Collectives()
        if self._start_without_data():
            self.initialized.fill_(True)
            return
        moments, sample = self._first_pass(stream, collectives)
        self._set_frame(moments.frame("feature" if self.standardize else self.scaling))
        sample = self.frame.enter(sample)
        complete = sample.shape[0] >= int(moments.count)
        centers = self._given_centers()
        if centers is None:
            centers = self._choose_centers(sample, stream, collectives)
        self._start_from(centers, sample if complete else None, stream, collectives)
        self.num_rows.fill_(int(moments.count))
        self.initialized.fill_(True)

    def _first_pass(self, stream: Stream, collectives: Collectives) -> tuple[StreamMoments, Tensor]:
        """Moments of all rows, and a random sample of them that no order or number of processes changes."""
        moments: StreamMoments | None = None
        collected: StreamSample | None = None
        for x, mask, index in stream():
            rows = self.check_rows(x)
            if moments is None:
                if not self.num_features:
                    self._allocate(rows.shape[1])
                moments = StreamMoments.zeros(rows.shape[1], rows.device)
                collected = StreamSample(self._sample_size())
            assert collected is not None
            moments = moments + StreamMoments.of(rows, mask)
            keys = row_keys(rows, self.seed, index)
            collected.add(rows, keys if mask is None else torch.where(mask, keys, torch.inf))
        if moments is None or collected is None:
            raise ValueError(
                f"Found array with 0 sample(s) while a minimum of {self.num_components} is required: the data is empty."
            )
        parts = [StreamMoments.from_flat(part) for part in collectives.gather(moments.flat())]
        total = sum(parts[1:], parts[0])
        self.initialization_passes += 1
        self._check_count(int(total.count), int(total.invalid))
        rows, keys = collected.result()
        rows, keys = collectives.gather_rows(rows), collectives.gather_rows(keys)
        order = keys.argsort(stable=True)[: self._sample_size()]
        return total, rows[order]

    def _sample_size(self) -> int:
        return self.init_size or max(SAMPLE_NUMBERS // max(self.num_features, 1), 3 * self.num_components)

    def _check_count(self, count: int, invalid: int) -> None:
        if invalid:
            raise ValueError(
                f"Input X contains NaN or infinity in {invalid} row(s). Remove those rows, impute the values, or "
                "look at the preprocessing that made them."
            )
        if count < self.num_components:
            raise ValueError(
                f"Expected n_samples >= n_components but got n_components = {self.num_components}, "
                f"n_samples = {count}: n_samples={count} should be >= n_clusters={self.num_components}. "
                "Give more rows or ask for fewer components."
            )

    def _set_frame(self, frame: ReferenceFrame) -> None:
        self.offset.copy_(frame.offset)
        self.scale.copy_(frame.scale)

    def _generator(self, start: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + start)

    def _choose_centers(self, sample: Tensor, stream: Stream, collectives: Collectives) -> Tensor:
        """Centres ``[S, K, D]`` in the frame."""
        if self.init == "k-means||":

            def in_frame() -> Iterable[Rows]:
                return ((self.frame.enter(self.check_rows(x)), mask, index) for x, mask, index in stream())

            generators = [self._generator(start) for start in range(self.n_init)]
            candidates, weights = scalable_candidates(
                sample, in_frame, self.num_components, generators, self.seed, collectives
            )
            self.initialization_passes += ROUNDS + 1
        centers = []
        for start in range(self.n_init):
            generator = self._generator(start)
            if self.init == "random":
                centers.append(random_rows(sample, self.num_components, generator))
            elif self.init == "k-means++":
                centers.append(kmeans_plus_plus(sample, self.num_components, generator))
            else:
                centers.append(kmeans_plus_plus(candidates[start], self.num_components, generator, weights[start]))
        return torch.stack(centers)

    # ------------------------------------------------------------------ passes

    @property
    def converged(self) -> bool:
        """Whether every start has come to rest or used up its passes."""
        return bool(self.initialized) and not bool(self.running.any())

    def _active_starts(self) -> Tensor:
        """Starts that a pass works on: those that still move, or all where running averages tie them together."""
        everyone = self.algorithm == "stepwise" or not bool(self.running.any())
        return torch.ones_like(self.running) if everyone else self.running.clone()

    def _blocks(self, x: Tensor, mask: Tensor | None) -> Iterable[tuple[Tensor, Tensor | None]]:
        """Rows in the frame, a block at a time, and the tally of rows that are not finite."""
        x = self.check_rows(x)
        for first in range(0, x.shape[0], BLOCK_ROWS):
            z = self.frame.enter(x[first : first + BLOCK_ROWS])
            part = None if mask is None else mask[first : first + BLOCK_ROWS]
            # a row's sum is finite where all of it is
            finite = torch.isfinite(z.sum(dim=1))
            if part is not None:
                finite |= ~part
            assert self._invalid is not None
            self._invalid += (~finite).sum()
            yield z, part

    def _settle(self, objective: Tensor, change: Tensor, count: int, active: Tensor) -> tuple[bool, float]:
        """Write what a pass came to for the ``active`` starts, and stop those at rest; whether all are, and the best's
        change.
        """
        previous = self.objective.clone()
        self.objective[active] = objective
        self.iterations[active] += 1
        self.num_rows.fill_(count)
        rest = (change <= self.tol) & (self.iterations[active] > 1)
        self.running[active] = ~rest & (self.iterations[active] < self.max_iter)
        score = self.direction * self.objective.nan_to_num(nan=-self.direction * torch.inf)
        # starts that reached the same optimum differ by rounding: the first of them, on any number of processes
        near = score >= score.max() - TIE * score.max().abs().clamp(min=1.0)
        self.best.copy_(near.int().argmax())
        moved = (self.objective[self.best] - previous[self.best]).item()
        return not bool(self.running.any()), moved

    @abstractmethod
    def _given_centers(self) -> Tensor | None:
        """Centres that the user gave, in the frame ``[S, K, D]``."""

    @abstractmethod
    def _start_without_data(self) -> bool:
        """Start from given parameters alone where they are complete; whether that was possible."""

    @abstractmethod
    def _start_from(self, centers: Tensor, rows: Tensor | None, stream: Stream, collectives: Collectives) -> None:
        """Start from ``centers``; ``rows`` are all rows of the data where they fit the sample."""

    @abstractmethod
    def begin_pass(self) -> None:
        """Forget the sums and prepare the current parameters."""

    @abstractmethod
    def accumulate(self, x: Tensor, mask: Tensor | None = None) -> None:
        """E-step on a batch."""

    @abstractmethod
    def end_step(self, collectives: Collectives | None = None) -> None:
        """The stepwise algorithm's M-step, after a batch of every process."""

    @abstractmethod
    def end_pass(self, collectives: Collectives | None = None) -> PassReport:
        """M-step of the exact algorithm, and what the pass came to."""


def fit_in_memory(model: ClusteringModel, x: Tensor, batch_size: int | None = None) -> list[PassReport]:
    """Fit ``model`` to rows ``x`` ``[N, D]`` that are in memory: the loop that a Trainer runs elsewhere."""
    batches = [x] if batch_size is None else list(x.split(batch_size))
    if not bool(model.initialized):
        model.initialize(lambda: ((batch, None, None) for batch in batches))
    reports = []
    while not model.converged:
        model.begin_pass()
        for batch in batches:
            model.accumulate(batch)
            if model.algorithm == "stepwise":
                model.end_step()
        reports.append(model.end_pass())
    return reports
