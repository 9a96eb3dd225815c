"""Point clouds: their denoising, noise, distances and files; tensor mathematics that knows nothing of Lightning."""

from lightning_modules.point_clouds.diffusion import PointCloudDiffusion
from lightning_modules.point_clouds.held_out import halves, held_out_error
from lightning_modules.point_clouds.metrics import chamfer_distance, surface_distance
from lightning_modules.point_clouds.neighborhoods import clouds
from lightning_modules.point_clouds.noise import estimate_cloud_noise

__all__ = [
    "PointCloudDiffusion",
    "chamfer_distance",
    "clouds",
    "estimate_cloud_noise",
    "halves",
    "held_out_error",
    "surface_distance",
]
