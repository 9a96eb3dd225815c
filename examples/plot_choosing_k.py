"""
How many components
===================

`choose_num_components` fits any family for each number of components and compares: BIC counts densities, ICL counts clusters
that are apart, and held-out likelihood assumes nothing about the number of samples.
"""

# %%
# Four clusters, two of which overlap.
import matplotlib.pyplot as plt
import torch

from lightning_modules.mixtures import choose_num_components

generator = torch.Generator().manual_seed(0)
centers = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0], [3.2, 6.0]])
x = (centers[:, None] + torch.randn(4, 250, 2, generator=generator)).flatten(0, 1)

choices = {
    criterion: choose_num_components(x, range(1, 8), criterion=criterion, n_init=3)
    for criterion in ("bic", "icl", "held-out")
}
print({criterion: choice.best for criterion, choice in choices.items()})

# %%
# The curves, less their own minimum.
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
left.scatter(*x.T, s=4, color="tab:gray")
for criterion, choice in choices.items():
    curve = torch.tensor(choice.criterion)
    right.plot(choice.candidates, (curve - curve.min()) / (curve.max() - curve.min()), marker="o", label=criterion)
right.set(xlabel="components", ylabel="criterion, scaled")
right.legend()
