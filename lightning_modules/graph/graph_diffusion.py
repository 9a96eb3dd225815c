"""Graph diffusion behind one door: the geometry chooses the path."""

import math
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_modules.graph.image_operator import diffuse_image, mean_similarity
from lightning_modules.graph.laplacian import Laplacian
from lightning_modules.graph.parameters import DiffusionParameters
from lightning_modules.graph.patch_operator import MAX_DENSE_NODES, diffuse_patches, mean_similarity_dense
from lightning_modules.graph.patches import PatchGrid, check_patch_geometry
from lightning_modules.graph.smoothness import Smoothness
from lightning_modules.graph.tiles import in_tiles
from lightning_modules.operators.operator import check_images, noise_level, per_image

if TYPE_CHECKING:
    from torch_geometric.data import Data

Implementation = Literal["auto", "message_passing"]


class GraphDiffusion(nn.Module):
    """Restores images, or signals on any graph, by diffusing them over a graph of similar patches.

    It has no parameters of its own: σ, τ, ρ, σ_s, σ_f and the number of steps are arguments of `forward`, each a number
    or a tensor with one number for each image, so that whoever learns them decides where they live.

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
            `signal="image"` and 10 for patches.
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
        self.reach = (3.0 if signal == "image" else 10.0) if reach is None else float(reach)
        if not (math.isfinite(self.reach) and self.reach >= (1 if signal == "image" else 0)):
            raise ValueError(f"reach must be a finite number of pixels, for signal='image' at least 1, got {reach}")

    # Eager inside a compiled module: the paths are chosen by geometry, on the host, and are kernels of their own.
    @torch.compiler.disable
    def forward(
        self,
        images: "Tensor | Data",
        *,
        sigma: Tensor | float,
        tau: Tensor | float,
        radius: Tensor | float,
        sigma_s: Tensor | float,
        sigma_f: Tensor | float,
        smooth_steps: Tensor | int,
        noise_std: Tensor | float = 0.0,
        guide: Tensor | None = None,
        max_radius: float | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Restored images, or the restored node signals of a graph.

        Args:
            images: Images, or a PyG `Data`/`Batch` with `x` and `pos` and, optionally, `edge_index` and `guide`.
            sigma: Width σ of the similarity, patch L2 distance.
            tau: Diffusion step τ.
            radius: Cut-off radius ρ of the weights, in pixels or in the unit of `pos`.
            sigma_s: Spatial width σ_s of the weights, in the same unit.
            sigma_f: Patch-distance width σ_f of the weights.
            smooth_steps: Number k of diffusion steps.
            noise_std: Noise standard deviation σ_n of the images, whose expected contribution is taken off the
                distances; 0 for clean ones.
            guide: Learned features to build the graph on, instead of the images. They are centred and scaled so that
                a patch vector has unit root-mean-square norm (a network could otherwise absorb σ), and not debiased.
            max_radius: Bound of `radius` in the run; the result does not depend on it. Taken from `radius` where it is
                left out.
            features: The former name of `guide`.

        Shape:
            - images: `[B, C, H, W]`, or data.x `[N, D]`
            - parameters: scalar, `[1]` or `[B]`, B the number of images or graphs; for `signal="image"` σ and σ_f also
              maps `[B, 1, H, W]`
            - noise_std: scalar, `[1]` or `[B]`; for `signal="image"` also `[B, 1 or C, H, W]`
            - guide: `[B, F, H, W]`
            - output: as images, or `[N, D]`

        Raises:
            ValueError: If the images are not floating-point `[B, C, H, W]` or smaller than a patch, or the guide or
                the parameters not those of as many images.
        """
        if features is not None:
            warnings.warn("features is now guide", FutureWarning, stacklevel=2)
            guide = features
        if not isinstance(images, Tensor):
            values = (sigma, tau, radius, sigma_s, sigma_f, smooth_steps)
            return self._diffuse_data(images, values, noise_std, max_radius)
        check_images(images, guide)
        # Distances of near-equal patches and sums of many small weights need the digits of float32, autocast or not.
        with torch.autocast(images.device.type, enabled=False):
            full = _full_precision(images)
            guided = full if guide is None else self._scaled(_full_precision(guide))
            noise = noise_level(noise_std if guide is None else 0.0, full)
            parameters = DiffusionParameters.of_each(full, sigma, tau, radius, sigma_s, sigma_f, smooth_steps)
            bound = float(parameters.radius.max()) if max_radius is None else max_radius
            maps = {"noise": noise, "sigma": parameters.sigma, "sigma_f": parameters.sigma_f}
            maps = {name: value for name, value in maps.items() if value.ndim == 4}
            if maps and self.signal == "patches":
                raise ValueError(f"signal='patches' takes no maps, got one of {' and '.join(maps)}: give a number each")

            def operator(images: Tensor, guide: Tensor, *parts: Tensor) -> Tensor:
                part = dict(zip(maps, parts, strict=True))
                own_noise = part.pop("noise", noise)
                return self._diffuse(images, guide, parameters._replace(**part), own_noise, bound)

            inputs = (full, guided, *maps.values())
            if self.tile_size is None or self.laplacian == "unnormalized":
                return operator(*inputs).to(images.dtype)
            self._grid(full)
            halo = self._dependency(parameters.max_steps, bound)
            return in_tiles(operator, inputs, self.tile_size, halo, self.patch_size, self.stride).to(images.dtype)

    def _diffuse_data(
        self,
        data: "Data",
        values: tuple[Any, ...],
        noise_std: Tensor | float,
        max_radius: float | None,
    ) -> Tensor:
        from lightning_modules.graph.message_passing import check_graph, diffuse_graph, graph_of_node

        if "features" in data and "guide" not in data:
            warnings.warn("features of the graph is now guide", FutureWarning, stacklevel=3)
            data = data.clone()
            data.guide = data.features
        check_graph(data)
        batch = graph_of_node(data)
        each = data.x.new_empty(int(batch.max()) + 1 if len(batch) else 0)
        parameters = DiffusionParameters.of_each(each, *values)
        bound = float(parameters.radius.max()) if max_radius is None else max_radius
        level = per_image("noise_std", noise_std, each).to(each.dtype)
        return diffuse_graph(data, parameters, level, self.laplacian, self.reach, bound)

    def _dependency(self, steps: int, max_radius: float) -> int:
        """How far, in pixels, a restored pixel looks."""
        # S looks as far as `reach`, each step one radius further. The weights of a pixel look a window beyond that.
        if self.signal == "image":
            return steps * int(max_radius) + int(max(self.reach, max_radius)) + 2 * (self.patch_size // 2)
        # The patches that cover a pixel; the symmetric Laplacian asks for the degree of neighbours too.
        return (steps + 1) * math.ceil(max_radius) + math.ceil(max(self.reach, max_radius)) + 2 * self.patch_size

    def _diffuse(
        self, images: Tensor, guide: Tensor, parameters: DiffusionParameters, noise: Tensor, max_radius: float
    ) -> Tensor:
        grid, plain = self._grid(images), self.implementation == "message_passing"
        if plain or (self.signal == "patches" and not self._is_dense(grid)):
            from lightning_modules.graph.message_passing import diffuse_image_reference, diffuse_patches_sparse
        if self.signal == "image":
            image_operator = diffuse_image_reference if plain else diffuse_image
            return image_operator(images, guide, parameters, noise, self.patch_size, self.reach, max_radius)
        patch_operator = diffuse_patches if self._is_dense(grid) else diffuse_patches_sparse
        return patch_operator(images, guide, parameters, noise, grid, self.laplacian, self.reach, max_radius)

    @torch.compiler.disable
    def smoothness(self, images: Tensor, sigma: Tensor | float, max_radius: float | None = None) -> Smoothness:
        """Smoothness of restored images on the graph of their own patches, whose edges are as long as `reach`.

        Args:
            images: Restored images, taken as free of noise.
            sigma: Width σ of the similarity; a number or one for each image.
            max_radius: Without effect: the similarity does not depend on the bound of the radius.

        Shape:
            - images: `[B, C, H, W]`
            - sigma: scalar, `[1]` or `[B]`
            - output: two tensors `[B]`
        """
        grid = self._grid(images)
        similarity, num_edges = self._mean_similarity(images, sigma, 0.0, grid, self.reach)
        num_nodes = images.shape[-2] * images.shape[-1] if self.signal == "image" else grid.num_patches
        return Smoothness.from_similarity(similarity, num_edges, num_nodes)

    @torch.compiler.disable
    def mean_edge_weight(
        self, images: Tensor, sigma_f: Tensor | float, noise_std: Tensor | float, max_radius: float
    ) -> Tensor:
        """Mean over the edges of what the patches have to say in the weights, exp(−D / 2σ_f²): 0 in a graph that joins
        nothing, 1 in one that joins all alike.

        Args:
            images: Noisy images.
            sigma_f: Patch-distance width of the weights.
            noise_std: Noise standard deviation, whose part is taken off the distances.
            max_radius: Largest length of an edge in pixels.

        Shape:
            - images: `[B, C, H, W]`
            - sigma_f, noise_std: scalar, `[1]` or `[B]`
            - output: `[B]`
        """
        return self._mean_similarity(images, sigma_f, noise_std, self._grid(images), max_radius)[0]

    def _mean_similarity(
        self, images: Tensor, sigma: Tensor | float, noise_std: Tensor | float, grid: PatchGrid, radius: float
    ) -> tuple[Tensor, int]:
        with torch.autocast(images.device.type, enabled=False):
            full = _full_precision(images)
            width = per_image("sigma", sigma, full).to(full.dtype)
            noise = per_image("noise_std", noise_std, full).to(full.dtype)
            if self.signal == "image":
                return mean_similarity(full, width, noise, self.patch_size, radius)
            if self._is_dense(grid):
                return mean_similarity_dense(full, width, noise, grid, radius)
            from lightning_modules.graph.message_passing import mean_patch_similarity

            return mean_patch_similarity(full, width, noise, grid, radius)

    def _is_dense(self, grid: PatchGrid) -> bool:
        return grid.num_patches <= MAX_DENSE_NODES and self.implementation == "auto"

    def _grid(self, images: Tensor) -> PatchGrid:
        if images.ndim != 4:
            raise ValueError(
                f"images must be [B, C, H, W], got {list(images.shape)}: add the batch dimension with [None]"
            )
        return PatchGrid(images.shape[-2], images.shape[-1], self.patch_size, self.stride)

    def _scaled(self, features: Tensor) -> Tensor:
        centered = features - features.mean((2, 3), keepdim=True)
        square = centered.square().mean((2, 3), keepdim=True).sum(1, keepdim=True) * self.patch_size**2
        # The floor keeps features that are the same at every pixel at 0 instead of dividing by it.
        return centered * square.clamp_min(torch.finfo(features.dtype).eps ** 2).rsqrt()

    def extra_repr(self) -> str:
        """Geometry, for `print(module)`."""
        return (
            f"patch_size={self.patch_size}, stride={self.stride}, signal={self.signal!r}, laplacian={self.laplacian!r}"
        )


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
