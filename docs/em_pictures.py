"""Draws the pictures of docs/site/em.md: python docs/em_pictures.py [--output docs/images]."""

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_modules.mixtures import MixtureParameters, evidence_lower_bound, log_likelihood, posterior
from lightning_modules.mixtures.gaussian.em import e_step, m_step
from lightning_modules.mixtures.gaussian.model import GaussianMixtureModel
from lightning_modules.mixtures.kmeans.model import KMeansModel
from lightning_modules.mixtures.model import fit_in_memory
from lightning_modules.mixtures.model_selection import choose_num_components

SIZE = {"layout": "constrained"}


def blobs(stretch: float = 1.0, rows: int = 300) -> Tensor:
    """Three clusters in the plane; ``stretch`` lengthens them."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[0.0, 0.0], [0.0, 3.0], [0.0, 6.0]], dtype=torch.float64)
    noise = torch.randn(rows, 2, generator=generator, dtype=torch.float64) * torch.tensor([stretch, 0.5])
    return centers[torch.arange(rows) % 3] + noise


def bound_touches_likelihood() -> Figure:
    """The likelihood of one mean, and the bounds of two posteriors: each touches it where it was taken."""
    generator = torch.Generator().manual_seed(1)
    x = torch.cat([torch.randn(40, 1, generator=generator) - 2, torch.randn(40, 1, generator=generator) + 2]).double()
    grid = torch.linspace(-2.5, 5.5, 161, dtype=torch.float64)

    def theta(mean: float) -> MixtureParameters:
        weights, means = torch.tensor([0.5, 0.5]), torch.tensor([[-2.0], [mean]])
        return MixtureParameters("diag", weights, means, torch.ones(2, 1))

    figure = Figure(figsize=(6, 3.6), **SIZE)
    axes = figure.subplots()
    axes.plot(grid, [float(log_likelihood(theta(float(m)), x)) for m in grid], color="black", label="log-likelihood")
    for start, colour in ((-0.5, "tab:orange"), (1.0, "tab:blue")):
        q = posterior(theta(start), x)
        bound = torch.stack([evidence_lower_bound(q, theta(float(m)), x) for m in grid])
        axes.plot(grid, bound, color=colour, linestyle="--", label=f"bound, q from mean {start:g}")
        axes.plot([start], [float(log_likelihood(theta(start), x))], "o", color=colour)
        axes.plot([float(grid[bound.argmax()])], [float(bound.max())], "x", color=colour)
    axes.set(xlabel="mean of the second component", ylabel="nats", ylim=(-330, -145))
    axes.legend()
    return figure


def responsibilities_move() -> Figure:
    """Responsibilities over the iterations, as mixed colours."""
    x = blobs(1.0)
    theta = MixtureParameters(
        "full",
        torch.full((3,), 1 / 3),
        torch.tensor([[-1.0, 2.0], [0.0, 2.5], [1.0, 3.5]]),
        torch.eye(2).repeat(3, 1, 1),
    ).batched()
    figure = Figure(figsize=(9, 3.2), **SIZE)
    moments = (0, 2, 8, 30)
    panels = figure.subplots(1, len(moments), sharex=True, sharey=True)
    for iteration in range(moments[-1] + 1):
        if iteration in moments:
            axes = panels[moments.index(iteration)]
            q = posterior(theta.select(0), x)
            axes.scatter(x[:, 0], x[:, 1], c=q.clamp(0, 1).numpy(), s=6)
            axes.plot(theta.means[0, :, 0], theta.means[0, :, 1], "kx")
            axes.set_title(f"iteration {iteration}")
        statistics = e_step(theta.components(), x)
        theta = m_step(statistics, torch.full((2,), 1e-6, dtype=torch.float64), theta)
    return figure


def elongated_clusters() -> Figure:
    """K-means cuts long clusters; a mixture follows them."""
    x = blobs(4.0, 600)
    mixture, kmeans = GaussianMixtureModel(3, n_init=8, init="random", tol=1e-6), KMeansModel(3, n_init=8)
    fit_in_memory(mixture, x)
    fit_in_memory(kmeans, x)
    panels = {"K-means": kmeans.assign(x)[0], "Gaussian mixture": mixture.log_joint(x).argmax(1)}
    return _panels(x, panels)


def feature_scaling() -> Figure:
    """K-means on features of unlike units, plain and standardised."""
    x = blobs(0.5) * torch.tensor([100.0, 1.0], dtype=torch.float64)
    panels = {}
    for title, standardize in (("plain", False), ("standardised", True)):
        model = KMeansModel(3, n_init=8, standardize=standardize)
        fit_in_memory(model, x)
        panels[title] = model.assign(x)[0]
    return _panels(x, panels)


def _panels(x: Tensor, panels: dict[str, Tensor]) -> Figure:
    figure = Figure(figsize=(8, 3.2), **SIZE)
    for axes, (title, labels) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.scatter(x[:, 0], x[:, 1], c=labels, s=5, cmap="viridis")
        axes.set_title(title)
    return figure


def number_of_components() -> Figure:
    """The Bayesian information criterion over the number of components."""
    return choose_num_components(blobs(1.0), range(1, 8), n_init=3).figure()


def grid_of_blobs(rows: int = 900) -> Tensor:
    """Nine clusters on a square grid."""
    generator = torch.Generator().manual_seed(0)
    centers = 3.0 * torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0)).double()
    return centers[torch.arange(rows) % 9] + 0.5 * torch.randn(rows, 2, generator=generator, dtype=torch.float64)


def local_minima() -> Figure:
    """K-means from two starts, each at rest: one with two centers in one cluster."""
    x, panels, ends = grid_of_blobs(), {}, []
    for seed in range(20):
        model = KMeansModel(9, init="random", seed=seed)
        fit_in_memory(model, x)
        ends.append((float(model.objective[model.best]), seed, model))
    ends.sort(key=lambda end: end[0])
    for name, (inertia, _, model) in (("best", ends[0]), ("worst", ends[-1])):
        panels[f"{name} of 20 starts, inertia {inertia:.0f}"] = model.assign(x)[0]
    return _panels(x, panels)


def starts_compared() -> Figure:
    """The inertia that K-means comes to, over the best known, from each kind of start."""
    x = grid_of_blobs()
    kinds: dict[str, dict[str, Any]] = {
        "random": {"init": "random"},
        "k-means++": {"init": "k-means++"},
        "k-means||": {"init": "k-means||"},
        "mini-batch, k-means++": {"init": "k-means++", "algorithm": "stepwise", "max_iter": 5},
        "random, best of 10": {"init": "random", "n_init": 10},
        "k-means++, best of 10": {"init": "k-means++", "n_init": 10},
    }
    ends: dict[str, list[float]] = {name: [] for name in kinds}
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    for name, options in kinds.items():
        for seed in range(15):
            model = KMeansModel(9, seed=seed, **options)
            fit_in_memory(model, x[order], 300)
            ends[name].append(float(model.assign(x)[1].sum()))
    least = min(min(values) for values in ends.values())
    figure = Figure(figsize=(7, 3.2), **SIZE)
    axes = figure.subplots()
    axes.boxplot([[value / least for value in values] for values in ends.values()], vert=False, whis=(0, 100))
    axes.set_yticks(range(1, len(ends) + 1), list(ends))
    axes.set(xlabel="inertia at rest, over the best known (15 seeds)")
    return figure


PICTURES = {
    "em_bound": bound_touches_likelihood,
    "em_responsibilities": responsibilities_move,
    "em_elongated": elongated_clusters,
    "em_scaling": feature_scaling,
    "em_components": number_of_components,
    "em_local_minima": local_minima,
    "em_starts": starts_compared,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images")
    folder = parser.parse_args(arguments).output
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw().savefig(folder / f"{name}.png", dpi=80)


if __name__ == "__main__":
    main()
