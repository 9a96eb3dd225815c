"""
A mixture that outliers do not pull
===================================

A few wild samples draw the means of a Gaussian mixture away and blow up its covariances. A mixture of t distributions gives
each sample a weight, and learns how heavy the tails are.
"""

# %%
# Three clusters, and one sample in twenty from anywhere.
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Ellipse

from lightning_modules import GaussianMixtureEstimator, StudentTMixtureEstimator

generator = np.random.default_rng(1)
means = np.array([[0.0, 0.0], [5.0, 1.0], [1.0, 5.0]])
samples = np.concatenate([generator.normal(mean, 0.6, (300, 2)) for mean in means])
outliers = generator.uniform(-25, 25, (45, 2))
x = np.concatenate([samples, outliers])

fits = {
    "Gaussian": GaussianMixtureEstimator(3, n_init=5, random_state=0).fit(x),
    "Student t": StudentTMixtureEstimator(3, n_init=5, random_state=0).fit(x),
}

# %%
# Ellipses hold the same share of each component.
figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharex=True, sharey=True)
for axis, (name, fit) in zip(axes, fits.items(), strict=True):
    axis.scatter(*x.T, s=4, color="tab:gray")
    for mean, covariance in zip(fit.means_, fit.covariances_, strict=True):
        values, vectors = np.linalg.eigh(covariance)
        angle = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
        axis.add_patch(
            Ellipse(mean, *4 * values[::-1] ** 0.5, angle=angle, fill=False, color="tab:orange", linewidth=2)
        )
    error = max(np.linalg.norm(fit.means_ - mean, axis=1).min() for mean in means)
    axis.set(title=f"{name}: worst mean off by {error:.2f}", xlim=(-12, 12), ylim=(-12, 12))
print("degrees of freedom:", fits["Student t"].degrees_of_freedom_.round(2))
