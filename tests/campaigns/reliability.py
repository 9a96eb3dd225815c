"""Runs that are killed, disks that fill up and files that are damaged: how many states are lost. None should be.

    python tests/campaigns/reliability.py [--only NAME ...] [--tries N] [--seconds BUDGET] [--seed S] [--json FILE]

Needs Linux. What it imports it imports once: each run is a fork of this process. With `--json`, campaigns that were not
run keep their line in the file.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

from lightning_modules import GraphDiffusionReconstruction
from lightning_modules.checkpoints.file import CheckpointError, find_damage, read_checkpoint
from lightning_modules.cli import main

import_module("lightning_modules.cli.training")  # here, so that no fork has to
PROJECT = Path(__file__).parents[2]
sys.path.insert(0, str(PROJECT / "benchmarks"))
from _common import provenance, write_json  # noqa: E402

CALLBACKS = "--trainer.callbacks"
EVERY_THIRD = [f"{CALLBACKS}+=lightning.pytorch.callbacks.ModelCheckpoint", f"{CALLBACKS}.every_n_train_steps=3"]
EVERY_THIRD += [f"{CALLBACKS}.save_top_k=-1", f"{CALLBACKS}.filename=mid-{{step}}"]
COMMON = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]
RUNS = {
    "demo": ["--data.train_crops=64", "--data.val_crops=8", "--data.batch_size=8", "--trainer.max_epochs=3"],
    "gaussian_mixture": ["--data.batch_size=512", "--model.num_components=4", "--trainer.max_epochs=3"],
    "detector": [
        *("--data.root=images", "--data.crop_size=32", "--data.eval_crops=2", "--data.batch_size=8"),
        *("--trainer.max_epochs=5", "--trainer.check_val_every_n_epoch=2"),
    ],
}
OTHER_FILE_SYSTEM = Path("/dev/shm")
Row = dict[str, Any]


class Scratch:
    """A folder to run in, a TMPDIR on another file system, and forks that run the command there."""

    def __init__(self, name: str, tmpdir: Path | None = OTHER_FILE_SYSTEM) -> None:
        self.name = name
        self.root = Path(tempfile.mkdtemp(prefix=f"{name}_", dir="/tmp"))
        self.tmpdir = Path(tempfile.mkdtemp(dir=tmpdir))
        (self.root / "configs").symlink_to(PROJECT / "configs")
        self.words = ["-c", f"configs/{name}.yaml", *COMMON, *RUNS.get(name, RUNS["demo"]), *EVERY_THIRD]
        if name == "detector":
            photographs(self.root / "images")

    def start(self, folder: Path, *words: str, before: Callable[[], object] = lambda: None) -> int:
        """Forks a `fit`, and returns its process."""
        (folder / "configs").exists() or shutil.copytree(self.root, folder, symlinks=True, dirs_exist_ok=True)
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            os.chdir(folder)
            log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ["TMPDIR"] = tempfile.tempdir = str(self.tmpdir)
            before()
            main(["fit", *self.words, *words])
            code = 0
        except SystemExit as error:
            print(error, flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def run(self, folder: Path, *words: str, **options: Any) -> int:
        """Runs to the end, and returns the exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.start(folder, *words, **options), 0)[1])

    def close(self) -> None:
        shutil.rmtree(self.root)
        shutil.rmtree(self.tmpdir)


def photographs(root: Path) -> None:
    """Ten photographs and ten smoother images to train on, six of each to validate."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 6)):
        for name, repeat in (("photographic", 1), ("generated", 2)):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (40 // repeat, 48 // repeat, 3), dtype=np.uint8)
                Image.fromarray(pixels.repeat(repeat, 0).repeat(repeat, 1)).save(root / part / name / f"{number}.png")


def equal(one: Any, other: Any) -> bool:
    """Whether two states are the same bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.equal(one.double().nan_to_num(7.7), other.double().nan_to_num(7.7))
    return one == other or (one != one and other != other)


def outcome(folder: Path) -> dict[str, Any]:
    """What the newest state of a run holds, but for paths."""
    newest = max(folder.rglob("last*.ckpt"), key=lambda path: path.stat().st_mtime)
    content = read_checkpoint(newest)
    kept = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    state = {name: content[name] for name in kept if name in content}
    return {**state, "em": content["callbacks"].get("EMParameterCallback")}


