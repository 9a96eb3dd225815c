"""`lightning-em restore` on 30 mixed files, killed at random and run again: complete, identical to an undisturbed run.

python tests/campaigns/restore_kills.py [KILLS]
"""

import csv
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

PROJECT = Path(__file__).parents[2]
SUFFIXES = ("jpg", "png", "tif", "webp", "gif", "bmp")


def make(root: Path) -> None:
    """30 files of six kinds and many sizes, one of them damaged."""
    generator = np.random.default_rng(0)
    for index in range(30):
        path = root / ("deep" if index % 4 == 0 else ".") / f"{index:02d}.{SUFFIXES[index % len(SUFFIXES)]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = generator.integers(40, 700, 2)
        array = generator.normal(128, 30, (height, width, 3)).clip(0, 255).astype(np.uint8)
        if index % 6 == 1 and index % 4 == 3:
            Image.fromarray(array[..., 0].astype(np.uint16) * 257).save(path)
        else:
            Image.fromarray(array).save(path)
    (root / "29.bmp").write_bytes((root / "29.bmp").read_bytes()[:500])


def results(out: Path) -> tuple[dict[str, bytes], list[tuple[str, ...]]]:
    """What files there are, and what the table has to say of them but for times and notes."""
    files = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "restored.csv"
    }
    with (out / "restored.csv").open(newline="") as file:
        rows = [tuple(row[name] for name in ("name", "output", "noise_std", "size")) for row in csv.DictReader(file)]
    return files, rows


def check_between(out: Path, complete: dict[str, bytes]) -> None:
    """After a kill, whatever has a name is whole, and the table names nothing that is not there."""
    for path in out.rglob("*"):
        name = path.relative_to(out).as_posix()
        if path.is_file() and name != "restored.csv" and not path.name.endswith(".part"):
            assert path.read_bytes() == complete[name], name
    if (out / "restored.csv").is_file():
        with (out / "restored.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        for row in lines[:-1]:  # the last may be cut off
            assert (out / row["output"]).is_file(), row


def main(kills: int) -> None:
    scratch = Path(tempfile.mkdtemp())
    make(scratch / "in")

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "lightning_modules.cli", "restore", "in", "-o", str(out)]
        return subprocess.Popen(command, cwd=scratch, env=environment(), stderr=subprocess.DEVNULL)

    begin = time.perf_counter()
    assert start(scratch / "undisturbed").wait() == 1, "one file is damaged"
    duration = time.perf_counter() - begin
    complete, table = results(scratch / "undisturbed")
    assert len(complete) == len(table) == 29
    dice = random.Random(0)
    out, done = scratch / "disturbed", 0
    while done < kills:
        process = start(out)
        time.sleep(dice.uniform(0.3, 1.1) * duration)
        if process.poll() is None:
            process.kill()
            process.wait()
            done += 1
        if out.is_dir():
            check_between(out, complete)
        left = sorted(path.name for path in out.rglob("*.part")) if out.is_dir() else []
        count = sum(path.is_file() for path in out.rglob("[0-9]*")) if out.is_dir() else 0
        print(f"kill {done}: {count} of 29 there, unfinished: {len(left)}", flush=True)
        if count == 29:  # from the start again, so that every kill finds work
            assert start(out).wait() == 1
            assert results(out) == (complete, table)
            shutil.rmtree(out)
    assert start(out).wait() == 1
    assert results(out) == (complete, table), "not identical"
    shutil.rmtree(scratch)
    print(f"killed {kills} times, run again: complete and identical")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
