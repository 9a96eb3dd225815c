"""Samples in memory, dense or sparse, and the few products that clustering asks of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csc_array, csr_array
from torch import Tensor

from lightning_modules.mixtures.chunks import chunk_size
from lightning_modules.mixtures.standardizer import Standardizer


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


@dataclass
class FramedRows:
    """Dense samples `[N, D]` that are standardized whenever some are looked at: the data are not copied.

    Attributes:
        x: `[N, D]`, in any type.
        standardizer: The map to standardized samples.
        dtype: Their type.
    """

    x: Tensor
    standardizer: Standardizer
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Samples and features."""
        return self.x.shape

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.x.device

    def __getitem__(self, part: slice) -> Tensor:
        """Some samples, standardized.

        Shape:
            - output: `[M, D]`
        """
        return self.standardizer.transform(self.x[part]).to(self.dtype)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Some samples, standardized, in the order of `index`.

        Shape:
            - index: `[M]`
            - output: `[M, D]`
        """
        return FramedRows(self.x.index_select(dim, index), self.standardizer, self.dtype)[:]


Rows = Tensor | SparseRows | FramedRows


def width_of(z: Rows) -> int:
    """Numbers that one sample holds."""
    return max(1, z.matrix.nnz // max(z.shape[0], 1)) if isinstance(z, SparseRows) else z.shape[1]


def dense(z: Rows, index: Tensor | None = None) -> Tensor:
    """Samples, or those of an index, as a tensor of their own.

    Shape:
        - z: `[N, D]`
        - index: `[M]`
        - output: `[N, D]` or `[M, D]`
    """
    part = z if index is None else z.index_select(0, index.to(z.device))
    if isinstance(part, FramedRows):
        return part[:]
    return torch.from_numpy(part.matrix.toarray()) if isinstance(part, SparseRows) else part


def products(vectors: Tensor, z: Rows) -> Tensor:
    """The product of each vector with each sample.

    Shape:
        - vectors: `[M, D]`
        - z: `[N, D]`
        - output: `[M, N]`
    """
    if isinstance(z, SparseRows):
        return torch.from_numpy(np.asarray(z.matrix @ vectors.T.contiguous().numpy())).T
    return vectors @ dense(z).T


def sums_by_label(z: Rows, labels: Tensor, num_labels: int, weights: Tensor | None = None) -> Tensor:
    """Sums of the samples of each label.

    Shape:
        - z: `[N, D]`
        - labels: `[N]`
        - weights: `[N]`
        - output: float64 `[num_labels, D]`
    """
    total = torch.zeros(num_labels, z.shape[1], dtype=torch.float64, device=z.device)
    names = torch.arange(num_labels, device=z.device)[:, None]
    step = z.shape[0] if isinstance(z, SparseRows) else chunk_size(4 * z.shape[1], z.device)
    for first in range(0, z.shape[0], max(step, 1)):
        chunk: Tensor | SparseRows = z[first : first + step].to(torch.float64)
        label = labels[first : first + step]
        share = torch.ones_like(label).double() if weights is None else weights[first : first + step]
        if isinstance(chunk, Tensor) and z.device.type != "cpu":
            total += ((label == names) * share) @ chunk
            continue
        # a product of what is almost all zeros: a tenth of the time of the dense one
        shape = (num_labels, len(label))
        indicator = csc_array((share.numpy(), label.numpy(), np.arange(len(label) + 1)), shape=shape)
        part = indicator @ (chunk.matrix if isinstance(chunk, SparseRows) else chunk.numpy())
        total += torch.from_numpy(part.toarray() if isinstance(chunk, SparseRows) else part)
    return total


def squared_norms(z: Rows) -> Tensor:
    """Squared norm of each sample.

    Shape:
        - z: `[N, D]`
        - output: `[N]`
    """
    if isinstance(z, SparseRows):
        return torch.from_numpy(np.asarray(z.matrix.multiply(z.matrix).sum(axis=1)).reshape(-1))
    return torch.linalg.vector_norm(dense(z), dim=1).square_()


def screened(z: Rows) -> tuple[Rows, Tensor]:
    """The samples in float32, and their squared norms.

    Shape:
        - z: `[N, D]`
        - output: `[N, D]` and `[N]`
    """
    if isinstance(z, SparseRows):
        return z.to(torch.float32), squared_norms(z)
    single = torch.empty(*z.shape, dtype=torch.float32, device=z.device)
    norms = torch.empty(z.shape[0], dtype=z.dtype, device=z.device)
    step = chunk_size(4 * z.shape[1], z.device)
    for first in range(0, z.shape[0], step):
        chunk = z[first : first + step]
        single[first : first + step], norms[first : first + step] = chunk, squared_norms(chunk)
    return single, norms


def squares_to(z: Rows, targets: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of each sample to its target, exact to the last digits where they are close.

    Shape:
        - z: `[N, D]`
        - targets: `[K, D]`
        - labels: `[N]`
        - output: `[N]`
    """
    if not isinstance(z, SparseRows):
        return squared_norms(targets.index_select(0, labels).sub_(dense(z)))
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
