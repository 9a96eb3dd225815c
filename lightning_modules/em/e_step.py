"""Statistics of an E-step: values for each image, and their sums for each row of the table."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Columns of `SufficientStatistics.sums` after the gradient's and its products'.
_COLUMNS = ("square_count", "cube_count", "count", "reconstruction", "perceptual", "smoothness", "similarity", "proxy")
# Parameters between which products of gradients are kept; more are taken in blocks of as many.
MAX_BLOCK = 32


class EStep(NamedTuple):
    r"""Statistics of one batch, for each image, which a `training_step` returns under the key `"em"`.

    The loss proxy is :math:`\ell = L_{recon} + L_{percep} - \alpha \cdot \mathrm{smoothness}`.

    Attributes:
        responsibilities: Responsibility of each row for each image, `[B, K]`; zeros use the global set alone.
        weight: Weight of each image in the batch's loss, `[B]`; 0 leaves the image out (a padded repeat). None: all 1.
        reconstruction: Reconstruction loss of each image, `[B]`.
        perceptual: Perceptual loss of each image, `[B]`; None where there is none.
        smoothness: Smoothness score of each restored image, `[B]`; None where it is not measured.
        similarity: Mean similarity over the edges of each image, `[B]`; None takes `smoothness`.
        smoothness_weight: α.
        latent: Sufficient statistics of each image for the assignment's own M-step, `[B, M]`; None where it has none.
        gradient: Gradient of each image's proxy with respect to the table's coordinates, `[B, P]`, where it does not
            come with the backward pass: `ParameterPair.gradient`.

    Example:
        >>> step = EStep(torch.zeros(2, 0), None, torch.tensor([0.5, 0.25]))
        >>> step.proxy.tolist()
        [0.5, 0.25]
    """

    responsibilities: Tensor
    weight: Tensor | None
    reconstruction: Tensor
    perceptual: Tensor | None = None
    smoothness: Tensor | None = None
    similarity: Tensor | None = None
    smoothness_weight: float = 0.0
    latent: Tensor | None = None
    gradient: Tensor | None = None

    def check(self, num_rows: int) -> None:
        """Raise `ValueError` for statistics of the wrong shape; nothing is read from the device.

        Args:
            num_rows: Number K of the table's rows.
        """
        rows = self.responsibilities
        for name in ("responsibilities", "weight", "reconstruction", "perceptual", "smoothness", "similarity"):
            value, may_be_none = getattr(self, name), name not in ("responsibilities", "reconstruction")
            if not isinstance(value, Tensor) and not (value is None and may_be_none):
                raise ValueError(
                    f"EStep.{name} must be a tensor with the numbers of each image of the batch, got "
                    f"{type(value).__name__}"
                )
        if rows.ndim != 2 or rows.shape[1] != num_rows:
            raise ValueError(
                f"EStep.responsibilities must be [B, {num_rows}], one column for each row of the table, got "
                f"{list(rows.shape)}"
            )
        for name in ("weight", "reconstruction", "perceptual", "smoothness", "similarity"):
            value = getattr(self, name)
            if value is not None and value.shape != rows.shape[:1]:
                raise ValueError(
                    f"EStep.{name} must be [{len(rows)}], one number for each image of the batch, got "
                    f"{list(value.shape)}: leave out the mean over the batch"
                )

    def mean(self, other: "EStep") -> "EStep":
        """The statistics of the same images under two sets of parameters, in the middle between the two."""

        def middle(here: Tensor | None, there: Tensor | None) -> Tensor | None:
            return None if here is None or there is None else (here + there) / 2

        return self._replace(
            reconstruction=(self.reconstruction + other.reconstruction) / 2,
            perceptual=middle(self.perceptual, other.perceptual),
            smoothness=middle(self.smoothness, other.smoothness),
            similarity=middle(self.similarity, other.similarity),
        )

    @property
    def proxy(self) -> Tensor:
        """Loss proxy ℓ of each image, float64.

        Shape:
            - output: `[B]`
        """
        proxy = self.reconstruction.double()
        if self.perceptual is not None:
            proxy = proxy + self.perceptual.double()
        if self.smoothness is not None and self.smoothness_weight:
            proxy = proxy - self.smoothness_weight * self.smoothness.double()
        return proxy


class SufficientStatistics:
    """Sums over images: row 0 over all of them, row k weighted by the responsibility of table row k.

    Sums and counts add up over micro-batches and processes, and only then become means: never means of means. How
    far a mean over shared images can be trusted is a matter of the squares of the responsibilities r.

    Products of gradients are kept between parameters of a block. Up to 32 parameters are one block; of a thousand, all
    products would be a million numbers for each row.

    Args:
        num_rows: Number K of the table's rows.
        num_parameters: Number P of the table's parameters.
        device: Device of the sums.

    Attributes:
        sums: One float64 tensor `[K + 1, 2P + N·S² + 8]`: r g, with the gradient g of the proxy with respect to the
            table's coordinates; r² g, and r² g gᵀ of each of N blocks of S; r² and r³; then, each times r, 1 (count),
            reconstruction, perceptual, smoothness, similarity and proxy.
        latent: Sums of the assignment's own statistics, float64 `[M]`.
        num_blocks: Number N of blocks.
        block_size: Number S of parameters in a block; the last may have fewer, and zeros in their place.

    Example:
        >>> statistics = SufficientStatistics(num_rows=1, num_parameters=2)
        >>> statistics.add(EStep(torch.ones(4, 1), None, torch.tensor([1.0, 2.0, 3.0, 4.0])), gradient=torch.ones(4, 2))
        >>> statistics.mean("reconstruction").tolist(), statistics.mean_gradient[1].tolist()
        ([2.5, 2.5], [1.0, 1.0])
    """

    def __init__(self, num_rows: int, num_parameters: int, device: torch.device | str = "cpu") -> None:
        self.num_parameters = num_parameters
        self.num_blocks, self.block_size = block_shape(num_parameters)
        products = self.num_blocks * self.block_size**2
        self.sums = torch.zeros(
            num_rows + 1, 2 * num_parameters + products + len(_COLUMNS), dtype=torch.float64, device=device
        )
        self.latent = self.sums.new_zeros(0)

    @torch.no_grad()
    def add(self, step: EStep, gradient: Tensor | None) -> None:
        """Add the images of a batch.

        Args:
            step: Values for each image.
            gradient: Gradient of each image's proxy with respect to its parameters' coordinates; None adds zeros.

        Shape:
            - gradient: `[B, P]`
        """
        rows = step.responsibilities.double()
        # Shape-preserving zeros would keep a NaN of an image that is left out: select, do not multiply.
        used = rows.new_ones(len(rows), dtype=torch.bool) if step.weight is None else step.weight > 0
        share = torch.cat([rows.new_ones(len(rows), 1), rows], dim=1)
        zero = rows.new_zeros(len(rows))
        smoothness = zero if step.smoothness is None else step.smoothness.double()
        gradient = rows.new_zeros(len(rows), self.num_parameters) if gradient is None else gradient.double()
        columns = [
            torch.ones_like(zero),
            step.reconstruction.double(),
            zero if step.perceptual is None else step.perceptual.double(),
            smoothness,
            smoothness if step.similarity is None else step.similarity.double(),
            step.proxy,
        ]
        share, gradient, values = (
            torch.where(used[:, None], part, 0.0) for part in (share, gradient, torch.stack(columns, dim=1))
        )
        square, one = share.square().T, torch.ones_like(gradient[:, :1])
        blocks = in_blocks(gradient)
        products = (blocks[..., :, None] * blocks[..., None, :]).flatten(1)
        squares = square @ torch.cat([gradient, products, one], dim=1)
        cubes = share.pow(3).sum(0)[:, None]
        self.sums += torch.cat([share.T @ gradient, squares, cubes, share.T @ values], dim=1)
        if step.latent is not None:
            latent = torch.where(used[:, None], step.latent.double(), 0.0).sum(0)
            self.latent = latent if not len(self.latent) else self.latent + latent

    def reduced(self, reduce: Callable[[Tensor], Tensor]) -> "SufficientStatistics":
        """The sums over all processes.

        Args:
            reduce: Called once, on one flat vector, which it may write to.

        Shape:
            - reduce: from `[N]` to `[N]`
        """
        flat = reduce(torch.cat([self.sums.flatten(), self.latent]))
        total = SufficientStatistics(len(self.sums) - 1, self.num_parameters, self.sums.device)
        total.sums, total.latent = flat[: self.sums.numel()].view_as(self.sums), flat[self.sums.numel() :]
        return total

    def sum(self, name: str) -> Tensor:
        """Sum of one quantity by its name, row 0 over all images.

        Shape:
            - output: `[K + 1]`
        """
        return self.sums[:, _COLUMNS.index(name) - len(_COLUMNS)]

    def mean(self, name: str) -> Tensor:
        """Mean of one quantity by its name; 0 for rows without images.

        Shape:
            - output: `[K + 1]`
        """
        return self.sum(name) / self.count.clamp_min(torch.finfo(torch.float64).tiny)

    @property
    def count(self) -> Tensor:
        """Number of images, weighted by the responsibilities, `[K + 1]`."""
        return self.sum("count")

    @property
    def mean_gradient(self) -> Tensor:
        """Mean gradient of the proxy with respect to the coordinates, `[K + 1, P]`; 0 for rows without images."""
        return self.sums[:, : self.num_parameters] / self.count[:, None].clamp_min(torch.finfo(torch.float64).tiny)

    @property
    def effective_count(self) -> Tensor:
        r"""How many whole images would give as good a mean, :math:`(\sum r)^2 / \sum r^2`, `[K + 1]`."""
        return self.count.square() / self.sum("square_count").clamp_min(torch.finfo(torch.float64).tiny)

    @property
    def mean_square_gradient(self) -> Tensor:
        """Mean over the images of g², weighted by r², `[K + 1, P]`; 0 for rows without images."""
        square = self.sum("square_count")[:, None].clamp_min(torch.finfo(torch.float64).tiny)
        return self._products.diagonal(dim1=2, dim2=3).flatten(1)[:, : self.num_parameters] / square

    @property
    def gradient_scatter(self) -> Tensor:
        r"""How far the images' gradients differ: :math:`\sum r^2 (g - \bar g)(g - \bar g)^\top`, `[K + 1, P, P]`.

        Over `freedom` times `count`, it is the covariance of the mean gradient :math:`\bar g = \sum r g / \sum r`. 0
        between parameters of different blocks.
        """
        scatter, size = self.block_scatter, self.num_parameters
        if self.num_blocks == 1:
            return scatter[:, 0]
        return torch.stack([torch.block_diag(*row)[:size, :size] for row in scatter])

    @property
    def block_scatter(self) -> Tensor:
        """`gradient_scatter` of each block, `[K + 1, N, S, S]`."""
        size, mean = self.num_parameters, in_blocks(self.mean_gradient)
        across = in_blocks(self.sums[:, size : 2 * size])[..., :, None] * mean[..., None, :]
        square = self.sum("square_count")[:, None, None, None]
        return self._products - across - across.mT + square * mean[..., :, None] * mean[..., None, :]

    @property
    def freedom(self) -> Tensor:
        r"""Degrees of freedom of `gradient_scatter`, `[K + 1]`: n − 1 for n images that a row has to itself.

        Gradients of covariance V have a mean of covariance :math:`V \sum r^2 / (\sum r)^2` and a scatter of expectation
        :math:`V (\sum r^2 - 2 \sum r^3 / \sum r + (\sum r^2)^2 / (\sum r)^2)`.
        """
        tiny = torch.finfo(torch.float64).tiny
        square = self.sum("square_count")
        freedom = self.count - 2 * self.sum("cube_count") / square.clamp_min(tiny) + square / self.count.clamp_min(tiny)
        return freedom.clamp_min(0)

    @property
    def _products(self) -> Tensor:
        shape = (self.num_blocks, self.block_size, self.block_size)
        return self.sums[:, 2 * self.num_parameters :][:, : math.prod(shape)].unflatten(1, shape)

    @property
    def finite(self) -> Tensor:
        """Whether every sum is finite, a boolean on the device."""
        return self.sums.isfinite().all() & self.latent.isfinite().all()


def block_shape(num_parameters: int) -> tuple[int, int]:
    """Number of blocks, and the parameters of each: as few and as equal as can be.

    Example:
        >>> block_shape(5), block_shape(1176)
        ((1, 5), (37, 32))
    """
    count = max(1, math.ceil(num_parameters / MAX_BLOCK))
    return count, math.ceil(num_parameters / count)


def in_blocks(values: Tensor) -> Tensor:
    """Numbers of all parameters, block by block; zeros fill up the last.

    Shape:
        - values: `[..., P]`
        - output: `[..., N, S]`
    """
    count, size = block_shape(values.shape[-1])
    padding = count * size - values.shape[-1]
    return (F.pad(values, (0, padding)) if padding else values).unflatten(-1, (count, size))
