"""Noise of images: its level, and models of what cameras add."""

from lightning_modules.noise.camera import estimate_noise_model, estimate_noise_models
from lightning_modules.noise.camera_noise import CameraNoise
from lightning_modules.noise.estimate import estimate_noise_std
from lightning_modules.noise.model import NoiseModel

__all__ = ["CameraNoise", "NoiseModel", "estimate_noise_model", "estimate_noise_models", "estimate_noise_std"]
