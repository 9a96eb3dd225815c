"""
Learn without clean images
==========================

Stein's unbiased estimate of the risk takes the place of the clean image: a run that sees noisy crops alone ends where one with
clean images does.
"""

# %%
# The same operator, the same crops and the same noise, once with clean images and once without.
import lightning as L
import matplotlib.pyplot as plt

from callbacks import EMParameterCallback, NewtonRule
from datamodules import PhotoCropsDataModule
from lightning_modules import BilateralFilter, Reconstruction


def run(objective):
    module = Reconstruction(BilateralFilter(), objective=objective, noise_std=25 / 255)
    learner = EMParameterCallback(NewtonRule(trust_radius=1.0))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=50,
        max_epochs=-1,
        callbacks=[learner],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = PhotoCropsDataModule(batch_size=16, train_crops=800, val_crops=200, seed=0)
    trainer.fit(module, data)
    quality = trainer.validate(module, data, verbose=False)[0]["val/psnr"]
    return learner, quality


runs = {name: run(name) for name in ("supervised", "sure")}
for name, (learner, quality) in runs.items():
    print(f"{name}: {learner.get_parameters()}, {quality:.2f} dB")

# %%
# Both take the same course: the estimate is noisier than the error that it estimates, and unbiased.
names = list(runs["sure"][0].get_parameters())
figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 3.2), layout="constrained")
for axis, parameter in zip(axes, names, strict=True):
    for name, (learner, _) in runs.items():
        axis.plot([past[parameter] for past in learner.parameter_history], label=name)
    axis.set(xlabel="step", title=parameter, yscale="log")
    axis.legend()
