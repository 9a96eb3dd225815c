"""Data: every module yields batches of one form, the same on any number of processes."""

from datamodules.cifar10 import CIFAR10DataModule
from datamodules.image_folder import ImageFolderDataModule
from datamodules.photo_crops import PhotoCropsDataModule

__all__ = ["CIFAR10DataModule", "ImageFolderDataModule", "PhotoCropsDataModule"]
