"""Diffusion of a point cloud along its normals, over graphs of near points."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from scipy.spatial import KDTree
from torch import Tensor

from lightning_modules.operators.operator import Noise, ParameterSpec, RestorationOperator, per_image
from lightning_modules.point_clouds.neighborhoods import (
    check_cloud,
    clouds,
    compact_groups,
    median_spacing,
    smallest_eigenvector,
    thinned_neighbors,
    thinning,
    typical_point,
    unit,
)

if TYPE_CHECKING:
    from torch_geometric.data import Data

# Weights end at so many widths; the Gaussian is 0.1 there.
_REACH = 2.0
# Points that share their neighbors, at least.
_GROUP = 8
# Entries of a matrix of groups by points by neighbors that is worked on at a time: they stay in a core's cache.
_CHUNK = 1 << 17
# Fewer points have no plane that fits them better than another.
_LEAST_POINTS = 4
# Sum of weights under which a point has no neighbor.
_NO_WEIGHT = 1e-12


class PointCloudDiffusion(RestorationOperator):
    r"""Moves the points of noisy clouds along the surface's normals, by diffusion over graphs of near points.

    On each graph, which is built anew from where the points have come, normals are the directions of least variance of
    a point's neighbors, smoothed by those of the neighbors that agree. A neighbor j puts point i at the height

    .. math:: h_{ij} = \tfrac12 \langle n_i \pm n_j, p_j - p_i \rangle, \qquad
        p_i \leftarrow p_i + \tau\, n_i \frac{\sum_j W_{ij} h_{ij}}{\sum_j W_{ij}}

    which is 0 on a sphere, so that round shapes do not shrink, and has the opposite sign for i and j, so that what one
    gains the other gives; points do not slide along the surface. The weights are

    .. math:: W_{ij} = e^{-r_{ij}^2 / 2w^2} \, e^{-(1 - |\langle n_i, n_j \rangle|) / \sigma_{normal}^2}
        \, e^{-h_{ij}^2 / 2\sigma_{height}^2}, \qquad w^2 = (a\,\sigma_n)^2 + (b\,d)^2

    with the noise's standard deviation :math:`\sigma_n` and the median distance d of the points: all five parameters
    are without a unit of length, so that scale does not matter. The Gaussian of the distance ends smoothly at 2w. Both
    normals in the height are those of Guennebaud & Gross, "Algebraic point set surfaces", 2007; weights as in
    Fleishman, Drori & Cohen-Or, "Bilateral mesh denoising", 2003.

    A cloud is a PyG `Data` or `Batch` with `pos`; `guide`, features of the points that are compared in place of the
    normals, may come in it. Fewer than 4 points are left as they are, and so are those without neighbors. A noise level
    of 0 is the identity.

    Args:
        num_neighbors: Neighbors K that a group of near points has in common; of more within reach, a random part.
        graphs: How often the graph is built.
        steps: Steps on each of them.

    Raises:
        ValueError: If an argument is not positive.

    Example:
        >>> from torch_geometric.data import Data
        >>> points = torch.nn.functional.normalize(torch.randn(500, 3), dim=1)
        >>> noisy = Data(pos=points + 0.05 * torch.randn(500, 3))
        >>> operator = PointCloudDiffusion()
        >>> start = {spec.name: spec.start for spec in operator.parameter_specs}
        >>> restored = operator(noisy, noise=0.05, **start)
        >>> bool((restored.norm(dim=1) - 1).square().mean() < 0.3 * (noisy.pos.norm(dim=1) - 1).square().mean())
        True
    """

    def __init__(self, num_neighbors: int = 48, graphs: int = 2, steps: int = 2) -> None:
        super().__init__()
        for name, value, least in (("num_neighbors", num_neighbors, 4), ("graphs", graphs, 1), ("steps", steps, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.num_neighbors, self.graphs, self.steps = num_neighbors, graphs, steps

    @property
    def parameter_specs(self) -> tuple[ParameterSpec, ...]:
        """Width of the weights, a in units of the noise and b in distances of the points; widths of the heights and of
        the normals; and the step τ.
        """
        return (
            ParameterSpec("width_noise", 3.5, (0.3, 6.0), unit="noise"),
            ParameterSpec("width_spacing", 2.5, (0.5, 5.0), unit="spacings"),
            ParameterSpec("sigma_height", 1.7, (0.2, 20.0), unit="noise"),
            ParameterSpec("sigma_normal", 0.35, (0.05, 5.0)),
            ParameterSpec("tau", 0.5, (0.05, 1.0)),
        )

    def forward(  # clouds in place of images
        self,
        noisy: "Data",
        *,
        noise: Noise,
        guide: Tensor | None = None,
        **parameters: Tensor | float,
    ) -> Tensor:
        """Denoised positions.

        Args:
            noisy: PyG `Data` or `Batch` with `pos`, and `guide` where there is one.
            noise: Standard deviation of the noise of each cloud, in the unit of the positions.
            guide: Features of the points, in place of those in the data.
            parameters: By the names declared: one number for all clouds or one for each.

        Shape:
            - noise: scalar or `[B]`
            - guide: `[N, F]`
            - parameters: scalar or `[B]`
            - output: `[N, 3]`

        Raises:
            ValueError: If the data are not clouds, or a number is negative or not finite.
        """
        guide = noisy.guide if guide is None and "guide" in noisy else guide
        check_cloud(noisy, guide)
        parts = clouds(noisy)
        each = noisy.pos.new_empty(len(parts))
        if not isinstance(noise, Tensor | float | int):
            raise ValueError("a cloud takes the noise level as a number, not an object")
        named = {name: per_image(name, value, each).to(each) for name, value in {"noise": noise, **parameters}.items()}
        for name, values in named.items():
            if not (values >= 0).all() or not values.isfinite().all():
                raise ValueError(f"{name} must be finite and not negative, got {values.tolist()}")
        moved = []
        for number, part in enumerate(parts):
            own = noisy.pos[part]
            if len(own) >= _LEAST_POINTS:
                features = None if guide is None else _scaled(guide[part])
                own_values = {name: value[number] for name, value in named.items()}
                own = self._diffuse(own, features, **own_values)
            moved.append(own)
        return torch.cat(moved)[torch.cat(parts).argsort()]

    def _diffuse(
        self,
        points: Tensor,
        features: Tensor | None,
        noise: Tensor,
        width_noise: Tensor,
        width_spacing: Tensor,
        sigma_height: Tensor,
        sigma_normal: Tensor,
        tau: Tensor,
    ) -> Tensor:
        center = typical_point(points.detach())
        position = points - center
        tree = KDTree(position.detach().cpu().numpy(), balanced_tree=False)
        width = ((width_noise * noise) ** 2 + (width_spacing * median_spacing(tree)) ** 2).sqrt()
        if not (reach := _REACH * float(width.detach())):
            return points
        count = min(self.num_neighbors, len(points))
        groups, place = compact_groups(position.detach(), _GROUP)
        parts = thinning(tree, _centers(position.detach(), groups), reach, count)
        for turn in range(self.graphs):
            graph = _Graph.build(position.detach(), groups, place, reach, count, parts, turn)
            height = sigma_height * noise / width
            position = width * self._on_graph(graph, position / width, features, width, height, sigma_normal, tau)
        return torch.where(noise > 0, position + center, points)

    def _on_graph(
        self,
        graph: "_Graph",
        position: Tensor,
        features: Tensor | None,
        width: Tensor,
        sigma_height: Tensor,
        sigma_normal: Tensor,
        tau: Tensor,
    ) -> Tensor:
        """Positions after the steps on a graph; these, and the heights, in units of the width."""
        parts = graph.split()
        near, normals = zip(*[part.normals(position, width) for part in parts], strict=True)
        normal = graph.ungroup(list(normals))
        smoothed = [p.smoothed(normal, features, w, sigma_normal) for p, w in zip(parts, near, strict=True)]
        normal = graph.ungroup(smoothed)
        frames = [part.frame(normal, features, w, sigma_normal) for part, w in zip(parts, near, strict=True)]
        for _ in range(self.steps):
            heights = [p.height(position, frame, sigma_height) for p, frame in zip(parts, frames, strict=True)]
            position = position + tau * graph.ungroup(heights)[:, None] * normal
        return position


class _Frame(NamedTuple):
    """Normals at a group's points `[G, S, 3]` and neighbors `[G, 3, K]`, and signs and weights of pairs `[G, S, K]`."""

    here: Tensor
    there: Tensor
    sign: Tensor
    weight: Tensor


