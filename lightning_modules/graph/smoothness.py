"""How smooth a signal is on its graph."""

from typing import NamedTuple

from torch import Tensor


class Smoothness(NamedTuple):
    r"""Smoothness of each image on its own graph.

    .. math:: 0.7 \min(1, s) + 0.3 \min(1, |E| / 5N)

    Attributes:
        score: The score, `[B]`. On dense graphs its second term is always 0.3.
        similarity: Mean similarity s over the edges, `[B]`: what thresholds are compared with.
    """

    score: Tensor
    similarity: Tensor

    @classmethod
    def from_similarity(cls, similarity: Tensor, num_edges: int, num_nodes: int) -> "Smoothness":
        """Smoothness of images whose graphs have `num_edges` edges, both directions counted, and `num_nodes` nodes."""
        density = min(1.0, num_edges / (5 * num_nodes))
        return cls(0.7 * similarity.clamp_max(1) + 0.3 * density, similarity)
