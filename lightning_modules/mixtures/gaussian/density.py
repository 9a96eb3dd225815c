"""Log densities of many Gaussians and weighted moments of the data, as few large matrix products in cached chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.mixtures.chunks import chunk_size

CovarianceType = Literal["full", "diag", "tied", "spherical"]

LOG_2PI = math.log(2 * math.pi)
# Above this precision (in units of the data's variance) the expanded square z'Pz - 2z'Pm + m'Pm loses digits that
# matter.
MAX_PRODUCT_PRECISION = 1e6
# Symmetric features z_i z_j are formed block by block; a block of 8 wastes 7 % of the products at D = 48 and needs 6
# calls.
BLOCK = 8
# Beyond this width the symmetric features of one chunk no longer fit a cache, and the centered form is as fast.
MAX_PRODUCT_FEATURES = 256


def cholesky_or_raise(matrices: Tensor, reg_covar: float | None = None) -> Tensor:
    """Lower Cholesky factors; the error names the components and what a user can change.

    Shape:
        - matrices: `[…, D, D]`
        - output: `[…, D, D]`
    """
    factors, info = torch.linalg.cholesky_ex(matrices)
    bad = (info > 0) | ~torch.isfinite(factors).all(dim=-1).all(dim=-1)
    if bool(bad.any()):
        raise ValueError(ill_defined_message(bad, reg_covar))
    return factors


def ill_defined_message(bad: Tensor, reg_covar: float | None) -> str:
    """The message for covariances that are not positive definite.

    Shape:
        - bad: `[…, K]`, true for those components
    """
    named = sorted({int(k) for k in bad.reshape(-1, bad.shape[-1] if bad.ndim else 1).nonzero()[:, 1]})
    given = "" if reg_covar is None else f" at reg_covar={reg_covar:g}"
    return (
        f"The covariance of component(s) {named} is not positive definite{given}. Fitting the mixture model failed "
        "because some components have ill-defined empirical covariance (for instance caused by singleton or collapsed "
        "samples). Try to decrease the number of components, increase reg_covar, or scale the input data."
    )


@dataclass
class GaussianComponents:
    r"""S mixtures of K Gaussians, prepared for one pass over the data.

    Two forms compute the same. The *product* form writes :math:`\log \pi_k N(z; \mu_k, \Sigma_k)` as one product of
    coefficients with the features :math:`(z_i z_j)_{i \le j}, z, 1`, which also are what the M-step sums: two matrix
    products a chunk and half the arithmetic. The *centered* form computes :math:`\|L_k^\top (z - \mu_k)\|^2` and
    moments about :math:`\mu_k`: for precisions so large that the expanded square would lose digits.

    Attributes:
        covariance_type: Which of the covariances are free.
        means: `[S, K, D]`.
        factors: Cholesky factors of the precisions, `[S, K, D, D]` (full), `[S, D, D]` (tied) or `[S, K, D]` (diag,
            spherical).
        log_constant: What does not depend on the sample, `[S, K]`.
        centered: Whether this is the centered form.
        coefficients: `[S·K, F]`; None in the centered form.
    """

    covariance_type: CovarianceType
    means: Tensor
    factors: Tensor
    log_constant: Tensor
    centered: bool
    coefficients: Tensor | None
    # one chunk's features, used again by the next: memory that is already in cache
    _scratch: Tensor | None = None

    @classmethod
    def prepare(
        cls,
        covariance_type: CovarianceType,
        weights: Tensor,
        means: Tensor,
        covariances: Tensor,
        centered: bool | None = None,
        check: bool = True,
    ) -> GaussianComponents:
        """Factorise the covariances, once an epoch, and choose the form by the largest precision.

        With `centered` given and without `check` the host need not wait for the device.

        Shape:
            - weights: `[S, K]`
            - means: `[S, K, D]`
            - covariances: `[S, K, D, D]` (full), `[S, D, D]` (tied), `[S, K, D]` (diag) or `[S, K]` (spherical)
        """
        num_features = means.shape[-1]
        factors = precision_factors(covariance_type, covariances, num_features, check)
        if covariance_type in ("diag", "spherical"):
            log_determinant, largest = factors.log().sum(dim=-1), factors.square().amax()
        else:
            log_determinant = factors.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
            largest = factors.square().sum(dim=-1).amax()
        if covariance_type == "tied":
            log_determinant = log_determinant[:, None]
        log_weights = weights.clamp(min=torch.finfo(torch.float64).tiny).log()
        log_constant = log_weights + log_determinant - 0.5 * num_features * LOG_2PI
        if centered is None:
            too_wide = covariance_type == "full" and num_features > MAX_PRODUCT_FEATURES
            centered = too_wide or bool(largest > MAX_PRODUCT_PRECISION)
        coefficients = None if centered else _coefficients(covariance_type, means, factors, log_constant)
        return cls(covariance_type, means, factors, log_constant, centered, coefficients)

    @classmethod
    def at(cls, covariance_type: CovarianceType, centers: Tensor) -> GaussianComponents:
        """Moments about given centers and nothing else: no densities.

        Shape:
            - centers: `[S, K, D]`
        """
        nothing = centers.new_empty(0)
        return cls(covariance_type, centers, nothing, nothing, centered=True, coefficients=None)

    @property
    def samples_per_chunk(self) -> int:
        """Samples that one chunk should hold."""
        restarts, num_components, num_features = self.means.shape
        width = restarts * num_components * num_features if self.coefficients is None else self.coefficients.shape[1]
        return chunk_size(width, self.means.device)

    def encode(self, z: Tensor) -> Tensor:
        """What densities and moments need of a chunk; valid until the next call.

        Shape:
            - z: `[N, D]`
            - output: features `[F, N]`, or differences `[S·K, N, D]`
        """
        if self.coefficients is None:
            restarts, num_components, num_features = self.means.shape
            return z[None] - self.means.reshape(restarts * num_components, 1, num_features)
        if self._scratch is None or self._scratch.shape[1] != z.shape[0]:
            self._scratch = z.new_empty(self.coefficients.shape[1], z.shape[0])
        return _features(self.covariance_type, z, self._scratch)

    def log_joint(self, code: Tensor) -> Tensor:
        r""":math:`\log \pi_k + \log N(z_n; \mu_k, \Sigma_k)` of an encoded chunk.

        Shape:
            - code: as `encode` gives it
            - output: `[S, K, N]`
        """
        restarts, num_components, num_features = self.means.shape
        if self.coefficients is not None:
            joint = (self.coefficients @ code).view(restarts, num_components, -1)
            if self.covariance_type == "tied":
                white = self.factors.transpose(-1, -2) @ code[:num_features]
                joint -= 0.5 * white.square_().sum(dim=1, keepdim=True)
            return joint
        difference = code.view(restarts, num_components, -1, num_features)
        if self.covariance_type in ("diag", "spherical"):
            white = difference * self.factors[:, :, None]
        elif self.covariance_type == "tied":
            white = difference @ self.factors[:, None]
        else:
            white = difference @ self.factors
        return self.log_constant[..., None] - 0.5 * white.square_().sum(dim=-1)

    def log_densities(self, z: Tensor) -> Tensor:
        """`log_joint` of samples, however many.

        Shape:
            - z: `[N, D]`
            - output: `[S, K, N]`
        """
        return torch.cat([self.log_joint(self.encode(part)) for part in z.split(self.samples_per_chunk)], dim=2)

    def new_moments(self) -> tuple[Tensor, ...]:
        """Empty sums for `add_moments`.

        Shape:
            - output: one to three tensors, by form and covariance type
        """
        restarts, num_components, num_features = self.means.shape
        count = restarts * num_components
        tied = self.means.new_zeros(restarts, num_features, num_features)
        if self.coefficients is not None:
            sums = torch.zeros_like(self.coefficients)
            return (sums, tied) if self.covariance_type == "tied" else (sums,)
        weight, first = self.means.new_zeros(count), self.means.new_zeros(count, num_features)
        if self.covariance_type == "full":
            return weight, first, self.means.new_zeros(count, num_features, num_features)
        return weight, first, tied if self.covariance_type == "tied" else torch.zeros_like(first)

    def add_moments(self, sums: tuple[Tensor, ...], responsibilities: Tensor, code: Tensor) -> None:
        """Add a chunk's weighted moments to `sums`, in place.

        Shape:
            - sums: as `new_moments` gives them
            - responsibilities: `[S, K, N]`
            - code: as `encode` gives it
        """
        restarts, num_components, num_features = self.means.shape
        flat = responsibilities.reshape(restarts * num_components, -1)
        if self.coefficients is not None:
            sums[0].addmm_(flat, code.T)
            if self.covariance_type == "tied":
                # responsibilities sum to the weight of the sample
                total = flat.view(restarts, num_components, -1).sum(dim=1)
                samples = code[:num_features]
                sums[1].add_((samples * total[:, None]) @ samples.T)
            return
        weighted = code * flat[..., None]
        sums[0].add_(flat.sum(dim=1))
        sums[1].add_(weighted.sum(dim=1))
        if self.covariance_type == "full":
            sums[2].baddbmm_(weighted.transpose(-1, -2), code)
        elif self.covariance_type == "tied":
            pooled = (restarts, -1, num_features)
            sums[2].baddbmm_(weighted.reshape(pooled).transpose(-1, -2), code.reshape(pooled))
        else:
            sums[2].add_((weighted * code).sum(dim=1))

    def read_moments(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Zeroth, first and second moments about the means (centered form) or about the origin.

        Shape:
            - sums: as `new_moments` gives them
            - output: `[S, K]`, `[S, K, D]` and the second moments, as the covariance type has them
        """
        shape = restarts, num_components, num_features = self.means.shape
        if self.coefficients is None:
            second = sums[2] if self.covariance_type == "tied" else sums[2].unflatten(0, (restarts, num_components))
            return sums[0].view(restarts, num_components), sums[1].view(shape), second
        raw = sums[0].view(restarts, num_components, -1)
        quadratic, first, weight = raw[..., : -num_features - 1], raw[..., -num_features - 1 : -1], raw[..., -1]
        if self.covariance_type == "tied":
            return weight, first, sums[1]
        return weight, first, unfold_quadratic(quadratic, num_features) if self.covariance_type == "full" else quadratic


