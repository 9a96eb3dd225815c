"""
Read a run's numbers
====================

What TensorBoard shows can be had as numbers: from the callback while the run is in memory, and from its event file afterwards.
"""

# %%
# A short run with a logger. `em/…` are the learned parameters and the means of the E-step.
import tempfile

import lightning as L
import matplotlib.pyplot as plt
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import EMDashboard, EMHealth, EMParameterCallback, GradientRule
from datamodules import PhotoCropsDataModule
from lightning_modules import GraphDiffusion, GraphDiffusionReconstruction, ParameterTable

table = ParameterTable(
    initial={"sigma": 1.1, "tau": 0.1, "radius": 2.0, "sigma_s": 10.0, "sigma_f": 1.1, "smooth_steps": 5},
    bounds={
        "sigma": (0.1, 4.0),
        "tau": (0.02, 0.5),
        "radius": (1.5, 3.0),
        "sigma_s": (0.5, 20.0),
        "sigma_f": (0.1, 4.0),
    },
    learned=["sigma", "tau", "sigma_s", "sigma_f"],
)
folder = tempfile.mkdtemp()
learner = EMParameterCallback(GradientRule(lr=0.1))
trainer = L.Trainer(
    accelerator="cpu",
    max_epochs=2,
    log_every_n_steps=1,
    callbacks=[learner, EMHealth(), EMDashboard()],
    logger=TensorBoardLogger(folder, name="run"),
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
diffusion = GraphDiffusion(patch_size=3, signal="image", widths="noise")
module = GraphDiffusionReconstruction(diffusion, table, noise_std=25 / 255)
trainer.fit(module, PhotoCropsDataModule(batch_size=32, train_crops=960, val_crops=100, seed=0))

# %%
# From the callback, in memory.
print(learner.get_status())

# %%
# From the event file, by the tags that the page shows.
events = EventAccumulator(trainer.logger.log_dir).Reload()
tags = [f"em/{name}" for name in table.learned]
figure, axes = plt.subplots(1, len(tags), figsize=(13, 2.8), layout="constrained")
for axis, tag in zip(axes, tags, strict=True):
    scalars = events.Scalars(tag)
    axis.plot([scalar.step for scalar in scalars], [scalar.value for scalar in scalars])
    axis.set(title=tag, xlabel="step", yscale="log")
