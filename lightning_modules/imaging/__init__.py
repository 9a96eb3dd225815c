"""Image files in and out, crops, and counter-based random numbers: free of Lightning and PyG."""

from lightning_modules.imaging.counters import draw, mix, permutation, seeded_normal, seeded_uniform, stream
from lightning_modules.imaging.crops import corner, cut_crop, fixed_crops, fixed_places, mirror
from lightning_modules.imaging.decoding import decode_image, read_image, to_pixels
from lightning_modules.imaging.discovery import find_images
from lightning_modules.imaging.encoding import output_names, png_name, write_png

__all__ = [
    "corner",
    "cut_crop",
    "decode_image",
    "draw",
    "find_images",
    "fixed_crops",
    "fixed_places",
    "mirror",
    "mix",
    "output_names",
    "permutation",
    "png_name",
    "read_image",
    "seeded_normal",
    "seeded_uniform",
    "stream",
    "to_pixels",
    "write_png",
]
