"""How long a start takes: whole processes, as ratios to `import torch` and to `import lightning` in one run.

Processes take turns, and each kind has its least time of several. It fails where a start is over its budget.

    python benchmarks/starting.py --json starting.json
"""

import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from _common import PROJECT, arguments, write_json
from PIL import Image

_COMMAND = "from lightning_modules.cli import main; main({words})"
_PEERS = {"torch": "import torch", "lightning": "import lightning"}
# Code of a start, what it is compared with, and the ratio that it may have.
STARTS: dict[str, tuple[str, str, float]] = {
    "`import lightning_modules, callbacks, datamodules`": (
        "import lightning_modules, callbacks, datamodules",
        "lightning",
        1.25,
    ),
    "`lightning-em --help`": (_COMMAND.format(words=["--help"]), "lightning", 1.25),
    "`lightning-em fit --help`": (_COMMAND.format(words=["fit", "--help"]), "lightning", 1.25),
    "`from lightning_modules import restore`": ("from lightning_modules import restore", "torch", 1.6),
    "`lightning-em restore --help`": (_COMMAND.format(words=["restore", "--help"]), "torch", 1.6),
    "`lightning-em restore photo.png`, of 256×256 pixels": (
        _COMMAND.format(words=["restore", "photo.png", "--overwrite"]),
        "torch",
        1.6,
    ),
}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind; the fastest counts")
    options = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": str(options.threads)}
    codes = {**_PEERS, **{name: code for name, (code, _, _) in STARTS.items()}}
    times: dict[str, list[float]] = {name: [] for name in codes}
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).normal(128, 25, (256, 256, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(f"{folder}/photo.png")
        for repeat in range(options.repeats + 1):
            for name, code in codes.items():
                seconds = _seconds(code, folder, environment)
                if repeat:  # the first has read the files from the disk, and compiled what is compiled once
                    times[name].append(seconds)
    least = {name: min(found) for name, found in times.items()}
    records, over = [], []
    for name, (_, peer, budget) in STARTS.items():
        ratio = least[name] / least[peer]
        over += [name] * (ratio > budget)
        row: dict[str, Any] = {"start": name, "seconds": least[name], "beside": f"import {peer}"}
        records.append({**row, "peer_seconds": least[peer], "ratio": ratio, "budget": budget})
        print(f"{name}: {least[name]:.2f} s, {ratio:.2f} times `import {peer}` ({budget} at most)", flush=True)
    write_json(options.json, records)
    if over:
        raise SystemExit(f"over budget: {', '.join(over)}")


def _seconds(code: str, folder: str, environment: dict[str, str]) -> float:
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"try:\n    {code}\nexcept SystemExit as end:\n    assert not end.code"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
