"""What the benchmarks share: where the data are, and records of results that say what made them."""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch

PROJECT = Path(__file__).resolve().parents[1]
# Whose versions a record names, where a benchmark has imported them: module and distribution.
LIBRARIES = {
    "torch": "torch",
    "lightning": "lightning",
    "torchvision": "torchvision",
    "torch_geometric": "torch-geometric",
    "numpy": "numpy",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "cv2": "opencv-python-headless",
    "bm3d": "bm3d",
    "optuna": "optuna",
    "deepinv": "deepinv",
    "pomegranate": "pomegranate",
    "CGAL": "cgal",
    "open3d": "open3d",
    "pymeshlab": "pymeshlab",
    "trimesh": "trimesh",
}
SOURCES = ("lightning_modules", "callbacks", "datamodules", "configs", "benchmarks")


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    default = os.environ.get("LIGHTNING_EM_DATA", str(PROJECT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(default), help="folder with cifar-10-batches-py")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch, and of peers")
    return parser


def quiet_trainer(max_steps: int, *callbacks: L.Callback) -> L.Trainer:
    """A Trainer on the CPU that trains for so many steps and neither shows nor keeps anything."""
    return L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        callbacks=list(callbacks),
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def write_json(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """Write a record, if a file was asked for: the rows and what made them. A run that is cut short leaves its rows."""
    if path is not None:
        path.write_text(json.dumps({**provenance(), "rows": rows}, indent=1) + "\n")


def provenance() -> dict[str, Any]:
    """Command, commit, processor, threads and versions of this run."""
    return {
        "command": _command(),
        "commit": _commit(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(module, name) for module, name in LIBRARIES.items() if module in sys.modules},
        },
    }


def _command() -> str:
    """The command with the variables that decide its speed and without the machine's own paths."""
    script, *words = sys.argv
    for number, word in enumerate(words):
        option, equals, value = word.partition("=")
        if word == "--data" and number + 1 < len(words):
            words[number + 1] = "DATA"
        elif option == "--data":
            words[number] = "--data=DATA"
        elif equals and "/" in value and Path(value).is_absolute():
            words[number] = f"{option}={Path(value).name}"
        elif Path(word).is_absolute():
            words[number] = Path(word).name
    decisive = ("OMP_", "MKL_", "OPENBLAS_", "LIGHTNING_EM_COMPILE")
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(decisive)]
    script = str(Path(script).resolve().relative_to(PROJECT))
    return shlex.join([*variables, "python", script, *words])


def _commit() -> str:
    """Commit of the sources, and whether they were changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" and changes" if git("status", "--porcelain", "--", *SOURCES) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    """Name and number of the machine's processors."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        named = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = named[0] if named else name
    return f"{name}, {os.cpu_count()} cores"


def _version(module: str, distribution: str) -> str:
    found = getattr(sys.modules[module], "__version__", None)
    return str(found or importlib.metadata.version(distribution))
