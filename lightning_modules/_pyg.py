"""PyTorch Geometric, imported where it is used: that takes as long as torch."""

import warnings

with warnings.catch_warnings():
    # It compiles functions as it is imported, by what newer versions of torch give up.
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated")
    from torch_geometric import typing
    from torch_geometric.data import Batch, Data
    from torch_geometric.nn import MessagePassing, knn, radius_graph
    from torch_geometric.utils import remove_self_loops, scatter, to_undirected

__all__ = [
    "Batch",
    "Data",
    "MessagePassing",
    "knn",
    "radius_graph",
    "remove_self_loops",
    "scatter",
    "to_undirected",
    "typing",
]
