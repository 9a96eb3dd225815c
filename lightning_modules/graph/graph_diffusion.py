"""Graph diffusion behind one door: the geometry chooses the path."""

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_modules._eager import eager
from lightning_modules.graph.image_operator import diffuse_image, largest_radius, mean_similarity
from lightning_modules.graph.laplacian import Laplacian
from lightning_modules.graph.parameters import DiffusionParameters, check_numbers
from lightning_modules.graph.patch_operator import MAX_DENSE_NODES, diffuse_patches, mean_similarity_dense
from lightning_modules.graph.patches import PatchGrid, check_patch_fits, check_patch_geometry
from lightning_modules.graph.smoothness import graph_smoothness
from lightning_modules.graph.tiles import in_tiles
from lightning_modules.graph.topology import half_offsets, within_image
from lightning_modules.operators.operator import (
    Noise,
    ParameterSpec,
    RestorationOperator,
    Smoothness,
    check_images,
    image_level,
    noise_level,
    per_image,
    pixel_level,
)

if TYPE_CHECKING:
    from torch_geometric.data import Data

Implementation = Literal["auto", "message_passing"]
Widths = Literal["absolute", "noise"]

_NAMES = ("sigma", "tau", "radius", "sigma_s", "sigma_f", "smooth_steps")
# Keywords of version 0.1, and what became of them.
_FORMER = {"noise_std": "noise", "features": "guide", "max_radius": None}

# Mean similarity over the edges under which the patches of a graph have next to nothing in common.
_LEAST_SIMILARITY = 0.3
# Mean edge weights outside which a graph joins nothing, or everything alike.
_DEAD_WEIGHT, _COMPLETE_WEIGHT = 1e-3, 0.95


