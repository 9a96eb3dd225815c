"""Where one rank ends, the others do not wait for it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules.cli import build
from lightning_modules.cli.training import EndTogether

DEMO = str(Path(__file__).parents[1] / "configs" / "demo.yaml")


class Endless(L.LightningModule):
    def __init__(self, root: Path, victim: int) -> None:
        super().__init__()
        self.layer, self.root, self.victim = torch.nn.Linear(2, 1), root, victim

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.ones(64, 2)))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch[0]).sum()
        if batch_idx == 3:
            (self.root / f"rank{self.global_rank}").write_text(str(os.getpid()))
            if self.global_rank == self.victim:  # within the backward pass, where Lightning's own handler hangs
                loss.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGTERM))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def wait_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_rank_ends_all(tmp_path: Path, rank: int) -> None:
    # A process of its own: one that has computed with threads must not be forked.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", __file__, str(tmp_path), str(rank)]
    child = subprocess.Popen(words, stderr=subprocess.DEVNULL, env=environment)
    files = [tmp_path / f"rank{index}" for index in (0, 1)]
    try:
        assert wait_for(lambda: all(file.exists() and file.read_text() for file in files), 240), "they train"
        ranks = [int(file.read_text()) for file in files]
        ended = wait_for(lambda: child.poll() is not None, 30)
        assert ended, "the others hang"
        assert wait_for(lambda: not any(is_running(pid) for pid in ranks), 10)
    finally:
        child.kill()
        child.wait()
        for file in files:
            if file.exists() and is_running(int(file.read_text())):
                os.kill(int(file.read_text()), signal.SIGKILL)


def test_a_rank_ends_with_the_process_that_started_it() -> None:
    rank = "import time; from lightning_modules.cli.processes import end_with_parent; end_with_parent(); time.sleep(60)"
    starter = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {rank!r}]); "
    starter += "print(p.pid, flush=True); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    time.sleep(2)
    assert is_running(child)
    process.kill()
    process.communicate()
    assert wait_for(lambda: not is_running(child), 20)


def test_the_command_has_it() -> None:
    command = build(["-c", DEMO, "--data.train_crops=20", "--data.val_crops=10", "--trainer.accelerator=cpu"])
    assert any(isinstance(callback, EndTogether) for callback in command.trainer.callbacks)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # gone, but for whoever asks after it


if __name__ == "__main__":
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=-1, callbacks=[EndTogether()], **quiet
    )
    trainer.fit(Endless(Path(sys.argv[1]), int(sys.argv[2])))
