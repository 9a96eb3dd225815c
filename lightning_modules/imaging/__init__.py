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
from lightning_modules.imaging.decoding import (
    camera_of,
    decode_image,
    find_white,
    read_image,
    read_picture,
    to_picture,
    to_pixels,
)
from lightning_modules.imaging.degradation import RESAMPLINGS, Degradation, Encoding, History, degrade, relive
from lightning_modules.imaging.discovery import find_images
from lightning_modules.imaging.encoding import (
    check_quality,
    kind_of,
    output_names,
    restored_name,
    write_picture,
    write_png,
    write_whole,
)
from lightning_modules.imaging.picture import Picture, color_channels, from_array

__all__ = [
    "RESAMPLINGS",
    "SPLIT_STREAMS",
    "Degradation",
    "Encoding",
    "History",
    "ImageBatch",
    "Picture",
    "as_batch",
    "camera_of",
    "check_batch",
    "check_noise_std",
    "check_quality",
    "color_channels",
    "corner",
    "cut_crop",
    "decode_image",
    "degrade",
    "draw",
    "find_images",
    "find_white",
    "fixed_crops",
    "fixed_places",
    "from_array",
    "key_stream",
    "kind_of",
    "mirror",
    "mix",
    "output_names",
    "permutation",
    "read_image",
    "read_picture",
    "relive",
    "restored_name",
    "seeded_normal",
    "seeded_uniform",
    "stream",
    "to_picture",
    "to_pixels",
    "write_picture",
    "write_png",
    "write_whole",
]
