"""
Your own operator
=================

A restoration operator declares its numbers and restores. Units, bounds, rows, checkpoints, the command line and every rule of
the M-step come with the base class.
"""

# %%
# A soft median: each pixel is drawn to the median of its neighbours, unless it is far from it. The distance is in units of the
# noise, so that one value does for every level.
import lightning as L
import matplotlib.pyplot as plt
import torch

from callbacks import EMParameterCallback, NewtonRule
from datamodules import PhotoCropsDataModule
from lightning_modules import ParameterSpec, Reconstruction, RestorationOperator
from lightning_modules.operators.operator import noise_level, per_image, pixel_level


class SoftMedian(RestorationOperator):
    """Draws each pixel to the median of its 3×3 neighbours, unless it is far from it."""

    @property
    def parameter_specs(self):
        return (ParameterSpec("distance", start=0.5, bounds=(0.05, 20.0), unit="noise"),)

    def forward(self, noisy, *, noise, guide=None, distance):
        level = pixel_level(noise_level(noise, noisy))
        width = per_image("distance", distance, noisy).view(-1, 1, 1, 1) * level
        padded = torch.nn.functional.pad(noisy, (1, 1, 1, 1), mode="replicate")
        median = padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4).median(-1).values
        difference = median - noisy
        return noisy + difference * width**2 / (width**2 + difference**2).clamp_min(1e-12)


# %%
# The noise of each image is drawn from a range; the operator is told its estimate.
learner = EMParameterCallback(NewtonRule())
module = Reconstruction(SoftMedian(), noise_std=(10 / 255, 50 / 255), estimate_noise=True)
data = PhotoCropsDataModule(batch_size=16, train_crops=640, val_crops=100, seed=0)
trainer = L.Trainer(
    accelerator="cpu",
    max_epochs=1,
    callbacks=[learner],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, data)
metrics = trainer.validate(module, data, verbose=False)[0]
print(f"distance {learner.get_parameters()['distance']:.2f} noise levels: ", end="")
print(f"{metrics['val/psnr_noisy']:.2f} dB become {metrics['val/psnr']:.2f} dB")

# %%
# Images of any size go through the learned operator.
from skimage import data as photographs

clean = torch.from_numpy(photographs.coffee()).permute(2, 0, 1)[None].float() / 255
noisy = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    restored = module(noisy)
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for axis, (name, image) in zip(axes, {"noisy": noisy, "restored": restored}.items(), strict=True):
    axis.imshow(image[0, :, 100:260, 200:440].permute(1, 2, 0).clamp(0, 1))
    axis.set(xticks=[], yticks=[], title=name)
