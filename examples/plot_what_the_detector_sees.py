"""
What the detector sees
======================

The detector looks at what a restoration takes away from an image. Noise and the marks of up-sampling layers stay in it, and
much of the scene does not.
"""

# %%
# A photograph, and its twin: the same photograph through an autoencoder of random convolutions that halves and doubles the
# image. Content, size and history are the same; only the decoder's trace differs.
import matplotlib.pyplot as plt
import torch
from skimage import data

from lightning_modules.detection import NeighborDifferences, RestorationResidual

photograph = torch.from_numpy(data.coffee()).permute(2, 0, 1)[None, :, 100:356, 200:456].float() / 255
small = torch.nn.functional.interpolate(photograph, scale_factor=0.5, mode="area")
twin = torch.nn.functional.interpolate(small, scale_factor=2, mode="nearest")
twin = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(twin, (1, 1, 1, 1), mode="replicate"), 3, 1)

# %%
# The residual of the restoration that ships, and its spectrum: up-sampling leaves lines where a sensor leaves none.
residual = RestorationResidual()
figure, axes = plt.subplots(2, 3, figsize=(11, 7), layout="constrained")
for row, (name, image) in zip(axes, {"photograph": photograph, "twin": twin}.items(), strict=True):
    with torch.no_grad():
        seen = residual(image)[0]
    spectrum = torch.fft.fftshift(torch.fft.fft2(seen).abs().square().mean(0)).log10()
    row[0].imshow(image[0].permute(1, 2, 0).clamp(0, 1))
    row[0].set(title=name)
    row[1].imshow((0.5 + seen.permute(1, 2, 0) / (6 * seen.std())).clamp(0, 1))
    row[1].set(title="residual")
    row[2].imshow(spectrum, cmap="magma", vmin=-4, vmax=2)
    row[2].set(title="its spectrum, log")
    for axis in row:
        axis.set(xticks=[], yticks=[])

# %%
# Differences of neighbouring pixels show the same without a restoration.
print(NeighborDifferences()(photograph).shape)
