"""Data: every module yields batches of one form, the same on any number of processes."""

from datamodules._sampler import SampleBatch
from datamodules.cifar10 import CIFAR10DataModule
from datamodules.generated_images import GeneratedImagesDataModule
from datamodules.image_data_module import BatchDataset, ImageDataModule, TensorImages
from datamodules.image_folder import ImageFolderDataModule
from datamodules.image_set import ImageSetDataModule
from datamodules.patches import PatchDataModule
from datamodules.photo_crops import PhotoCropsDataModule
from datamodules.point_clouds import PointCloudDataModule
from datamodules.twins import AutoencoderTwins
from lightning_modules.imaging import decode_image, read_image

__all__ = [
    "AutoencoderTwins",
    "BatchDataset",
    "CIFAR10DataModule",
    "GeneratedImagesDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageSetDataModule",
    "PatchDataModule",
    "PhotoCropsDataModule",
    "PointCloudDataModule",
    "SampleBatch",
    "TensorImages",
    "decode_image",
    "read_image",
]
