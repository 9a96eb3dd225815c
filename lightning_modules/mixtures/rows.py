"""Samples in memory, dense or sparse, and the few products that clustering asks of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse import csr_array


@dataclass
class SparseRows:
    """A CSR matrix of SciPy in the place of samples `[N, D]`; it is never made dense as a whole."""

    matrix: csr_array

    @property
    def shape(self) -> tuple[int, int]:
        """Samples and features."""
        rows, width = self.matrix.shape
        return rows, width

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers."""
        return torch.float32 if self.matrix.dtype == np.float32 else torch.float64

    @property
    def device(self) -> torch.device:
        """Where they are: SciPy knows the CPU only."""
        return torch.device("cpu")

    def __getitem__(self, part: slice) -> SparseRows:
        """Some rows, a view of these."""
        first, last, _ = part.indices(self.shape[0])
        begin, end = (int(self.matrix.indptr[row]) for row in (first, max(first, last)))
        pointers = self.matrix.indptr[first : max(first, last) + 1] - begin
        data = (self.matrix.data[begin:end], self.matrix.indices[begin:end], pointers)
        return SparseRows(type(self.matrix)(data, shape=(len(pointers) - 1, self.shape[1])))

    def index_select(self, dim: int, index: Tensor) -> SparseRows:
        """Some rows, in the order of `index`.

        Shape:
            - index: `[M]`
        """
        assert dim == 0
        return SparseRows(self.matrix[index.numpy()])

    def to(self, dtype: torch.dtype) -> SparseRows:
        """The same in another type."""
        return SparseRows(self.matrix.astype(np.float32 if dtype == torch.float32 else np.float64, copy=False))


Rows = Tensor | SparseRows


def width_of(z: Rows) -> int:
    """Numbers that one sample holds."""
    return z.shape[1] if isinstance(z, Tensor) else max(1, z.matrix.nnz // max(z.shape[0], 1))


def dense(z: Rows, index: Tensor | None = None) -> Tensor:
    """Samples, or those of an index, as a tensor of their own.

    Shape:
        - z: `[N, D]`
        - index: `[M]`
        - output: `[N, D]` or `[M, D]`
    """
    if isinstance(z, Tensor):
        return z if index is None else z.index_select(0, index.to(z.device))
    return torch.from_numpy((z if index is None else z.index_select(0, index)).matrix.toarray())


def products(vectors: Tensor, z: Rows) -> Tensor:
    """The product of each vector with each sample.

    Shape:
        - vectors: `[M, D]`
        - z: `[N, D]`
        - output: `[M, N]`
    """
    if isinstance(z, Tensor):
        return vectors @ z.T
    return _numpy_product(z.matrix, vectors.T.contiguous()).T


def sums(shares: Tensor, z: Rows) -> Tensor:
    """Sums of the samples, each with its share.

    Shape:
        - shares: `[M, N]`
        - z: `[N, D]`
        - output: `[M, D]`
    """
    if isinstance(z, Tensor):
        return shares @ z
    return _numpy_product(z.matrix.T, shares.T.contiguous()).T


def _numpy_product(matrix: Any, columns: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(matrix @ columns.numpy()))


def squared_norms(z: Rows) -> Tensor:
    """Squared norm of each sample.

    Shape:
        - z: `[N, D]`
        - output: `[N]`
    """
    if isinstance(z, Tensor):
        return torch.linalg.vector_norm(z, dim=1).square_()
    return torch.from_numpy(np.asarray(z.matrix.multiply(z.matrix).sum(axis=1)).reshape(-1))


def squares_to(z: Rows, targets: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of each sample to its target, exact to the last digits where they are close.

    Shape:
        - z: `[N, D]`
        - targets: `[K, D]`
        - labels: `[N]`
        - output: `[N]`
    """
    if isinstance(z, Tensor):
        return (z - targets[labels]).square_().sum(dim=1)
    z = z.to(torch.float64)
    matrix = z.matrix
    row = np.repeat(np.arange(z.shape[0]), np.diff(matrix.indptr))
    at = targets.double().numpy()[labels.numpy()[row], matrix.indices]
    # what the stored numbers change in the square of the target
    change = np.bincount(row, (matrix.data - at) ** 2 - at**2, minlength=z.shape[0])
    norms = squared_norms(targets.double())[labels]
    squares = torch.from_numpy(change).add_(norms)
    rounding = 32 * torch.finfo(z.dtype).eps * (norms + squared_norms(z))
    return torch.where(squares <= rounding, 0.0, squares)


def distinct(samples: Tensor) -> Tensor:
    """Positions of the samples that equal none before them, in their order.

    Shape:
        - samples: `[N, D]`
        - output: `[M]`
    """
    _, inverse = torch.unique(samples, dim=0, return_inverse=True)
    position = torch.arange(len(samples), device=samples.device)
    first = torch.full_like(position, len(samples)).scatter_reduce(0, inverse, position, "amin")
    return first[first < len(samples)].sort().values
