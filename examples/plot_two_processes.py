"""
Two processes are one
=====================

Statistics add over processes before every M-step, and every image carries a weight and a noise key of its own: two processes
with batches of 8 take the course of one with 16.
"""

# %%
# The command line in two ways, on crops that come with the installation.
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml


def fit(folder, devices, batch_size):
    command = [
        *(sys.executable, "-m", "lightning_modules.cli", "fit", "-c", str(CONFIGS / "demo.yaml")),
        *(f"--trainer.devices={devices}", f"--data.batch_size={batch_size}"),
        *(["--trainer.strategy=ddp"] if devices > 1 else []),
        *("--trainer.max_epochs=1", "--data.train_crops=160", "--data.val_crops=20"),
        *("--trainer.logger.init_args.save_dir=" + str(folder), "--trainer.enable_progress_bar=false"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = Path(folder).rglob("em_parameters.yaml")
    return yaml.safe_load(found.read_text())["model"]["init_args"]["em_parameters"]["init_args"]["initial"]


CONFIGS = Path(__import__("lightning_modules").__file__).parents[1] / "configs"
with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
    alone, together = fit(one, 1, 16), fit(two, 2, 8)

# %%
# What was learned, to the last digits that the file holds.
for name in alone:
    print(f"{name:>12}  {alone[name]!s:>22}  {together[name]!s:>22}")
