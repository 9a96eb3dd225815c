"""Weighted average of the image signal over a stencil, whose weights are folded over the windows and normalised."""

import math
from functools import cached_property

import torch
from torch import Tensor

from lightning_modules.graph.stencil import (
    Signal,
    StencilGeometry,
    Workspace,
    add_products_,
    at_neighbor,
    box_sum_,
    correlate,
    edge_views,
    incident_sum,
)


class WindowAverage:
    r"""The weighted average A of symmetric weights w of the neighbours and s of the pixel itself.

    The weights are normalised by :math:`t = s + \sum w`, averaged over the windows that cover a pixel (box filter b),
    cut to valid pairs V and normalised again:

    .. math:: c = V\, b(w / t), \quad o = b(s / t), \quad n = o + \sum c, \quad A x = (o x + \sum c x) / n
    """

    def __init__(self, weight: Tensor, self_weight: float, geometry: StencilGeometry, workspace: Workspace) -> None:
        self.weight, self.self_weight, self.geometry, self.workspace = weight, self_weight, geometry, workspace
        batch, count, n = weight.shape
        total = incident_sum(weight, weight, geometry).add_(self_weight)
        self.inverse_total = geometry.pad(geometry.inside / total)
        both = workspace.empty("both", weight, batch, 2 * count, n)
        torch.mul(weight, self.inverse_total[:, None, :n], out=both[:, :count])
        for first, run, _ in geometry.rows:
            target = both[:, count + first : count + first + run]
            torch.mul(weight[:, first : first + run], at_neighbor(self.inverse_total, geometry, first), out=target)
        box_sum_(both, geometry.patch_size, geometry.pitch, workspace)
        forward, backward = both.unflatten(1, (2, -1)).mul_(geometry.valid).unbind(1)
        self._forward, self._backward = forward, backward
        own = box_sum_(self_weight * self.inverse_total, geometry.patch_size, geometry.pitch, workspace)
        own = geometry.core(own)
        norm = incident_sum(forward, backward, geometry).add_(own).add_(1 - geometry.inside)
        self.own, self.inverse_norm = own[:, None].contiguous(), norm.reciprocal_()[:, None]
        self._edges = edge_views(forward, backward, geometry)

    @cached_property
    def _adjoint_edges(self) -> list[Tensor]:
        return edge_views(self._backward, self._forward, self.geometry)

    def __call__(self, signal: Signal, output: Tensor) -> Tensor:
        """A x of a signal, `[B, C, L]`."""
        torch.mul(self.own, signal.core, out=output)
        return add_products_(output, self._edges, signal.neighbors).mul_(self.inverse_norm)

    def adjoint(self, cotangent: Signal, output: Tensor) -> Tensor:
        """Aᵀ g of g/n, `[B, C, L]`: every edge the other way round."""
        torch.mul(self.own, cotangent.core, out=output)
        return add_products_(output, self._adjoint_edges, cotangent.neighbors)

    def application_buffers(self, count: int, channels: int) -> tuple[list[Signal], list[Signal]]:
        """Where `backward` looks for the g/n and the x of `count` applications with `channels` each."""
        left, right = (
            self.workspace.padded(name, self.weight, count * channels + 1, self.geometry) for name in ("left", "right")
        )
        self._left, self._right = left, right
        cotangents, signals = (
            [Signal(part, self.geometry) for part in stack[:, :-1].split(channels, 1)] for stack in (left, right)
        )
        return cotangents, signals

    def backward(self, averages: list[Tensor]) -> Tensor:
        """Gradient of log₂ w, `[B, M, n]`, given the averages A x, `[B, C, L]` each."""
        geometry, weight, left, right = self.geometry, self.weight, self._left, self._right
        # The norm n is one more channel, with a signal of ones.
        through_norm = geometry.core(left)[:, -1].zero_()
        for cotangent, average in zip(
            geometry.core(left)[:, :-1].split(averages[0].shape[1], 1), averages, strict=True
        ):
            through_norm -= (cotangent * average).sum(1)
        geometry.core(right)[:, -1] = 1
        grad_own = (geometry.core(left) * geometry.core(right)).sum(1)
        grad = correlate(left, right, geometry, self.workspace)
        grad.unflatten(1, (2, -1)).mul_(geometry.valid)
        box_sum_(grad, geometry.patch_size, geometry.pitch, self.workspace)
        forward, backward = grad.unflatten(1, (2, -1)).unbind(1)
        grad_own = geometry.pad(grad_own * geometry.inside)
        grad_own = geometry.core(box_sum_(grad_own, geometry.patch_size, geometry.pitch, self.workspace))

        forward.mul_(weight)
        backward.mul_(weight)
        through_total = incident_sum(forward, backward, geometry).add_(grad_own, alpha=self.self_weight)
        through_total = geometry.pad(-through_total * geometry.core(self.inverse_total).square())
        # forward·w/t(p) + backward·w/t(p+δ) + (through_total(p) + through_total(p+δ))·w
        n = weight.shape[2]
        forward.mul_(self.inverse_total[:, None, :n]).addcmul_(weight, through_total[:, None, :n])
        for first, run, _ in geometry.rows:
            rows = slice(first, first + run)
            forward[:, rows].addcmul_(backward[:, rows], at_neighbor(self.inverse_total, geometry, first))
            forward[:, rows].addcmul_(weight[:, rows], at_neighbor(through_total, geometry, first))
        return forward.mul_(math.log(2))