def precision_factors(
    covariance_type: CovarianceType, covariances: Tensor, num_features: int, check: bool = True
) -> Tensor:
    r"""Cholesky factors of the precisions, :math:`L L^\top = \Sigma^{-1}`; of diagonals the inverse deviations.

    Shape:
        - covariances: `[S, K, D, D]` (full), `[S, D, D]` (tied), `[S, K, D]` (diag) or `[S, K]` (spherical)
        - output: the same; `[S, K, D]` where spherical
    """
    if covariance_type in ("diag", "spherical"):
        bad = ~(covariances > 0)
        if check and bool(bad.any()):
            raise ValueError(ill_defined_message(bad if covariance_type == "spherical" else bad.any(dim=-1), None))
        if covariance_type == "spherical":
            covariances = covariances[..., None].expand(*covariances.shape, num_features)
        return covariances.rsqrt()
    lower = cholesky_or_raise(covariances) if check else torch.linalg.cholesky_ex(covariances)[0]
    eye = torch.eye(num_features, dtype=lower.dtype, device=lower.device).expand_as(lower)
    return torch.linalg.solve_triangular(lower, eye, upper=False).transpose(-1, -2).contiguous()


def _blocks(num_features: int) -> Iterator[tuple[int, int]]:
    """First index and width of the blocks of lines of a symmetric matrix whose upper part is stored."""
    for first in range(0, num_features, BLOCK):
        yield first, min(BLOCK, num_features - first)


