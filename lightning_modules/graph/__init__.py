"""Graph diffusion of images and point sets: tensor mathematics that knows nothing of Lightning."""

from lightning_modules.graph.graph_diffusion import GraphDiffusion
from lightning_modules.graph.noise import estimate_noise_std
from lightning_modules.graph.patches import PatchGrid
from lightning_modules.graph.smoothness import Smoothness
from lightning_modules.graph.topology import radius_graph
from lightning_modules.imaging import seeded_normal, seeded_uniform

__all__ = [
    "GraphDiffusion",
    "PatchGrid",
    "Smoothness",
    "estimate_noise_std",
    "radius_graph",
    "seeded_normal",
    "seeded_uniform",
]