def check_kill(scratch: Scratch, folder: Path, whole: dict[str, Any], from_last: bool) -> str:
    """Looks at what a killed run has left, resumes it, and returns what there is to complain of."""
    checkpoints = list(folder.rglob("*.ckpt"))
    if bad := [path.name for path in checkpoints if find_damage(path)]:
        return f"damaged: {bad}"
    if left := list(scratch.tmpdir.iterdir()):
        return f"left in TMPDIR: {[path.name for path in left]}"
    steps = {path: read_checkpoint(path, "meta")["global_step"] for path in checkpoints}
    last = next((path for path in checkpoints if path.name == "last.ckpt"), None)
    if last is None and any(path.name.startswith("epoch") for path in checkpoints):
        steps_of_epochs = [step for path, step in steps.items() if path.name.startswith("epoch")]
        if len(steps_of_epochs) > 1:
            return "no last.ckpt"
    start = last if from_last and last is not None else max(steps, key=lambda path: steps[path])
    if scratch.run(folder, "--ckpt_path", str(start)) != 0:
        return f"not resumed from {start.name}: {(folder / 'log.txt').read_text()[-300:]}"
    return "" if equal(outcome(folder), whole) else f"resumed from {start.name}: another result"


def kills(name: str, tries: int, dice: random.Random, deadline: float, in_write: bool = False) -> Row:
    """Runs killed at random points, or in the middle of a write, and resumed."""
    scratch = Scratch(name)
    begin = time.monotonic()
    assert scratch.run(scratch.root / "whole") == 0, (scratch.root / "whole" / "log.txt").read_text()[-2000:]
    duration = time.monotonic() - begin
    whole = outcome(scratch.root / "whole")
    row: Row = {"tries": 0, "exact": 0, "before_the_first": 0, "lost": 0, "notes": []}
    while row["tries"] < tries and time.monotonic() < deadline:
        folder = scratch.root / f"killed {row['tries']}"
        if in_write:
            scratch.run(folder, before=lambda: dies_in_write(dice.randrange(1, 14)))
        else:
            process = scratch.start(folder)
            time.sleep(dice.uniform(0.15, 1.0) * duration)
            os.kill(process, signal.SIGKILL)
            if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0:
                shutil.rmtree(folder)
                continue  # it was done
        row["tries"] += 1
        if not list(folder.rglob("*.ckpt")):
            row["before_the_first"] += 1
        elif complaint := check_kill(scratch, folder, whole, from_last=dice.random() < 0.5):
            row["lost"] += 1
            row["notes"].append(complaint)
        else:
            row["exact"] += 1
        shutil.rmtree(folder)
        print(name, row, flush=True)
    scratch.close()
    return row


def dies_in_write(number: int) -> None:
    """Kills this process in its n-th write of a checkpoint, when half of it is there."""
    written = iter(range(1, 10**6))
    sync = os.fsync

    def fsync(file: int) -> None:
        if next(written) == number:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        sync(file)

    os.fsync = fsync


def disk_full(tries: int, dice: random.Random, deadline: float) -> Row:
    """Runs on a file system that fills up; where none can be mounted, files have a limit."""
    row: Row = {"tries": 0, "whole": 0, "lost": 0, "notes": []}
    while row["tries"] < tries and time.monotonic() < deadline:
        scratch = Scratch("demo")
        folder, size = scratch.root / "small", dice.randrange(60, 700) * 1024
        shutil.copytree(scratch.root, folder, symlinks=True)
        (folder / "logs").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder / "logs")]
        mounted = subprocess.run(mount, capture_output=True).returncode == 0

        def limit(mounted: bool = mounted, size: int = size) -> None:
            if not mounted:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 12, size // 12))

        code = scratch.run(folder, before=limit)
        row["tries"] += 1
        found = list((folder / "logs").rglob("*.ckpt"))
        bad = [path.name for path in found if find_damage(path)] + [p.name for p in (folder / "logs").rglob("*.part")]
        bad += [path.name for path in scratch.tmpdir.iterdir()]
        row["lost" if bad else "whole"] += 1
        row["notes"] += [f"{'tmpfs' if mounted else 'limit'} {size}: left {bad}"] * bool(bad)
        print("disk full", size, "exit", code, "checkpoints", len(found), "bad", bad, flush=True)
        if mounted:
            subprocess.run(["umount", str(folder / "logs")], check=True)
        scratch.close()
    return row