class _Graph(NamedTuple):
    """Groups of near points `[G, S]`, where each point is in them `[N]`, the neighbors of each group `[G, K]`, and up
    to which squared distance a point's neighbors are all among them, or end `[G, S]`.
    """

    groups: Tensor
    place: Tensor
    neighbors: Tensor
    limit: Tensor

    @classmethod
    def build(
        cls, position: Tensor, groups: Tensor, place: Tensor, radius: float, count: int, parts: int, turn: int
    ) -> "_Graph":
        """The graph of points `[N, 3]` within a radius of each other."""
        own = _taken(position, groups)
        centers = _centers(position, groups)
        neighbors = thinned_neighbors(position, centers, count, parts, turn)
        farthest = (position[neighbors[:, -1]] - centers).norm(dim=1, keepdim=True)
        if neighbors.shape[1] == len(position):
            farthest = torch.full_like(farthest, torch.inf)
        within = (farthest - (own - centers[:, None]).norm(dim=2)).clamp_max(radius)
        # Where a group is wide for its neighbors, a point has at least those within half of their distance.
        limit = torch.maximum(within, 0.5 * farthest.clamp_max(radius)).square()
        limit = limit.clamp_min(torch.finfo(limit.dtype).tiny ** 0.5)  # of points that are all at one place
        return cls(groups, place, neighbors, limit)

    def ungroup(self, parts: list[Tensor]) -> Tensor:
        """Values of the groups' points, part by part `[·, ...]`, as those of the points `[N, ...]`."""
        return torch.cat(list(parts)).index_select(0, self.place)

    def split(self) -> "list[_Graph]":
        """Parts that stay in the cache."""
        size = max(1, _CHUNK // (self.groups.shape[1] * self.neighbors.shape[1]))
        chunks = (each.split(size) for each in (self.groups, self.neighbors, self.limit))
        return [_Graph(g, self.place, n, m) for g, n, m in zip(*chunks, strict=True)]

    def normals(self, position: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the distances `[G, S, K]`, and directions of least variance under them `[G·S, 3]`."""
        here, there = self._pair(position)
        squares = here.square().sum(2)[..., None] + there.square().sum(1)[:, None]
        exponent = torch.baddbmm(squares, here, there, beta=-0.5).clamp_max(0)  # half of the squared distance
        limit = (self.limit / width.detach() ** 2)[..., None]
        weight = exponent.exp() * (1 + exponent * (2 / limit)).clamp_min(0).square()
        x, y, z = there.unbind(1)
        terms = [torch.ones_like(x), x, y, z, x * x, x * y, x * z, y * y, y * z, z * z]
        moments = (weight @ torch.stack(terms, 1).mT).flatten(0, 1).T
        mean, second = (moments[1:] / (moments[0] + _NO_WEIGHT)).split([3, 6])
        variance = second[[0, 1, 2, 1, 3, 4, 2, 4, 5]].unflatten(0, (3, 3)) - mean[:, None] * mean
        return weight, smallest_eigenvector(variance.permute(2, 0, 1))

    def smoothed(self, normal: Tensor, features: Tensor | None, weight: Tensor, s: Tensor) -> Tensor:
        """Mean normals of the neighbors that agree `[G·S, 3]`."""
        frame = self.frame(normal, features, weight, s)
        return unit(((frame.weight * frame.sign) @ frame.there.mT).flatten(0, 1))

    def frame(self, normal: Tensor, features: Tensor | None, weight: Tensor, s: Tensor) -> _Frame:
        here, there = _taken(normal, self.groups), _columns(normal, self.neighbors)
        cosine = here @ there
        likeness = cosine.abs() - 1
        if features is not None:
            likeness = -0.5 * torch.cdist(features[self.groups], features[self.neighbors]).square()
        return _Frame(here, there, cosine.detach().sign(), weight * (likeness / s.square().clamp_min(1e-6)).exp())

    def height(self, position: Tensor, frame: _Frame, sigma: Tensor) -> Tensor:
        """How far the neighbors are above each point `[G·S]`."""
        here, there = self._pair(position)
        own = torch.baddbmm(-(frame.here * here).sum(2)[..., None], frame.here, there)
        other = torch.baddbmm((frame.there * there).sum(1)[:, None], here, frame.there, alpha=-1)
        twice = torch.addcmul(own, frame.sign, other)
        weight = frame.weight * (twice.square() * (-0.125 / sigma.square().clamp_min(1e-12))).exp()
        return (0.5 * (weight * twice).sum(2) / (weight.sum(2) + _NO_WEIGHT)).flatten()

    def _pair(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of a group's points `[G, S, 3]` and of its neighbors `[G, 3, K]` about one of these."""
        here, there = _taken(position, self.groups), _columns(position, self.neighbors)
        origin = there[:, :, :1].detach()  # the nearest to the center: a group's own points may be outliers
        return here - origin.mT, there - origin


def _centers(position: Tensor, groups: Tensor) -> Tensor:
    return _taken(position, groups).median(1).values  # which an outlier does not move


def _taken(values: Tensor, index: Tensor) -> Tensor:
    return values.index_select(0, index.flatten()).view(*index.shape, values.shape[1])


def _columns(values: Tensor, index: Tensor) -> Tensor:
    return _taken(values, index).mT.contiguous()  # along which products and sums run faster


def _scaled(guide: Tensor) -> Tensor:
    """Features with a mean square of 1."""
    centered = guide - guide.mean(0)
    return centered * centered.square().sum(1).mean().clamp_min(torch.finfo(guide.dtype).tiny).rsqrt()
