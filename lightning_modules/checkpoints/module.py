"""Checkpoints of Lightning: written whole or not at all, the newest state kept, and refused by name."""

import io
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lightning_modules._version import __version__
from lightning_modules.checkpoints.file import CheckpointError, read_checkpoint
from lightning_modules.checkpoints.trust import ORIGIN, GuardedCheckpoint, find_class, fitting, is_remote
from lightning_modules.imaging import write_whole

_SHOWN = 3


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it, and compares checksums on reading.

    Lightning's own writes to TMPDIR and moves, which is not one step where that is another file system: a process that
    is killed, or a full disk, then leaves a truncated file in place of the one that was there. The command line uses
    this one by itself.

    Example:
        >>> trainer = L.Trainer(plugins=[AtomicCheckpointIO()], logger=False)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes; what was there stays until the new file is whole."""
        if is_remote(path) or storage_options is not None:
            return super().save_checkpoint(checkpoint, path, storage_options)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(Path(path), buffer.getbuffer())
        return None

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Reads; see `read_checkpoint`."""
        if is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return check_content(read_checkpoint(path, map_location, weights_only), path)


class LastCheckpoint(ModelCheckpoint):
    """Keeps the newest state in `last.ckpt`, on the occasions of a `ModelCheckpoint` and at the end of each epoch.

    `ModelCheckpoint(monitor=..., save_last=True)` writes `last.ckpt` only beside a new best, so that it is the best
    state, not the last. Our modules put this in its place by themselves.

    Args:
        leader: The checkpoint callback that asks for `save_last`.
    """

    def __init__(self, leader: ModelCheckpoint) -> None:
        super().__init__()
        own = {"monitor": None, "filename": leader.CHECKPOINT_NAME_LAST, "save_top_k": 1, "save_last": False}
        vars(self).update(vars(leader) | own | {"_every_n_epochs": 1})
        self._leader = leader

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decides on the file: that of the run which is resumed, or else a free one."""
        super().on_train_start(trainer, pl_module)
        if self._save_on_train_epoch_end is None and trainer.val_check_interval == 1.0:
            self._save_on_train_epoch_end = True  # in epochs without validation too
        path = self._leader.last_model_path
        for version in count():
            if path:
                break
            free = self.format_checkpoint_name({}, ver=version or None)
            path = "" if self.file_exists(free, trainer) else free
        self._leader.last_model_path = self.best_model_path = path

    def save(self, trainer: Trainer) -> None:
        """Writes the state of this moment, which must be that after a step."""
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


def keep_newest(trainer: Trainer) -> None:
    """Lets `last.ckpt` be the newest state of a `fit` where a `ModelCheckpoint` of the run would keep the best in it.

    To be called before the callbacks' `setup`, or in it.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    asked = [c for c in callbacks if isinstance(c, ModelCheckpoint) and c.save_last]
    leaders = [c for c in asked if c.monitor is not None or c.save_top_k == 0]
    if not leaders or trainer.state.fn != "fit" or any(isinstance(c, LastCheckpoint) for c in callbacks):
        return
    # Appended, not returned by `configure_callbacks`: Lightning would let it replace others of its kind.
    callbacks.append(LastCheckpoint(leaders[0]))
    for callback in asked:
        callback.save_last = None if callback.dirpath == leaders[0].dirpath else callback.save_last


class CheckpointedModule(GuardedCheckpoint, L.LightningModule):
    """Module whose checkpoints name what wrote them, and are refused in one line where they do not fit."""

    def configure_callbacks(self) -> Sequence[Callback]:
        """Lets `last.ckpt` be the newest state where a `ModelCheckpoint` of the run would keep the best in it."""
        keep_newest(self.trainer)
        return []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes version and classes."""
        checkpoint[ORIGIN] = {"version": __version__, **self._classes()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint that does not fit, before anything has changed.

        Raises:
            CheckpointError: With the name of the file and what differs.
        """
        trainer = self._trainer
        if trainer is None:  # `load_from_checkpoint` knows the file, and whether it is to be strict
            _check_tensors(checkpoint["state_dict"])
            _check_classes(self._classes(), checkpoint)
            return
        with fitting(trainer.ckpt_path, checkpoint):
            _check_tensors(checkpoint["state_dict"])
            _check_classes(self._classes(), checkpoint)
            former = {name: value.clone() for name, value in self.state_dict().items()}
            try:
                self.load_state_dict(checkpoint["state_dict"], strict=self.strict_loading)
            except (RuntimeError, ValueError):
                self.load_state_dict(former, strict=False)
                raise
        if trainer.state.fn != "fit":
            return
        if missing := [name for name in ("callbacks", "loops") if name not in checkpoint]:
            rank_zero_warn(
                f"{trainer.ckpt_path} has no {' and no '.join(missing)}: the run goes on from its weights, and what is "
                "missing starts afresh"
            )
        if "loops" in checkpoint:
            self._resume(checkpoint)

    def _resume(self, checkpoint: dict[str, Any]) -> None:
        """Brings Lightning's record of the loops into a form that goes on without loss."""
        _finish_epoch(checkpoint, self.trainer)

    def on_validation_start(self) -> None:
        """Takes back the mark that `_finish_epoch` has left for the loop of the trainer."""
        total: Any = self.trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
        if self.trainer.state.fn == "fit" and (total.started, total.processed) == (1, 0):
            total.reset()

    @classmethod
    def _check_content(cls, content: dict[str, Any], path: Any) -> None:
        super()._check_content(check_content(content, path), path)

    def _classes(self) -> dict[str, str]:
        parts = {"class": self, "operator": getattr(self, "operator", None)}
        return {name: class_name(type(part)) for name, part in parts.items() if part is not None}


