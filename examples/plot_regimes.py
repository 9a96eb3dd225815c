"""
Regimes that nobody labels
==========================

Images of two kinds, and no label: a Gaussian mixture over a feature of the images is learned along with the parameters, and
gives each regime a row of its own.
"""

# %%
# Half of the crops are noisy a little, half strongly; the operator's widths are absolute, so the two kinds want different ones.
import lightning as L
import matplotlib.pyplot as plt

from callbacks import EMParameterCallback, GradientRule
from datamodules import PhotoCropsDataModule
from lightning_modules import GraphDiffusion, GraphDiffusionReconstruction, ParameterTable
from lightning_modules.em import MixtureAssignment

table = ParameterTable(
    initial={"sigma": 0.4, "tau": 0.1, "radius": 2.0, "sigma_s": 3.0, "sigma_f": 0.4, "smooth_steps": 5},
    bounds={
        "sigma": (0.02, 4.0),
        "tau": (0.005, 0.5),
        "radius": (1.5, 3.0),
        "sigma_s": (0.5, 20.0),
        "sigma_f": (0.02, 4.0),
    },
    learned=["sigma", "tau"],
    per_row=["sigma", "tau"],
    row_names=["first", "second"],
)
module = GraphDiffusionReconstruction(
    GraphDiffusion(patch_size=3, signal="image"),
    table,
    assignment=MixtureAssignment(num_regimes=2),
    noise_levels=[10 / 255, 50 / 255],
    estimate_noise=True,
)
learner = EMParameterCallback(GradientRule(lr=0.1, pseudo_count=0))
trainer = L.Trainer(
    accelerator="cpu",
    max_epochs=4,
    callbacks=[learner],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
data = PhotoCropsDataModule(batch_size=32, train_crops=640, val_crops=100, seed=0)
trainer.fit(module, data)

# %%
# The mixture has found the two levels, and each regime its own parameters.
assignment = module.assignment
levels = 255 * (assignment.offset + assignment.scale * assignment.means)[:, 0].exp()
for row, level in enumerate(levels.tolist()):
    found = ", ".join(f"{name} {table.get_parameters(row)[name]:.3f}" for name in ("sigma", "tau"))
    print(f"regime of noise {level:.1f}/255: {found}")

figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for axis, name in zip(axes, ("sigma", "tau"), strict=True):
    for row, level in enumerate(levels.tolist()):
        axis.plot([past[name] for past in learner.class_parameter_history(row)], label=f"noise {level:.0f}/255")
    axis.set(xlabel="step", title=name, yscale="log")
    axis.legend()
