"""Lightning side of the mixtures: streams of batches, one reduction over the ranks, the stop at convergence."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_modules.checkpoints.module import CheckpointedModule
from lightning_modules.mixtures.batches import as_tensor, read_batch
from lightning_modules.mixtures.collectives import Collectives
from lightning_modules.mixtures.initialization import Samples
from lightning_modules.mixtures.interruption import FitRecord
from lightning_modules.mixtures.model import ClusteringModel, EpochResult, MixtureModel

# where a checkpoint keeps the sums of the epoch that it interrupts
EPOCH_STATE = "clustering_epoch"


class ClusteringModule(CheckpointedModule, ABC):
    """Base of `MixtureModule` and `KMeans`: a `ClusteringModel` fed by a Trainer.

    A batch is a tensor `[B, …]`, a tuple or list whose first entry is one, or a dictionary with `image` (or `x`,
    `data`, `features`) and optionally `index` and `weight`: how often each sample counts. Samples of weight 0 may hold
    anything. Whatever has more than two dimensions is flattened. With `index` the random choices of the initialisation
    are the same in every order of the samples, and on any number of processes.

    One epoch is one iteration. The passes that the initialisation needs run before the first epoch, are not counted as
    epochs, and are reported; the Trainer's `max_epochs` is the ceiling of the iterations. A module that has been fitted
    goes on from where it is when it is fitted again, to the same data or to new ones.

    A checkpoint from the middle of an epoch holds the sums of its part already seen, of each process: the resumed run
    is the uninterrupted one. Where the loader cannot go on from there (a plain `DataLoader`), or the number of
    processes has changed, the epoch starts again, with a message.

    The constructor of a subclass builds the model from its own arguments, which are saved as hyperparameters.

    Args:
        model: The state and its mathematics.
    """

    #: what the objective is called in the logs of training
    objective: ClassVar[str]
    #: which of the inferred numbers is logged in validation and test
    metric: ClassVar[str]

    def __init__(self, model: ClusteringModel[Any]) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model"])
        self.model = model
        # DDP wraps, the Trainer counts steps and AMP finds an optimiser only where something has a gradient.
        self.anchor = nn.Parameter(torch.zeros(()))
        self.epoch_result: EpochResult | None = None
        self._position = self._steps = 0
        self._order = torch.empty(0, dtype=torch.long)
        self._interrupted: dict[str, Any] | None = None
        self._warned_empty = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns an optimiser that moves nothing; the M-step is closed form."""
        return torch.optim.SGD([self.anchor], lr=0.0)

    # ----------------------------------------------------------- epochs

    def on_fit_start(self) -> None:
        """Refuses settings under which the sums would be wrong."""
        if self.model.offset.dtype != torch.float64:
            raise ValueError(
                f"The Trainer's precision={self.trainer.precision!r} turned the statistics into "
                f"{self.model.offset.dtype}: use 32-true, 64-true or a mixed precision; the statistics stay in float64 "
                "in all of them."
            )
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                raise ValueError(
                    f"{type(callback).__name__} has nothing to average in {type(self).__name__}, whose M-step is "
                    "closed form over the whole epoch: remove the callback"
                )
        if self.model.algorithm == "exact" and self.trainer.accumulate_grad_batches != 1:
            rank_zero_warn("accumulate_grad_batches changes nothing for exact EM, which updates once an epoch.")

    def on_train_start(self) -> None:
        """Initialises from passes over the training data, unless a checkpoint or known parameters have done so."""
        if not bool(self.model.initialized):
            self.model.initialize(self._stream, self._collectives())
            passes = int(self.model.initialization_passes)
            if passes:
                rank_zero_info(
                    f"{type(self).__name__}: {passes} pass(es) over the data to initialise {self.model.n_init} "
                    "restart(s); epochs count iterations only."
                )
        elif self.model.finished and self.trainer.ckpt_path is None:
            rank_zero_info(f"{type(self).__name__} has been fitted before and goes on; make a new one to start afresh.")
            self.model.continue_fit()
        if self.model.finished:
            rank_zero_info(f"{type(self).__name__} has no iteration left to take.")
            self.trainer.should_stop = True
        if self._interrupted is not None:
            self._resume_epoch(self._interrupted)
            self._interrupted = None

    def on_train_epoch_start(self) -> None:
        """Starts an epoch of the model."""
        self.model.start_epoch()
        self._position = 0
        self._steps = self.trainer.global_step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """E-step: adds the batch's sufficient statistics.

        Args:
            batch: Samples, as the class describes.
            batch_idx: Unused; Lightning passes it.

        Shape:
            - output: `[]`, a loss of 0
        """
        x, weight, _ = self._samples(batch, self._position)
        self._position += x.shape[0]
        with torch.autocast(self.device.type, enabled=False):
            self.model.add_batch(x, weight)
        return self.anchor * 0.0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """M-step of the stepwise algorithm, once for each optimiser step."""
        self._end_step()

    def _end_step(self) -> None:
        if self.model.algorithm == "stepwise" and self.trainer.global_step != self._steps:
            self._steps = self.trainer.global_step
            self.model.end_batch(self._collectives())

    def on_train_epoch_end(self) -> None:
        """M-step, the logs, and the stop."""
        self.epoch_result = result = self.model.end_epoch(self._collectives())
        self.log(f"train/{self.objective}", result.objective, prog_bar=True)
        self.log("train/change", abs(result.change))
        for name, value in result.numbers.items():
            self.log(f"train/{name}", value)
        if result.empty and not self._warned_empty:
            self._warned_empty = True
            rank_zero_warn(
                f"{type(self).__name__}: component(s) {result.empty} have no samples in iteration {result.iteration}. "
                "They keep their place or restart far from the others; the data may hold fewer components."
            )
        if result.finished:
            self.trainer.should_stop = True
        if result.finished or self.trainer.current_epoch + 1 == self.trainer.max_epochs:
            self._announce_end(result)

    def _announce_end(self, result: EpochResult) -> None:
        change = "no change to measure yet" if math.isnan(result.change) else f"last change {abs(result.change):.3g}"
        numbers = (
            f"{self.objective} {result.objective:.6g} after {result.iteration} iteration(s), "
            f"{change}, tol {self.model.tol:.3g}, {int(self.model.num_samples)} samples, "
            f"{int(self.model.initialization_passes)} initialisation pass(es)"
        )
        if result.converged:
            rank_zero_info(f"{type(self).__name__} converged: {numbers}.")
        else:
            rank_zero_warn(f"{type(self).__name__} did not converge: {numbers}. Raise max_iter or max_epochs, or tol.")

    # ------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the sums of the epoch under way, which `state_dict` does not have."""
        super().on_save_checkpoint(checkpoint)
        if "loops" not in checkpoint:
            return
        collectives = self._collectives()
        state = self.model.epoch_state(collectives)
        if state is not None:
            positions = collectives.gather(self.model.num_samples.new_tensor(self._position))
            checkpoint[EPOCH_STATE] = state | {"positions": positions, "steps": self._steps}

    def _resume(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the epoch that the checkpoint interrupts, or back to its start."""
        record, state = FitRecord(checkpoint["loops"]), checkpoint.get(EPOCH_STATE)
        if not record.in_epoch and state is None:
            if self.trainer.max_steps != -1:
                record.finish_epoch()
            return
        reason = self._why_not(record, state)
        if reason is None:
            self._interrupted = state
            record.finish_batch()
            return
        record.rewind()
        if state is not None:
            checkpoint["state_dict"].update({f"model.{name}": value for name, value in state["start"].items()})
        rank_zero_info(
            f"{type(self).__name__}: the checkpoint is from the middle of an epoch, and {reason}: that epoch starts "
            "again."
        )

    def _why_not(self, record: FitRecord, state: dict[str, Any] | None) -> str | None:
        """Why an interrupted epoch cannot go on where it was; None where it can."""
        if state is None:
            return "holds no sums of it"
        if not record.in_epoch:
            return "was written while it ended"
        if not record.loader_goes_on:
            return "the loader of the training data cannot go on there (it has no state_dict)"
        if len(state["sums"]) != self.trainer.world_size:
            return f"was written by {len(state['sums'])} process(es), not {self.trainer.world_size}"
        if state["batches"] != record.batches:
            return "was written while a batch was being added"
        return None

    def _resume_epoch(self, state: dict[str, Any]) -> None:
        self.model.resume_epoch(state, self.trainer.global_rank)
        self._position = int(state["positions"][self.trainer.global_rank])
        self._steps = state["steps"]
        # checkpoints are written before this module's hook that ends a batch, and Lightning does not call that again
        self._end_step()

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

    def _stream(self) -> Iterator[Samples]:
        """One pass over this rank's training batches outside the epochs, for the initialisation."""
        loader: Iterable[Any] | None = self.trainer.train_dataloader
        if loader is None:
            return
        if isinstance(loader, DataLoader):
            # the epoch's own loader keeps its place, and its workers
            loader = copy.copy(loader)
            loader._iterator = None
        position = 0
        for number, batch in enumerate(loader):
            if number >= self.trainer.num_training_batches:
                break
            samples = self._samples(self.trainer.strategy.batch_to_device(batch, dataloader_idx=0), position)
            position += samples[0].shape[0]
            yield samples

    def _samples(self, batch: Any, position: int | None = None) -> Samples:
        """Samples `[B, D]` of a batch, their weights and their indices; of a training batch, whose `position` in the
        epoch is known, also those that a plain `DistributedSampler` implies.
        """
        x, weight, index = read_batch(batch)
        loader = self.trainer.train_dataloader if position is not None else None
        sampler = getattr(loader, "sampler", None)
        # a loader of whole batches, as the project's DataModules have, has settled weights and indices itself
        if not isinstance(sampler, DistributedSampler) or getattr(loader, "batch_size", None) is None:
            return x, weight, index
        if position == 0 or not len(self._order):
            self._order = torch.tensor(list(sampler))
        assert position is not None
        if index is None:
            index = self._order[position : position + x.shape[0]].to(x.device)
        length = len(sampler.dataset)  # type: ignore[arg-type]
        if length % sampler.num_replicas and not sampler.drop_last:
            # the repeats that pad an uneven epoch
            positions = position + torch.arange(x.shape[0], device=x.device)
            own = (positions * sampler.num_replicas + sampler.rank < length).double()
            weight = own if weight is None else weight * own
        return x, weight, index

    # --------------------------------------------------------- inference

    @property
    def n_iter(self) -> int:
        """Iterations of the best restart."""
        return int(self.model.iterations[self.model.best])

    @property
    def initialization_passes(self) -> int:
        """Passes over the data that the initialisation took, apart from the iterations."""
        return int(self.model.initialization_passes)

    @property
    def converged(self) -> bool:
        """Whether the run came to rest within `tol`."""
        return self.model.converged

    @abstractmethod
    def infer(self, x: Tensor) -> dict[str, Tensor]:
        """Returns what `predict` gives of each sample, by name.

        Shape:
            - x: `[N, D]`
            - output: `[N, …]` each
        """

    def predict(self, x: Tensor) -> Tensor:
        """Returns the component of each sample.

        Shape:
            - x: `[N, D]`
            - output: `[N]`
        """
        return self.infer(x)["component"]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the mean metric of a validation batch."""
        self._log_metric("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the mean metric of a test batch."""
        self._log_metric("test", batch)

    def _log_metric(self, stage: str, batch: Any) -> None:
        x, weight, _ = read_batch(batch)
        weight = torch.ones(len(x), dtype=torch.float64, device=x.device) if weight is None else weight
        x, weight = x[weight > 0], weight[weight > 0]
        if bool(self.model.initialized) and len(x):
            value = (self.infer(x)[self.metric] * weight).sum() / weight.sum()
            # a mean over batches by their weight
            self.log(f"{stage}/{self.metric}", value, batch_size=float(weight.sum()), sync_dist=True)  # type: ignore[arg-type]

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Returns what `infer` does, and `index` where it is known."""
        x, _, index = read_batch(batch)
        inferred: dict[str, Any] = self.infer(x)
        return inferred if index is None else inferred | {"index": index}

    def _input(self, x: Any) -> Tensor:
        x = as_tensor(x, device=self.model.offset.device)
        x = x if x.is_floating_point() else x.double()
        x = self.model.check_samples(x)
        if not bool(torch.isfinite(x).all()):
            raise ValueError("Input X contains NaN or infinity. Remove those samples or impute the values.")
        return x


class MixtureModule(ClusteringModule):
    """Base of the mixtures: a `MixtureModel` fed by a Trainer, and what its densities are good for."""

    objective = metric = "log_likelihood"
    model: MixtureModel[Any]

    @property
    def lower_bound(self) -> float:
        """Mean log-likelihood of a sample in the last epoch, under the parameters before its M-step."""
        return float(self.model.objective[self.model.best])

    def infer(self, x: Tensor) -> dict[str, Tensor]:
        """Returns component, responsibilities (`probability`) and `log_likelihood` of each sample.

        Shape:
            - x: `[N, D]`
            - output: `[N]`, `[N, K]` and `[N]`
        """
        joint = self.model.log_joint(self._input(x))
        probability, log_likelihood = torch.softmax(joint, dim=1), torch.logsumexp(joint, dim=1)
        return {"component": joint.argmax(dim=1), "probability": probability, "log_likelihood": log_likelihood}

    def predict_proba(self, x: Tensor) -> Tensor:
        """Returns the responsibilities of the components.

        Shape:
            - x: `[N, D]`
            - output: `[N, K]`
        """
        return self.infer(x)["probability"]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the responsibilities of the components.

        Shape:
            - x: `[N, D]`
            - output: `[N, K]`
        """
        return self.predict_proba(x)

    def score_samples(self, x: Tensor) -> Tensor:
        """Returns the log-likelihood of each sample.

        Shape:
            - x: `[N, D]`
            - output: `[N]`
        """
        return self.infer(x)["log_likelihood"]

    def score(self, x: Tensor) -> float:
        """Returns the mean log-likelihood.

        Shape:
            - x: `[N, D]`
        """
        return float(self.score_samples(x).mean())

    def bic(self, x: Tensor) -> float:
        """Returns the Bayesian information criterion; lower is better.

        Shape:
            - x: `[N, D]`
        """
        return self._criterion(x, math.log(len(x)))

    def aic(self, x: Tensor) -> float:
        """Returns Akaike's information criterion; lower is better.

        Shape:
            - x: `[N, D]`
        """
        return self._criterion(x, 2.0)

    def _criterion(self, x: Tensor, price: float) -> float:
        return -2.0 * float(self.score_samples(x).sum()) + price * self.model.num_free_parameters()
