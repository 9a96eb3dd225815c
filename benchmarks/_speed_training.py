"""Speed around the network in a training step: batches of CIFAR-10, and the M-step."""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from _common import PROJECT
from _timing import median_ms, record
from torch.utils.data import DataLoader
from torchvision.transforms import ToTensor

from callbacks import EMParameterCallback
from datamodules import CIFAR10DataModule
from datamodules.cifar10 import _AnyCIFAR10
from lightning_modules.cli import build

BATCH = 128
_STEPS = 30


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Results of this section, as records of `_timing.record`."""
    yield _loading(options)
    yield _m_step(options)


def _loading(options: argparse.Namespace) -> dict[str, Any]:
    """One epoch: uint8 in memory, mirrored at random, to float; against decoded images one by one, not mirrored."""
    data = CIFAR10DataModule(root=str(options.data), batch_size=BATCH, val_size=1)
    data.setup("fit")

    def ours() -> None:
        for batch in data.train_dataloader():
            data.on_after_batch_transfer(batch, 0)

    images = _AnyCIFAR10(options.data, train=True, transform=ToTensor())  # torchvision's, without its checksums
    loaders = {
        count: DataLoader(images, batch_size=BATCH, shuffle=True, num_workers=count, persistent_workers=count > 0)
        for count in range(options.threads + 1)
    }
    theirs = {count: median_ms(partial(_exhaust, loader)) for count, loader in loaders.items()}
    fastest = min(theirs, key=theirs.__getitem__)
    peer = f"torchvision, the fastest of 0 to {options.threads} workers ({fastest})"
    each = [taken / len(images) for taken in (median_ms(ours, repeats=7), theirs[fastest])]
    return record("CIFAR-10 to training-ready tensors, an image", each[0], peer, each[1])


def _exhaust(loader: DataLoader[Any]) -> None:
    for _ in loader:
        pass


class Clock(L.Callback):
    """Times the EM callback's hooks, and whole steps: the shortest way to the share of one in the other."""

    def __init__(self) -> None:
        self.begin: list[float] = []
        self.spent: list[float] = []

    def watch(self, callback: EMParameterCallback) -> None:
        for name in ("on_after_backward", "on_train_batch_end"):
            setattr(callback, name, self._timed(getattr(callback, name)))

    def _timed(self, hook: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> None:
            begin = time.perf_counter()
            hook(*args, **kwargs)
            self.spent[-1] += time.perf_counter() - begin

        return timed

    def on_train_batch_start(self, *args: Any) -> None:
        self.begin.append(time.perf_counter())
        self.spent.append(0.0)


def _m_step(options: argparse.Namespace) -> dict[str, Any]:
    """The EM callback's time in a step of the recommended configuration."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    words = ["-c", str(PROJECT / "configs" / "cifar10_denoise.yaml"), f"--data.root={options.data}"]
    # What is timed is the callback, so the others stay away; val_size is for partial copies of the data.
    words += ["--data.val_size=0.1", "--trainer.callbacks=[{class_path: callbacks.EMParameterCallback}]"]
    words += ["--trainer.logger=false", f"--trainer.max_steps={_STEPS}", "--trainer.accelerator=cpu"]
    words += ["--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
    words += ["--trainer.enable_model_summary=false", "--trainer.enable_checkpointing=false"]
    with tempfile.TemporaryDirectory() as folder:
        command = build([*words, f"--trainer.default_root_dir={Path(folder)}"])
        callback = next(c for c in command.trainer.callbacks if isinstance(c, EMParameterCallback))
        clock = Clock()
        clock.watch(callback)
        command.trainer.callbacks.append(clock)
        command.trainer.fit(command.model, command.datamodule)
    steps = [end - begin for begin, end in zip(clock.begin, clock.begin[1:], strict=False)][3:]
    step, spent = 1e3 * statistics.median(steps), 1e3 * statistics.median(clock.spent[3:])
    print(f"the EM callback takes {spent / step:.2%} of a training step (cifar10_denoise, batch {BATCH}, CPU)")
    return record("EM callback in a training step", spent, "the whole step", step, share=spent / step)