def fold_quadratic(matrices: Tensor) -> Tensor:
    """Symmetric matrices to the coefficients of the block features: what is stored once counts twice.

    Shape:
        - matrices: `[…, D, D]`
        - output: `[…, F]`
    """
    num_features = matrices.shape[-1]
    parts = []
    for first, width in _blocks(num_features):
        block = matrices[..., first : first + width, first:].clone()
        block[..., width:] *= 2
        parts.append(block.flatten(-2))
    return torch.cat(parts, dim=-1)


def unfold_quadratic(features: Tensor, num_features: int) -> Tensor:
    """Sums of block features to symmetric matrices.

    Shape:
        - features: `[…, F]`
        - output: `[…, D, D]`
    """
    matrices = features.new_empty(*features.shape[:-1], num_features, num_features)
    position = 0
    for first, width in _blocks(num_features):
        size = width * (num_features - first)
        block = features[..., position : position + size].unflatten(-1, (width, num_features - first))
        matrices[..., first : first + width, first:] = block
        matrices[..., first:, first : first + width] = block.transpose(-1, -2)
        position += size
    return matrices


def _coefficients(covariance_type: CovarianceType, means: Tensor, factors: Tensor, log_constant: Tensor) -> Tensor:
    """Coefficients `[S·K, F]` of the features of `_features` that give the log joint density."""
    if covariance_type in ("diag", "spherical"):
        precisions = factors.square()
        linear = precisions * means
        quadratic = -0.5 * precisions
    else:
        spread = factors[:, None] if covariance_type == "tied" else factors
        precisions = spread @ spread.transpose(-1, -2)
        linear = (precisions @ means[..., None])[..., 0]
        quadratic = (
            fold_quadratic(-0.5 * precisions) if covariance_type == "full" else means.new_empty(*means.shape[:2], 0)
        )
    constant = log_constant - 0.5 * (linear * means).sum(dim=-1)
    return torch.cat([quadratic, linear, constant[..., None]], dim=-1).flatten(0, 1)


def _features(covariance_type: CovarianceType, z: Tensor, features: Tensor) -> Tensor:
    """Fill `features` `[F, N]` of samples `z` `[N, D]`: quadratic ones of the covariance type, then `z`, then 1."""
    columns = z.T.contiguous()
    num_features, num_samples = columns.shape
    if covariance_type == "full":
        position = 0
        for first, size in _blocks(num_features):
            count = size * (num_features - first)
            out = features[position : position + count].view(size, num_features - first, num_samples)
            torch.mul(columns[first : first + size, None], columns[None, first:], out=out)
            position += count
    elif covariance_type != "tied":
        torch.mul(columns, columns, out=features[:num_features])
    features[-num_features - 1 : -1] = columns
    features[-1] = 1.0
    return features
