"""
Learn the weight of total variation in three lines
==================================================

`learn_parameters` takes any function of noisy images and of one number for each image and parameter, and finds the numbers by
expectation–maximisation: no Trainer, no grid.
"""

# %%
# Total variation by a few steps of gradient descent on a smoothed penalty; nothing in it knows of EM.
import matplotlib.pyplot as plt
import torch

from datamodules import PhotoCropsDataModule
from lightning_modules import learn_parameters

crops = PhotoCropsDataModule(crop_size=48, train_crops=320).load_split("train").images.float() / 255
images, others = crops[: len(crops) // 2], crops[len(crops) // 2 :]


def total_variation(noisy, *, weight):
    weight = weight.view(-1, 1, 1, 1)
    image = noisy
    for _ in range(20):
        rows = torch.nn.functional.pad(image.diff(dim=2), (0, 0, 0, 1))
        columns = torch.nn.functional.pad(image.diff(dim=3), (0, 1, 0, 0))
        length = (rows.square() + columns.square() + 1e-3).sqrt()
        rows, columns = rows / length, columns / length
        divergence = rows - rows.roll(1, 2) + columns - columns.roll(1, 3)
        image = image - 0.15 * (image - noisy - weight * divergence)
    return image


# %%
# The three lines. Bounds may be a thousandfold apart; noise of the level that is named is added to the clean images.
learned = learn_parameters(total_variation, {"weight": (1e-3, 1.0)}, images, noise_std=25 / 255, progress=False)
print(learned.parameters, "±", learned.errors)

# %%
# The oracle: the mean squared error of every weight of a grid, on other crops.
noisy = others + 25 / 255 * torch.randn(others.shape, generator=torch.Generator().manual_seed(1))


def quality(weight):
    with torch.no_grad():
        error = total_variation(noisy, weight=torch.full((len(noisy),), weight)) - others
    return -10 * error.square().mean().log10()


grid = torch.logspace(-3, 0, 31).tolist()
found = learned.parameters["weight"]
print(f"learned {quality(found):.2f} dB, best of the grid {max(map(quality, grid)):.2f} dB")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
left.plot([step["weight"] for step in learned.history], marker="o")
left.set(xlabel="batch", ylabel="weight", yscale="log", title="on its way")
right.plot(grid, [quality(weight) for weight in grid], color="tab:gray", label="grid")
right.plot(found, quality(found), "o", color="tab:orange", label="learned")
right.set(xlabel="weight", ylabel="PSNR [dB]", xscale="log", title="on images that were not seen")
right.legend()

# %%
# `learned.operator` is the restoration under these numbers, which `restore(path, model=learned.operator)` takes as well.
