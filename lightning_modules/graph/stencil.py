r"""A pixel graph as a stencil: shifted slices of flattened images, no edge list.

An image is flattened row by row with enough empty columns after each row, and enough empty rows above and below, that
the neighbour q+δ of every pixel q is at one and the same distance in memory for a given offset δ = (row, column), and
outside the image for certain where it should: one contiguous slice instead of a rectangle for each offset.

M is the number of half offsets, one of each pair ±δ. A *map* holds a value for each pair: entry m of pixel p belongs to
the pair (p, p+δ_m). A pair of maps (forward, backward) therefore holds a value for both directions of each edge.

Letters of the shapes: L = H·pitch pixels of the flattened image; n = margin + L pixels, the rows above it included, on
which maps live; N = n + margin pixels, the rows below included, on which flattened images live.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.graph.topology import half_offsets, within_image

# Squared distance of pairs that leave the image: no kernel of a width under 10⁵ lets any weight through, and unlike an
# infinity it gives no NaN in the gradient.
FAR = 1e12


@dataclass(frozen=True)
class StencilGeometry:
    """What depends on the image's size only; maps are made when they are first read.

    Attributes:
        height: H.
        width: W.
        patch_size: Side p of the windows.
        offsets: Half offsets δ as (row, column), ascending, without those that leave the image from every pixel.
        padding: Empty columns after each row; above and below there is one row more.
        device: Of the maps.
        dtype: Of the maps.
    """

    height: int
    width: int
    patch_size: int
    offsets: tuple[tuple[int, int], ...]
    padding: int
    device: torch.device
    dtype: torch.dtype

    @property
    def pitch(self) -> int:
        """Pixels from a row to the next."""
        return self.width + self.padding

    @property
    def margin(self) -> int:
        """Pixels above and below the image."""
        return (self.padding + 1) * self.pitch

    @cached_property
    def shifts(self) -> tuple[int, ...]:
        """Distance in memory of each half offset, ascending."""
        return tuple(a * self.pitch + b for a, b in self.offsets)

    @cached_property
    def rows(self) -> tuple[tuple[int, int, int], ...]:
        """Runs of half offsets next to each other in an image row: (first, number, shift of the first)."""
        starts = [m for m, (a, _) in enumerate(self.offsets) if m == 0 or a != self.offsets[m - 1][0]]
        ends = [*starts, len(self.offsets)][1:]
        return tuple((m, end - m, self.shifts[m]) for m, end in zip(starts, ends, strict=True))

    @property
    def num_half_edges(self) -> int:
        """Number of valid pairs."""
        return sum((self.height - a) * (self.width - abs(b)) for a, b in self.offsets)

    @cached_property
    def length(self) -> Tensor:
        """‖δ‖, `[M]`."""
        return self._constant(torch.tensor([(a * a + b * b) ** 0.5 for a, b in self.offsets], dtype=torch.float64))

    @cached_property
    def squared_length(self) -> Tensor:
        """‖δ‖², `[M]`."""
        return self._constant(torch.tensor([a * a + b * b for a, b in self.offsets], dtype=torch.float64))

    def within(self, reach: float) -> Tensor:
        """Exponent of the similarity beside that of the distance: 0 for offsets within `reach`, no similarity beyond,
        `[M]`.
        """
        return torch.where(self.length <= reach, 0.0, -FAR).to(self.dtype)

    @cached_property
    def inside(self) -> Tensor:
        """1 for the pixels of the image, 0 for the empty columns, `[L]`."""
        return self._constant(self._ones[self.margin : self.margin + self.size].contiguous())

    @cached_property
    def valid(self) -> Tensor:
        """1 where both pixels of a pair are in the image, `[M, n]`."""
        return self._constant(self._pairs)

    @cached_property
    def scale(self) -> Tensor:
        """p² over the number of terms of the window that are valid for δ, 0 where the pair is not, `[M, n]`."""
        terms = box_sum_(self._pairs, self.patch_size, self.pitch, Workspace()).clamp_min(1)
        return self._constant(self._pairs * self.patch_size**2 / terms)

    @cached_property
    def far(self) -> Tensor:
        """A distance without similarity where the pair is not valid, 0 elsewhere, `[M, n]`."""
        return self._constant(FAR * (1 - self._pairs))

    @property
    def _ones(self) -> Tensor:
        one = torch.ones(self.height, self.width, dtype=torch.float64)
        return F.pad(one, (0, self.padding, self.padding + 1, self.padding + 1)).flatten()

    @property
    def _pairs(self) -> Tensor:
        """`valid` in double precision, afresh each time: it is large, and nobody needs it twice."""
        one, n = self._ones, self.margin + self.size
        pairs = [one[:n] * one[shift : shift + n] for shift in self.shifts]
        return torch.stack(pairs) if pairs else one.new_zeros(0, n)

    def _constant(self, values: Tensor) -> Tensor:
        # Made in a validation and kept, it is used in training steps too.
        with torch.inference_mode(False):
            return values.to(self.device, self.dtype, copy=True)

    @property
    def size(self) -> int:
        """L."""
        return self.height * self.pitch

    def unflatten(self, flat: Tensor) -> Tensor:
        """Images `[B, C, H, W]`, as a view of flattened ones without margins, `[B, C, L]`."""
        return flat.unflatten(2, (self.height, self.pitch))[..., : self.width]

    def pad(self, flat: Tensor) -> Tensor:
        """With empty margins: `[..., N]` of `[..., L]`."""
        return F.pad(flat, (self.margin, self.margin))

    def core(self, padded: Tensor) -> Tensor:
        """Without margins: `[..., L]` of `[..., N]` or of `[..., n]`."""
        return padded[..., self.margin : self.margin + self.size]


class Workspace:
    """Memory that the chunks of a call use one after the other.

    Fresh memory costs a page fault for every 4 KiB, which is more than what is computed in it.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def empty(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Uninitialised tensor; what was given out under the same name before is overwritten."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = like.new_empty(size)
        return self._buffers[name][:size].view(shape)

    def padded(self, name: str, like: Tensor, channels: int, geometry: StencilGeometry) -> Tensor:
        """Buffer for flattened images, `[B, channels, N]`; zero where nobody has written, such as in the margins."""
        shape = (len(like), channels, geometry.size + 2 * geometry.margin)
        if name not in self._buffers or self._buffers[name].shape != shape:
            self._buffers[name] = like.new_zeros(shape)
        return self._buffers[name]


class Signal:
    """Flattened images in a buffer with empty margins, and the views on it that sums over neighbours need.

    Attributes:
        padded: The buffer, `[B, C, N]`.
        core: The images in it, `[B, C, L]`.
        neighbors: What each pixel has at +δ and −δ in turn, `[B, C, L]` each.
    """

    def __init__(self, padded: Tensor, geometry: StencilGeometry) -> None:
        margin, size = geometry.margin, geometry.size
        self.padded, self.core = padded, geometry.core(padded)
        starts = (start for shift in geometry.shifts for start in (margin + shift, margin - shift))
        self.neighbors = [padded[..., start : start + size] for start in starts]


def box_sum_(maps: Tensor, patch_size: int, pitch: int, workspace: Workspace) -> Tensor:
    """Sum over the centred window of flattened images or maps that are zero outside the image, in place.

    Shape:
        - maps: `[..., n]`, contiguous
        - output: as maps; right at every pixel of the image, arbitrary elsewhere
    """
    source, total = maps, workspace.empty("box", maps, *maps.shape)
    for step in (1, pitch) if patch_size > 1 else ():
        torch.add(source[..., :-step], source[..., step:], out=total[..., :-step])
        total[..., -step:] = source[..., -step:]
        total[..., step:] += source[..., :-step]
        for distance in range(2 * step, patch_size // 2 * step + 1, step):
            total[..., :-distance] += source[..., distance:]
            total[..., distance:] += source[..., :-distance]
        source, total = total, source
    return maps


def squared_differences(padded: Tensor, geometry: StencilGeometry, workspace: Workspace) -> Tensor:
    """‖y(p) − y(p+δ)‖² of flattened images, 0 where the pair is not valid.

    Shape:
        - padded: `[B, F, N]`
        - output: `[B, M, n]`
    """
    batch, channels, _ = padded.shape
    n = geometry.margin + geometry.size
    squared = workspace.empty("distance", padded, batch, len(geometry.shifts), n)
    for first, count, _ in geometry.rows:
        run = squared[:, first : first + count]
        # A buffer: what torch would allocate for the difference of a view that overlaps itself is not contiguous.
        difference = workspace.empty("difference", padded, batch, count, n)
        for channel in range(channels):
            torch.sub(at_neighbor(padded[:, channel], geometry, first), padded[:, channel, None, :n], out=difference)
            if channel == 0:
                torch.mul(difference, difference, out=run)
            else:
                run.addcmul_(difference, difference)
    return squared.mul_(geometry.valid)


def at_neighbor(padded: Tensor, geometry: StencilGeometry, first: int) -> Tensor:
    """Values at p+δ for the run of offsets that starts at `first`, as a view: `[B, count, n]` of `[B, N]`."""
    count, shift = next((count, shift) for start, count, shift in geometry.rows if start == first)
    n = geometry.margin + geometry.size
    return padded[:, shift : shift + n + count - 1].unfold(1, n, 1)


def incident_sum(forward: Tensor, backward: Tensor, geometry: StencilGeometry) -> Tensor:
    """Sum over a pixel's edges: `forward` of those that start at it and `backward` of those that end at it.

    Shape:
        - forward, backward: `[B, M, n]`, zero where the pair is not valid
        - output: `[B, L]`
    """
    total = geometry.core(forward).sum(1)
    for shift, maps in zip(geometry.shifts, backward.unbind(1), strict=True):
        start = geometry.margin - shift
        total += maps[:, start : start + geometry.size]
    return total


def edge_views(forward: Tensor, backward: Tensor, geometry: StencilGeometry) -> list[Tensor]:
    """The values of each pixel's edges: of +δ and −δ in turn, as views `[B, 1, L]` of two maps.

    Shape:
        - forward, backward: `[B, M, n]`
    """
    margin, size = geometry.margin, geometry.size
    views = []
    for shift, leaving, arriving in zip(geometry.shifts, forward.unbind(1), backward.unbind(1), strict=True):
        views += [leaving[:, None, margin:], arriving[:, None, margin - shift : margin - shift + size]]
    return views


def add_products_(total: Tensor, left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Add the products of the views to `total`: with edge and neighbour views, the weighted sum of the neighbours."""
    for one, other in zip(left, right, strict=True):
        total.addcmul_(one, other)
    return total


def correlate(left: Tensor, right: Tensor, geometry: StencilGeometry, workspace: Workspace) -> Tensor:
    """Σ_c left_c(p) right_c(p+δ) and Σ_c left_c(p+δ) right_c(p): what `add_products_` takes from the weights.

    Shape:
        - left, right: `[B, C, N]`
        - output: `[B, 2M, n]`
    """
    n, count_all = geometry.margin + geometry.size, len(geometry.shifts)
    both = workspace.empty("correlation", left, len(left), 2 * count_all, n).zero_()
    for first, count, _ in geometry.rows:
        forward, backward = both[:, first : first + count], both[:, count_all + first : count_all + first + count]
        for channel in range(left.shape[1]):
            forward.addcmul_(left[:, channel, None, :n], at_neighbor(right[:, channel], geometry, first))
            backward.addcmul_(right[:, channel, None, :n], at_neighbor(left[:, channel], geometry, first))
    return both


def pair_sum(maps: Tensor, geometry: StencilGeometry) -> Tensor:
    """Sum of the two pixels' values of each pair, 0 where it is not valid; differentiable.

    Shape:
        - maps: `[B, 1, H, W]`
        - output: `[B, M, n]`
    """
    n, edge = geometry.margin + geometry.size, geometry.padding + 1
    flat = F.pad(maps, (0, geometry.padding, edge, edge)).flatten(1)
    pairs = [flat[:, :n] + flat[:, shift : shift + n] for shift in geometry.shifts]
    return torch.stack(pairs, 1) * geometry.valid if pairs else flat.new_zeros(len(flat), 0, n)


def window_sum(maps: Tensor, geometry: StencilGeometry) -> Tensor:
    """Sum of each pair's window, times p² over the number of its valid terms; differentiable, unlike `box_sum_`.

    Shape:
        - maps: `[B, M, n]`, zero where the pair is not valid
        - output: as maps
    """
    size = geometry.patch_size
    rows = maps.unflatten(2, (-1, geometry.pitch))
    summed = F.avg_pool2d(rows, size, 1, size // 2, divisor_override=1) if maps.numel() else rows
    return summed.flatten(2) * geometry.scale


@lru_cache(maxsize=4)
def stencil_geometry(
    height: int, width: int, patch_size: int, radius: float, device: torch.device, dtype: torch.dtype
) -> StencilGeometry:
    """Geometry of images of a size, whose pixels at most `radius` apart are joined.

    Its maps take 12 M bytes for each pixel in float32, which is why few are kept: training and validation have one or
    two sizes, and a folder of photographs of many sizes must not fill the memory.
    """
    radius = within_image(radius, height, width)
    offsets = tuple((a, b) for a, b in half_offsets(radius) if a < height and abs(b) < width)
    padding = max(int(radius), patch_size // 2)
    return StencilGeometry(height, width, patch_size, offsets, padding, device, dtype)
