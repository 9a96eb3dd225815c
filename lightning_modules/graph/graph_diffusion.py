"""Graph diffusion behind one door: the geometry chooses the path."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from lightning_modules.graph.image_operator import diffuse_image, mean_similarity
from lightning_modules.graph.laplacian import Laplacian
from lightning_modules.graph.message_passing import (
    diffuse_graph,
    diffuse_image_reference,
    mean_patch_similarity,
    patch_graph,
)
from lightning_modules.graph.parameters import DiffusionParameters
from lightning_modules.graph.patch_operator import MAX_DENSE_NODES, diffuse_patches, mean_similarity_dense
from lightning_modules.graph.patches import PatchGrid, check_patch_geometry
from lightning_modules.graph.smoothness import Smoothness
from lightning_modules.graph.tiles import in_tiles


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
        reference: Compute images by message passing as well, slowly: the oracle of the fast paths.
        tile_size: Larger images are computed in tiles of this side, in memory that does not grow with the image; the
            tiles overlap so far that the result is the same. None computes them whole. The unnormalised Laplacian
            always is, for its stable step depends on all of the graph.

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
        reference: bool = False,
        tile_size: int | None = 512,
    ) -> None:
        super().__init__()
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
        self.reference = reference

    # Eager inside a compiled module: the paths are chosen by geometry, on the host, and are kernels of their own.
    @torch.compiler.disable
    def forward(
        self,
        images: Tensor | Data,
        *,
        sigma: Tensor | float,
        tau: Tensor | float,
        radius: Tensor | float,
        sigma_s: Tensor | float,
        sigma_f: Tensor | float,
        smooth_steps: Tensor | int,
        noise_std: Tensor | float = 0.0,
        features: Tensor | None = None,
        max_radius: float | None = None,
    ) -> Tensor:
        """Restored images, or the restored node signals of a graph.

        Args:
            images: Images, or a PyG `Data`/`Batch` with `x` and `pos` and, optionally, `edge_index` and `features`.
            sigma: Width σ of the similarity, patch L2 distance.
            tau: Diffusion step τ.
            radius: Cut-off radius ρ of the weights, in pixels or in the unit of `pos`.
            sigma_s: Spatial width σ_s of the weights, in the same unit.
            sigma_f: Patch-distance width σ_f of the weights.
            smooth_steps: Number k of diffusion steps.
            noise_std: Noise standard deviation σ_n of the images, whose expected contribution is taken off the
                distances; 0 for clean ones.
            features: Learned features to build the graph on, instead of the images. They are centred and scaled so that
                a patch vector has unit root-mean-square norm (a network could otherwise absorb σ), and not debiased.
            max_radius: Radius of the topology: the largest `radius` of the run. Taken from `radius` where it is left
                out.

        Shape:
            - images: `[B, C, H, W]`, or data.x `[N, D]`
            - parameters, noise_std: scalar or `[B]`, B the number of images or graphs
            - features: `[B, F, H, W]`
            - output: as images, or `[N, D]`

        Raises:
            ValueError: If the images are not floating-point `[B, C, H, W]` or smaller than a patch, or the features or
                the numbers of steps not those of as many images.
        """
        parameters = DiffusionParameters(sigma, tau, radius, sigma_s, sigma_f, smooth_steps)
        reach = float(torch.as_tensor(radius).max()) if max_radius is None else max_radius
        if isinstance(images, Data):
            _check_graph(images)
            return diffuse_graph(images, parameters, noise_std, self.laplacian, reach)
        _check_images(images, features, smooth_steps)
        # Distances of near-equal patches and sums of many small weights need the digits of float32, autocast or not.
        with torch.autocast(images.device.type, enabled=False):
            full = _full_precision(images)
            guide = full if features is None else self._scaled(_full_precision(features))
            noise = (noise_std.to(full.dtype) if torch.is_tensor(noise_std) else noise_std) if features is None else 0.0
            parameters = parameters.map(lambda value: value.to(full.dtype) if value.is_floating_point() else value)
            if self.tile_size is None or self.laplacian == "unnormalized":
                return self._diffuse(full, guide, parameters, noise, reach).to(images.dtype)
            self._grid(full)

            def operator(images: Tensor, guide: Tensor) -> Tensor:
                return self._diffuse(images, guide, parameters, noise, reach)

            halo = self._dependency(parameters.smooth_steps, reach)
            restored = in_tiles(operator, full, guide, self.tile_size, halo, self.patch_size, self.stride)
            return restored.to(images.dtype)

    def _dependency(self, smooth_steps: Tensor | int, reach: float) -> int:
        """How far, in pixels, a restored pixel looks."""
        steps = int(smooth_steps.max()) if torch.is_tensor(smooth_steps) else smooth_steps
        # S and each step look one radius further. The weights of a pixel look one radius and a window beyond it.
        if self.signal == "image":
            return (steps + 1) * int(reach) + 2 * (self.patch_size // 2)
        # The patches that cover a pixel; the symmetric Laplacian asks for the degree of neighbours too.
        return (steps + 2) * math.ceil(reach) + 2 * self.patch_size

    def _diffuse(
        self, images: Tensor, guide: Tensor, parameters: DiffusionParameters, noise_std: Tensor | float, reach: float
    ) -> Tensor:
        grid = self._grid(images)
        if self.signal == "image":
            operator = diffuse_image_reference if self.reference else diffuse_image
            return operator(images, guide, parameters, noise_std, self.patch_size, reach)
        if self._is_dense(grid):
            return diffuse_patches(images, guide, parameters, noise_std, grid, self.laplacian, reach)
        graph = patch_graph(images, guide, grid, reach)
        restored = diffuse_graph(graph, parameters, noise_std, self.laplacian, reach)
        return grid.average(restored.view(len(images), grid.num_patches, -1))

    @torch.compiler.disable
    def smoothness(self, images: Tensor, sigma: Tensor | float, max_radius: float) -> Smoothness:
        """Smoothness of restored images on the graph of their own patches.

        Args:
            images: Restored images, taken as free of noise.
            sigma: Width σ of the similarity; a number or one for each image.
            max_radius: Radius of the topology in pixels.

        Shape:
            - images: `[B, C, H, W]`
            - output: two tensors `[B]`
        """
        grid = self._grid(images)
        with torch.autocast(images.device.type, enabled=False):
            similarity, num_edges = self._mean_similarity(_full_precision(images), sigma, 0.0, grid, max_radius)
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
            max_radius: Radius of the topology in pixels.

        Shape:
            - images: `[B, C, H, W]`
            - sigma_f, noise_std: scalar or `[B]`
            - output: `[B]`
        """
        grid = self._grid(images)
        with torch.autocast(images.device.type, enabled=False):
            return self._mean_similarity(_full_precision(images), sigma_f, noise_std, grid, max_radius)[0]

    def _mean_similarity(
        self,
        images: Tensor,
        sigma: Tensor | float,
        noise_std: Tensor | float,
        grid: PatchGrid,
        max_radius: float,
    ) -> tuple[Tensor, int]:
        if self.signal == "image":
            return mean_similarity(images, sigma, noise_std, self.patch_size, max_radius)
        measure = mean_similarity_dense if self._is_dense(grid) else mean_patch_similarity
        return measure(images, sigma, noise_std, grid, max_radius)

    def _is_dense(self, grid: PatchGrid) -> bool:
        return grid.num_patches <= MAX_DENSE_NODES and not self.reference

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


def _check_images(images: Tensor, features: Tensor | None, smooth_steps: Tensor | int) -> None:
    if not images.is_floating_point():
        raise ValueError(f"images must be floating-point, got {images.dtype}: divide by 255 what has whole numbers")
    size = (len(images), *images.shape[-2:])
    if features is not None and (features.ndim != 4 or (len(features), *features.shape[-2:]) != size):
        raise ValueError(
            f"features must be [B, F, H, W] of the images' B, H and W, got {list(features.shape)} beside "
            f"{list(images.shape)}"
        )
    if torch.is_tensor(smooth_steps) and smooth_steps.numel() not in (1, len(images)):
        raise ValueError(
            f"smooth_steps must be one number or one for each of {len(images)} images, got {smooth_steps.numel()}"
        )


def _check_graph(data: Data) -> None:
    missing = [name for name in ("x", "pos") if getattr(data, name, None) is None]
    if missing:
        raise ValueError(
            f"the graph has no {' and no '.join(missing)}: give a PyG Data with x [N, D] (signal) and pos [N, 2] "
            "(positions); edge_index is optional"
        )
