"""Graph diffusion of images and point sets: tensor mathematics that knows nothing of Lightning."""

from lightning_modules._renamed import renamed
from lightning_modules.graph.graph_diffusion import GraphDiffusion
from lightning_modules.graph.patches import PatchGrid
from lightning_modules.graph.topology import knn_graph, radius_graph
from lightning_modules.imaging import seeded_normal, seeded_uniform
from lightning_modules.operators.operator import Smoothness

__all__ = ["GraphDiffusion", "PatchGrid", "Smoothness", "knn_graph", "radius_graph", "seeded_normal", "seeded_uniform"]

__getattr__ = renamed(__name__, {"estimate_noise_std": "lightning_modules.noise.estimate_noise_std"})
