"""The Lightning side of clustering: streams of batches, one reduction over the ranks, the stop at convergence."""

from collections.abc import Iterable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from lightning_modules.mixtures.collectives import Collectives
from lightning_modules.mixtures.initialization import Rows
from lightning_modules.mixtures.model import ClusteringModel, PassReport


class ClusteringModule(L.LightningModule):
    """Base of :class:`GaussianMixture` and :class:`KMeans`: a :class:`ClusteringModel` fed by a Trainer.

    A batch is a tensor `[B, …]`, a tuple or list whose first entry is one, or a dictionary with `image` (or `x`,
    `data`, `features`) and optionally `index` and `weight`; rows of weight 0, the padding of an uneven distributed
    epoch, do not count. Whatever has more than two dimensions is flattened.

    One epoch is one iteration. The passes that the initialisation needs run before the first epoch, are not counted as
    epochs, and are said; the Trainer's `max_epochs` is the ceiling of the iterations.

    Args:
        model: The state and its mathematics.
        objective: What the objective is called in logs, such as `log_likelihood`.
    """

    def __init__(self, model: ClusteringModel, objective: str) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        # DDP wraps, the Trainer counts steps and AMP finds an optimiser only where something has a gradient.
        self.anchor = nn.Parameter(torch.zeros(()))
        self.report: PassReport | None = None
        self._position = 0
        self._warned_empty = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns an optimiser that moves nothing; the M-step is closed form."""
        return torch.optim.SGD([self.anchor], lr=0.0)

    # ----------------------------------------------------------- passes

    def on_fit_start(self) -> None:
        """Refuses settings under which the sums would be wrong."""
        if self.model.offset.dtype != torch.float64:
            raise ValueError(
                f"The Trainer's precision={self.trainer.precision!r} turned the statistics into "
                f"{self.model.offset.dtype}: use 32-true, 64-true or a mixed precision; the statistics stay in float64 "
                "in all of them."
            )
        if self.model.algorithm == "exact" and self.trainer.accumulate_grad_batches != 1:
            rank_zero_warn("accumulate_grad_batches changes nothing for exact EM, which updates once an epoch.")

    def on_train_start(self) -> None:
        """Initialises from passes over the training data, unless a checkpoint or given parameters have done so."""
        if not bool(self.model.initialized):
            self.model.initialize(self._stream, self._collectives())
            passes = int(self.model.initialization_passes)
            if passes:
                rank_zero_info(
                    f"{type(self).__name__}: {passes} pass(es) over the data to initialise {self.model.n_init} "
                    "start(s); epochs count iterations only."
                )
        if self.model.converged:
            rank_zero_info(f"{type(self).__name__} has come to rest in an earlier run; make a new one to start afresh.")
            self.trainer.should_stop = True

    def on_train_epoch_start(self) -> None:
        """Begins a pass."""
        self.model.begin_pass()
        self._position = 0
        self._steps = self.trainer.global_step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """E-step: adds the batch's sufficient statistics.

        Args:
            batch: Rows, as the class describes.
            batch_idx: Unused; Lightning passes it.
        """
        x, mask, _ = self._rows(batch, self._position)
        self._position += x.shape[0]
        with torch.autocast(self.device.type, enabled=False):
            self.model.accumulate(x, mask)
        return self.anchor * 0.0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """M-step of the stepwise algorithm, once for each optimiser step."""
        if self.model.algorithm == "stepwise" and self.trainer.global_step != self._steps:
            self._steps = self.trainer.global_step
            self.model.end_step(self._collectives())

    def on_train_epoch_end(self) -> None:
        """M-step, the logs, and the stop."""
        self.report = report = self.model.end_pass(self._collectives())
        self.log(f"train/{self.objective}", report.objective, prog_bar=True)
        self.log("train/change", abs(report.change))
        for name, value in report.numbers.items():
            self.log(f"train/{name}", value)
        if report.empty and not self._warned_empty:
            self._warned_empty = True
            rank_zero_warn(
                f"{type(self).__name__}: component(s) {report.empty} have no rows in iteration {report.iteration}. "
                "They keep their place or restart far from the others; fewer components may serve the data better."
            )
        if report.converged:
            self.trainer.should_stop = True
            self._say_end(report)
        elif self.trainer.current_epoch + 1 == self.trainer.max_epochs:
            self._say_end(report)

    def _say_end(self, report: PassReport) -> None:
        numbers = (
            f"{self.objective} {report.objective:.6g} after {report.iteration} iteration(s), "
            f"last change {abs(report.change):.3g}, tol {self.model.tol:.3g}, {report.count} rows, "
            f"{int(self.model.initialization_passes)} initialisation pass(es)"
        )
        at_rest = report.converged and report.iteration < self.model.max_iter
        if at_rest:
            rank_zero_info(f"{type(self).__name__} converged: {numbers}.")
        else:
            rank_zero_warn(f"{type(self).__name__} did not converge: {numbers}. Raise max_iter or max_epochs, or tol.")

    # ---------------------------------------------------------- streams

    def _collectives(self) -> Collectives:
        strategy = self.trainer.strategy
        if self.trainer.world_size == 1:
            return Collectives()
        return Collectives(
            # the strategy's reduce writes into its input
            reduce=lambda vector: strategy.reduce(vector.clone(), reduce_op="sum"),
            gather=lambda tensor: strategy.all_gather(tensor).reshape(-1, *tensor.shape),
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
        )

    def _stream(self) -> Iterator[Rows]:
        """One pass over this rank's training batches outside the epochs, for the initialisation."""
        loader: Iterable[Any] | None = self.trainer.train_dataloader
        if loader is None:
            return
        position = 0
        for number, batch in enumerate(loader):
            if number >= self.trainer.num_training_batches:
                break
            rows = self._rows(self.trainer.strategy.batch_to_device(batch, dataloader_idx=0), position)
            position += rows[0].shape[0]
            yield rows

    def _rows(self, batch: Any, position: int | None = None) -> Rows:
        """Rows `[B, D]` of a batch, the mask of those that count, and their indices where the batch tells them."""
        mask = index = None
        if isinstance(batch, dict):
            names = [name for name in ("image", "x", "data", "features") if name in batch]
            if not names:
                raise ValueError(f"A batch must hold one of image, x, data or features; it holds {sorted(batch)}.")
            x = batch[names[0]]
            index = batch.get("index")
            mask = batch["weight"] > 0 if "weight" in batch else None
        else:
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(x, Tensor):
            raise ValueError(f"A batch must be a tensor, or begin with one; got {type(x).__name__}.")
        x = x.reshape(x.shape[0], -1)
        x = x if x.is_floating_point() else x.double()
        if mask is None and position is not None:
            mask = self._padding_mask(position, x)
        return x, mask, index

    def _padding_mask(self, position: int, x: Tensor) -> Tensor | None:
        """Without weights, the repeats that a plain `DistributedSampler` pads an uneven epoch with are known by
        position.
        """
        sampler = getattr(self.trainer.train_dataloader, "sampler", None)
        if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
            return None
        length = len(sampler.dataset)  # type: ignore[arg-type]
        if length % sampler.num_replicas == 0:
            return None
        rows = position + torch.arange(x.shape[0], device=x.device)
        return rows * sampler.num_replicas + sampler.rank < length

    # --------------------------------------------------------- inference

    @property
    def n_iter(self) -> int:
        """Iterations of the best start."""
        return int(self.model.iterations[self.model.best])

    @property
    def initialization_passes(self) -> int:
        """Passes over the data that the initialisation took, apart from the iterations."""
        return int(self.model.initialization_passes)

    @property
    def converged(self) -> bool:
        """Whether the run came to rest within `tol` before `max_iter`."""
        return self.model.converged and self.n_iter < self.model.max_iter

    def _input(self, x: Any) -> Tensor:
        x = torch.as_tensor(x, device=self.model.offset.device)
        x = x if x.is_floating_point() else x.double()
        x = self.model.check_rows(x)
        if not bool(torch.isfinite(x).all()):
            raise ValueError("Input X contains NaN or infinity. Remove those rows or impute the values.")
        return x