def damaged_checkpoints(tries: int, dice: random.Random, deadline: float) -> Row:
    """Truncated, flipped and foreign files through `load_from_checkpoint`: named, or loaded as they were written."""
    scratch = Scratch("demo")
    assert scratch.run(scratch.root / "whole", "--trainer.max_epochs=1") == 0
    sound = next((scratch.root / "whole").rglob("last.ckpt"))
    content, whole = sound.read_bytes(), read_checkpoint(sound)["state_dict"]
    row: Row = {"tries": 0, "named": 0, "harmless": 0, "lost": 0, "notes": []}
    path = sound.with_name("damaged.ckpt")
    while row["tries"] < tries and time.monotonic() < deadline:
        place = dice.randrange(len(content))
        flipped = content[:place] + bytes([content[place] ^ (1 << dice.randrange(8))]) + content[place + 1 :]
        path.write_bytes([content[:place], flipped, flipped, dice.randbytes(place % 3000)][row["tries"] % 4])
        row["tries"] += 1
        try:
            loaded = GraphDiffusionReconstruction.load_from_checkpoint(path).state_dict()
            good = equal(dict(loaded), dict(whole))
            row["harmless" if good else "lost"] += 1
        except CheckpointError as error:
            named = str(path) in str(error) and "\n" not in str(error)
            row["named" if named else "lost"] += 1
            row["notes"] += [str(error)[:200]] * (not named)
        except Exception as error:
            row["lost"] += 1
            row["notes"].append(f"{type(error).__name__}: {error}"[:200])
    scratch.close()
    return row


def ranks(tries: int, dice: random.Random, deadline: float) -> Row:
    """Two ranks of the command, of which one is sent SIGTERM or SIGKILL: seconds until both have ended."""
    row: Row = {"tries": 0, "ended": 0, "lost": 0, "seconds": [], "notes": []}
    words = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=100000", *RUNS["demo"][:3]]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    while row["tries"] < tries and time.monotonic() < deadline:
        folder = Path(tempfile.mkdtemp())
        command = [sys.executable, "-m", "lightning_modules.cli", "fit", "-c", str(PROJECT / "configs" / "demo.yaml")]
        with (folder / "log.txt").open("w") as log:
            first = subprocess.Popen([*command, *COMMON, *words], cwd=folder, env=environment, stdout=log, stderr=log)
        second = None
        while second is None and first.poll() is None:
            time.sleep(0.2)
            second = next(iter(children(first.pid)), None)
        in_rendezvous = row["tries"] % 3 == 2
        while not in_rendezvous and not list(folder.rglob("last.ckpt")) and first.poll() is None:
            time.sleep(0.2)
        time.sleep(dice.uniform(0, 3))
        number = (signal.SIGTERM, signal.SIGKILL)[row["tries"] % 2] if not in_rendezvous else signal.SIGKILL
        victim = (first.pid, second)[row["tries"] // 2 % 2]
        begin = time.monotonic()
        os.kill(victim, number)
        while time.monotonic() < begin + 60 and (first.poll() is None or os.path.exists(f"/proc/{second}")):
            time.sleep(0.1)
        took = time.monotonic() - begin
        row["tries"] += 1
        row["ended" if took < 30 else "lost"] += 1
        row["seconds"].append(round(took, 1))
        what = f"{number.name} to rank {int(victim != first.pid)}{' in the rendezvous' if in_rendezvous else ''}"
        row["notes"] += [what] * (took >= 30)
        print("ranks", what, f"{took:.1f} s", flush=True)
        for process in (first.pid, second):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        first.wait()
        shutil.rmtree(folder)
    return row


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


CAMPAIGNS: dict[str, tuple[str, Callable[..., Row]]] = {
    "demo": ("SIGKILL of the demo", lambda *a: kills("demo", *a)),
    "gaussian_mixture": ("SIGKILL of a Gaussian mixture", lambda *a: kills("gaussian_mixture", *a)),
    "detector": ("SIGKILL of the detector", lambda *a: kills("detector", *a)),
    "write": ("SIGKILL in the middle of a write", lambda *a: kills("demo", *a, in_write=True)),
    "disk_full": ("Disk full", disk_full),
    "damaged": ("Damaged checkpoints, load_from_checkpoint", damaged_checkpoints),
    "ranks": ("One of two ranks ends", ranks),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=CAMPAIGNS, default=list(CAMPAIGNS))
    parser.add_argument("--tries", type=int, default=17)
    parser.add_argument("--seconds", type=float, default=3600.0, help="for each campaign")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: dict[str, Row] = {}
    if options.json is not None and options.json.exists():
        rows = {row["name"]: row for row in json.loads(options.json.read_text())["rows"]}
    for name in options.only:
        title, campaign = CAMPAIGNS[name]
        deadline = time.monotonic() + options.seconds
        row = campaign(options.tries, random.Random(f"{options.seed} {name}"), deadline)
        rows[name] = {"name": name, "campaign": title, **row, "commit": provenance()["commit"]}
        print(f"{title}: {row}", flush=True)
        write_json(options.json, list(rows.values()))
    sys.exit(any(row["lost"] for row in rows.values()))