class GraphDiffusion(RestorationOperator):
    """Restores images, or signals on any graph, by diffusing them over a graph of similar patches.

    It has no values of its own: σ, τ, ρ, σ_s, σ_f and the number of steps are arguments of `forward`, each a number or
    a tensor with one number for each image, so that whoever learns them decides where they are kept.

    Args:
        patch_size: Side p of the patches in pixels; odd for `signal="image"`.
        stride: Distance of neighbouring patches in pixels; 1 for `signal="image"`.
        signal: What is diffused: `"image"` folds the patches after every step (recommended), `"patches"` once at the
            end.
        laplacian: `"symmetric"`, `"random_walk"` or `"unnormalized"`; by default symmetric for patches. The image
            operator is a random walk by construction.
        implementation: `"message_passing"` computes images as any other graph: slowly, in the plainest form, with
            derivatives of all orders. `"auto"` takes the fast path of the geometry.
        tile_size: Larger images are computed in tiles of this side, in memory that does not grow with the image; the
            tiles overlap so far that the result is the same. None computes them whole. The unnormalised Laplacian
            always is, for its stable step depends on all of the graph.
        reach: Largest distance of similar patches, in pixels or in the unit of `pos`; by default 3 for
            `signal="image"`, 10 for patches, and the radius for other graphs.
        widths: Unit of σ and σ_f: `"absolute"`, the patch's L2 distance, or `"noise"`, multiples s of what the noise
            does to it, σ = s (2d)^¼ σ_n for patches of d numbers. A noise level of 0 is then the identity.
        reference: The former name of `implementation="message_passing"`.

    Raises:
        ValueError: If the geometry is impossible; the message names the argument, the rule and the value.

    Example:
        >>> diffusion = GraphDiffusion(patch_size=3)
        >>> noisy = torch.rand(2, 3, 16, 16)
        >>> restored = diffusion(noisy, sigma=0.3, tau=0.1, radius=3.0, sigma_s=2.0, sigma_f=0.3, smooth_steps=2)
        >>> restored.shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self,
        patch_size: int = 3,
        stride: int = 1,
        signal: Literal["image", "patches"] = "image",
        laplacian: Laplacian | None = None,
        implementation: Implementation = "auto",
        tile_size: int | None = 512,
        reach: float | None = None,
        widths: Widths = "absolute",
        reference: bool | None = None,
    ) -> None:
        super().__init__()
        if reference is not None or isinstance(implementation, bool):
            reference = implementation is True if reference is None else reference
            implementation = "message_passing" if reference else "auto"
            warnings.warn(
                f"reference={reference} is now implementation={implementation!r}", FutureWarning, stacklevel=2
            )
        if implementation not in ("auto", "message_passing"):
            raise ValueError(f"implementation must be 'auto' or 'message_passing', got {implementation!r}")
        if widths not in ("absolute", "noise"):
            raise ValueError(f"widths must be 'absolute' or 'noise', got {widths!r}")
        check_patch_geometry(patch_size, stride)
        if signal not in ("image", "patches"):
            raise ValueError(f"signal must be 'image' or 'patches', got {signal!r}")
        if signal == "image":
            if stride != 1:
                raise ValueError(f"signal='image' makes every pixel a node, so stride must be 1, got {stride}")
            if patch_size % 2 == 0:
                raise ValueError(
                    f"signal='image' centres a window on each pixel: patch_size must be odd, got {patch_size}"
                )
            if laplacian not in (None, "random_walk"):
                raise ValueError(f"signal='image' is a random walk: leave laplacian out instead of {laplacian!r}")
        if tile_size is not None and tile_size < 1:
            raise ValueError(f"tile_size must be a positive number of pixels, or None for no tiles, got {tile_size}")
        self.tile_size = tile_size
        self.patch_size = patch_size
        self.stride = stride
        self.signal = signal
        self.laplacian: Laplacian = laplacian or ("random_walk" if signal == "image" else "symmetric")
        self.implementation = implementation
        self.widths = widths
        self._reach_is_given = reach is not None
        self.reach = (3.0 if signal == "image" else 10.0) if reach is None else float(reach)
        if not (math.isfinite(self.reach) and self.reach >= (1 if signal == "image" else 0)):
            raise ValueError(f"reach must be a finite number of pixels, for signal='image' at least 1, got {reach}")
        # Largest radius of a run, from `set_bounds`: an accelerator need not be asked for it in every step.
        self._max_radius: float | None = None

    @property
    def parameter_specs(self) -> tuple[ParameterSpec, ...]:
        """σ, τ, ρ, σ_s, σ_f and the number of steps.

        With absolute widths they start from the values of the textbook's patches; with widths in units of noise from
        what restores 3×3 patches of colour photographs best, between bounds that are wide.
        """
        least = 1.2 * self.stride  # under the stride no two patches are joined
        if self.widths == "absolute":
            return (
                ParameterSpec("sigma", 0.3, (0.1, 0.5), unit="patch distance", relative_step=0.01),
                ParameterSpec("tau", 0.1, (0.05, 0.3)),
                ParameterSpec(
                    "radius", max(10.0, 2 * self.stride), (max(5.0, least), max(20.0, 4 * self.stride)), unit="pixels"
                ),
                ParameterSpec("sigma_s", 10.0, (5.0, 20.0), unit="pixels"),
                ParameterSpec("sigma_f", 0.3, (0.1, 0.5), unit="patch distance", relative_step=0.01),
                ParameterSpec("smooth_steps", 5, (2, 10), integer=True),
            )
        return (
            ParameterSpec("sigma", 0.8, (0.1, 4.0), unit="noise", relative_step=0.01),
            ParameterSpec("tau", 0.15, (0.005, 0.9)),
            ParameterSpec("radius", 3.0 * self.stride, (least, 4.0 * self.stride), unit="pixels"),
            ParameterSpec("sigma_s", 1.0 * self.stride, (0.5, 20.0 * self.stride), unit="pixels"),
            ParameterSpec("sigma_f", 1.4, (0.1, 4.0), unit="noise", relative_step=0.01),
            ParameterSpec("smooth_steps", 5, (1, 10), integer=True),
        )

    def set_bounds(self, bounds: Mapping[str, tuple[float, float]]) -> None:
        """Refuse a radius that joins no patches; see `RestorationOperator.set_bounds`.

        On an accelerator, the largest radius given here bounds the topology from then on.
        """
        lower, upper = bounds["radius"]
        if lower <= self.stride:
            raise ValueError(
                f"the lower bound of radius is {lower:g}, and the nearest patches are {self.stride} pixels apart: at "
                "or under that radius the graph has no edge. Raise the bound above it or lower the stride"
            )
        self._max_radius = upper

    def unit_factor(self, name: str, channels: int) -> float:
        """:math:`(2d)^{1/4}` of σ and σ_f; see `RestorationOperator.unit_factor`."""
        scaled = self.widths == "noise" and name in ("sigma", "sigma_f")
        return float((2 * channels * self.patch_size**2) ** 0.25) if scaled else 1.0

    def forward(  # type: ignore[override]  # its parameters by name
        self,
        noisy: "Tensor | Data",
        *,
        sigma: Tensor | float,
        tau: Tensor | float,
        radius: Tensor | float,
        sigma_s: Tensor | float,
        sigma_f: Tensor | float,
        smooth_steps: Tensor | int,
        noise: Noise = 0.0,
        guide: Tensor | None = None,
        **former: Any,
    ) -> Tensor:
        """Restored images, or the restored node signals of a graph.

        Args:
            noisy: Images, or a PyG `Data`/`Batch` with `x` and `pos` and, optionally, `guide` and `edge_index`: each
                edge in both directions; where one is missing, it is added.
            sigma: Width σ of the similarity, in the unit of `widths`.
            tau: Diffusion step τ.
            radius: Cut-off radius ρ of the weights, in pixels or in the unit of `pos`.
            sigma_s: Spatial width σ_s of the weights, in the same unit.
            sigma_f: Patch-distance width σ_f of the weights, in the unit of `widths`.
            smooth_steps: Number k of diffusion steps.
            noise: Noise of the images: its standard deviation σ_n, a map of it, or an object that describes it. Its
                expected contribution is taken off the distances; 0 for clean images.
            guide: Learned features to build the graph on, instead of the images. They are centred and scaled so that
                a patch vector has unit root-mean-square norm (a network could otherwise absorb σ), and not debiased.
            former: Keywords of version 0.1, which warn.

        Shape:
            - noisy: `[B, C, H, W]`, or data.x `[N, D]`
            - parameters: scalar, `[1]` or `[B]`, B the number of images or graphs; for `signal="image"` σ and σ_f also
              maps `[B, 1, H, W]`
            - noise: scalar, `[1]` or `[B]`; for `signal="image"` also `[B, 1 or C, H, W]`
            - guide: `[B, F, H, W]`
            - output: as noisy, or `[N, D]`

        Raises:
            ValueError: If the images are not floating-point `[B, C, H, W]` or smaller than a patch, or the guide or
                the parameters not those of as many images.
        """
        noise, guide = _former_keywords(former, noise, guide)
        values = (sigma, tau, radius, sigma_s, sigma_f, smooth_steps)
        if not isinstance(noisy, Tensor):
            return self._diffuse_data(noisy, values, noise)
        check_images(noisy, guide)
        self._check_guide(guide)
        # Distances of near-equal patches and sums of many small weights need the digits of float32, autocast or not.
        with torch.autocast(noisy.device.type, enabled=False):
            full = _full_precision(noisy)
            guided = full if guide is None else self._scaled(_full_precision(guide))
            parameters = DiffusionParameters.of_each(full, *values)
            bound = self._bound(radius)
            level, bias = self._noise(noise if guide is None else 0.0, full, parameters.radius, bound)
            parameters = self._absolute(parameters, level, guided.shape[1])
            bias = level if bias is None else bias
            restored = self._diffuse(full, guided, parameters, bias, bound)
            if self.widths == "noise":
                restored = torch.where(pixel_level(level) > 0, restored, full)
            return restored.to(noisy.dtype)

    def _bound(self, radius: Tensor | float) -> float | None:
        """A bound of the radius, by which the topology is chosen; None where only a look at a tensor would tell."""
        if isinstance(radius, Tensor):
            return self._max_radius
        return self._max_radius if self._max_radius is not None and radius <= self._max_radius else math.ceil(radius)

    def _noise(
        self, noise: Noise, images: Tensor, radius: Tensor, max_radius: float | None
    ) -> tuple[Tensor, Tensor | None]:
        """Level of the noise, and what it adds to the distances at each offset where it is an object that knows."""
        if isinstance(noise, (Tensor, float, int)):
            return noise_level(noise, images), None
        if self.signal == "patches":
            raise ValueError("signal='patches' takes the noise level as a number, not an object: use signal='image'")
        largest = max(self.reach, largest_radius(radius, max_radius))
        offsets = half_offsets(within_image(largest, *images.shape[-2:]))
        dimension = images.shape[1] * self.patch_size**2
        bias = [torch.as_tensor(noise.distance_bias(offset)).to(images).expand(len(images)) for offset in offsets]
        return noise.variance(images).flatten(1).mean(1).sqrt(), dimension * torch.stack(bias, 1)

    def _absolute(self, parameters: DiffusionParameters, level: Tensor, channels: int) -> DiffusionParameters:
        """The parameters with σ and σ_f as patch distances."""
        if self.widths == "absolute":
            return parameters
        unit = self.unit_factor("sigma", channels) * (level if level.ndim == 1 else pixel_level(level))
        sigma, sigma_f = (
            width.view(-1, 1, 1, 1) if unit.ndim == 4 and width.ndim == 1 else width
            for width in (parameters.sigma, parameters.sigma_f)
        )
        return parameters._replace(sigma=sigma * unit, sigma_f=sigma_f * unit)

    @eager
    def _diffuse_data(self, data: "Data", values: tuple[Any, ...], noise: Noise) -> Tensor:
        from lightning_modules.graph.message_passing import check_graph, count_graphs, diffuse_graph, graph_of_node

        _check_eager()
        if "features" in data and "guide" not in data:
            warnings.warn("features of the graph is now guide", FutureWarning, stacklevel=3)
            data = data.clone()
            data.guide = data.features
        check_graph(data)
        batch = graph_of_node(data)
        each = data.x.new_empty(count_graphs(data))
        parameters = DiffusionParameters.of_each(each, *values)
        bound = float(parameters.radius.detach().max()) if len(each) else 1.0
        if not isinstance(noise, (Tensor, float, int)):
            raise ValueError("a graph takes the noise level as a number for each, not an object")
        level = per_image("noise", noise, each).to(each.dtype)
        check_numbers({"noise": level})
        # Pixels are no unit of a cloud's positions: there, all that is joined may be similar.
        reach = self.reach if self._reach_is_given else bound
        if self.widths == "absolute":
            return diffuse_graph(data, parameters, level, self.laplacian, reach, bound)
        self._check_guide(data.guide if "guide" in data else None)
        unit = (2 * data.x.shape[1]) ** 0.25 * level
        parameters = parameters._replace(sigma=parameters.sigma * unit, sigma_f=parameters.sigma_f * unit)
        restored = diffuse_graph(data, parameters, level, self.laplacian, reach, bound)
        return torch.where((level > 0)[batch][:, None], restored, data.x)

    def _check_guide(self, guide: Tensor | None) -> None:
        if guide is not None and self.widths == "noise":
            raise ValueError("a guide has no noise level for widths='noise' to be measured in: use widths='absolute'")

    def _diffuse(
        self,
        images: Tensor,
        guide: Tensor,
        parameters: DiffusionParameters,
        noise: Tensor,
        max_radius: float | None,
    ) -> Tensor:
        if self.signal == "image" and self.implementation == "auto":
            options = (self.patch_size, self.reach, max_radius, self.tile_size)
            return diffuse_image(images, guide, parameters, noise, *options)
        return self._diffuse_in_tiles(images, guide, parameters, noise, max_radius)

    # The paths of patches and of messages are chosen by geometry, on the host: eager inside a compiled module.
    @eager
    def _diffuse_in_tiles(
        self,
        images: Tensor,
        guide: Tensor,
        parameters: DiffusionParameters,
        noise: Tensor,
        max_radius: float | None,
    ) -> Tensor:
        _check_eager()
        bound = largest_radius(parameters.radius, max_radius)
        maps = {"noise": noise, "sigma": parameters.sigma, "sigma_f": parameters.sigma_f}
        maps = {name: value for name, value in maps.items() if value.ndim == 4}
        if maps and self.signal == "patches":
            raise ValueError(f"signal='patches' takes no maps, got one of {' and '.join(maps)}: give a number each")
        height, width = images.shape[-2:]
        check_patch_fits(height, width, self.patch_size)

        def operator(images: Tensor, guide: Tensor, *parts: Tensor) -> Tensor:
            part = dict(zip(maps, parts, strict=True))
            own_noise = part.pop("noise", noise)
            return self._diffuse_part(images, guide, parameters._replace(**part), own_noise, bound)

        inputs = (images, guide, *maps.values())
        if self.tile_size is None or self.laplacian == "unnormalized":
            return operator(*inputs)
        # The patches that cover a pixel; each step looks one radius further, and the symmetric Laplacian asks for the
        # degree of neighbours too.
        largest = math.ceil(max(self.reach, bound))
        halo = (parameters.max_steps + 1) * math.ceil(bound) + largest + 2 * self.patch_size
        return in_tiles(operator, inputs, self.tile_size, halo, self.patch_size, self.stride)

    def _diffuse_part(
        self, images: Tensor, guide: Tensor, parameters: DiffusionParameters, noise: Tensor, bound: float
    ) -> Tensor:
        grid = self._grid(images)
        if self._is_dense(grid):
            return diffuse_patches(images, guide, parameters, noise, grid, self.laplacian, self.reach, bound)
        from lightning_modules.graph.message_passing import diffuse_image_reference, diffuse_patches_sparse

        if self.signal == "image":
            return diffuse_image_reference(images, guide, parameters, noise, self.patch_size, self.reach, bound)
        return diffuse_patches_sparse(images, guide, parameters, noise, grid, self.laplacian, self.reach, bound)

    @eager
    def smoothness(
        self, restored: Tensor, *, sigma: Tensor | float, noise: Noise = 0.0, **parameters: Any
    ) -> Smoothness:
        """Smoothness of restored images on the graph of their own patches, whose edges are as long as `reach`.

        Args:
            restored: Restored images, taken as free of noise.
            sigma: Width σ of the similarity, in the unit of `widths`.
            noise: Noise of the images that were restored, for widths in units of it.
            parameters: The others are without effect.

        Shape:
            - restored: `[B, C, H, W]`
            - sigma: scalar, `[1]` or `[B]`
            - noise: scalar, `[1]` or `[B]`
            - output: two tensors `[B]`
        """
        grid = self._grid(restored)
        width = self._width(sigma, noise, restored)
        similarity, num_edges = self._mean_similarity(restored, width, 0.0, grid, self.reach)
        num_nodes = restored.shape[-2] * restored.shape[-1] if self.signal == "image" else grid.num_patches
        return graph_smoothness(similarity, num_edges, num_nodes)

    @eager
    def diagnostics(
        self, noisy: Tensor, *, noise: Noise, radius: Tensor | float, sigma_f: Tensor | float, **parameters: Any
    ) -> dict[str, Tensor]:
        """Mean edge weight of each image, `edge_weight`; see `RestorationOperator.diagnostics`.

        It is the mean over the edges of what the patches have to say, exp(−D / 2σ_f²): 0 in a graph that joins nothing,
        1 in one that joins all alike; 0 too where the radius leaves no edge.

        Shape:
            - noisy: `[B, C, H, W]`
            - noise, radius, sigma_f: scalar, `[1]` or `[B]`
            - output: `[B]`
        """
        radius = per_image("radius", radius, noisy)
        level = image_level(noise_level(noise, noisy))
        width = self._width(sigma_f, noise, noisy)
        largest = max(float(radius.max()), self.stride)  # on steps that log, the host may wait
        weight = self._mean_similarity(noisy, width, level, self._grid(noisy), largest)[0]
        return {"edge_weight": torch.where(radius > self.stride, weight, 0.0)}

    def warnings(self, diagnostics: Mapping[str, float]) -> dict[str, str]:
        """A graph that is dead, or joins all alike, and patches that have nothing in common; see
        `RestorationOperator.warnings`.
        """
        found: dict[str, str] = {}
        similarity, weight = diagnostics.get("similarity"), diagnostics.get("edge_weight")
        if similarity is not None and similarity < _LEAST_SIMILARITY:
            found["similarity"] = (
                f"the mean similarity of neighbouring patches is {similarity:.2g}, under {_LEAST_SIMILARITY}: raise "
                "sigma or its upper bound, and check that the noise level the diffusion is told is that of the images"
            )
        if weight is not None and weight < _DEAD_WEIGHT:
            found["graph/dead"] = (
                f"the graph is dead: its mean edge weight is {weight:.2g}. Raise sigma_f, or radius where it is at the "
                "stride, or tell the diffusion the noise level of the images, whose part of the distances it then "
                "takes off"
            )
        if weight is not None and weight > _COMPLETE_WEIGHT:
            found["graph/complete"] = (
                f"the graph joins everything alike: its mean edge weight is {weight:.2f}. Lower sigma_f or the noise "
                "level the diffusion is told"
            )
        return found

    def _width(self, width: Tensor | float, noise: Noise, images: Tensor) -> Tensor:
        """σ or σ_f as a patch distance, `[B]`."""
        own = per_image("sigma", width, images)
        check_numbers({"sigma": own})
        if self.widths == "absolute":
            return own
        return own * self.unit_factor("sigma", images.shape[1]) * image_level(noise_level(noise, images))

    def _mean_similarity(
        self, images: Tensor, width: Tensor, noise: Tensor | float, grid: PatchGrid, radius: float
    ) -> tuple[Tensor, int]:
        with torch.autocast(images.device.type, enabled=False):
            full = _full_precision(images)
            width, level = width.to(full.dtype), per_image("noise", noise, full).to(full.dtype)
            if self.signal == "image":
                return mean_similarity(full, width, level, self.patch_size, radius)
            if self._is_dense(grid):
                return mean_similarity_dense(full, width, level, grid, radius)
            from lightning_modules.graph.message_passing import mean_patch_similarity

            return mean_patch_similarity(full, width, level, grid, radius)

    def _is_dense(self, grid: PatchGrid) -> bool:
        return self.signal == "patches" and self.implementation == "auto" and grid.num_patches <= MAX_DENSE_NODES

    def _grid(self, images: Tensor) -> PatchGrid:
        return PatchGrid(images.shape[-2], images.shape[-1], self.patch_size, self.stride)

    def _scaled(self, features: Tensor) -> Tensor:
        centered = features - features.mean((2, 3), keepdim=True)
        square = centered.square().mean((2, 3), keepdim=True).sum(1, keepdim=True) * self.patch_size**2
        # The floor keeps features that are the same at every pixel at 0 instead of dividing by it.
        return centered * square.clamp_min(torch.finfo(features.dtype).eps ** 2).rsqrt()

    def extra_repr(self) -> str:
        """Geometry, for `print(module)`."""
        return (
            f"patch_size={self.patch_size}, stride={self.stride}, signal={self.signal!r}, "
            f"laplacian={self.laplacian!r}, widths={self.widths!r}"
        )


def _former_keywords(former: Mapping[str, Any], noise: Noise, guide: Tensor | None) -> tuple[Noise, Tensor | None]:
    for name, value in former.items():
        if name not in _FORMER:
            raise TypeError(
                f"GraphDiffusion got an unexpected keyword {name!r}; its parameters are {', '.join(_NAMES)}"
            )
        instead = f"is now {_FORMER[name]}" if _FORMER[name] else "is without effect: the result does not depend on it"
        warnings.warn(f"{name} {instead}", FutureWarning, stacklevel=4)
        noise = value if name == "noise_std" else noise
        guide = value if name == "features" else guide
    return noise, guide


def _check_eager() -> None:
    # Where a compiled program calls this, the compiler is not at work any more; an export is.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "torch.export and the transforms of torch.func (vmap, grad, ...) take GraphDiffusion with signal='image' "
            "and implementation='auto' only: graphs of patches, and of messages, are built on the host"
        )


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
