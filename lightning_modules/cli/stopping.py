"""Ctrl-C: a run that ends after its step, with what it has reached."""

import signal
import sys
import threading
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.checkpoints.module import LastCheckpoint

INTERRUPTED = 128 + signal.SIGINT  # the exit code, as shells have it


class StopBetweenSteps(Callback):
    """Ends a `fit` in one process at Ctrl-C when its step is done, and keeps the state in `last.ckpt`.

    Lightning's own way is to end within the step, between the optimizer's and the M-step say, and to leave
    `last.ckpt` as the last epoch has written it. A second Ctrl-C does end at once. Several processes, which would end
    at different steps and wait for one another, are left to Lightning.
    """

    def __init__(self) -> None:
        self._is_asked = False
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signal."""
        self._is_asked, self._last_step = False, trainer.global_step
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves and ends, if that is asked for and the batch was not one of an accumulation."""
        is_step, self._last_step = trainer.global_step != self._last_step, trainer.global_step
        if self._is_asked and is_step:
            for checkpoint in trainer.checkpoint_callbacks:
                if isinstance(checkpoint, LastCheckpoint):
                    checkpoint.save(trainer)
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the signal to Python."""
        if signal.getsignal(signal.SIGINT) == self._ask:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask(self, number: int, frame: Any) -> None:
        self._is_asked = True
        signal.signal(number, signal.default_int_handler)
        print("\nstopping when this step is done; Ctrl-C again stops at once", file=sys.stderr)
