"""Data: every module yields batches of one form, the same on any number of processes."""

from datamodules.cifar10 import CIFAR10DataModule
from datamodules.generated_images import GeneratedImagesDataModule
from datamodules.image_folder import ImageFolderDataModule
from datamodules.image_reader import decode_image, read_image
from datamodules.patches import PatchDataModule
from datamodules.photo_crops import PhotoCropsDataModule

__all__ = [
    "CIFAR10DataModule",
    "GeneratedImagesDataModule",
    "ImageFolderDataModule",
    "PatchDataModule",
    "PhotoCropsDataModule",
    "decode_image",
    "read_image",
]
