"""
Parameters with error bars
==========================

`BayesianRule` carries a posterior over the parameters: each has a standard deviation, which shrinks as images come in.
"""

# %%
# A bilateral filter, learned from few images at a time.
import lightning as L
import matplotlib.pyplot as plt
import numpy as np
from lightning.pytorch import Callback

from callbacks import BayesianRule, EMParameterCallback
from datamodules import PhotoCropsDataModule
from lightning_modules import BilateralFilter, Reconstruction


class Watch(Callback):
    """Keeps mean and standard deviation of each parameter after every step."""

    def __init__(self, learner):
        self.learner, self.path = learner, []

    def on_train_batch_end(self, trainer, module, *_):
        table = module.em_parameters
        self.path.append((table.values()[0].clone(), self.learner.standard_deviation()[0].clone()))


learner = EMParameterCallback(BayesianRule())
watch = Watch(learner)
module = Reconstruction(BilateralFilter(), noise_std=25 / 255)
trainer = L.Trainer(
    accelerator="cpu",
    max_steps=60,
    max_epochs=-1,
    callbacks=[learner, watch],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, PhotoCropsDataModule(batch_size=4, train_crops=240, seed=0))

# %%
# The posterior is over the logarithm, so the bars are factors.
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for number, (axis, name) in enumerate(zip(axes, module.em_parameters.learned, strict=True)):
    mean, deviation = (np.array([values[number] for values in path]) for path in zip(*watch.path, strict=True))
    axis.plot(mean)
    axis.fill_between(range(len(mean)), mean * np.exp(-1.645 * deviation), mean * np.exp(1.645 * deviation), alpha=0.25)
    axis.set(xlabel="step", title=f"{name}, with a band of 90 %", yscale="log")