def _finish_epoch(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Lets a run resumed after the last batch of an epoch begin with that epoch's validation and end.

    Lightning goes on with the next epoch instead: what validation fits, and what an epoch's end does, would be left
    out. The state of its loops becomes that of a run stopped when validation had begun. It needs data that go on where
    they were, here with nothing; other loaders would begin the epoch once more.
    """
    loop = checkpoint["loops"].get("fit_loop", {})
    batches = loop.get("epoch_loop.batch_progress", {"is_last_batch": False})
    if not batches["is_last_batch"] or batches["total"]["completed"] != batches["total"]["processed"] - 1:
        return
    if not loop["state_dict"].get("combined_loader"):
        return
    for counts in (batches["total"], batches["current"]):
        counts["completed"] = counts["processed"]
    validation = loop["epoch_loop.val_loop.batch_progress"]
    validation["current"] = dict.fromkeys(validation["current"], 0)
    validation["total"] = {**validation["current"], "ready": 1, "started": 1}
    every, epoch = trainer.check_val_every_n_epoch, loop["epoch_progress"]["current"]["processed"]
    if every is not None and (epoch + 1) % every:  # without validation the loop does not count the batch itself
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


def checkpoint_paths(trainer: Trainer) -> tuple[str, str]:
    """Returns the best checkpoint of a run by its monitor and the newest; an empty string where there is none."""
    best = last = ""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and not isinstance(callback, LastCheckpoint):
            best = best or (callback.best_model_path if callback.monitor is not None else "")
            last = (
                last or callback.last_model_path or ("" if callback.monitor is not None else callback.best_model_path)
            )
    return best, last


def check_content(content: dict[str, Any], path: Any) -> dict[str, Any]:
    """Returns the content of a checkpoint; what is not one of Lightning is refused."""
    if not isinstance(content.get("state_dict"), dict):
        held = ", ".join(map(str, list(content)[:_SHOWN])) or "nothing"
        raise CheckpointError(f"{path} has no state_dict of a Lightning module: it holds {held}")
    return content


def class_name(cls: type) -> str:
    """Returns the name by which a class is found again."""
    return f"{cls.__module__}.{cls.__qualname__}"


def check_class(cls: type, checkpoint: dict[str, Any]) -> None:
    """Refuses the checkpoint of a module that is neither a kind of `cls` nor the other way round.

    Raises:
        CheckpointError: Where it is; without the name of the file.
    """
    _check_classes({"class": class_name(cls)}, checkpoint)


def _check_tensors(state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        if not name.endswith("_extra_state") and not isinstance(value, torch.Tensor | list):  # a list is a metric's
            raise CheckpointError(f"{name} is a {type(value).__name__} in it, expected a tensor")


def _check_classes(own: dict[str, str], checkpoint: dict[str, Any]) -> None:
    hyper_parameters = checkpoint.get("hyper_parameters", {})
    stored = {"class": hyper_parameters.get("_class_path", ""), **checkpoint.get(ORIGIN, {})}
    for part, name in own.items():
        theirs, ours = find_class(stored.get(part, "")), find_class(name)
        if theirs and ours and not issubclass(theirs, ours) and not issubclass(ours, theirs):
            what = "is that of a" if part == "class" else "was trained with the operator"
            raise CheckpointError(f"the checkpoint {what} {theirs.__name__}, expected {ours.__name__}")
