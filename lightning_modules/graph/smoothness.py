"""Smoothness of a signal on its graph."""

from torch import Tensor

from lightning_modules.operators.operator import Smoothness


def graph_smoothness(similarity: Tensor, num_edges: int, num_nodes: int) -> Smoothness:
    r"""Smoothness of images from the mean similarity s over the edges of their graphs.

    .. math:: 0.7 \min(1, s) + 0.3 \min(1, |E| / 5N)

    On dense graphs the second term is always 0.3.

    Args:
        similarity: Mean similarity of each image.
        num_edges: Number of edges, both directions counted.
        num_nodes: Number of nodes.

    Shape:
        - similarity: `[B]`
        - output: two tensors `[B]`
    """
    density = min(1.0, num_edges / (5 * num_nodes))
    return Smoothness(0.7 * similarity.clamp_max(1) + 0.3 * density, similarity)
