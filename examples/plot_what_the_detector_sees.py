"""
What the detector sees
======================

The detector looks at what a restoration takes away from an image. Noise and the marks of up-sampling layers stay in it, and
much of the scene does not.
"""

# %%
# A photograph, and a stand-in for its twin by an autoencoder: the same photograph halved, doubled and smoothed, as the last
# layers of a decoder do. Content and size are the same; only the trace of the up-sampling differs.
import matplotlib.pyplot as plt
import torch
from skimage import data

from lightning_modules.detection import NeighborDifferences, RestorationResidual

photograph = torch.from_numpy(data.coffee()).permute(2, 0, 1)[None, :, 100:356, 200:456].float() / 255
small = torch.nn.functional.interpolate(photograph, scale_factor=0.5, mode="area")
twin = torch.nn.functional.interpolate(small, scale_factor=2, mode="nearest")
twin = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(twin, (1, 1, 1, 1), mode="replicate"), 3, 1)

# %%
# The residual of the restoration that ships, and its spectrum: the twin has lost what a sensor would have left at high
# frequencies.
residual = RestorationResidual()
images = {"photograph": photograph, "twin": twin}
with torch.no_grad():
    seen = {name: residual(image)[0] for name, image in images.items()}
spectra = {
    name: torch.fft.fftshift(torch.fft.fft2(layers).abs().square().mean(0), dim=(0, 1)).log10()
    for name, layers in seen.items()
}
least, most = torch.stack(list(spectra.values())).quantile(torch.tensor([0.02, 0.998])).tolist()

figure, axes = plt.subplots(2, 3, figsize=(11, 7), layout="constrained")
for row, name in zip(axes, images, strict=True):
    row[0].imshow(images[name][0].permute(1, 2, 0).clamp(0, 1))
    row[0].set(title=name)
    row[1].imshow((0.5 + seen[name].permute(1, 2, 0) / (6 * seen[name].std())).clamp(0, 1))
    row[1].set(title="residual")
    row[2].imshow(spectra[name], cmap="magma", vmin=least, vmax=most)
    row[2].set(title="its spectrum, log")
    for axis in row:
        axis.set(xticks=[], yticks=[])

# %%
# Differences of neighbouring pixels show the same without a restoration.
print(NeighborDifferences()(photograph).shape)
