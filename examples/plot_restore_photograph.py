"""
Restore a photograph
====================

`restore` takes a path, a PIL image, an array or a tensor and gives the same kind back. The noise is estimated from the image;
the weights are in the package.
"""

# %%
# A photograph that comes with scikit-image, with white noise of standard deviation 25/255, stored in eight bits.
import matplotlib.pyplot as plt
import numpy as np
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from lightning_modules import restore

clean = data.chelsea()
noise = np.random.default_rng(0).normal(0, 25, clean.shape)
noisy = (clean + noise).clip(0, 255).round().astype(np.uint8)

restored = restore(noisy)

# %%
# The result has the type, the shape and the depth of what was given.
print(restored.dtype, restored.shape)

figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
part = (slice(60, 180), slice(130, 290))
for axis, (name, image) in zip(axes, {"noisy": noisy, "restored": restored, "clean": clean}.items(), strict=True):
    quality = "" if image is clean else f", {peak_signal_noise_ratio(clean, image):.1f} dB"
    axis.imshow(image[part], interpolation="nearest")
    axis.set(xticks=[], yticks=[], title=name + quality)

# %%
# What is clean stays as it is: the estimate reads no noise, and a level of 0 is the identity.
print(f"a clean photograph: {peak_signal_noise_ratio(clean, restore(clean)):.0f} dB from itself")

# %%
# From the command line the same is `lightning-em restore photo.jpg`, and `lightning-em restore FOLDER -o OUT` for a tree of
# files, whose kind, depth, profile and metadata stay.
