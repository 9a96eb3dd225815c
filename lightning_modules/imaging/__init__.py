"""Image files in and out, batches of images, crops, and random numbers by counter: free of Lightning and PyG."""

from lightning_modules.imaging.batch import (
    SPLIT_STREAMS,
    ImageBatch,
    as_batch,
    check_batch,
    check_noise_std,
    key_stream,
)
from lightning_modules.imaging.counters import draw, mix, permutation, seeded_normal, seeded_uniform, stream
from lightning_modules.imaging.crops import corner, cut_crop, fixed_crops, fixed_places, mirror
from lightning_modules.imaging.decoding import decode_image, read_image, to_pixels
from lightning_modules.imaging.discovery import find_images
from lightning_modules.imaging.encoding import output_names, png_name, write_png

__all__ = [
    "SPLIT_STREAMS",
    "ImageBatch",
    "as_batch",
    "check_batch",
    "check_noise_std",
    "corner",
    "cut_crop",
    "decode_image",
    "draw",
    "find_images",
    "fixed_crops",
    "fixed_places",
    "key_stream",
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
