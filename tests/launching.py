"""A script of the tests in a process of its own, which may start others beside it."""

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1]


def launch(script: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a script on one thread, without a GPU, and wait for its end.

    Args:
        script: The script.
        words: Its arguments.
    """
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *map(str, words)],
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
